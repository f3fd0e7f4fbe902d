"""The `anthropic` SDK as perdure uses it: where its client goes, what its errors are.

The SDK is imported inside the functions; `load_sdk` has seen to it that it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from perdure.errors import NotConfigured, PlatformError
from perdure_adapters._endpoint import (
    DECODING_ERRORS,
    Endpoint,
    fault_of,
    message_of,
    wire_errors,
)
from perdure_adapters._sdk import typed_error

if TYPE_CHECKING:
    from anthropic import APIStatusError, AsyncAnthropic

__all__ = [
    "anthropic_client",
    "platform_schema",
    "reading_errors",
    "sdk_errors",
    "typed_anthropic_error",
]


def anthropic_client(endpoint: Endpoint, *, token: bool) -> AsyncAnthropic:
    """Return a new client, its retries off.

    Args:
        endpoint: Where it goes.
        token: Whether the endpoint's key is an OAuth token and no API key.
    """
    import anthropic

    return anthropic.AsyncAnthropic(
        base_url=endpoint.url,
        # One of the two is always given, or the SDK would look for other credentials by itself.
        api_key=None if token else endpoint.sent_key,
        auth_token=endpoint.sent_key if token else None,
        max_retries=0,
        timeout=endpoint.timeout,
        # An API key has a header of its own here.
        http_client=endpoint.http_client(follow_redirects=token),
    )


def platform_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema in the form that Claude takes.

    Claude wants every object closed and knows no lengths, ranges or patterns; the SDK closes them
    and moves the rest into descriptions. What it can't turn is left as it is: the platform then
    says what it doesn't like. The answer is held to the schema as the task has it.
    """
    from anthropic import transform_schema

    try:
        return transform_schema(dict(schema))
    except (ValueError, TypeError, AttributeError, AssertionError, LookupError):
        return dict(schema)


def sdk_errors() -> tuple[type[Exception], ...]:
    """Return what the SDK raises on purpose, and what it lets through from the wire."""
    import anthropic

    return (anthropic.AnthropicError, *wire_errors())


def reading_errors() -> tuple[type[Exception], ...]:
    """Return what reading an answer may raise besides."""
    return (*sdk_errors(), *DECODING_ERRORS)


def typed_anthropic_error(error: Exception, endpoint: Endpoint) -> PlatformError:
    """Return the typed form of one of `reading_errors`."""
    import anthropic
    import httpx2

    cause = error.__cause__ or error
    match error:
        case anthropic.APIStatusError():
            return _typed_status(error, endpoint)
        case anthropic.APITimeoutError() | httpx2.TimeoutException():
            return endpoint.timed_out(cause)
        case anthropic.APIConnectionError() | httpx2.HTTPError():
            return endpoint.lost(cause)
        case anthropic.APIError():
            return endpoint.unreadable(cause)
        case anthropic.AnthropicError():
            return NotConfigured(endpoint.detail(cause))
        case _:
            return endpoint.unreadable(cause)


def _typed_status(error: APIStatusError, endpoint: Endpoint) -> PlatformError:
    """Return the typed form of an answer that is an error, or of an error inside a stream.

    The SDK gives the latter the status of the response, 200: what it is called decides.
    """
    inside = error.status_code < 300
    fault = fault_of(error.body)
    message = message_of(error.body, fault)
    if error.status_code in (401, 403) and endpoint.key is None:
        message += " (no key was given)"
    said = "reported" if inside else f"answered {error.status_code}"
    return typed_error(
        f"{endpoint.shown} {said}: {message}",
        status=error.status_code,
        names=_names(fault),
        headers=error.response.headers,
        request_id=error.request_id,
        secrets=(endpoint.key,),
    )


def _names(fault: Mapping[str, Any]) -> list[str]:
    """Return what the error is called, the most telling name first."""
    details = fault.get("details")
    code = cast("Mapping[str, Any]", details).get("error_code") if _is_mapping(details) else None
    names = [str(name) for name in (code, fault.get("code"), fault.get("type")) if name is not None]
    # There are several limits of spending; all of them are final though they come as a 429.
    return ["spend_limit_reached" if n.endswith("spend_limit_reached") else n for n in names]


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)
