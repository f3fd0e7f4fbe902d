"""Any server that speaks OpenAI's chat completions: Ollama, llama.cpp, vLLM and many more.

Streams through the `openai` SDK, which is imported when the first call is made. A stream without
a finish reason is `StreamTruncated`; the SDK's own retries are off, since each attempt belongs in
the log.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.adapter import Call, Capabilities
from perdure.errors import InvalidRequest, NotConfigured, PlatformError
from perdure.events import Event
from perdure_adapters._chat import ChatReader, chat_messages, chat_parameters
from perdure_adapters._openai import (
    Endpoint,
    fault_of,
    reading_errors,
    sdk_errors,
    typed_openai_error,
)
from perdure_adapters._sdk import PerLoop, find_sdk, load_sdk, typed_error
from perdure_adapters.base import AsyncBasePlatformAdapter

if TYPE_CHECKING:
    from openai import AsyncOpenAI, AsyncStream
    from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

__all__ = ["CompatibleAdapter"]

_END: Final = object()


class CompatibleAdapter(AsyncBasePlatformAdapter):
    """A platform behind an OpenAI-compatible server.

    Nothing is connected, imported or checked before the first call. `task.options` go into the
    request's body as they are (`tools`, `response_format`, `seed`, `top_k` …).

    Args:
        base_url: Where the API begins, mostly ending in `/v1`. None takes
            `PERDURE_COMPATIBLE_BASE_URL`, else `OPENAI_BASE_URL`.
        api_key: The server's key. None takes `PERDURE_COMPATIBLE_API_KEY`; `OPENAI_API_KEY` is
            sent only where the address is that of `OPENAI_BASE_URL`. Local servers need none.
        default_model: For tasks that name none. None takes `PERDURE_COMPATIBLE_MODEL`, else the
            first model that the server lists.
        connect_timeout: Seconds to wait for a connection.
        read_timeout: Seconds to wait for the first or next part of an answer.
        platform: The platform's name, for those who use several servers side by side.
        prices: The provider's name in the price table; None leaves costs unknown.
    """

    platform = "compatible"
    capabilities = Capabilities(
        files=frozenset({"text", "image"}), reasoning=True, tools=True, schema=True
    )

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        default_model: str | None = None,
        connect_timeout: float = 10,
        read_timeout: float = 300,
        platform: str = "compatible",
        prices: str | None = None,
    ) -> None:
        self.platform = platform
        self.default_model = default_model or _setting("PERDURE_COMPATIBLE_MODEL")
        self.prices = prices
        url = base_url or _setting("PERDURE_COMPATIBLE_BASE_URL")
        of_openai = url is None
        key = api_key or _setting("PERDURE_COMPATIBLE_API_KEY")
        self._endpoint = Endpoint(
            url=url or _setting("OPENAI_BASE_URL"),
            key=(key or (_setting("OPENAI_API_KEY") if of_openai else None) or "").strip() or None,
            of_openai=of_openai,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
        )
        self._clients = PerLoop(self._endpoint.client)
        self._listed_model: str | None = None
        self._asks_for_usage = True

    def __repr__(self) -> str:
        """Return how it was made, the key left out."""
        return (
            f"{type(self).__name__}({self._endpoint.shown!r}, "
            f"default_model={self.default_model!r}, platform={self.platform!r})"
        )

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream one chat completion."""
        self._check_settings()
        messages = chat_messages(call)
        parameters = chat_parameters(call)
        await load_sdk("openai", extra="compatible")
        client = self._clients.get()
        model = call.model or self.default_model or await self._first_model(client)
        stream = await self._open(client, model, messages, parameters)
        async with stream:
            await self._check_streams(stream)
            reader = ChatReader(
                stream.response.headers.get("x-request-id"),
                None if self._asks_for_usage else "the server can't report usage in a stream",
            )
            while (chunk := await self._next(stream, reader)) is not _END:
                for event in reader.feed(chunk):
                    yield event
        for event in reader.finish():
            yield event

    def check(self) -> None:
        """Raise `NotConfigured` where the server's address or the SDK is missing."""
        self._check_settings()
        find_sdk("openai", extra="compatible")

    def _check_settings(self) -> None:
        if self._endpoint.url is None:
            raise NotConfigured(
                "the platform 'compatible' has no server: set PERDURE_COMPATIBLE_BASE_URL, "
                "such as http://127.0.0.1:11434/v1 for Ollama"
            )
        self._endpoint.check()

    async def close(self) -> None:
        """Close the connections of the running event loop, and the adapter's own engine."""
        await super().close()
        client = self._clients.take()
        if client is not None:
            await client.close()

    async def _first_model(self, client: AsyncOpenAI) -> str:
        """Return the first model that the server lists; it is asked once."""
        if self._listed_model is None:
            try:
                page = await client.models.list()
                self._listed_model = next((model.id for model in page.data or []), None)
            except reading_errors() as error:
                raise typed_openai_error(error, self._endpoint) from error
        if self._listed_model is None:
            raise InvalidRequest(
                f"{self._endpoint.shown} lists no model: name one with PERDURE_COMPATIBLE_MODEL "
                "or the task's `constraints.model`"
            )
        return self._listed_model

    async def _open(
        self,
        client: AsyncOpenAI,
        model: str,
        messages: list[dict[str, Any]],
        parameters: dict[str, Any],
    ) -> AsyncStream[ChatCompletionChunk]:
        """Return the opened stream, asking for usage unless the server doesn't know that."""
        asked = self._asks_for_usage
        try:
            return await self._create(client, model, messages, parameters, usage=asked)
        except InvalidRequest as error:
            if not asked or not _is_about_usage(error):
                raise
        stream = await self._create(client, model, messages, parameters, usage=False)
        self._asks_for_usage = False
        return stream

    async def _create(
        self,
        client: AsyncOpenAI,
        model: str,
        messages: list[dict[str, Any]],
        parameters: dict[str, Any],
        *,
        usage: bool,
    ) -> AsyncStream[ChatCompletionChunk]:
        from openai import omit

        try:
            return await client.chat.completions.create(
                model=model,
                messages=cast("list[ChatCompletionMessageParam]", messages),
                stream=True,
                stream_options={"include_usage": True} if usage else omit,
                extra_body=parameters,
            )
        except sdk_errors() as error:
            raise typed_openai_error(error, self._endpoint) from error

    async def _check_streams(self, stream: AsyncStream[ChatCompletionChunk]) -> None:
        """Refuse an answer that is no stream; read as one it would only look truncated."""
        content_type = stream.response.headers.get("content-type", "").lower()
        if "json" not in content_type and "html" not in content_type:
            return
        body: object = None
        try:
            await stream.response.aread()
            body = json.loads(stream.response.text)
        except json.JSONDecodeError:
            pass
        except reading_errors() as error:
            raise typed_openai_error(error, self._endpoint) from error
        fault = fault_of(body)
        if fault:
            raise typed_error(
                f"{self._endpoint.shown} reported: {fault.get('message') or fault}",
                names=(str(fault.get("code")), str(fault.get("type"))),
                secrets=(self._endpoint.key,),
            )
        raise InvalidRequest(
            f"{self._endpoint.shown} answered with {content_type.partition(';')[0]} instead of a "
            "stream: check the base URL (mostly it ends in /v1) and that the server can stream"
        )

    async def _next(self, stream: AsyncStream[ChatCompletionChunk], reader: ChatReader) -> object:
        """Return the next chunk, or `_END`."""
        try:
            return await anext(stream, _END)
        except reading_errors() as error:
            # After the end marker only the count of tokens can be missing. The answer is whole,
            # and asking for it again would cost it again.
            if reader.ended:
                return _END
            raise typed_openai_error(error, self._endpoint) from error


def _setting(name: str) -> str | None:
    return os.environ.get(name, "").strip() or None


def _is_about_usage(error: PlatformError) -> bool:
    return error.status in (400, 422) and any(
        word in error.message for word in ("stream_options", "include_usage")
    )
