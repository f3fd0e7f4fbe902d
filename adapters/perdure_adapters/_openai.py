"""The `openai` SDK as perdure uses it: where its client goes, what goes along, what its errors are.

The SDK is imported inside the functions; `load_sdk` has seen to it that it is there.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import urlsplit, urlunsplit

from perdure.errors import (
    ConnectionLost,
    NotConfigured,
    PlatformError,
    PlatformTimeout,
    StreamTruncated,
)
from perdure_adapters._sdk import redact, typed_error

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

__all__ = ["Endpoint", "fault_of", "reading_errors", "sdk_errors", "typed_openai_error"]

# What the SDK can't leave out and servers without keys ignore.
_NO_KEY: Final = "none"
_KEY: Final = re.compile("[!-~]+")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and how to reach it.

    Attributes:
        url: Where the API begins; None where nobody said.
        key: The key; None where there is none.
        of_openai: Whether OpenAI's own settings in the environment (organization, project,
            headers) are meant for this server. If not they stay here, being no one else's business.
        connect_timeout: Seconds.
        read_timeout: Seconds between two parts of an answer.
    """

    url: str | None = field(repr=False)  # it may hold a password
    key: str | None = field(repr=False)
    of_openai: bool
    connect_timeout: float
    read_timeout: float

    @property
    def shown(self) -> str:
        """The address as it may be shown: without user, password and query."""
        if not self.url:
            return "the server"
        parts = urlsplit(self.url)
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, host, parts.path, "", ""))

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
                f"the base URL {self.url!r} is no address such as http://127.0.0.1:8080/v1"
            )
        if self.key is not None and not _KEY.fullmatch(self.key):
            raise NotConfigured(
                f"the key for {self.shown} holds a space or a character that no key has: "
                "copy it again"
            )

    def client(self) -> AsyncOpenAI:
        """Return a new client, its retries off."""
        import httpx2
        import openai

        timeout = httpx2.Timeout(self.read_timeout, connect=self.connect_timeout, pool=None)
        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.sent_key,
            max_retries=0,
            timeout=timeout,
            default_headers=None if self.of_openai else self._own_headers(),
            http_client=httpx2.AsyncClient(
                timeout=timeout,
                follow_redirects=True,
                limits=httpx2.Limits(
                    max_connections=None,  # how many calls run at once is the engine's decision
                    max_keepalive_connections=100,
                    # Uvicorn, under vLLM and others, drops idle connections after 5 seconds: one
                    # that is just being dropped must not be taken for the next call.
                    keepalive_expiry=4,
                ),
                # A proxy is the way to other machines, not to this one.
                trust_env=not self.loopback,
            ),
        )

    def _own_headers(self) -> dict[str, str]:
        """Return headers that keep OpenAI's settings of the environment from being sent."""
        import os

        from openai import Omit

        names = ["OpenAI-Organization", "OpenAI-Project"]
        custom = os.environ.get("OPENAI_CUSTOM_HEADERS", "")
        names += [line.partition(":")[0].strip() for line in custom.splitlines() if ":" in line]
        omitted = {name: Omit() for name in names if name.lower() != "authorization"}
        # The SDK takes `Omit` here, though its annotation doesn't say so.
        return {**cast("dict[str, str]", omitted), "Authorization": f"Bearer {self.sent_key}"}


def sdk_errors() -> tuple[type[Exception], ...]:
    """Return what the SDK raises on purpose, and what it lets through from the wire."""
    import httpx2
    import openai

    return (openai.OpenAIError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError)


def reading_errors() -> tuple[type[Exception], ...]:
    """Return what reading an answer may raise besides: the SDK decodes it without suspicion."""
    return (*sdk_errors(), ValueError, TypeError, AttributeError, LookupError, RecursionError)


def typed_openai_error(error: Exception, endpoint: Endpoint) -> PlatformError:
    """Return the typed form of one of `reading_errors`."""
    import httpx2
    import openai

    where = endpoint.shown
    cause = error.__cause__ or error
    detail = redact(str(cause) or type(cause).__name__, (endpoint.key,))
    match error:
        case openai.APIStatusError():
            return _typed_status(error, endpoint)
        case openai.APITimeoutError() | httpx2.TimeoutException():
            if isinstance(cause, httpx2.ConnectTimeout):
                return PlatformTimeout(
                    f"{where} took no connection within {endpoint.connect_timeout:g} s"
                )
            return PlatformTimeout(f"{where} sent nothing for {endpoint.read_timeout:g} s")
        case openai.APIConnectionError() | httpx2.HTTPError():
            if isinstance(cause, httpx2.ConnectError):
                return ConnectionLost(f"{where} can't be reached ({detail}): is it running?")
            return ConnectionLost(f"the connection to {where} broke ({detail})")
        case openai.APIResponseValidationError():
            return _unreadable(where, detail)
        case openai.APIError():  # an error event inside a stream
            return typed_error(
                f"{where} reported: {error.message}",
                names=(error.code, error.type),
                secrets=(endpoint.key,),
            )
        case openai.OpenAIError():
            return NotConfigured(detail)
        case _:
            return _unreadable(where, detail)


def _unreadable(where: str, detail: str) -> StreamTruncated:
    """Return the error for a stream that holds what nobody can read."""
    return StreamTruncated(f"{where} sent something unreadable ({detail[:200]})")


def _typed_status(error: APIStatusError, endpoint: Endpoint) -> PlatformError:
    fault = fault_of(error.body)
    message = str(fault.get("message") or _compact(error.body) or "no explanation")
    if error.status_code in (401, 403) and endpoint.key is None:
        message += " (no key was given)"
    if error.status_code == 404 and not fault:
        message += " (check the base URL: mostly it ends in /v1)"
    return typed_error(
        f"{endpoint.shown} answered {error.status_code}: {message}",
        status=error.status_code,
        names=(_word(fault.get("code")), _word(fault.get("type"))),
        headers=error.response.headers,
        request_id=error.request_id,
        secrets=(endpoint.key,),
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


def _compact(body: object) -> str:
    if body is None or isinstance(body, str):
        text = body or ""
        return "" if text.lstrip().startswith("<") else text  # a proxy's HTML page says nothing
    return json.dumps(body, ensure_ascii=False, default=str)


def _word(value: object) -> str | None:
    return None if value is None else str(value)
