"""The adapter to Claude, against a real model that runs on this machine and speaks Messages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from yielded import drain, end_of, text_of

from perdure.adapter import Call, Resume
from perdure.errors import InvalidRequest
from perdure.events import Accepted, Chunk, UsageReported
from perdure.task import Message, Task, TaskConstraints
from perdure.testing import AdapterContract
from perdure_adapters import ClaudeAdapter
from servers.llama import NAME, LlamaServer, llama_server

# One process runs them all: the model is loaded once, and its two slots are known to be idle.
pytestmark = [pytest.mark.model, pytest.mark.xdist_group("model")]


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    """A real model behind llama-server."""
    with llama_server() as server:
        yield server


def an_adapter(llama: LlamaServer) -> ClaudeAdapter:
    """Return an adapter to the model."""
    return ClaudeAdapter(base_url=llama.url, default_model=NAME)


def a_call(prompt: str, *, max_tokens: int = 24, resume: Resume | None = None) -> Call:
    """Return a call with a short answer that is the same every time."""
    constraints = TaskConstraints(max_tokens=max_tokens, temperature=0)
    return Call(task=Task(prompt=prompt, constraints=constraints), task_id="t", resume=resume)


def endless() -> Call:
    """Return a call that the model would take minutes to answer."""
    # Without `ignore_eos` a small model may stop after one sentence.
    task = Task(
        prompt="Tell a very long story about the sea.",
        constraints=TaskConstraints(max_tokens=3000),
        options={"ignore_eos": True},
    )
    return Call(task=task, task_id="t")


async def until_idle(llama: LlamaServer, seconds: float = 5) -> None:
    """Wait until the server generates nothing any more."""
    began = time.monotonic()
    while await asyncio.to_thread(lambda: llama.busy):
        assert time.monotonic() - began < seconds, "the server is still generating"
        await asyncio.sleep(0.02)


async def test_it_streams(llama: LlamaServer) -> None:
    """A real answer comes in pieces, with the model's name, its tokens and why it ended."""
    async with an_adapter(llama) as adapter:
        seen = await drain(adapter, a_call("What is the capital of France?"))
    assert isinstance(seen[0], Accepted)
    assert seen[0].model == NAME
    assert seen[0].response_id
    assert len([event for event in seen if isinstance(event, Chunk)]) > 3
    assert text_of(seen).strip()
    end = end_of(seen)
    assert end.usage is not None
    assert end.usage.input_tokens
    assert 0 < (end.usage.output_tokens or 0) <= 24
    assert end.finish_reason in {"stop", "length"}
    assert any(isinstance(event, UsageReported) for event in seen)


async def test_a_limit_ends_it(llama: LlamaServer) -> None:
    """`max_tokens` is kept, and named as the reason."""
    async with an_adapter(llama) as adapter:
        end = end_of(await drain(adapter, a_call("Count from 1 to 100.", max_tokens=5)))
    assert (end.finish_reason, end.platform_finish_reason) == ("length", "max_tokens")
    assert end.usage is not None
    assert end.usage.output_tokens == 5


async def test_the_same_question_gives_the_same_answer(llama: LlamaServer) -> None:
    """The temperature reaches the model."""
    async with an_adapter(llama) as adapter:
        texts = {text_of(await drain(adapter, a_call("Name three colours."))) for _ in range(2)}
    assert len(texts) == 1


async def test_a_stop_sequence(llama: LlamaServer) -> None:
    """The model stops at it, and it is no part of the output."""
    limits = TaskConstraints(max_tokens=40, temperature=0, stop_sequences=("\n", ",", "."))
    call = Call(task=Task(prompt="Count: 1, 2, 3.", constraints=limits), task_id="t")
    async with an_adapter(llama) as adapter:
        seen = await drain(adapter, call)
    assert end_of(seen).finish_reason == "stop"
    assert not {"\n", ",", "."} & set(text_of(seen))


async def test_a_conversation(llama: LlamaServer) -> None:
    """System prompt, earlier turns and facts reach the model: it counts their tokens."""
    question = "What is my name?"
    turns = (
        Message(role="user", content="My name is Ada."),
        Message(role="assistant", content="Hello Ada."),
        Message(role="user", content=question),
    )
    brief = TaskConstraints(max_tokens=1)
    system = "Answer in one sentence."
    tasks = [
        Task(prompt=question, system=system, constraints=brief),
        Task(messages=turns, system=system, constraints=brief),
        Task(messages=turns, system=system, context={"place": "a ship"}, constraints=brief),
    ]
    counted: list[int] = []
    async with an_adapter(llama) as adapter:
        for task in tasks:
            end = end_of(await drain(adapter, Call(task=task, task_id="t")))
            assert end.usage is not None
            counted.append(end.usage.input_tokens or 0)
    assert 0 < counted[0] < counted[1] < counted[2]


async def test_it_goes_on_from_a_partial_answer(llama: LlamaServer) -> None:
    """The server takes a conversation that ends with the request to go on."""
    resume = Resume("continue", output="The three primary colours are red,")
    call = a_call("Name the three primary colours.", resume=resume)
    async with an_adapter(llama) as adapter:
        seen = await drain(adapter, call)
    assert end_of(seen)
    assert text_of(seen)


async def test_cancelling_stops_the_server(llama: LlamaServer) -> None:
    """A cancelled call closes its connection, and the server stops long before its end."""
    async with an_adapter(llama) as adapter:
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
        await drain(adapter, a_call("Say yes.", max_tokens=2))
        assert await asyncio.to_thread(lambda: llama.tokens) - before <= 2
        assert before < 3000


async def test_a_reader_that_leaves_stops_the_server(llama: LlamaServer) -> None:
    """Closing the stream does the same, without a cancellation."""
    async with an_adapter(llama) as adapter:
        stream = adapter.run(endless())
        async for event in stream:
            if isinstance(event, Chunk):
                break
        await stream.aclose()
        await until_idle(llama)


async def test_a_prompt_that_is_too_long(llama: LlamaServer) -> None:
    """What does not fit into the context is refused at once, as an invalid request."""
    async with an_adapter(llama) as adapter:
        with pytest.raises(InvalidRequest) as caught:
            await drain(adapter, a_call("word " * 20_000))
    assert caught.value.status == 400


class TestContract(AdapterContract):
    """With a real model behind it the adapter keeps the contract too."""

    patience = 60.0
    at_once = 4

    @pytest.fixture(autouse=True)
    def _server(self, llama: LlamaServer) -> None:
        self.llama = llama

    def make_adapter(self) -> ClaudeAdapter:
        """Return a new adapter."""
        return an_adapter(self.llama)

    def success(self) -> Call:
        """Return a call with a short answer."""
        return a_call("Say hello to the world.", max_tokens=12)

    def endless(self) -> Call:
        """Return a call that goes on for long."""
        return endless()

    def open_calls(self) -> int:
        """Return how many answers the server is generating."""
        return self.llama.busy
