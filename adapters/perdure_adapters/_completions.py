"""Chat completions through the `openai` SDK: what `compatible` does, and `chatgpt` by choice."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, Final

from perdure.errors import InvalidRequest, PlatformError
from perdure.events import Event
from perdure_adapters._chat import ChatReader
from perdure_adapters._endpoint import LAST_WORDS
from perdure_adapters._openai import (
    OpenAIEndpoint,
    check_streams,
    open_stream,
    reading_errors,
    typed_openai_error,
)
from perdure_adapters._sdk import within

if TYPE_CHECKING:
    from openai import AsyncOpenAI, AsyncStream

__all__ = ["Completions"]

_END: Final = object()
_PATH: Final = "/chat/completions"


class Completions:
    """Streams completions from one server, and remembers whether it can report usage."""

    def __init__(self, endpoint: OpenAIEndpoint) -> None:
        self._endpoint = endpoint
        self._asks_for_usage = True

    async def stream(
        self,
        client: AsyncOpenAI,
        model: str,
        messages: list[dict[str, Any]],
        parameters: dict[str, Any],
    ) -> AsyncGenerator[Event, None]:
        """Yield what happens to one completion.

        Raises:
            PlatformError: It failed, or ended without a finish reason.
        """
        stream = await self._open(client, model, messages, parameters)
        async with stream:
            await check_streams(stream, self._endpoint)
            reader = ChatReader(
                stream.response.headers.get("x-request-id"),
                None if self._asks_for_usage else "the server can't report usage in a stream",
                secrets=(self._endpoint.key,),
            )
            # Not in a coroutine of its own, which would be made for every piece of text.
            while not reader.ended:
                try:
                    chunk = await anext(stream, _END)
                except TimeoutError:  # of a transport that has no error of its own for it
                    break
                except reading_errors() as error:
                    raise typed_openai_error(error, self._endpoint) from error
                if chunk is _END:
                    break
                for event in reader.feed(chunk):
                    yield event
            while reader.ended and (chunk := await _last_words(stream)) is not _END:
                for event in reader.feed(chunk):
                    yield event
        for event in reader.finish():
            yield event

    async def _open(
        self,
        client: AsyncOpenAI,
        model: str,
        messages: list[dict[str, Any]],
        parameters: dict[str, Any],
    ) -> AsyncStream[object]:
        """Return the opened stream, asking for usage unless the server doesn't know that."""
        body = {"model": model, "messages": messages, **parameters}
        asked = {**body, "stream_options": {"include_usage": True}}
        if not self._asks_for_usage:
            return await open_stream(client, _PATH, body, self._endpoint)
        try:
            return await open_stream(client, _PATH, asked, self._endpoint)
        except InvalidRequest as error:
            if not _is_about_usage(error):
                raise
        stream = await open_stream(client, _PATH, body, self._endpoint)
        self._asks_for_usage = False
        return stream


async def _last_words(stream: AsyncStream[object]) -> object:
    """Return the next chunk after the end marker, or `_END`.

    Only the count of tokens can be missing then. The answer is whole, and asking for it again would
    cost it again: so whatever goes wrong is the end.
    """
    with contextlib.suppress(TimeoutError, *reading_errors()):
        return await within(LAST_WORDS, anext(stream, _END))
    return _END


def _is_about_usage(error: PlatformError) -> bool:
    return error.status in (400, 422) and any(
        word in error.message for word in ("stream_options", "include_usage")
    )
