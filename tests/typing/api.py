"""The public face as people use it. Never run: mypy and pyright check it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import assert_type

from perdure import (
    Adapter,
    Call,
    Capabilities,
    Chunk,
    Completed,
    Engine,
    Event,
    RecordedEvent,
    Result,
    Task,
    TaskConstraints,
    TaskFilter,
    TaskRecord,
    TaskStatus,
    TextChunk,
    collect_stream,
    execute,
)
from perdure_adapters import AsyncBasePlatformAdapter, DemoAdapter


async def lifecycle(engine: Engine) -> None:
    """The five lifecycle methods and what they return."""
    task_id = await engine.submit_task(
        Task(prompt="…", platform="demo", constraints=TaskConstraints(max_tokens=10))
    )
    assert_type(task_id, str)
    assert_type(await engine.get_status(task_id), TaskStatus)
    async for text in engine.stream_result(task_id):
        assert_type(text, TextChunk)
    assert_type(await collect_stream(engine.stream_result(task_id)), str)
    assert_type(await engine.get_result(task_id, timeout=5), Result)
    assert_type(await engine.cancel_task(task_id, reason="…"), bool)


async def looking_up(engine: Engine) -> None:
    """What is known of tasks."""
    assert_type(await engine.list_tasks(TaskFilter(batch="b"), limit=5), list[TaskRecord])
    assert_type(await engine.get_events("id"), list[RecordedEvent])
    assert_type(await engine.get_definition("id"), Task)


async def opening() -> None:
    """An engine is an asynchronous context manager."""
    async with Engine.open("sqlite:///perdure.db", adapters=[DemoAdapter()]) as engine:
        assert_type(engine, Engine)


def blocking() -> None:
    """The blocking form."""
    assert_type(execute(Task(prompt="…")), Result)


class Echo(AsyncBasePlatformAdapter):
    """A platform of one's own, by the base class."""

    platform = "echo"
    capabilities = Capabilities(streaming=False)

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say what was asked."""
        yield Chunk(text=call.task.question)
        yield Completed()


class Plain:
    """A platform of one's own, by the protocol alone."""

    platform = "plain"
    capabilities = Capabilities()
    default_model = None
    prices = None

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say nothing."""
        yield Completed()

    async def stop(self, response_id: str) -> None:
        """Nothing goes on without us."""

    async def close(self) -> None:
        """Nothing is held."""


echo: Adapter = Echo()
plain: Adapter = Plain()
