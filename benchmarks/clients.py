"""The three SDKs, bare and through the engine, against `benchmarks.chat_server`."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any, Final, NamedTuple, cast

from perdure.adapter import Adapter

__all__ = ["CLIENTS", "Client", "usable"]

Ask = Callable[[Callable[[str], None]], Awaitable[None]]
"""Stream one answer and call back with each piece of text."""


class Client(NamedTuple):
    """One SDK.

    Attributes:
        name: Of the SDK, as it is imported.
        platform: Of the adapter that uses it.
        bare: Makes, from the server's address, the client and how to ask it and close it.
        adapter: Makes the adapter from the server's address.
        deltas: How many an answer has: fewer where the bare SDK takes long for each.
    """

    name: str
    platform: str
    bare: Callable[[str], tuple[Ask, Callable[[], Awaitable[None]]]]
    adapter: Callable[[str], Adapter]
    deltas: int = 200


def _openai(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    async def ask(on_text: Callable[[str], None]) -> None:
        stream = await client.chat.completions.create(
            model="bench",
            messages=[{"role": "user", "content": "Question"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                on_text(chunk.choices[0].delta.content)

    return ask, client.close


def _compatible(address: str) -> Adapter:
    from perdure_adapters.compatible import CompatibleAdapter

    return CompatibleAdapter(f"{address}/v1", api_key="none", default_model="bench")


def _anthropic(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    from anthropic import AsyncAnthropic

    client = AsyncAnthropic(base_url=address, api_key="none", max_retries=0)

    async def ask(on_text: Callable[[str], None]) -> None:
        stream = await client.messages.create(
            model="bench",
            max_tokens=4096,
            messages=[{"role": "user", "content": "Question"}],
            stream=True,
        )
        async for event in stream:
            if event.type == "content_block_delta" and event.delta.type == "text_delta":
                on_text(event.delta.text)

    return ask, client.close


def _claude(address: str) -> Adapter:
    from perdure_adapters.claude import ClaudeAdapter

    return ClaudeAdapter(base_url=address, api_key="none", default_model="bench")


def _google(address: str) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    from google import genai
    from google.genai import types

    once = types.HttpRetryOptions(attempts=1)
    options = types.HttpOptions(base_url=address, retry_options=once)
    client = genai.Client(vertexai=False, api_key="none", http_options=options)

    async def ask(on_text: Callable[[str], None]) -> None:
        interactions = cast("Any", client.aio.interactions)
        stream = await interactions.create(
            model="bench",
            input="Question",
            stream=True,
            store=False,
            automatic_continuation=False,
        )
        async for event in stream:
            if event.event_type == "step.delta" and event.delta.type == "text":
                on_text(event.delta.text)

    return ask, client.aio.aclose


def _gemini(address: str) -> Adapter:
    from perdure_adapters.gemini import GeminiAdapter

    return GeminiAdapter(base_url=address, api_key="none", default_model="bench", background=False)


CLIENTS: Final = (
    Client("openai", "compatible", _openai, _compatible),
    Client("anthropic", "claude", _anthropic, _claude),
    Client("google.genai", "gemini", _google, _gemini, deltas=50),
)


def usable() -> list[Client]:
    """Return the SDKs that are installed."""
    return [client for client in CLIENTS if _is_installed(client.name)]


def _is_installed(name: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # what it is in isn't there, either
        return find_spec(name) is not None
    return False
