"""Certificates: the same ones as before, loaded once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import ssl
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import truststore
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from perdure.errors import NotConfigured
from perdure_adapters._anthropic import anthropic_client
from perdure_adapters._endpoint import Endpoint
from perdure_adapters._gemini import GeminiEndpoint
from perdure_adapters._openai import OpenAIEndpoint
from perdure_adapters._tls import ssl_context

HOST = "models.example"  # which the environment's certificates count for: it isn't called localhost
URL = f"https://{HOST}/v1"
LIMITS: dict[str, Any] = {"key": "a-key", "connect_timeout": 30, "read_timeout": 30}

NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
USAGE = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
# What OpenSSL calls a certificate's file in a directory: of the name, without what is around it.
HASH = hashlib.sha1(NAME.public_bytes()[2:], usedforsecurity=False).digest()[3::-1].hex()

MAKE: dict[str, Callable[[str], object]] = {
    "openai": lambda url: OpenAIEndpoint(url=url, of_openai=False, **LIMITS).client(),
    "anthropic": lambda url: anthropic_client(Endpoint(url=url, **LIMITS), token=False),
    "gemini": lambda url: GeminiEndpoint(url=url, api_version=None, **LIMITS).client(),
}


def certify(path: Path) -> Path:
    """Write a new certificate for `HOST` that vouches for itself, and its key; return the path."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(USAGE, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A certificate for `HOST` that the environment names, with its key."""
    for name in os.environ:
        if name.startswith("SSL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    path = certify(tmp_path / "trusted.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The files of certificates that were loaded, one by one."""
    files: list[object] = []
    load = ssl.SSLContext.load_verify_locations

    def noted(self: ssl.SSLContext, cafile: Any = None, *others: Any, **named: Any) -> None:
        files.append(cafile)
        load(self, cafile, *others, **named)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", noted)
    return files


class Silent(BaseHTTPRequestHandler):
    """Writes no log."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - it is called that
        """Say nothing."""


class Answer(Silent):
    """Says yes to everything."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.send_header("content-length", "3")
        self.end_headers()
        self.wfile.write(b"yes")


class Elsewhere(Silent):
    """Sends everybody on to the path, read as an address."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(307)
        self.send_header("location", self.path.removeprefix("/"))
        self.send_header("content-length", "0")
        self.end_headers()


class Quiet(ThreadingHTTPServer):
    """A server that says nothing of clients that don't trust it."""

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""


@contextmanager
def running(server: Quiet) -> Generator[int]:
    """Run a server in a thread; return its port."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def serving(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    """Run a server with a certificate; return its URL, under which `HOST` is found here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    look_up = socket.getaddrinfo

    def here(host: Any, *others: Any, **named: Any) -> Any:
        return look_up("127.0.0.1" if host in (HOST, HOST.encode()) else host, *others, **named)

    server = Quiet(("127.0.0.1", 0), Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with running(server) as port, monkeypatch.context() as patched:
        patched.setattr(socket, "getaddrinfo", here)
        yield f"https://{HOST}:{port}/v1"


def ask(url: str) -> str:
    """Ask a server on an event loop of its own, with a new client; return what it says."""

    async def asked() -> str:
        endpoint = Endpoint(url=url, **LIMITS)
        async with endpoint.http_client(follow_redirects=True) as client:
            return (await client.get(url)).text

    return asyncio.run(asked())


def counted(context: ssl.SSLContext) -> dict[str, int] | None:
    """Return how many certificates a context holds; None where the system's store is asked."""
    try:
        return context.cert_store_stats()
    except NotImplementedError:
        return None


class TestLoading:
    """How often certificates are read."""

    @pytest.mark.parametrize("sdk", MAKE)
    def test_a_second_client(self, trusted: Path, loaded: list[object], sdk: str) -> None:
        """It loads nothing; the first one loads everything once, whatever its SDK makes besides."""
        MAKE[sdk](URL)
        assert loaded == [str(trusted)]
        for _ in range(3):
            MAKE[sdk](URL)
        assert loaded == [str(trusted)]

    @pytest.mark.usefixtures("trusted")
    def test_one_for_all(self) -> None:
        """Clients of several servers have the same; this machine's own knows no environment."""
        first = Endpoint(url=URL, **LIMITS).ssl_context
        assert Endpoint(url="http://other.example/v1", **LIMITS).ssl_context is first
        assert Endpoint(url="https://127.0.0.1/v1", **LIMITS).ssl_context is not first

    @pytest.mark.usefixtures("trusted")
    def test_the_system(self, monkeypatch: pytest.MonkeyPatch, loaded: list[object]) -> None:
        """It has the certificates that httpx2 would have loaded, and loads them at most once."""
        monkeypatch.delenv("SSL_CERT_FILE")
        theirs = httpx2.create_ssl_context()
        ours = ssl_context(trust_env=True)
        assert type(ours) is type(theirs)
        assert counted(ours) == counted(theirs)
        assert (ours.verify_mode, ours.check_hostname) == (ssl.CERT_REQUIRED, True)
        loaded.clear()
        assert counted(ssl_context(trust_env=True)) == counted(theirs)
        assert not any(loaded)

    @pytest.mark.usefixtures("trusted")
    def test_a_store_that_is_asked_each_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its context, as on macOS, holds nothing, gathers what it is told, and is never kept."""

        def made(**_: object) -> ssl.SSLContext:
            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        monkeypatch.setattr(httpx2, "create_ssl_context", made)
        first = ssl_context(trust_env=True)
        assert isinstance(first, truststore.SSLContext)
        assert ssl_context(trust_env=True) is not first

    @pytest.mark.usefixtures("trusted")
    def test_another_thread(self) -> None:
        """It has one of its own: a connection sets the context up, which only one may do."""
        mine = ssl_context(trust_env=True)
        other: list[ssl.SSLContext] = []
        thread = threading.Thread(target=lambda: other.append(ssl_context(trust_env=True)))
        thread.start()
        thread.join()
        assert ssl_context(trust_env=True) is mine
        assert other[0] is not mine


class TestTrust:
    """Who is believed, as a real server finds out."""

    def test_the_environment(self, trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`SSL_CERT_FILE` is obeyed, on one event loop after another, and so is its absence."""
        with serving(trusted, monkeypatch) as url:
            assert [ask(url) for _ in range(3)] == ["yes"] * 3
            monkeypatch.delenv("SSL_CERT_FILE")
            with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                ask(url)
            monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
            assert ask(url) == "yes"

    def test_sent_on_from_a_plain_server(
        self, trusted: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server without certificates may name one that has some."""
        elsewhere = running(Quiet(("127.0.0.1", 0), Elsewhere))
        with serving(trusted, monkeypatch) as url, elsewhere as port:
            assert ask(f"http://{HOST}:{port}/{url}") == "yes"

    def test_a_directory(
        self, trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`SSL_CERT_DIR` is obeyed, and what is put there later is found by the next client."""
        monkeypatch.delenv("SSL_CERT_FILE")
        directory = tmp_path / "certificates"
        directory.mkdir()
        monkeypatch.setenv("SSL_CERT_DIR", str(directory))
        with serving(trusted, monkeypatch) as url:
            with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                ask(url)
            (directory / f"{HASH}.0").write_bytes(trusted.read_bytes())
            assert ask(url) == "yes"

    def test_a_file_that_changes(
        self, trusted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A new client goes by what is there now: written anew, or put in its place."""
        old = trusted.read_bytes()
        with serving(trusted, monkeypatch) as url:
            assert ask(url) == "yes"
            certify(trusted)
            os.utime(trusted, (1, 1))  # however coarse the clock of the file system is
            with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                ask(url)
            other = tmp_path / "other.pem"
            other.write_bytes(old)
            other.replace(trusted)
            assert ask(url) == "yes"

    def test_a_file_that_is_none(self, trusted: Path) -> None:
        """It is named, with what to do about it; and loaded as soon as it is one."""
        right = trusted.read_bytes()
        trusted.write_text("nothing")
        endpoint = Endpoint(url=URL, **LIMITS)
        with pytest.raises(NotConfigured, match=r"trusted\.pem.*unset it") as caught:
            endpoint.http_client(follow_redirects=True)
        assert "\n" not in str(caught.value)
        trusted.unlink()
        with pytest.raises(NotConfigured, match="No such file"):
            endpoint.http_client(follow_redirects=True)
        trusted.write_bytes(right)
        assert endpoint.ssl_context.cert_store_stats()["x509"] == 1
