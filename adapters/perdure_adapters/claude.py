"""Claude, by Anthropic's Messages API, and whatever else speaks it.

Streams through the `anthropic` SDK, which is imported when the first call is made; events are read
as the JSON that they are. A stream without a `message_stop` is `StreamTruncated`; the SDK's own
retries are off, since each attempt belongs in the log. A message that was cut off can't be picked
up: how its task goes on is policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.adapter import Call, Capabilities
from perdure.errors import NotConfigured, PlatformError
from perdure.events import Event
from perdure.text import JsonObject
from perdure_adapters._anthropic import (
    anthropic_client,
    event_data,
    platform_schema,
    reading_errors,
    typed_anthropic_error,
)
from perdure_adapters._claude_request import message_body
from perdure_adapters._endpoint import Endpoint
from perdure_adapters._messages import MessagesReader
from perdure_adapters._models import DEFAULT_MODELS
from perdure_adapters._sdk import PerLoop, find_sdk, load_sdk, within
from perdure_adapters._settings import Settings
from perdure_adapters.base import AsyncBasePlatformAdapter

if TYPE_CHECKING:
    import httpx2
    from anthropic import AsyncAnthropic, AsyncStream
    from anthropic._streaming import ServerSentEvent
    from anthropic.types import MessageParam, RawMessageStreamEvent

__all__ = ["ClaudeAdapter"]

_URL: Final = "https://api.anthropic.com"
_SETTINGS: Final = (
    "api_key",
    "auth_token",
    "base_url",
    "connect_timeout",
    "default_model",
    "read_timeout",
)
_MOST_PAUSES: Final = 25
"""How often a paused turn is sent again, before what there is counts as all there is."""
_LAST_BYTES: Final = 0.5
"""Seconds to wait, once all was said, for the end of the body, so that the connection is kept."""


class ClaudeAdapter(AsyncBasePlatformAdapter):
    """Anthropic's Claude.

    Nothing is connected, imported or checked before the first call. `task.options` go into the
    request's body as they are (`tools` of Anthropic's own, `top_k`, `cache_control`, `thinking` …);
    `betas`, a list of names, goes into the header of that purpose.

    Args:
        api_key: The key. None takes `ANTHROPIC_API_KEY`. A server of one's own needs none.
        auth_token: An OAuth token in its place. None takes `ANTHROPIC_AUTH_TOKEN`.
        base_url: Where the API begins. None takes `ANTHROPIC_BASE_URL`, else Anthropic's own.
        default_model: For tasks that name none. None takes `PERDURE_CLAUDE_MODEL`, else the
            platform's default.
        connect_timeout: Seconds to wait for a connection; 10.
        read_timeout: Seconds to wait for the first or next part of an answer; 300.
        platform: The platform's name, for those who use several accounts side by side.
        settings: What `perdure.toml` says: the arguments above by their names. An address from
            there gets no key and no headers of the environment.
    """

    platform = "claude"
    prices = "anthropic"
    capabilities = Capabilities(
        files=frozenset({"text", "image", "pdf"}),
        usage_on_the_way=True,
        reasoning=True,
        tools=True,
        schema=True,
    )

    def __init__(
        self,
        *,
        api_key: str | None = None,
        auth_token: str | None = None,
        base_url: str | None = None,
        default_model: str | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        platform: str = "claude",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.platform = platform
        given = Settings(platform, settings, _SETTINGS)
        self.default_model = (
            given.text("default_model", default_model, "PERDURE_CLAUDE_MODEL")
            or DEFAULT_MODELS["claude"]
        )
        url = given.text("base_url", base_url, "ANTHROPIC_BASE_URL")
        named = given.file_names_address(base_url, "ANTHROPIC_BASE_URL")
        variables = ("", "") if named else ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY")
        token = given.text("auth_token", auth_token, variables[0])
        key = given.text("api_key", api_key, variables[1])
        if auth_token and not api_key:  # what the caller gave beats the environment
            key = None
        self._token = key is None and token is not None
        self._needs_key = url is None
        self._endpoint = Endpoint(
            # The SDK adds the version; other SDKs' addresses end with it.
            url=(url or _URL).rstrip("/").removesuffix("/v1"),
            key=key or token,
            connect_timeout=given.number("connect_timeout", connect_timeout, 10),
            read_timeout=given.number("read_timeout", read_timeout, 300),
        )
        self._clients = PerLoop(
            lambda: anthropic_client(self._endpoint, token=self._token, of_file=named)
        )

    def __repr__(self) -> str:
        """Return how it was made, the key left out."""
        return (
            f"{type(self).__name__}(base_url={self._endpoint.shown!r}, "
            f"default_model={self.default_model!r})"
        )

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream one message; where the platform pauses its turn, the messages after it too."""
        self._check_settings()
        await load_sdk("anthropic", extra="claude")
        wanted = call.task.output_schema
        model = call.model or self.default_model or DEFAULT_MODELS["claude"]
        body = message_body(call, model, platform_schema(wanted) if wanted is not None else None)
        client = self._clients.get()
        reader: MessagesReader | None = None
        for _ in range(_MOST_PAUSES + 1):
            stream = await self._open(client, body)
            async with stream:
                response = stream.response
                await self._endpoint.refuse_no_stream(
                    response,
                    lambda error: typed_anthropic_error(error, self._endpoint),
                    errors=reading_errors(),
                    request_id=response.headers.get("request-id"),
                )
                reader = MessagesReader(response.headers.get("request-id"), before=reader)
                # The SDK's models of events would take four times as long as its reading of them,
                # and have nothing that isn't in the JSON.
                events = stream.raw_events(response)
                # Not in a coroutine of its own, which would be made for every piece of text.
                while not reader.stopped:
                    try:
                        sse = await anext(events, None)
                        if sse is None:
                            break
                        event = event_data(sse, response, self._endpoint)
                    except TimeoutError:  # of a transport that has no error of its own for it
                        break
                    except reading_errors() as error:
                        raise typed_anthropic_error(error, self._endpoint) from error
                    for found in reader.feed(event):
                        yield found
                while reader.stopped:
                    words = await self._last_words(events, response)
                    if words is None:
                        break
                    for found in reader.feed(words):
                        yield found
            if not reader.paused:
                break
            body = reader.resumed(body)
        assert reader is not None  # noqa: S101 - the loop runs at least once
        for found in reader.finish():
            yield found

    def check(self) -> None:
        """Raise `NotConfigured` where the key or the SDK is missing."""
        self._check_settings()
        find_sdk("anthropic", extra="claude")

    def _check_settings(self) -> None:
        if self._needs_key and self._endpoint.key is None:
            raise NotConfigured(f"the platform {self.platform!r} has no key: set ANTHROPIC_API_KEY")
        self._endpoint.check()

    async def close(self) -> None:
        """Close the connections of the running event loop, and the adapter's own engine."""
        await super().close()
        client = self._clients.take()
        if client is not None:
            await client.close()

    async def _open(
        self, client: AsyncAnthropic, body: Mapping[str, Any]
    ) -> AsyncStream[RawMessageStreamEvent]:
        rest = dict(body)
        betas = rest.pop("betas", None)
        try:
            return await client.messages.create(
                model=rest.pop("model"),
                max_tokens=rest.pop("max_tokens"),
                messages=cast("list[MessageParam]", rest.pop("messages")),
                stream=True,
                extra_headers={"anthropic-beta": ",".join(map(str, betas))} if betas else None,
                # As it is: the SDK's own parameters would be looked through for files first.
                extra_body=rest,
            )
        except reading_errors() as error:  # what a platform sent may be nothing to send back
            raise typed_anthropic_error(error, self._endpoint) from error

    async def _last_words(
        self, events: AsyncIterator[ServerSentEvent], response: httpx2.Response
    ) -> JsonObject | None:
        """Return the next event after the end marker; None where there is none.

        The answer is whole: so whatever goes wrong is the end.
        """
        with contextlib.suppress(TimeoutError, PlatformError, *reading_errors()):
            sse = await within(_LAST_BYTES, anext(events, None))
            return None if sse is None else event_data(sse, response, self._endpoint)
        return None
