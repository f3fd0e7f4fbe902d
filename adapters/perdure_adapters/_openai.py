"""The `openai` SDK as perdure uses it: where its client goes, what goes along, what its errors are.

The SDK is imported inside the functions; `load_sdk` has seen to it that it is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
    from openai import APIStatusError, AsyncOpenAI, AsyncStream

__all__ = [
    "OpenAIEndpoint",
    "check_streams",
    "open_stream",
    "reading_errors",
    "sdk_errors",
    "typed_openai_error",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIEndpoint(Endpoint):
    """A server that speaks as OpenAI's do.

    Attributes:
        of_openai: Whether OpenAI's own settings in the environment (organization, project,
            headers) are meant for this server. If not they stay here, being no one else's business.
        organization: OpenAI's; None takes `OPENAI_ORG_ID` where it is meant for this server.
        project: OpenAI's; None takes `OPENAI_PROJECT_ID` likewise.
    """

    of_openai: bool
    organization: str | None = None
    project: str | None = None

    def client(self) -> AsyncOpenAI:
        """Return a new client, its retries off."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=self.sent_key,
            organization=self.organization,
            project=self.project,
            max_retries=0,
            timeout=self.timeout,
            default_headers=None if self.of_openai else self._own_headers(),
            http_client=self.http_client(follow_redirects=True),
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
    import openai

    return (openai.OpenAIError, *wire_errors())


def reading_errors() -> tuple[type[Exception], ...]:
    """Return what reading an answer may raise besides."""
    return (*sdk_errors(), *DECODING_ERRORS)


def typed_openai_error(error: Exception, endpoint: Endpoint) -> PlatformError:
    """Return the typed form of one of `reading_errors`."""
    import httpx2
    import openai

    cause = error.__cause__ or error
    match error:
        case openai.APIStatusError():
            return _typed_status(error, endpoint)
        case openai.APITimeoutError() | httpx2.TimeoutException():
            return endpoint.timed_out(cause)
        case openai.APIConnectionError() | httpx2.HTTPError():
            return endpoint.lost(cause)
        case openai.APIResponseValidationError():
            return endpoint.unreadable(cause)
        case openai.APIError():  # an error event inside a stream
            return typed_error(
                f"{endpoint.shown} reported: {error.message}",
                names=(error.code, error.type),
                secrets=(endpoint.key,),
            )
        case openai.OpenAIError():
            return NotConfigured(endpoint.detail(cause))
        case _:
            return endpoint.unreadable(cause)


def _typed_status(error: APIStatusError, endpoint: Endpoint) -> PlatformError:
    fault = fault_of(error.body)
    message = message_of(error.body, fault)
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


async def open_stream(
    client: AsyncOpenAI, path: str, body: Mapping[str, Any], endpoint: Endpoint
) -> AsyncStream[object]:
    """Return the opened stream of an answer, its events as the JSON that they are.

    The SDK's own methods would make a model of each, which takes ten times as long as all else that
    it does to read one.

    Args:
        client: The SDK's client.
        path: What is asked, after the base URL.
        body: The request's.
        endpoint: Where it goes.

    Raises:
        PlatformError: It was refused, or didn't get there.
    """
    from openai import AsyncStream

    try:
        return await client.post(
            path,
            body={**body, "stream": True},
            cast_to=object,
            stream=True,
            stream_cls=AsyncStream[object],
            options={"security": {"bearer_auth": True}},  # the key, and no administrator's one
        )
    except sdk_errors() as error:
        raise typed_openai_error(error, endpoint) from error


async def check_streams(stream: AsyncStream[Any], endpoint: Endpoint) -> None:
    """Refuse an answer that is no stream; read as one it would only look truncated.

    Raises:
        PlatformError: It is an error, or something else than a stream.
    """
    await endpoint.refuse_no_stream(
        stream.response,
        lambda error: typed_openai_error(error, endpoint),
        errors=reading_errors(),
        hint=" (mostly it ends in /v1)",
    )


def _word(value: object) -> str | None:
    return None if value is None else str(value)
