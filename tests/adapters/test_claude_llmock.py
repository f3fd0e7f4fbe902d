"""Claude against llmock: a server that nobody here wrote, and its verdict on the client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from messaging import a_call, an_adapter
from yielded import drain, end_of, text_of

from perdure import Engine, Result, Task, TaskConstraints, Tool
from perdure.errors import (
    AuthenticationFailed,
    ConnectionLost,
    InvalidRequest,
    Overloaded,
    PlatformError,
    PlatformTimeout,
    RateLimited,
    StreamTruncated,
)
from perdure.events import Chunk, Event
from servers.llmock import LLMockServer, delay, fail, reply, stream_fault

SAID = "The first word and the last, with a few of them in between."


async def collected(server: LLMockServer, **how: Any) -> list[Event]:
    """Return the events of a call."""
    async with an_adapter(server.anthropic, **how) as adapter:
        return await drain(adapter, a_call())


async def test_it_streams(llmock_server: LLMockServer) -> None:
    """The scripted words come in pieces, with their tokens and an end."""
    llmock_server.script(reply(SAID))
    seen = await collected(llmock_server)
    assert text_of(seen) == SAID
    assert len([e for e in seen if isinstance(e, Chunk)]) > 5
    end = end_of(seen)
    assert end.finish_reason == "stop"
    assert end.usage is not None
    assert end.usage.input_tokens
    assert end.usage.output_tokens
    (request,) = llmock_server.requests
    assert (request["path"], request["completed"]) == ("/anthropic/v1/messages", True)


async def test_tool_calls(llmock_server: LLMockServer) -> None:
    """Offered tools are called, several at once."""
    calls = [
        {"name": "weather", "arguments": {"city": "Ulm"}},
        {"name": "now", "arguments": {}},
    ]
    llmock_server.script(reply("Wait.", tool_calls=calls, finish_reason="tool_calls"))
    tools = (Tool(name="weather"), Tool(name="now"))
    async with an_adapter(llmock_server.anthropic) as adapter:
        seen = await drain(adapter, a_call(tools=tools))
    assert end_of(seen).finish_reason == "tool_calls"
    assert text_of(seen) == "Wait."
    written = text_of(seen, "tool_call").splitlines()
    assert len(written) == 2
    assert '"name":"weather"' in written[0]
    assert '"Ulm"' in written[0]


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        (kind, after)
        for kind in ("truncate", "disconnect", "malformed")
        for after in range(16)
        if (kind, after) != ("malformed", 2)  # a ping, of which nobody reads more than its name
    ],
)
async def test_a_broken_stream(llmock_server: LLMockServer, kind: Any, after: int) -> None:
    """Wherever and however it breaks: a retryable error, never a success."""
    llmock_server.script(stream_fault(kind, after_chunks=after), reply(SAID))
    seen: list[Event] = []
    async with an_adapter(llmock_server.anthropic) as adapter:
        with pytest.raises((StreamTruncated, ConnectionLost)):
            await drain(adapter, a_call(), seen)
    assert SAID.startswith(text_of(seen))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, AuthenticationFailed),
        (403, AuthenticationFailed),
        (404, InvalidRequest),
        (429, RateLimited),
        (500, Overloaded),
        (503, Overloaded),
        (529, Overloaded),
    ],
)
async def test_statuses(
    llmock_server: LLMockServer, status: int, kind: type[PlatformError]
) -> None:
    """Each is its error, asked for once; the wait that is asked for is told."""
    llmock_server.script(fail(status, retry_after=3, message="not now"))
    with pytest.raises(kind) as caught:
        await collected(llmock_server)
    assert caught.value.status == status
    assert "not now" in caught.value.message
    assert caught.value.retry_after == (3 if caught.value.retryable else None)
    assert len(llmock_server.requests) == 1


async def test_a_stall(llmock_server: LLMockServer) -> None:
    """A stream that falls silent is given up after the time to read."""
    llmock_server.script(stream_fault("stall", after_chunks=3, stall_seconds=1), reply(SAID))
    with pytest.raises(PlatformTimeout):
        await collected(llmock_server, read_timeout=0.3)


async def test_a_slow_first_word(llmock_server: LLMockServer) -> None:
    """It is waited for."""
    llmock_server.script(delay(0.3), delay(0.3, first_token=True), reply(SAID))
    assert text_of(await collected(llmock_server)) == SAID


class TestVerdict:
    """The engine's attempts, judged."""

    async def run(self, server: LLMockServer, database: Path) -> Result:
        """Return the result of one task, run by an engine."""
        adapter = an_adapter(server.anthropic, read_timeout=0.5)
        async with Engine.open(f"sqlite:///{database}", adapters=[adapter]) as engine:
            limits = TaskConstraints(max_attempts=4)
            task = Task(prompt="Say it.", platform="claude", constraints=limits)
            return await engine.get_result(await engine.submit_task(task), timeout=60)

    @pytest.mark.parametrize(
        ("faults", "attempts"),
        [
            ([fail(429, retry_after=0.4)], 2),
            ([fail(529, times=2)], 3),
            ([stream_fault("truncate", after_chunks=4)], 2),
            ([stream_fault("disconnect", after_chunks=4)], 2),
            ([stream_fault("malformed", after_chunks=4)], 2),
            ([stream_fault("stall", after_chunks=4, stall_seconds=2)], 2),
        ],
    )
    async def test_it_gets_there(
        self,
        llmock_server: LLMockServer,
        make_database: Callable[[], Path],
        faults: list[dict[str, Any]],
        attempts: int,
    ) -> None:
        """Faults that pass are got over, with the waits asked for, and nothing is doubled."""
        llmock_server.script(*faults, reply(SAID, times=9))
        result = await self.run(llmock_server, make_database())
        assert (result.success, result.output, result.attempts) == (True, SAID, attempts)
        assert len(llmock_server.requests) == attempts
        llmock_server.assert_resilient()

    async def test_it_gives_up(
        self, llmock_server: LLMockServer, make_database: Callable[[], Path]
    ) -> None:
        """What no repetition helps is asked once."""
        llmock_server.script(fail(400, times=9, message="no"))
        result = await self.run(llmock_server, make_database())
        assert (result.success, result.error_class) == (False, "InvalidRequest")
        assert len(llmock_server.requests) == 1
        llmock_server.assert_resilient()
