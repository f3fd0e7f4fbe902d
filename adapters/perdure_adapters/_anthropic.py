"""The `anthropic` SDK as perdure uses it: where its client goes, what its errors are.

The SDK is imported inside the functions; `load_sdk` has seen to it that it is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from perdure.errors import NotConfigured, PlatformError
from perdure.text import JsonObject
from perdure_adapters._endpoint import (
    DECODING_ERRORS,
    Endpoint,
    fault_of,
    message_of,
    wire_errors,
)
from perdure_adapters._sdk import typed_error

if TYPE_CHECKING:
    import httpx2
    from anthropic import AsyncAnthropic
    from anthropic._streaming import ServerSentEvent

__all__ = [
    "anthropic_client",
    "event_data",
    "platform_schema",
    "reading_errors",
    "sdk_errors",
    "typed_anthropic_error",
]


def anthropic_client(endpoint: Endpoint, *, token: bool, of_file: bool = False) -> AsyncAnthropic:
    """Return a new client, its retries off.

    Args:
        endpoint: Where it goes.
        token: Whether the endpoint's key is an OAuth token and no API key.
        of_file: Whether `perdure.toml` says where that is; what the environment has for a gateway
            must not go there.
    """
    import anthropic

    client = anthropic.AsyncAnthropic(
        base_url=endpoint.url,
        # One of the two is always given, or the SDK would look for other credentials by itself.
        api_key=None if token else endpoint.sent_key,
        auth_token=endpoint.sent_key if token else None,
        max_retries=0,
        timeout=endpoint.timeout,
        # An API key has a header of its own here.
        http_client=endpoint.http_client(follow_redirects=token),
    )
    if of_file:
        # ANTHROPIC_CUSTOM_HEADERS, which no argument keeps the SDK from reading. To override them
        # one by one would take the SDK's own ones of the same names along, such as the key's.
        client._custom_headers = {}  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return client


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
            return _typed_body(error.body, error.response, endpoint)
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


def event_data(sse: ServerSentEvent, response: httpx2.Response, endpoint: Endpoint) -> JsonObject:
    """Return what an event of a stream says; empty where that is no JSON object.

    Raises:
        PlatformError: It says that the platform failed.
        ValueError: It has a name, and is no JSON.
    """
    data: object = sse.data
    if sse.event is None or sse.event == "error":
        with contextlib.suppress(ValueError, RecursionError):  # as a gateway's own may be
            data = sse.json()
    elif data and sse.event != "ping":
        data = sse.json()
    if sse.event == "error":
        raise _typed_body(data, response, endpoint)
    if not isinstance(data, dict):
        return {}
    said = cast("JsonObject", data)
    if said.get("type") == "error":  # which came without its name
        raise _typed_body(said, response, endpoint)
    return said


def _typed_body(body: object, response: httpx2.Response, endpoint: Endpoint) -> PlatformError:
    """Return the typed form of an error, that of an answer or one inside a stream.

    What it is called decides about the latter, for the status of the response is that of a success.
    """
    fault = fault_of(body)
    message = message_of(body, fault)
    status = response.status_code
    if status in (401, 403) and endpoint.key is None:
        message += " (no key was given)"
    said = "reported" if status < 300 else f"answered {status}"
    return typed_error(
        f"{endpoint.shown} {said}: {message}",
        status=status,
        names=_names(fault),
        headers=response.headers,
        request_id=response.headers.get("request-id"),
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
