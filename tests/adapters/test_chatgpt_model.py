"""ChatGPT's adapter against a real model that runs on this machine, through its Responses API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from yielded import accepted_of, end_of, text_of

from perdure.adapter import Call, Resume
from perdure.events import Chunk, Event
from perdure.task import Message, Task, TaskConstraints
from perdure_adapters import ChatGPTAdapter
from servers.llama import LlamaServer, llama_server

# As in the other files that need it: one process runs them all.
pytestmark = [pytest.mark.model, pytest.mark.xdist_group("model")]


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    """A real model behind llama-server."""
    with llama_server() as server:
        yield server


@pytest.fixture(params=["responses", "chat"])
def adapter(llama: LlamaServer, request: pytest.FixtureRequest) -> ChatGPTAdapter:
    """An adapter to it, by each API."""
    return ChatGPTAdapter(base_url=llama.url, api=request.param)


async def collect(adapter: ChatGPTAdapter, call: Call) -> list[Event]:
    """Return all events of a call."""
    return [event async for event in adapter.run(call)]


def until_idle(llama: LlamaServer, seconds: float = 5) -> None:
    """Wait until the server generates nothing any more."""
    latest = time.monotonic() + seconds
    while llama.busy:
        assert time.monotonic() < latest, "the server is still generating"
        time.sleep(0.02)


def a_call(max_tokens: int = 16, resume: Resume | None = None) -> Call:
    """Return a call of some turns."""
    turns = (
        Message(role="user", content="My name is Ada."),
        Message(role="assistant", content="Hello Ada."),
        Message(role="user", content="Say hello to the world."),
    )
    limits = TaskConstraints(max_tokens=max_tokens, temperature=0)
    task = Task(messages=turns, system="Answer briefly.", constraints=limits)
    return Call(task, "t", model="smollm2", resume=resume)


async def test_it_streams(adapter: ChatGPTAdapter) -> None:
    """A real answer comes in pieces, with its tokens; it works without background."""
    async with adapter:
        events = await collect(adapter, a_call())
        assert not accepted_of(events).reattachable
        assert len([event for event in events if isinstance(event, Chunk)]) > 2
        assert text_of(events).strip()
        usage = end_of(events).usage
        assert usage is not None
        assert usage.input_tokens
        assert 0 < (usage.output_tokens or 0) <= 16
        resume = Resume("continue", output=text_of(events))
        assert end_of(await collect(adapter, a_call(resume=resume)))


async def test_cancelling_stops_the_server(adapter: ChatGPTAdapter, llama: LlamaServer) -> None:
    """A cancelled call closes its connection, and the model stops long before its end."""
    task = Task(
        prompt="Tell a very long story about the sea.",
        constraints=TaskConstraints(max_tokens=3000),
        options={"ignore_eos": True},
    )
    async with adapter:
        begun = asyncio.Event()

        async def read() -> None:
            async for event in adapter.run(Call(task, "t", model="smollm2")):
                if isinstance(event, Chunk):
                    begun.set()

        before = await asyncio.to_thread(lambda: llama.tokens)
        reading = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 60)
        assert await asyncio.to_thread(lambda: llama.busy) == 1
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.to_thread(until_idle, llama)
        assert await asyncio.to_thread(lambda: llama.tokens) - before < 1000
