"""Tasks that an engine runs on Claude: what the log and the result hold."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from messaging import ANSWER, KEY, SAID, an_adapter
from pydantic import BaseModel

from perdure import Engine, Result, Task, TaskConstraints, ToolCall
from servers.messages import MessagesServer


class City(BaseModel):
    """An answer with fields."""

    name: str
    people: int


@pytest.fixture
async def engine(
    messages_server: MessagesServer, make_database: Callable[[], Path]
) -> AsyncIterator[Engine]:
    """An engine whose Claude is the scripted server."""
    adapter = an_adapter(messages_server)
    async with Engine.open(f"sqlite:///{make_database()}", adapters=[adapter]) as opened:
        yield opened


async def result_of(engine: Engine, scenario: dict[str, Any], **fields: Any) -> Result:
    """Return how a task ended."""
    task = Task(prompt="x", platform="claude", options={"scenario": scenario}, **fields)
    return await engine.get_result(await engine.submit_task(task), timeout=30)


async def test_a_call_of_a_tool(engine: Engine) -> None:
    """What the model asked for is in the result, apart from what it said."""
    result = await result_of(engine, {"blocks": ANSWER, "stop_reason": "tool_use"})
    assert (result.output, result.finish_reason) == (SAID, "tool_calls")
    called = ToolCall(id="toolu_1", name="weather", arguments={"city": "Ulm", "days": 2})
    assert result.tool_calls == (called,)


async def test_an_answer_that_is_repaired(engine: Engine, messages_server: MessagesServer) -> None:
    """An answer that doesn't satisfy the schema is handed back, with what is wrong with it."""
    good = json.dumps({"name": "Ulm", "people": 126_000})
    task = Task(
        prompt="Name a city.",
        platform="claude",
        output_schema=City,
        options={"scenario": {"text": '{"name": "Ulm"}'}},
    )
    messages_server.repairs = {"text": good}
    result = await engine.get_result(await engine.submit_task(task), timeout=30)
    assert result.parse(City) == City(name="Ulm", people=126_000)
    assert len(messages_server.messages) == 2
    _, said, wanted = messages_server.messages[1].body["messages"]
    assert said == {"role": "assistant", "content": '{"name": "Ulm"}'}
    assert "people" in wanted["content"]


async def test_a_cut_is_an_attempt(engine: Engine, messages_server: MessagesServer) -> None:
    """Each generation that the platform began is an attempt in the log, none hidden."""
    limits = TaskConstraints(max_attempts=2)
    result = await result_of(engine, {"cut_after": 6}, constraints=limits)
    assert not result.success
    assert result.error_class == "StreamTruncated"
    assert result.attempts == messages_server.generations == 2
    assert result.partial_output
    assert KEY not in repr(result)
