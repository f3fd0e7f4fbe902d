"""A result is the same whether it is put together from what passed by or read from the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from perdure import Engine, Task, TaskConstraints
from perdure.errors import InvalidRequest
from perdure.events import Accepted, Chunk, Completed, FileCreated, UsageReported
from perdure.store.records import Records
from perdure.task import Result, Usage
from perdure.testing import Hold, ScriptedAdapter

_USAGE = Usage(input_tokens=7, output_tokens=3, cache_read_tokens=2, raw={"in": 7, "out": 3})
_SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def _refuse(_call: object) -> None:
    raise InvalidRequest("no such thing")


# What is asked, and what the platform does.
CASES: dict[str, tuple[Task, tuple[object, ...]]] = {
    "plain": (Task(prompt="Hello"), ("Good day.", Completed())),
    "much beside it": (
        Task(
            prompt="Grüße, 世界 \U0001f600",
            system="You are terse. " * 400,  # stored apart
            context={"b": [1, 2.5, None], "a": {"x": True}},
            labels={"z": "1", "a": "ü"},
            metadata={"own": {"deep": [1]}},
            constraints=TaskConstraints(max_tokens=100, model="model-2"),
            key="one",
            batch="few",
            priority=2,
        ),
        (
            Accepted(response_id="r_1", request_id="q_1", model="model-2-late"),
            Chunk(text="thinking", kind="reasoning"),
            "Said.",
            Chunk(text='{"id":"c","name":"look","arguments":{"b":1,"a":2}}\n', kind="tool_call"),
            FileCreated(path="out.txt", size=3),
            UsageReported(usage=_USAGE),
            Completed(finish_reason="tool_calls", usage=_USAGE),
        ),
    ),
    "a conversation": (
        Task.model_validate(
            {
                "messages": [
                    {"role": "user", "content": "One?"},
                    {"role": "assistant", "content": "One."},
                    {"role": "user", "content": "Two?"},
                ]
            }
        ),
        ("Two.", Completed()),
    ),
    "checked output": (Task(prompt="n", output_schema=_SCHEMA), ('{"n": 1}', Completed())),
    "refused": (Task(prompt="Hello"), ("So far", _refuse)),
    "nothing said": (Task(prompt="Hello"), (Completed(),)),
}


@contextmanager
def noted(monkeypatch: pytest.MonkeyPatch) -> Generator[list[str], None, None]:
    """Give the list of tasks whose result is read from the database meanwhile."""
    read: list[str] = []
    both = Records.both

    async def note(self: Records, task_id: str) -> object:
        read.append(task_id)
        return await both(self, task_id)

    with monkeypatch.context() as patched:
        patched.setattr(Records, "both", note)
        yield read


async def _settled(engine: Engine, read: list[str]) -> None:
    """Wait until this process knows of all that is committed, as just after a start it doesn't."""
    async with asyncio.timeout(60):
        while True:
            await engine.get_result(await engine.submit_task(Task(prompt="Hello")), 60)
            if not read:
                return
            read.clear()


async def _twice(
    engine: Engine, task: Task, monkeypatch: pytest.MonkeyPatch
) -> tuple[Result, Result]:
    """Return a task's result as it came, and as it is read, and see that these are two ways."""
    with noted(monkeypatch) as read:
        await _settled(engine, read)
        task_id = await engine.submit_task(task)
        first = await engine.get_result(task_id, 60)
        assert not read
        second = await engine.get_result(task_id, 60)
        assert read == [task_id]
    return first, second


@pytest.mark.parametrize("case", CASES)
async def test_both_ways(db: Path | str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field is the same, for answers and tasks of all kinds."""
    task, script = CASES[case]
    adapter = ScriptedAdapter(*script)  # type: ignore[arg-type]
    async with Engine.open(db, adapters=[adapter], default_platform="scripted") as engine:
        first, second = await _twice(engine, task, monkeypatch)
    assert first == second
    assert first.model_dump_json() == second.model_dump_json()


async def test_a_cancelled_task(db: Path | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cancelled task leaves is the same, too."""
    hold = Hold()
    adapter = ScriptedAdapter(
        per_call=lambda call: ["So far", hold if call.task.prompt == "Wait" else Completed()]
    )
    async with Engine.open(db, adapters=[adapter], default_platform="scripted") as engine:
        with noted(monkeypatch) as read:
            await _settled(engine, read)
            task_id = await engine.submit_task(Task(prompt="Wait"))
            waiting = asyncio.create_task(engine.get_result(task_id, 60))
            await hold.reached.wait()
            assert await engine.cancel_task(task_id, "enough")
            first = await waiting
            assert not read
            second = await engine.get_result(task_id, 60)
    assert first == second
    assert first.partial_output == "So far"


@pytest.mark.parametrize(
    ("steps", "task"),
    [
        (lambda: ["a" * 20_000, Completed()], Task(prompt="Hello")),
        (lambda: ["Short.", Completed()], Task(prompt="b" * 20_000)),
        (
            lambda: [UsageReported(usage=_USAGE), *([FileCreated(path="f")] * 20), Completed()],
            Task(prompt="Hello"),
        ),
    ],
    ids=["long answer", "long question", "many events"],
)
async def test_what_is_long_is_read(
    db: Path | str,
    steps: Callable[[], list[object]],
    task: Task,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What would take memory to keep is read from the database."""
    adapter = ScriptedAdapter(*steps())  # type: ignore[arg-type]
    async with Engine.open(db, adapters=[adapter], default_platform="scripted") as engine:
        with noted(monkeypatch) as read:
            task_id = await engine.submit_task(task)
            result = await engine.get_result(task_id, 60)
            assert result.success
            assert read == [task_id]
