"""ChatGPT: OpenAI's models, through the Responses API, or chat completions by choice.

Streams through the `openai` SDK, which is imported when the first call is made. Responses run in
the background at the platform, so that a call whose connection or process was lost is picked up
where it was read up to, and is paid for once. A stream without the platform's end marker is
`StreamTruncated`; the SDK's own retries are off, since each attempt belongs in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from perdure.adapter import Call, Capabilities, Resume
from perdure.errors import InvalidRequest, NotConfigured, PlatformError, StreamTruncated
from perdure.events import Event
from perdure_adapters._chat import chat_messages, chat_parameters
from perdure_adapters._completions import Completions
from perdure_adapters._models import DEFAULT_MODELS
from perdure_adapters._openai import (
    OpenAIEndpoint,
    check_streams,
    open_stream,
    reading_errors,
    sdk_errors,
    typed_openai_error,
)
from perdure_adapters._reading import text_in
from perdure_adapters._response_request import (
    check_sizes,
    response_input,
    response_parameters,
    wants_background,
)
from perdure_adapters._responses import Cursor, ResponseReader
from perdure_adapters._sdk import PerLoop, find_sdk, load_sdk
from perdure_adapters._settings import Settings
from perdure_adapters._strict import is_strict
from perdure_adapters.base import AsyncBasePlatformAdapter

if TYPE_CHECKING:
    from openai import AsyncOpenAI, AsyncStream
    from openai.types.responses import Response, ResponseStreamEvent

__all__ = ["ChatGPTAdapter"]

_URL: Final = "https://api.openai.com/v1"
_END: Final = object()
_OVER: Final = frozenset({"failed", "cancelled", "incomplete"})
_UNDER_WAY: Final = frozenset({"queued", "in_progress"})
_SETTINGS: Final = (
    *("api", "api_key", "background", "base_url", "connect_timeout", "default_model"),
    *("organization", "prices", "project", "read_timeout"),
)


class ChatGPTAdapter(AsyncBasePlatformAdapter):
    """OpenAI's platform.

    Nothing is connected, imported or checked before the first call. `task.options` go into the
    request's body as they are (`top_p`, `include`, `service_tier`, tools of the platform's own …);
    `reasoning` and `text` are joined with what the task's constraints say.

    Args:
        base_url: Where the API begins. None takes `OPENAI_BASE_URL`, else OpenAI's own.
        api_key: The key. None takes `OPENAI_API_KEY`, which is not sent to an address that only
            `perdure.toml` names: a file in the current directory may be anyone's.
        default_model: For tasks that name none. None takes `PERDURE_CHATGPT_MODEL`, else perdure's
            default for this platform.
        organization: OpenAI's id; None takes `OPENAI_ORG_ID`.
        project: OpenAI's id; None takes `OPENAI_PROJECT_ID`.
        api: `responses`, or `chat` for chat completions, which know stop sequences but neither
            background nor PDF.
        background: Whether responses go on at the platform without us, which is what lets them be
            picked up; True. They are stored there then. `task.options` may say otherwise
            (`background`, `store`).
        connect_timeout: Seconds to wait for a connection; 10.
        read_timeout: Seconds to wait for the first or next part of an answer; 600.
        platform: The platform's name, for those who use several accounts side by side.
        prices: The provider's name in the price table; `openai`.
        settings: What `perdure.toml` says: the arguments above by their names.
    """

    platform = "chatgpt"
    capabilities = Capabilities(
        reattach=True,
        files=frozenset({"text", "image", "pdf"}),
        reasoning=True,
        tools=True,
        schema=True,
    )
    default_model = DEFAULT_MODELS["chatgpt"]
    prices = "openai"

    def __init__(
        self,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        default_model: str | None = None,
        organization: str | None = None,
        project: str | None = None,
        api: str | None = None,
        background: bool | None = None,
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        platform: str = "chatgpt",
        prices: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.platform = platform
        given = Settings(platform, settings, _SETTINGS)
        elsewhere = Settings(platform, None, ())
        self.default_model = (
            given.text("default_model", default_model, "PERDURE_CHATGPT_MODEL")
            or DEFAULT_MODELS["chatgpt"]
        )
        self.prices = given.text("prices", prices) or "openai"
        self._api = given.choice("api", api, ("responses", "chat"))
        self._background = given.flag("background", background, default=True)
        if self._api == "chat":
            self.capabilities = Capabilities(
                files=frozenset({"text", "image"}), reasoning=True, tools=True, schema=True
            )
        elif not self._background:
            self.capabilities = Capabilities(
                files=frozenset({"text", "image", "pdf"}), reasoning=True, tools=True, schema=True
            )
        known = elsewhere.text("base_url", base_url, "OPENAI_BASE_URL")
        told = given.text("base_url", known)
        trusted = known is not None or told is None
        self._endpoint = OpenAIEndpoint(
            url=told or _URL,
            key=given.text("api_key", api_key, *(("OPENAI_API_KEY",) if trusted else ())),
            of_openai=trusted,
            connect_timeout=given.number("connect_timeout", connect_timeout, 10),
            read_timeout=given.number("read_timeout", read_timeout, 600),
            organization=given.text("organization", organization),
            project=given.text("project", project),
        )
        self._clients = PerLoop(self._endpoint.client)
        self._completions = Completions(self._endpoint)
        self._refusal: str | None = None

    def __repr__(self) -> str:
        """Return how it was made, the key left out."""
        return (
            f"{type(self).__name__}({self._endpoint.shown!r}, default_model="
            f"{self.default_model!r}, api={self._api!r}, background={self._background!r}, "
            f"platform={self.platform!r})"
        )

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream one response, or pick one up where it was read up to."""
        self._check_settings()
        # First, whatever the settings are now: asked anew, its answer would come twice.
        if call.resume is not None and call.resume.mode == "reattach":
            stream = self._pick_up(call.resume)
        elif self._api == "chat":
            stream = self._complete(call)
        else:
            stream = self._respond(call)
        async with aclosing(stream):
            async for event in stream:
                yield event

    async def stop(self, response_id: str) -> None:
        """Stop a response that goes on in the background; one that has ended is left as it is.

        Raises:
            PlatformError: It could not be stopped.
        """
        await load_sdk("openai", extra="chatgpt")
        try:
            await self._clients.get().responses.cancel(response_id)
        except reading_errors() as error:
            typed = typed_openai_error(error, self._endpoint)
            if typed.status not in (400, 404, 409):  # over, or gone: there is nothing to stop
                raise typed from error

    def check(self) -> None:
        """Raise `NotConfigured` where the key or the SDK is missing."""
        self._check_settings()
        find_sdk("openai", extra="chatgpt")

    async def close(self) -> None:
        """Close the connections of the running event loop, and the adapter's own engine."""
        await super().close()
        client = self._clients.take()
        if client is not None:
            await client.close()

    def _check_settings(self) -> None:
        if self._endpoint.key is None and not self._endpoint.of_openai:
            raise NotConfigured(
                f"the platform {self.platform!r} has no key: OPENAI_API_KEY is not sent to a "
                "base_url that only perdure.toml names; set OPENAI_BASE_URL, or api_key beside it"
            )
        if self._endpoint.key is None and self._endpoint.url == _URL:
            raise NotConfigured(f"the platform {self.platform!r} has no key: set OPENAI_API_KEY")
        self._endpoint.check()

    # -- chat completions ------------------------------------------------------------------------

    async def _complete(self, call: Call) -> AsyncGenerator[Event, None]:
        check_sizes(call.files)
        messages = chat_messages(call)
        parameters = chat_parameters(call)
        limit = parameters.pop("max_tokens", None)
        if limit is not None:  # its old name, which newer models refuse
            parameters.setdefault("max_completion_tokens", limit)
        schema = call.task.output_schema
        if schema is not None and "response_format" not in call.task.options:
            parameters["response_format"]["json_schema"]["strict"] = is_strict(schema)
        await load_sdk("openai", extra="chatgpt")
        model = call.model or self.default_model or DEFAULT_MODELS["chatgpt"]
        stream = self._completions.stream(self._clients.get(), model, messages, parameters)
        async with aclosing(stream):
            async for event in stream:
                yield event

    # -- responses -------------------------------------------------------------------------------

    async def _respond(self, call: Call) -> AsyncGenerator[Event, None]:
        body = {"input": response_input(call), **response_parameters(call)}
        body["model"] = call.model or self.default_model
        background = wants_background(call, self._background)
        if not background:  # without a word it would be stored there
            body.setdefault("store", False)
        await load_sdk("openai", extra="chatgpt")
        client = self._clients.get()
        try:
            stream, refusal = await self._open(client, body, background)
        except InvalidRequest as error:
            raise _explained(error, call) from error.__cause__
        async with stream:
            await check_streams(stream, self._endpoint)
            reader = ResponseReader(
                stream.response.headers.get("x-request-id"),
                refusal,
                background=background and refusal is None,
                secrets=(self._endpoint.key,),
            )
            async with aclosing(self._read(client, stream, reader)) as events:
                async for event in events:
                    yield event
        yield reader.finish()

    async def _open(
        self, client: AsyncOpenAI, body: dict[str, Any], background: bool
    ) -> tuple[AsyncStream[object], str | None]:
        """Return the opened stream and, where the platform refuses background, its words."""
        if not background:
            return await self._create(client, body), None
        refusal = self._refusal
        if refusal is None:
            try:
                return await self._create(client, {**body, "background": True, "store": True}), None
            except InvalidRequest as error:
                if not _is_about_background(error):
                    raise
                refusal = f"without background, so it can't be picked up: {error.message}"
        stream = await self._create(client, body)
        self._refusal = refusal
        return stream, refusal

    async def _create(self, client: AsyncOpenAI, body: dict[str, Any]) -> AsyncStream[object]:
        return await open_stream(client, "/responses", body, self._endpoint)

    async def _pick_up(self, resume: Resume) -> AsyncGenerator[Event, None]:
        """Go on with a response: by its stream, or by the whole where that can't be had."""
        if not resume.response_id:
            raise InvalidRequest("there is no response to go on with")
        reader = ResponseReader(resume=resume, secrets=(self._endpoint.key,))
        await load_sdk("openai", extra="chatgpt")
        client = self._clients.get()
        stream = await self._reopen(client, resume.response_id, Cursor.parse(resume.cursor))
        if stream is not None:
            async with stream, aclosing(self._read(client, stream, reader)) as events:
                async for event in events:
                    yield event
        if not reader.ended:
            whole = await self._whole(client, resume.response_id, wait=stream is None)
            for event in reader.catch_up(whole):
                yield event
        yield reader.finish()

    async def _reopen(
        self, client: AsyncOpenAI, response_id: str, cursor: Cursor
    ) -> AsyncStream[ResponseStreamEvent] | None:
        """Return the stream after the cursor; None where the platform doesn't stream it again."""
        try:
            stream = await client.responses.retrieve(
                response_id, stream=True, starting_after=cursor.sequence
            )
        except sdk_errors() as error:
            typed = self._typed(error, response_id)
            if not isinstance(typed, InvalidRequest):
                raise typed from error
            return None
        if "event-stream" in stream.response.headers.get("content-type", "").lower():
            return stream
        await stream.close()
        return None

    async def _whole(self, client: AsyncOpenAI, response_id: str, *, wait: bool) -> Response:
        """Return the response as it is, or, with ``wait``, as it is when it has ended."""
        pause = 0.25
        while True:
            try:
                response = await client.responses.retrieve(response_id)
            except reading_errors() as error:
                raise self._typed(error, response_id) from error
            if not wait or text_in(response, "status") not in _UNDER_WAY:
                return response
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _read(
        self,
        client: AsyncOpenAI,
        stream: AsyncStream[Any],
        reader: ResponseReader,
    ) -> AsyncGenerator[Event, None]:
        """Yield what the stream says, up to its end or the platform's end marker."""
        while not reader.ended and (item := await self._next(stream)) is not _END:
            try:
                for event in reader.feed(item):
                    yield event
            except PlatformError as error:
                if reader.reattachable and not error.response_over:
                    error.response_over = await self._is_over(client, reader.response_id or "")
                raise
        if reader.ended:  # what follows says nothing; read to its end, the connection is kept
            with contextlib.suppress(TimeoutError, *reading_errors()):
                async with asyncio.timeout(0.2):
                    while await anext(stream, _END) is not _END:
                        pass

    async def _next(self, stream: AsyncStream[Any]) -> object:
        try:
            return await anext(stream, _END)
        except reading_errors() as error:
            raise typed_openai_error(error, self._endpoint) from error

    async def _is_over(self, client: AsyncOpenAI, response_id: str) -> bool:
        """Return whether a response whose stream reported an error has ended with it."""
        try:
            async with asyncio.timeout(self._endpoint.connect_timeout):
                whole = await client.responses.retrieve(response_id)
        except reading_errors() as error:
            return typed_openai_error(error, self._endpoint).status == 404
        except TimeoutError:
            return False
        return text_in(whole, "status") in _OVER

    def _typed(self, error: Exception, response_id: str) -> PlatformError:
        """Return the typed form of an error in asking for a response."""
        typed = typed_openai_error(error, self._endpoint)
        if typed.status != 404:
            return typed
        return StreamTruncated(
            f"the response {response_id!r} can't be picked up: {typed.message}",
            status=404,
            request_id=typed.request_id,
            response_over=True,
        )


def _is_about_background(error: PlatformError) -> bool:
    words = error.message.lower()
    return error.status in (400, 403, 404, 422) and ("background" in words or "store" in words)


def _explained(error: InvalidRequest, call: Call) -> InvalidRequest:
    """Return the platform's refusal with what to do about it."""
    limits = call.task.limits
    hints = {
        "temperature": limits.temperature is not None,
        "reasoning": limits.reasoning_effort is not None,
    }
    for word, given in hints.items():
        if given and error.status in (400, 422) and word in error.message:
            name = "reasoning_effort" if word == "reasoning" else word
            return InvalidRequest(
                f"{error.message.rstrip('.')}: leave {name} out for this model",
                status=error.status,
                request_id=error.request_id,
            )
    return error
