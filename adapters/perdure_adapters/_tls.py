"""The certificates that servers are checked against, loaded once and not for every client.

Reading some hundred of them takes 30 to 150 ms, in which the event loop stands still, and every
blocking `execute` makes a client of its own. httpx2 comes with the SDKs, so it is imported inside
the function.
"""

from __future__ import annotations

import os
import ssl
import threading
from pathlib import Path
from typing import Final

from perdure.errors import NotConfigured

__all__ = ["ssl_context"]

# Where httpx2 looks for the system's certificates: where OpenSSL was built to look, and, where
# nothing is there, where distributions put them.
_DEFAULTS: Final = ssl.get_default_verify_paths()
_SYSTEM: Final = (
    _DEFAULTS.openssl_cafile,
    _DEFAULTS.openssl_capath,
    "/etc/ssl/cert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/cert.pem",
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/ssl/ca-bundle.pem",
)

# What the environment names -> what lay on the disk then, and the context made of it.
_Kept = dict[tuple[str | None, ...], tuple[tuple[object, ...], ssl.SSLContext]]


class _OfThread(threading.local):
    """The contexts of one thread.

    The ssl module lets threads share a context as long as nobody sets it up any more once it is in
    use, and httpcore2 sets the protocols (ALPN) again for every connection. It says `http/1.1` each
    time, so the clients of one thread don't get into each other's way.
    """

    def __init__(self) -> None:
        self.kept: _Kept = {}


_contexts: Final = _OfThread()


def ssl_context(*, trust_env: bool) -> ssl.SSLContext:
    """Return the context that httpx2 makes for a client, made anew only where it would differ.

    It is for clients of the calling thread that speak HTTP/1.1 and change nothing about it. It
    belongs to no event loop, and holds nothing that a fork would break.

    A client goes on with the certificates it was made with. The next one gets those that are on the
    disk by then: a file of certificates that was replaced or written anew is loaded again, and so
    is the system's when certificates come into its directory or leave it. `SSL_CERT_DIR`, and the
    system's own store on macOS and Windows, are read while connecting; a context for them holds
    nothing yet, takes no time, and is made anew for each client.

    Args:
        trust_env: Whether `SSL_CERT_FILE` and `SSL_CERT_DIR` count.

    Raises:
        NotConfigured: What they name can't be loaded.
    """
    import httpx2

    file = os.environ.get("SSL_CERT_FILE") if trust_env else None
    directory = os.environ.get("SSL_CERT_DIR") if trust_env else None
    named = (file, directory, os.environ.get("SSLKEYLOGFILE"))
    # Looked at before they are read: what changes meanwhile is then read once more, not missed.
    on_disk = tuple(_state(path) for path in (file, *_SYSTEM) if path)
    known = _contexts.kept.get(named)
    if known is not None and known[0] == on_disk:
        return known[1]
    try:
        context = httpx2.create_ssl_context(trust_env=trust_env)
    except OSError as error:
        where, advice = "the system's store", "name others in SSL_CERT_FILE"
        if file:
            where, advice = f"SSL_CERT_FILE={file!r}", "name a PEM file there, or unset it"
        raise NotConfigured(
            f"the certificates of {where} can't be loaded ({error}): {advice}"
        ) from error
    if _holds_certificates(context):
        _contexts.kept[named] = on_disk, context
    return context


def _holds_certificates(context: ssl.SSLContext) -> bool:
    """Return whether making a context took the time to read certificates."""
    try:
        return any(context.cert_store_stats().values())
    except NotImplementedError:  # truststore's, on macOS and Windows, asks the system each time
        return False


def _state(path: str) -> object:
    """Return what differs once a file was replaced or written to; None where there is none."""
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
