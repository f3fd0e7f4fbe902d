"""A platform's server: where it is, how it is reached, and what goes wrong on the way.

This is HTTP and what all three SDKs make of it, since all of them stand on httpx2; what an SDK adds
is in the room of that SDK. httpx2 comes with them, so it is imported inside the functions.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit

from perdure.errors import (
    ConnectionLost,
    InvalidRequest,
    NotConfigured,
    PlatformError,
    PlatformTimeout,
    StreamTruncated,
)
from perdure_adapters._sdk import redact, typed_error
from perdure_adapters._tls import ssl_context

if TYPE_CHECKING:
    import ssl

    import httpx2

__all__ = ["DECODING_ERRORS", "LAST_WORDS", "Endpoint", "fault_of", "message_of", "wire_errors"]

# What an SDK can't leave out and servers without keys ignore.
_NO_KEY: Final = "none"
_KEY: Final = re.compile("[!-~]+")
_QUERY: Final = re.compile("[?#]")
_MAX_DETAIL: Final = 200

LAST_WORDS: Final = 5.0
"""Seconds to wait, once an answer is whole, for the tokens it used; some servers never hang up."""

DECODING_ERRORS: Final = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What reading an answer may raise: the SDKs decode it without suspicion."""


def wire_errors() -> tuple[type[Exception], ...]:
    """Return what the SDKs let through from the wire."""
    import httpx2

    return (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server, and how to reach it.

    Attributes:
        url: Where the API begins; None where nobody said.
        key: The key; None where there is none.
        connect_timeout: Seconds.
        read_timeout: Seconds between two parts of an answer.
        name: What it is called where nobody said where it is.
    """

    url: str | None = field(repr=False)  # it may hold a password
    key: str | None = field(repr=False)
    connect_timeout: float
    read_timeout: float
    name: str = "the server"

    @property
    def shown(self) -> str:
        """The address as it may be shown: without user, password and query.

        It may be none: a password with a slash in it makes an address unreadable, and must not be
        shown all the more.
        """
        if not self.url:
            return self.name
        scheme, mark, rest = self.url.rpartition("://")
        return scheme + mark + _QUERY.split(rest.rpartition("@")[2])[0]

    @property
    def sent_key(self) -> str:
        """What is sent as the key."""
        return self.key or _NO_KEY

    @property
    def loopback(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.url or "").hostname or ""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raise `NotConfigured` where nothing could be reached with these settings."""
        try:
            parts = urlsplit(self.url or "")
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # raises where it is no number
        except ValueError:
            usable = False
        if not usable:
            raise NotConfigured(
                f"the base URL {self.shown!r} is no address such as http://127.0.0.1:8080/v1"
            )
        self.check_key()

    def check_key(self) -> None:
        """Raise `NotConfigured` where the key can't be one."""
        if self.key is not None and not _KEY.fullmatch(self.key):
            raise NotConfigured(
                f"the key for {self.shown} holds a space or a character that no key has: "
                "copy it again"
            )

    @property
    def timeout(self) -> httpx2.Timeout:
        """How long to wait for what; never for a connection of the pool, which has no limit."""
        import httpx2

        return httpx2.Timeout(self.read_timeout, connect=self.connect_timeout, pool=None)

    @property
    def _trust_env(self) -> bool:
        """Whether the environment's proxies and certificates count.

        A proxy is the way to other machines, not to this one.
        """
        return not self.loopback

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """What the server's certificate is checked against; `NotConfigured` where it can't be."""
        return ssl_context(trust_env=self._trust_env)

    def http_client(self, *, follow_redirects: bool) -> httpx2.AsyncClient:
        """Return a new HTTP client for an SDK.

        Args:
            follow_redirects: Only where the key is in the header `Authorization`: from others
                httpx2 doesn't take it away when an answer names another place.

        Raises:
            NotConfigured: The environment names certificates that can't be loaded.
        """
        import httpx2

        from perdure_adapters._http import HttpClient

        return HttpClient(
            timeout=self.timeout,
            follow_redirects=follow_redirects,
            # Even for `http://`: a server may send us on to `https://`.
            verify=self.ssl_context,
            limits=httpx2.Limits(
                max_connections=None,  # how many calls run at once is the engine's decision
                max_keepalive_connections=100,
                # Uvicorn, under vLLM and others, drops idle connections after 5 seconds: one that
                # is just being dropped must not be taken for the next call.
                keepalive_expiry=4,
            ),
            trust_env=self._trust_env,
        )

    # -- what goes wrong ---------------------------------------------------------------------------

    def detail(self, cause: BaseException) -> str:
        """Return an error's own words, short and without the key."""
        return redact(str(cause) or type(cause).__name__, (self.key,))[:_MAX_DETAIL]

    def timed_out(self, cause: BaseException) -> PlatformTimeout:
        """Return the error for a time limit of ours that ran out."""
        import httpx2

        if isinstance(cause, httpx2.ConnectTimeout):
            return PlatformTimeout(
                f"{self.shown} took no connection within {self.connect_timeout:g} s"
            )
        return PlatformTimeout(f"{self.shown} sent nothing for {self.read_timeout:g} s")

    def lost(self, cause: BaseException) -> ConnectionLost:
        """Return the error for a connection that could not be made, or broke."""
        import httpx2

        if isinstance(cause, httpx2.ConnectError):
            hint = ": is it running?" if self.loopback else ""
            return ConnectionLost(f"{self.shown} can't be reached ({self.detail(cause)}){hint}")
        return ConnectionLost(f"the connection to {self.shown} broke ({self.detail(cause)})")

    def unreadable(self, cause: BaseException) -> StreamTruncated:
        """Return the error for a stream that holds what nobody can read."""
        return StreamTruncated(f"{self.shown} sent something unreadable ({self.detail(cause)})")

    async def refuse_no_stream(
        self,
        response: httpx2.Response,
        typed: Callable[[Exception], PlatformError],
        *,
        errors: tuple[type[Exception], ...],
        request_id: str | None = None,
        hint: str = "",
    ) -> None:
        """Refuse an answer that is no stream; read as one it would only look truncated.

        Args:
            response: The answer, of which nothing but the head was read.
            typed: Returns the typed form of one of ``errors``.
            errors: What reading may raise.
            request_id: The platform's id of the request.
            hint: What to know about base URLs of this kind of server.

        Raises:
            PlatformError: It is an error, or something else than a stream.
        """
        content_type = response.headers.get("content-type", "").lower()
        if "json" not in content_type and "html" not in content_type:
            return
        body: object = None
        try:
            await response.aread()
            body = json.loads(response.text)
        except json.JSONDecodeError:
            pass
        except errors as error:
            raise typed(error) from error
        fault = fault_of(body)
        if fault:
            raise typed_error(
                f"{self.shown} reported: {fault.get('message') or fault}",
                names=(str(fault.get("code")), str(fault.get("type"))),
                request_id=request_id,
                secrets=(self.key,),
            )
        raise InvalidRequest(
            f"{self.shown} answered with {content_type.partition(';')[0]} instead of a stream: "
            f"check the base URL{hint} and that the server can stream"
        )


def fault_of(body: object) -> Mapping[str, Any]:
    """Return the error object of a response's body; empty where there is none."""
    if not isinstance(body, Mapping):
        return {}
    fields = cast("Mapping[str, Any]", body)
    inner = fields.get("error")
    if isinstance(inner, Mapping):
        return cast("Mapping[str, Any]", inner)
    if isinstance(inner, str):
        return {"message": inner, **{k: v for k, v in fields.items() if k in ("code", "type")}}
    return fields if "message" in fields else {}


def message_of(body: object, fault: Mapping[str, Any]) -> str:
    """Return what a body says went wrong: the message of its error, else the body itself."""
    message = fault.get("message")
    if message:
        return str(message)
    if body is None or isinstance(body, str):
        text = body or ""
        # A proxy's HTML page says nothing.
        return "no explanation" if not text or text.lstrip().startswith("<") else text
    return json.dumps(body, ensure_ascii=False, default=str)
