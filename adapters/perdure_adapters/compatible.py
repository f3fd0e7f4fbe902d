"""Any server that speaks OpenAI's chat completions: Ollama, llama.cpp, vLLM and many more.

Streams through the `openai` SDK, which is imported when the first call is made. A stream without
a finish reason is `StreamTruncated`; the SDK's own retries are off, since each attempt belongs in
the log.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from perdure.adapter import Call, Capabilities
from perdure.errors import InvalidRequest, NotConfigured
from perdure.events import Event
from perdure_adapters._chat import chat_messages, chat_parameters
from perdure_adapters._completions import Completions
from perdure_adapters._openai import OpenAIEndpoint, reading_errors, typed_openai_error
from perdure_adapters._sdk import PerLoop, find_sdk, load_sdk
from perdure_adapters._settings import Settings
from perdure_adapters.base import AsyncBasePlatformAdapter

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["CompatibleAdapter"]

_SETTINGS: Final = (
    *("api_key", "base_url", "default_model", "connect_timeout", "read_timeout", "prices"),
)


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
        connect_timeout: Seconds to wait for a connection; 10.
        read_timeout: Seconds to wait for the first or next part of an answer; 300.
        platform: The platform's name, for those who use several servers side by side.
        prices: The provider's name in the price table; None leaves costs unknown.
        settings: What `perdure.toml` says: the arguments above by their names. One more server
            with a name of its own reads `PERDURE_<NAME>_BASE_URL` and so on. An address from
            there gets no key of the environment.
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
        connect_timeout: float | None = None,
        read_timeout: float | None = None,
        platform: str = "compatible",
        prices: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.platform = platform
        given = Settings(platform, settings, _SETTINGS)
        # The variables are for the platform of that name; one more server has its own settings.
        own = platform == "compatible"
        mine = "PERDURE_COMPATIBLE_" if own else f"PERDURE_{platform.upper()}_"
        self.default_model = given.text("default_model", default_model, f"{mine}MODEL")
        self.prices = given.text("prices", prices)
        url = given.text("base_url", base_url, f"{mine}BASE_URL")
        of_openai = own and url is None
        named = given.file_names_address(base_url, f"{mine}BASE_URL")
        key = given.text("api_key", api_key, *(() if named else (f"{mine}API_KEY",)))
        self._variable = f"{mine}BASE_URL"
        self._endpoint = OpenAIEndpoint(
            url=given.text("base_url", url, *(("OPENAI_BASE_URL",) if own else ())),
            key=given.text("api_key", key, *(("OPENAI_API_KEY",) if of_openai else ())),
            of_openai=of_openai,
            connect_timeout=given.number("connect_timeout", connect_timeout, 10),
            read_timeout=given.number("read_timeout", read_timeout, 300),
        )
        self._clients = PerLoop(self._endpoint.client)
        self._listed_model: str | None = None
        self._completions = Completions(self._endpoint)

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
        stream = self._completions.stream(client, model, messages, parameters)
        async with aclosing(stream):
            async for event in stream:
                yield event

    def check(self) -> None:
        """Raise `NotConfigured` where the server's address or the SDK is missing."""
        self._check_settings()
        find_sdk("openai", extra="compatible")

    def _check_settings(self) -> None:
        if self._endpoint.url is None:
            raise NotConfigured(
                f"the platform {self.platform!r} has no server: set {self._variable}, "
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
