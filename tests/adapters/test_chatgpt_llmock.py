"""ChatGPT against llmock, which nobody here wrote, and its verdict on us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from responding import run, run_to_error
from yielded import accepted_of, end_of, text_of

from perdure import Engine, Task, TaskConstraints
from perdure.adapter import Call
from perdure.errors import ConnectionLost, Overloaded, RateLimited, StreamTruncated
from perdure.policy import RetryPolicy
from perdure.settings import WorkerSettings
from perdure.task import Tool
from perdure_adapters import ChatGPTAdapter
from servers.llmock import LLMockServer, fail, reply, stream_fault

TEXT = "Seven words that somebody else's server says."


def asking(**fields: Any) -> Call:
    """Return a call."""
    return Call(Task(prompt="Say something.", **fields), "t", model="gpt-6.2-sol")


@pytest.mark.parametrize("how", [{}, {"background": False}, {"api": "chat"}])
class TestEachWay:
    """In the background (which llmock does not know), plainly, and chat completions."""

    async def test_text(self, llmock_server: LLMockServer, how: dict[str, Any]) -> None:
        """The text is what it says, with its tokens; nothing claims that it can be picked up."""
        llmock_server.script(reply(TEXT))
        events = await run(llmock_server.openai, asking(), **how)
        assert text_of(events) == TEXT
        assert end_of(events).finish_reason == "stop"
        usage = end_of(events).usage
        assert usage is not None
        assert usage.output_tokens
        assert not accepted_of(events).reattachable

    async def test_tool_calls(self, llmock_server: LLMockServer, how: dict[str, Any]) -> None:
        """They are whole lines."""
        llmock_server.script(reply(tool_calls=[{"name": "look", "arguments": {"far": 3}}]))
        events = await run(llmock_server.openai, asking(tools=(Tool(name="look"),)), **how)
        line = text_of(events, "tool_call")
        assert '"name":"look"' in line
        assert line.endswith("}\n")
        assert end_of(events).finish_reason == "tool_calls"

    @pytest.mark.parametrize("kind", ["truncate", "disconnect", "malformed"])
    @pytest.mark.parametrize("after", range(1, 4))
    async def test_broken_streams(
        self, llmock_server: LLMockServer, how: dict[str, Any], kind: Any, after: int
    ) -> None:
        """None of them is a success."""
        llmock_server.script(stream_fault(kind, after_chunks=after), reply(TEXT))
        seen, error = await run_to_error(llmock_server.openai, asking(), **how)
        assert isinstance(error, (StreamTruncated, ConnectionLost))
        assert TEXT.startswith(text_of(seen))

    async def test_statuses(self, llmock_server: LLMockServer, how: dict[str, Any]) -> None:
        """429 with its wait, 503."""
        llmock_server.script(fail(429, retry_after=3))
        _, error = await run_to_error(llmock_server.openai, asking(), **how)
        assert (type(error), error.retry_after) == (RateLimited, 3)
        llmock_server.reset()
        llmock_server.script(fail(503))
        assert type((await run_to_error(llmock_server.openai, asking(), **how))[1]) is Overloaded

    async def test_its_verdict(
        self, llmock_server: LLMockServer, how: dict[str, Any], make_database: Callable[[], Path]
    ) -> None:
        """Through an engine, faults are coped with as llmock thinks right."""
        llmock_server.script(
            fail(429, retry_after=1),
            stream_fault("truncate", after_chunks=3, times=2),
            reply(TEXT, times=9),
        )
        task = Task(
            prompt="Cope.", platform="chatgpt", constraints=TaskConstraints(model="gpt-6.2-sol")
        )
        adapter = ChatGPTAdapter(base_url=llmock_server.openai, api_key="any", **how)
        # llmock expects a client that waits a little longer each time.
        settings = WorkerSettings(retry=RetryPolicy(base_seconds=0.5))
        async with Engine.open(make_database(), adapters=[adapter], settings=settings) as engine:
            result = await engine.get_result(await engine.submit_task(task), timeout=30)
        assert (result.success, result.output) == (True, TEXT)
        llmock_server.assert_resilient()
