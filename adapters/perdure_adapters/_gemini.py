"""The `google-genai` SDK as perdure uses it: where its client goes, and what its errors are.

The SDK has two trees of errors, one for Interactions and one for everything else, and lets those of
its HTTP client through as well. It is imported inside the functions; `load_sdk` has seen to it that
it is there.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.errors import (
    AuthenticationFailed,
    ContentRefused,
    InvalidRequest,
    NotConfigured,
    Overloaded,
    PlatformError,
    PlatformTimeout,
    QuotaExhausted,
    RateLimited,
)
from perdure_adapters._endpoint import (
    DECODING_ERRORS,
    Endpoint,
    fault_of,
    message_of,
    wire_errors,
)
from perdure_adapters._sdk import MAX_RETRY_AFTER, error_class, redact, retry_after

if TYPE_CHECKING:
    import httpx2
    from google.genai import Client

__all__ = [
    "GeminiClient",
    "GeminiEndpoint",
    "event_stream",
    "fault_error",
    "reading_errors",
    "sdk_errors",
    "typed_gemini_error",
]

_MAX_MESSAGE: Final = 500

# How a body begins, blanks left out, that is an error object and no stream of chunks.
_ERROR_BEGINS: Final = (b'{"error"', b'[{"error"')
_LONGEST_BLANKS: Final = 200
_MAX_ERROR: Final = 64 * 1024

# Google's words for what went wrong (google.rpc.Code), in lower case, as they stand in the `status`
# of bodies and in the `code` of error events.
_BY_WORD: Final[Mapping[str, type[PlatformError]]] = {
    "aborted": Overloaded,
    "already_exists": InvalidRequest,
    "cancelled": Overloaded,
    "data_loss": Overloaded,
    "deadline_exceeded": PlatformTimeout,
    "failed_precondition": InvalidRequest,
    "gateway_timeout": PlatformTimeout,
    "internal": Overloaded,
    "invalid_argument": InvalidRequest,
    "invalid_request": InvalidRequest,
    "not_found": InvalidRequest,
    "out_of_range": InvalidRequest,
    "permission_denied": AuthenticationFailed,
    "resource_exhausted": RateLimited,
    "too_many_requests": RateLimited,
    "unauthenticated": AuthenticationFailed,
    "unavailable": Overloaded,
    "unimplemented": InvalidRequest,
    "unknown": Overloaded,
}
_KEY_REASONS: Final = frozenset(
    {"API_KEY_EXPIRED", "API_KEY_INVALID", "API_KEY_SERVICE_BLOCKED", "SERVICE_DISABLED"}
)
# Reasons for which an answer, or a prompt, is refused for what it says.
_REFUSALS: Final = frozenset({"content_filter", "prohibited_content", "safety", "blocklist"})


@dataclass(frozen=True, slots=True)
class GeminiClient:
    """A client of the SDK with the HTTP client that is its own to close."""

    sdk: Client
    http: httpx2.AsyncClient

    async def close(self) -> None:
        """Give back the connections."""
        await self.sdk.aio.aclose()
        self.sdk.close()
        await self.http.aclose()


@dataclass(frozen=True, slots=True, kw_only=True)
class GeminiEndpoint(Endpoint):
    """A server that speaks as Google's do; without an address it is Google's own.

    Attributes:
        api_version: The first part of every path; None leaves it to the SDK.
    """

    api_version: str | None
    name: str = "Gemini"

    def check(self) -> None:
        """Raise `NotConfigured` where nothing could be reached with these settings."""
        if self.url is None and self.key is None:
            raise NotConfigured(
                "the platform 'gemini' has no key: set GOOGLE_API_KEY or GEMINI_API_KEY"
            )
        if self.url is None:
            self.check_key()
        else:
            Endpoint.check(self)

    def client(self) -> GeminiClient:
        """Return a new client: on httpx2, its retries off, with limits of time."""
        from google import genai
        from google.genai import types

        timeout = self.timeout

        async def limited(request: httpx2.Request) -> None:
            # The SDK asks for no limits at all where it was given none, and knows but one number
            # where it was: one for connecting and reading alike, which the server is told, too.
            request.extensions["timeout"] = timeout.as_dict()

        async def read(response: httpx2.Response) -> None:
            # The SDK asks for the text of what it hasn't read, and leaves the connection open
            # where it is cancelled before it has.
            if response.status_code != 200:
                await response.aread()
            elif response.request.url.path.endswith(":streamGenerateContent"):
                # What it makes of an error that stands in a list has lost the error's words.
                pieces = response.aiter_bytes()
                heard = _chunks_or_error(self, pieces, response.headers)
                cast("Any", response).aiter_bytes = lambda: heard

        http = self.http_client(follow_redirects=False)  # the key has a header of its own
        http.event_hooks = {"request": [limited], "response": [read]}
        certificates = self.ssl_context
        options = types.HttpOptions(
            base_url=self.url,
            api_version=self.api_version,
            # Else it is aiohttp wherever that happens to be installed, with errors of its own.
            httpx_async_client=http,
            # For what it makes besides and we don't use, a client that blocks and WebSockets: each
            # would load all certificates by itself.
            client_args={"verify": certificates},
            async_client_args={"ssl": certificates},
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        client = genai.Client(vertexai=False, api_key=self.sent_key, http_options=options)
        return GeminiClient(client, http)


async def _chunks_or_error(
    endpoint: GeminiEndpoint, pieces: AsyncGenerator[bytes, None], headers: Mapping[str, str]
) -> AsyncGenerator[bytes, None]:
    """Yield the pieces of a body that is no error; those that may yet be one are held back."""
    held = b""
    passing = False
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            held += piece
            passing = passing or len(held) > _MAX_ERROR or not _may_be_error(held)
            if passing:
                yield held
                held = b""
            elif (error := _told_error(endpoint, held, headers)) is not None:
                raise error
    if held:
        yield held


def _may_be_error(beginning: bytes) -> bool:
    begun = b"".join(beginning[:_LONGEST_BLANKS].split())
    return any(begun.startswith(error) or error.startswith(begun) for error in _ERROR_BEGINS)


async def event_stream(answer: Any, endpoint: GeminiEndpoint) -> object:  # noqa: ANN401 - a raw response of the SDK's
    """Return the stream of an answer's events, each as the JSON it came as.

    The SDK makes a new model of pydantic for each event, which takes a hundred times as long as the
    event; it takes a decoder as well. What is no stream is what the SDK makes of it, or its error.

    Raises:
        PlatformError: It is an error instead, though its status is none.
    """
    from google.genai._interactions import AsyncStream

    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if answer.status_code != 200 or kind != "text/event-stream":  # as the SDK has it
        if answer.status_code == 200:
            error = _told_error(endpoint, await answer.read(), answer.headers)
            if error is not None:
                raise error
        return await answer.parse()
    return await answer.parse(to=AsyncStream[object], decoder=_event_data, sentinel="[DONE]")


def _event_data(envelope: str) -> object:
    """Return what an event says, out of what the SDK puts around it; a text where it is no JSON."""
    return json.loads(envelope).get("data")


def sdk_errors() -> tuple[type[Exception], ...]:
    """Return what the SDK raises on purpose, and what it lets through from the wire."""
    from google.genai import _interactions as interactions
    from google.genai import errors

    return (
        errors.APIError,
        interactions.GeminiNextGenAPIClientError,
        *wire_errors(),
    )


def reading_errors() -> tuple[type[Exception], ...]:
    """Return what reading an answer may raise besides."""
    return (*sdk_errors(), *DECODING_ERRORS)


def typed_gemini_error(error: Exception, endpoint: GeminiEndpoint) -> PlatformError:
    """Return the typed form of one of `reading_errors`."""
    import httpx2
    from google.genai import _interactions as interactions
    from google.genai import errors

    cause = _root(error)
    match error:
        case interactions.APIResponseValidationError():
            return endpoint.unreadable(cause)
        case interactions.APITimeoutError() | httpx2.TimeoutException():
            return endpoint.timed_out(cause)
        case interactions.APIConnectionError() | httpx2.HTTPError():
            return endpoint.lost(cause)
        case interactions.APIError():
            response = getattr(error, "response", None)
            return _answered(endpoint, error.status_code, error.body, _headers(response))
        case errors.APIError():
            return _answered_error(endpoint, error)
        case _:
            return endpoint.unreadable(cause)


def _answered_error(endpoint: GeminiEndpoint, error: object) -> PlatformError:
    """Return the typed form of an `errors.APIError`, whose fields hold whatever was sent."""
    status: object = getattr(error, "code", None)
    return _answered(
        endpoint,
        status if isinstance(status, int) else None,
        getattr(error, "details", None),
        _headers(getattr(error, "response", None)),
    )


def _root(error: BaseException) -> BaseException:
    """Return what was there first: the SDK wraps the errors of its HTTP client, and those again."""
    seen: set[int] = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return error


def _headers(response: object) -> Mapping[str, str]:
    headers = getattr(response, "headers", None)
    return cast("Mapping[str, str]", headers) if isinstance(headers, Mapping) else {}


def _told_error(
    endpoint: GeminiEndpoint, data: bytes, headers: Mapping[str, str]
) -> PlatformError | None:
    """Return the error that a body tells of whose status was 200; None where it tells of none."""
    try:
        body = _unlisted(json.loads(data))
    except (ValueError, RecursionError):
        return None
    fault = fault_of(body)
    if not fault:
        return None
    status = fault.get("code")  # the one that it would have come with
    return _answered(endpoint, status if type(status) is int else None, body, headers)


def _unlisted(body: object) -> object:
    """Return what is in the list that Google's servers put around an error now and then."""
    return next(iter(cast("list[object]", body)), None) if isinstance(body, list) else body


def _answered(
    endpoint: GeminiEndpoint, status: int | None, body: object, headers: Mapping[str, str]
) -> PlatformError:
    """Return the error for an answer with an HTTP status, or for an error object in a stream."""
    body = _unlisted(body)
    fault = fault_of(body)
    if status is not None and status < 400:
        if not fault:
            return InvalidRequest(
                f"{endpoint.shown} answered with {status} and no stream: check the base URL"
            )
        status = None
    message = message_of(body, fault)
    if status in (401, 403) and endpoint.key is None:
        message += " (no key was given)"
    what = "reported" if status is None else f"answered {status}"
    return fault_error(
        f"{endpoint.shown} {what}: {message}",
        fault,
        status=status,
        headers=headers,
        secrets=(endpoint.key,),
    )


def fault_error(
    message: str,
    fault: Mapping[str, Any],
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    secrets: tuple[str | None, ...] = (),
    response_over: bool = False,
) -> PlatformError:
    """Return the typed error for an error object of Google's.

    Args:
        message: What happened.
        fault: Its `code`, `status` and `details`.
        status: The HTTP status; None for an error inside a stream.
        headers: The response's headers.
        secrets: What must not be in the message.
        response_over: Whether the response itself has ended with it.
    """
    kind = _kind(status, fault)
    text = redact(message, secrets)
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE]} …"
    wait = retry_after(headers or {})
    return kind(
        text,
        status=status,
        request_id=(headers or {}).get("x-request-id") or None,
        retry_after=(_asked_delay(fault) if wait is None else wait) if kind.retryable else None,
        response_over=response_over,
    )


def _kind(status: int | None, fault: Mapping[str, Any]) -> type[PlatformError]:
    reasons = {str(detail.get("reason")) for detail in _details(fault)}
    if reasons & _KEY_REASONS:  # these come as 400 or 403
        return AuthenticationFailed
    words = [_word(fault.get(name)) for name in ("status", "code", "type")]
    if not _REFUSALS.isdisjoint(words):
        return ContentRefused
    kind = error_class(status, words)
    if status is None:
        kind = next((_BY_WORD[word] for word in words if word in _BY_WORD), kind)
    if kind is RateLimited and _used_up(fault):
        return QuotaExhausted
    return kind


def _word(value: object) -> str:
    """Return a code's last part: some are URIs."""
    return str(value if value is not None else "").rstrip("/").rpartition("/")[2].strip().lower()


def _details(fault: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    details = fault.get("details")
    for detail in cast("list[object]", details) if isinstance(details, list) else ():
        if isinstance(detail, Mapping):
            yield cast("Mapping[str, Any]", detail)


def _used_up(fault: Mapping[str, Any]) -> bool:
    """Return whether a quota of a whole day or more is used up: a wait won't help."""
    return any(
        "PerDay" in str(violation) or "PerMonth" in str(violation)
        for detail in _details(fault)
        for violation in (detail.get("violations"),)
    )


def _asked_delay(fault: Mapping[str, Any]) -> float | None:
    """Return the seconds of a `RetryInfo`, which Google sends instead of `Retry-After`."""
    for detail in _details(fault):
        delay = detail.get("retryDelay") or detail.get("retry_delay")
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)s", str(delay))
        if found:
            return min(float(found[1]), MAX_RETRY_AFTER)
    return None
