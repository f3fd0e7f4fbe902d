"""Google's Gemini, through the `google-genai` SDK.

By default through Interactions, in the background: the platform goes on whether or not somebody
listens, and a stream that broke, or whose process was killed, is picked up where it was. With
``api="generate"`` through `generateContent`, which all Gemini-compatible servers speak and which
can't be picked up. A stream without the platform's end marker is `StreamTruncated`; the SDK's own
retries, continuations and function calls are off, since each request belongs in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from perdure.adapter import Call, Capabilities
from perdure.errors import InvalidRequest, NotConfigured, PlatformError, StreamTruncated
from perdure.events import Event
from perdure_adapters._endpoint import LAST_WORDS
from perdure_adapters._gemini import (
    GeminiClient,
    GeminiEndpoint,
    event_stream,
    reading_errors,
    sdk_errors,
    typed_gemini_error,
)
from perdure_adapters._generate import (
    GenerateReader,
    generate_config,
    generate_contents,
    generate_options,
)
from perdure_adapters._interactions import InteractionReader, cursor_event, interaction_body
from perdure_adapters._models import DEFAULT_MODELS
from perdure_adapters._sdk import PerLoop, find_sdk, load_sdk, within
from perdure_adapters._settings import Settings
from perdure_adapters.base import AsyncBasePlatformAdapter

if TYPE_CHECKING:
    from google.genai.types import GenerateContentConfig

__all__ = ["GeminiAdapter"]

_END: Final = object()
_APIS: Final = ("interactions", "generate")
_SETTINGS: Final = (
    *("api", "api_key", "api_version", "background", "base_url", "connect_timeout"),
    *("default_model", "read_timeout", "thoughts"),
)
_REFUSED_BACKGROUND: Final = (
    "the platform refuses background work: this call can't be picked up where it breaks"
)


class GeminiAdapter(AsyncBasePlatformAdapter):
    """The platform `gemini`.

    Nothing is connected, imported or checked before the first call. `task.options` go into the
    request's body, objects within objects too: `{"generation_config": {"seed": 7}}` with
    Interactions, `{"generationConfig": {"seed": 7}}` with generateContent. The option
    `background=False` is perdure's own and runs that one task plainly.

    Args:
        api: `interactions`, or `generate` for `generateContent`.
        api_key: The key. None takes `GOOGLE_API_KEY`, else `GEMINI_API_KEY`.
        base_url: Where the API begins. None takes `GOOGLE_GEMINI_BASE_URL`, else Google's own.
        api_version: The first part of every path, such as `v1beta`. None takes
            `GOOGLE_GENAI_API_VERSION`, else what the SDK takes.
        default_model: For tasks that name none. None takes `PERDURE_GEMINI_MODEL`, else perdure's.
        background: Whether interactions run in the background; they are stored at the platform
            then, and can be picked up. Yes unless said otherwise.
        thoughts: Whether to ask for what the model thinks. Yes unless said otherwise; a model that
            doesn't think may refuse the question.
        connect_timeout: Seconds to wait for a connection; 10.
        read_timeout: Seconds to wait for the first or next part of an answer; 300.
        platform: The platform's name, for those who use several accounts side by side.
        settings: What `perdure.toml` says: the arguments above by their names. An address from
            there gets no key of the environment.
    """

    platform = "gemini"
    prices = "google"

    def __init__(
        self,
        *,
        api: Literal["interactions", "generate"] | None = None,
        api_key: str | None = None,
        base_url: str | None = None,
        api_version: str | None = None,
        default_model: str | None = None,
        background: bool | None = None,
        thoughts: bool | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        platform: str = "gemini",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.platform = platform
        given = Settings(platform, settings, _SETTINGS)
        self._api = given.choice("api", api, _APIS)
        self.default_model = (
            given.text("default_model", default_model, "PERDURE_GEMINI_MODEL")
            or DEFAULT_MODELS["gemini"]
        )
        self._background = given.flag("background", background, default=True)
        self._thoughts = given.flag("thoughts", thoughts, default=True)
        named = given.file_names_address(base_url, "GOOGLE_GEMINI_BASE_URL")
        keys = () if named else ("GOOGLE_API_KEY", "GEMINI_API_KEY")
        self._endpoint = GeminiEndpoint(
            url=given.text("base_url", base_url, "GOOGLE_GEMINI_BASE_URL"),
            key=given.text("api_key", api_key, *keys),
            api_version=given.text("api_version", api_version),
            connect_timeout=given.number("connect_timeout", connect_timeout, 10),
            read_timeout=given.number("read_timeout", read_timeout, 300),
        )
        self._clients = PerLoop(self._endpoint.client)
        self._takes_background = True
        self.capabilities = Capabilities(
            reattach=self._api == "interactions" and self._background,
            files=frozenset({"text", "image", "pdf"}),
            usage_on_the_way=True,
            reasoning=True,
            tools=True,
            schema=True,
        )

    def __repr__(self) -> str:
        """Return how it was made, the key left out."""
        return (
            f"{type(self).__name__}({self._endpoint.shown!r}, api={self._api!r}, "
            f"background={self._background!r}, default_model={self.default_model!r})"
        )

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream one answer."""
        self._endpoint.check()
        resume = call.resume
        if resume is not None and resume.mode == "reattach":
            events = self._take_up(resume.response_id, resume.cursor)
        elif self._api == "generate":
            events = self._generate(call)
        else:
            events = self._interact(call)
        async with contextlib.aclosing(events):
            async for event in events:
                yield event

    def check(self) -> None:
        """Raise `NotConfigured` where the key or the SDK is missing."""
        self._endpoint.check()
        with contextlib.suppress(ModuleNotFoundError):  # `google` itself isn't there
            find_sdk("google.genai", extra="gemini")
            return
        raise NotConfigured(
            "the package 'google-genai' is not installed: run `pip install 'perdure[gemini]'`"
        )

    async def stop(self, response_id: str) -> None:
        """Cancel an interaction that goes on in the background."""
        await load_sdk("google.genai", extra="gemini")
        try:
            await self._clients.get().sdk.aio.interactions.cancel(response_id)
        except reading_errors() as error:
            raise typed_gemini_error(error, self._endpoint) from error

    async def close(self) -> None:
        """Close the connections of the running event loop, and the adapter's own engine."""
        await super().close()
        client = self._clients.take()
        if client is not None:
            await client.close()

    # -- Interactions ----------------------------------------------------------------------------

    async def _interact(self, call: Call) -> AsyncGenerator[Event, None]:
        body = interaction_body(call, thoughts=self._thoughts)
        wanted = self._background and call.task.options.get("background") is not False
        wanted = wanted and body.get("store") is not False  # what isn't stored can't be picked up
        await load_sdk("google.genai", extra="gemini")
        client = self._clients.get()
        model = call.model or self.default_model
        stream, background = await self._open(client, model, body, wanted)
        reader = InteractionReader(
            background=background,
            note=_REFUSED_BACKGROUND if wanted and not background else None,
            where=self._endpoint.shown,
            secrets=(self._endpoint.key,),
        )
        async with contextlib.aclosing(self._read(client, stream, reader)) as events:
            async for event in events:
                yield event

    async def _open(
        self, client: GeminiClient, model: str | None, body: dict[str, Any], background: bool
    ) -> tuple[Any, bool]:
        """Return the opened stream, and whether it is one of the background."""
        if background and self._takes_background:
            try:
                return await self._create(client, model, body, background=True), True
            except InvalidRequest as error:
                if not _is_about_background(error):
                    raise
            stream = await self._create(client, model, body, background=False)
            self._takes_background = False
            return stream, False
        return await self._create(client, model, body, background=False), False

    async def _create(
        self, client: GeminiClient, model: str | None, body: dict[str, Any], *, background: bool
    ) -> Any:  # noqa: ANN401 - a stream of the SDK's
        # In the background the platform goes on by itself where one request's limit is reached,
        # and the SDK takes no word about it.
        how = {"background": True} if background else {"automatic_continuation": False}
        try:
            answer = await _raw(client).create(
                model=model,
                stream=True,
                store=background,
                extra_body=body,  # as it is: the SDK's own types would refuse what is newer
                **how,
            )
            stream = await event_stream(answer, self._endpoint)
        except sdk_errors() as error:
            raise typed_gemini_error(error, self._endpoint) from error
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"the request can't be put together: {error}") from error
        except RecursionError as error:  # an answer that is nested without end
            raise typed_gemini_error(error, self._endpoint) from error
        return self._checked_stream(stream)

    def _checked_stream(self, stream: object) -> object:
        if not hasattr(stream, "__aiter__"):
            raise InvalidRequest(
                f"{self._endpoint.shown} answered with something else than a stream: check the "
                "base URL and the API version"
            )
        return stream

    async def _take_up(
        self, response_id: str | None, cursor: str | None
    ) -> AsyncGenerator[Event, None]:
        """Yield what comes after ``cursor`` in an interaction that is there."""
        if response_id is None:
            raise StreamTruncated("there is no interaction to pick up", response_over=True)
        await load_sdk("google.genai", extra="gemini")
        client = self._clients.get()
        after = cursor_event(cursor)
        try:
            answer = await _raw(client).get(response_id, stream=True, last_event_id=after)
            stream = await event_stream(answer, self._endpoint)
        except PlatformError as error:  # told with the status 200
            raise self._lost(response_id, error) from None
        except reading_errors() as error:
            raise self._lost(response_id, typed_gemini_error(error, self._endpoint)) from error
        reader = InteractionReader(
            background=True,
            cursor=cursor,
            where=self._endpoint.shown,
            secrets=(self._endpoint.key,),
        )
        reader.response_id = response_id
        checked = self._checked_stream(stream)
        async with contextlib.aclosing(self._read(client, checked, reader)) as events:
            async for event in events:
                yield event

    def _lost(self, response_id: str, error: PlatformError) -> PlatformError:
        """Return the error for an interaction that can't be picked up: it has to begin anew."""
        if error.status not in (404, 410):
            return error
        return StreamTruncated(
            f"{self._endpoint.shown} does not know the interaction {response_id!r} any more",
            status=error.status,
            response_over=True,
        )

    async def _read(
        self, client: GeminiClient, stream: object, reader: InteractionReader
    ) -> AsyncGenerator[Event, None]:
        try:
            while not reader.ended:
                event = await self._next(stream)
                if event is _END:
                    break
                for found in reader.feed(event):
                    yield found
            for found in reader.finish():
                yield found
        except PlatformError as error:
            if error.retryable and reader.reported and reader.response_id is not None:
                error.response_over = await self._is_over(client, reader.response_id)
            raise
        finally:
            await cast("Any", stream).close()

    async def _next(self, stream: object) -> object:
        """Return the next event or chunk, or `_END`."""
        try:
            return await anext(cast("AsyncIterator[object]", stream), _END)
        except reading_errors() as error:
            raise typed_gemini_error(error, self._endpoint) from error

    async def _is_over(self, client: GeminiClient, response_id: str) -> bool:
        """Return whether an interaction is over for good, after an error in its stream.

        The error may be the stream's alone. Where the platform can't say, it is taken to go on.
        """
        interactions = cast("Any", client.sdk.aio.interactions)
        try:
            found = await interactions.get(response_id)
        except reading_errors() as error:
            return typed_gemini_error(error, self._endpoint).status in (404, 410)
        return getattr(found, "status", None) in ("failed", "cancelled")

    # -- generateContent -------------------------------------------------------------------------

    async def _generate(self, call: Call) -> AsyncGenerator[Event, None]:
        contents = generate_contents(call)
        config = generate_config(call, thoughts=self._thoughts)
        options = generate_options(call)
        await load_sdk("google.genai", extra="gemini")
        asked = _config(config, options)
        client = self._clients.get()
        model = call.model or self.default_model
        reader = GenerateReader()
        async with _pumped(client, model, contents, asked) as chunks:
            while (chunk := await self._chunk(chunks, reader)) is not _END:
                for event in reader.feed(chunk):
                    yield event
        for event in reader.finish():
            yield event

    async def _chunk(self, chunks: AsyncIterator[object], reader: GenerateReader) -> object:
        try:
            return await within(LAST_WORDS if reader.ended else None, self._next(chunks))
        except TimeoutError:
            return _END
        except PlatformError:
            # After the end marker only the count of tokens can be missing. The answer is whole,
            # and asking for it again would cost it again.
            if reader.ended:
                return _END
            raise


def _raw(client: GeminiClient) -> Any:  # noqa: ANN401 - the SDK's types don't agree among themselves
    return client.sdk.aio.interactions.with_raw_response


def _config(config: dict[str, Any], options: dict[str, Any]) -> GenerateContentConfig:
    from google.genai import types

    try:
        return types.GenerateContentConfig(
            **config, http_options=types.HttpOptions(extra_body=options or None)
        )
    except ValueError as error:
        raise InvalidRequest(f"the request can't be put together: {error}") from error


@contextlib.asynccontextmanager
async def _pumped(
    client: GeminiClient, model: str | None, contents: object, config: GenerateContentConfig
) -> AsyncGenerator[AsyncIterator[object]]:
    """Read a stream in a task of its own, and cancel that to leave it.

    The SDK does not close the connection where its iterator is left or closed, but it does where
    the task that reads it is cancelled.
    """
    waiting: asyncio.Queue[object] = asyncio.Queue()

    async def pump() -> None:
        models = cast("Any", client.sdk.aio.models)
        try:
            stream = await models.generate_content_stream(
                model=model, contents=contents, config=config
            )
            async for chunk in stream:
                waiting.put_nowait(chunk)  # never waits: it must be the reading that is cancelled
        finally:
            waiting.put_nowait(_END)

    async def chunks() -> AsyncIterator[object]:
        while (chunk := await waiting.get()) is not _END:
            yield chunk
        await pumping  # raises what it met

    pumping = asyncio.create_task(pump())
    try:
        yield chunks()
    finally:
        pumping.cancel()
        await asyncio.wait({pumping})
        if not pumping.cancelled():
            pumping.exception()  # it was told, or nobody wants to know


def _is_about_background(error: PlatformError) -> bool:
    words = error.message.lower()
    return error.status in (400, 422) and ("background" in words or "store" in words)
