"""The adapter to OpenAI-compatible servers, against a real model that runs on this machine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from perdure.adapter import Call, Resume
from perdure.errors import InvalidRequest
from perdure.events import Accepted, Chunk, Completed, Event
from perdure.task import Message, Task, TaskConstraints
from perdure.testing import AdapterContract
from perdure_adapters import CompatibleAdapter
from servers.llama import NAME, LlamaServer, llama_server

# One process runs them all: the model is loaded once, and its two slots are known to be idle.
pytestmark = [pytest.mark.model, pytest.mark.xdist_group("model")]


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    """A real model behind llama-server."""
    with llama_server() as server:
        yield server


def a_call(prompt: str, *, max_tokens: int = 24, resume: Resume | None = None) -> Call:
    """Return a call with a short answer that is the same every time."""
    constraints = TaskConstraints(max_tokens=max_tokens, temperature=0)
    task = Task(prompt=prompt, constraints=constraints, options={"seed": 1})
    return Call(task=task, task_id="t", resume=resume)


def endless() -> Call:
    """Return a call that the model would take minutes to answer."""
    # Without `ignore_eos` a small model may stop after one sentence.
    task = Task(
        prompt="Tell a very long story about the sea.",
        constraints=TaskConstraints(max_tokens=3000),
        options={"ignore_eos": True},
    )
    return Call(task=task, task_id="t")


async def collect(adapter: CompatibleAdapter, call: Call) -> list[Event]:
    """Return all events of a call."""
    return [event async for event in adapter.run(call)]


def text_of(events: list[Event]) -> str:
    """Return the joined text."""
    return "".join(event.text for event in events if isinstance(event, Chunk))


async def until_idle(llama: LlamaServer, seconds: float = 5) -> float:
    """Return after how many seconds the server generates nothing any more."""
    began = time.monotonic()
    while await asyncio.to_thread(lambda: llama.busy):
        assert time.monotonic() - began < seconds, "the server is still generating"
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def test_one_process_runs_them_all(request: pytest.FixtureRequest) -> None:
    """The group is more than a mark: versions of pytest and pytest-xdist that don't fit ignore it.

    Two servers at once wait for each other's processors, and take ten times as long.
    """
    distributed = request.config.getoption("loadgroup", default=False)
    assert request.node.nodeid.endswith("@model") or not distributed


async def test_it_streams(llama: LlamaServer) -> None:
    """A real answer comes in pieces, with the model's name, its tokens and why it ended."""
    async with CompatibleAdapter(llama.url) as adapter:
        events = await collect(adapter, a_call("What is the capital of France?"))
    accepted, end = events[0], events[-1]
    assert isinstance(accepted, Accepted)
    assert accepted.model == NAME
    assert len([event for event in events if isinstance(event, Chunk)]) > 3
    assert text_of(events).strip()
    assert isinstance(end, Completed)
    assert end.usage is not None
    assert end.usage.input_tokens
    assert 0 < (end.usage.output_tokens or 0) <= 24
    assert end.finish_reason in {"stop", "length"}


async def test_a_limit_ends_it(llama: LlamaServer) -> None:
    """`max_tokens` is kept, and named as the reason."""
    async with CompatibleAdapter(llama.url) as adapter:
        end = (await collect(adapter, a_call("Count from 1 to 100.", max_tokens=5)))[-1]
    assert isinstance(end, Completed)
    assert end.finish_reason == "length"
    assert end.usage is not None
    assert end.usage.output_tokens == 5


async def test_the_same_question_gives_the_same_answer(llama: LlamaServer) -> None:
    """Temperature and options reach the model."""
    async with CompatibleAdapter(llama.url) as adapter:
        texts = {text_of(await collect(adapter, a_call("Name three colours."))) for _ in range(2)}
    assert len(texts) == 1


async def test_a_conversation(llama: LlamaServer) -> None:
    """System prompt and earlier turns reach the model: it counts their tokens."""
    question = "What is my name?"
    turns = (
        Message(role="user", content="My name is Ada."),
        Message(role="assistant", content="Hello Ada."),
        Message(role="user", content=question),
    )
    brief = TaskConstraints(max_tokens=1)
    tasks = [
        Task(prompt=question, system="Answer in one sentence.", constraints=brief),
        Task(messages=turns, system="Answer in one sentence.", constraints=brief),
        Task(
            messages=turns,
            system="Answer in one sentence.",
            context={"place": "a ship"},
            constraints=brief,
        ),
    ]
    counted: list[int] = []
    async with CompatibleAdapter(llama.url) as adapter:
        for task in tasks:
            end = (await collect(adapter, Call(task=task, task_id="t")))[-1]
            assert isinstance(end, Completed)
            assert end.usage is not None
            counted.append(end.usage.input_tokens or 0)
    assert 0 < counted[0] < counted[1] < counted[2]


async def test_it_goes_on_from_a_partial_answer(llama: LlamaServer) -> None:
    """The server takes a conversation that ends with the request to go on."""
    resume = Resume("continue", output="The three primary colours are red,")
    call = a_call("Name the three primary colours.", resume=resume)
    async with CompatibleAdapter(llama.url) as adapter:
        events = await collect(adapter, call)
    assert isinstance(events[-1], Completed)
    assert text_of(events)


async def test_cancelling_stops_the_server(llama: LlamaServer) -> None:
    """A cancelled call closes its connection, and the server stops long before its end."""
    async with CompatibleAdapter(llama.url) as adapter:
        begun = asyncio.Event()

        async def read() -> None:
            async for event in adapter.run(endless()):
                if isinstance(event, Chunk):
                    begun.set()

        reading = asyncio.create_task(read())
        await asyncio.wait_for(begun.wait(), 60)
        assert await asyncio.to_thread(lambda: llama.busy) == 1
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until_idle(llama)
        # And it is idle because it stopped, not because it was done.
        before = await asyncio.to_thread(lambda: llama.tokens)
        await collect(adapter, a_call("Say yes.", max_tokens=2))
        assert await asyncio.to_thread(lambda: llama.tokens) - before <= 2
        assert before < 3000


async def test_a_reader_that_leaves_stops_the_server(llama: LlamaServer) -> None:
    """Closing the stream does the same, without a cancellation."""
    async with CompatibleAdapter(llama.url) as adapter:
        stream = adapter.run(endless())
        async for event in stream:
            if isinstance(event, Chunk):
                break
        await stream.aclose()
        await until_idle(llama)


async def test_more_calls_than_slots(llama: LlamaServer) -> None:
    """Calls wait at the server for their turn, and each gets its own answer."""
    async with CompatibleAdapter(llama.url) as adapter:
        calls = [a_call(f"Repeat the number {n}.", max_tokens=8) for n in range(6)]
        answers = await asyncio.gather(*(collect(adapter, call) for call in calls))
    assert all(isinstance(events[-1], Completed) for events in answers)
    assert all(text_of(events) for events in answers)


async def test_a_prompt_that_is_too_long(llama: LlamaServer) -> None:
    """What does not fit into the context is refused at once, as an invalid request."""
    async with CompatibleAdapter(llama.url) as adapter:
        with pytest.raises(InvalidRequest) as caught:
            await collect(adapter, a_call("word " * 20_000))
    assert caught.value.status == 400


class TestContract(AdapterContract):
    """With a real model behind it the adapter keeps the contract too."""

    patience = 60.0
    at_once = 4

    @pytest.fixture(autouse=True)
    def _server(self, llama: LlamaServer) -> None:
        self.llama = llama

    def make_adapter(self) -> CompatibleAdapter:
        """Return a new adapter."""
        return CompatibleAdapter(self.llama.url)

    def success(self) -> Call:
        """Return a call with a short answer."""
        return a_call("Say hello to the world.", max_tokens=12)

    def endless(self) -> Call:
        """Return a call that goes on for long."""
        return endless()

    def open_calls(self) -> int:
        """Return how many answers the server is generating."""
        return self.llama.busy
