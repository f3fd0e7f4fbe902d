"""Tasks that an engine runs on Claude Code: crashes, cancellations, limits, the log."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from agents import KEY, Stage, hurry, kill, scenario

from perdure import Engine, Result, Task, TaskConstraints, TaskStatus
from perdure.events import Accepted, AttemptFailed, Chunk, Interrupted
from perdure.policy import RetryPolicy
from perdure.settings import WorkerSettings

WORK = (
    {"say": "I write one."},
    {"write": ["one.txt", "1"]},
    {"say": "I write two."},
    {"hang": 1},
    {"write": ["two.txt", "2"]},
    {"say": "Done writing."},
)
SAID = "I write one.\n\nI write two.\n\nDone writing."
# Another process that runs a task, to be killed.
RUN = """
import asyncio, sys
from perdure import Engine, Task
from perdure_adapters import ClaudeCodeAdapter

async def main(database, directory, program, prompt):
    adapter = ClaudeCodeAdapter(directory=directory, cli_path=program)
    async with Engine.open(f"sqlite:///{database}", adapters=[adapter]) as engine:
        task_id = await engine.submit_task(Task(prompt=prompt, platform="claude_code"))
        print(task_id, flush=True)
        async for chunk in engine.stream_result(task_id):
            print(chunk.replace("\\n", " "), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A directory, and the program."""
    return Stage.at(tmp_path)


def opened(stage: Stage, database: Path) -> Engine:
    """Return an engine whose Claude Code is the program."""
    settings = WorkerSettings(retry=RetryPolicy(base_seconds=0.01))
    return Engine.open(f"sqlite:///{database}", adapters=[stage.adapter()], settings=settings)


def a_task(*steps: dict[str, Any], **fields: Any) -> Task:
    """Return a task with these steps."""
    more = {name: fields.pop(name) for name in ("cuts", "deaf", "result") if name in fields}
    return Task(prompt=scenario(*steps, **more), platform="claude_code", **fields)


def named(result: Result) -> list[str]:
    """Return the names of the files that a task wrote."""
    return [Path(path).name for path in result.files_created]


async def until_said(engine: Engine, task_id: str, text: str) -> None:
    """Wait until the task has said this."""
    said = ""
    async for chunk in engine.stream_result(task_id):
        said += chunk
        if text in said:
            return


async def test_a_task(stage: Stage, tmp_path: Path) -> None:
    """Output, calls of tools, files, usage and cost are in the result."""
    async with opened(stage, tmp_path / "db") as engine:
        task = a_task({"say": "I write."}, {"write": ["a.txt", "hello"]}, {"say": "Done."})
        result = await engine.get_result(await engine.submit_task(task), timeout=30)
    assert result.output == "I write.\n\nDone."
    assert named(result) == ["a.txt"]
    assert [call.name for call in result.tool_calls] == ["Write"]
    assert result.model == "claude-sonnet-5-5"
    assert result.usage.output_tokens == 30
    assert result.cost is not None
    assert KEY not in repr(result)


async def test_the_agent_dies_and_another_one_goes_on(stage: Stage, tmp_path: Path) -> None:
    """One session, its text and files whole; each process is an attempt in the log."""
    async with opened(stage, tmp_path / "db") as engine:
        task_id = await engine.submit_task(a_task(*WORK))
        await until_said(engine, task_id, "I write two.")
        (pid,) = stage.alive
        kill(pid)
        result = await engine.get_result(task_id, timeout=30)
        events = [recorded.event for recorded in await engine.get_events(task_id)]
    assert (result.output, named(result)) == (SAID, ["one.txt", "two.txt"])
    assert result.attempts == len(stage.runs) == 2
    assert len({run["session"] for run in stage.runs}) == 1
    (failed,) = [event for event in events if isinstance(event, AttemptFailed)]
    assert (failed.error_class, failed.next) == ("StreamTruncated", "reattach")


async def test_a_death_in_the_middle_of_a_call_of_a_tool(stage: Stage, tmp_path: Path) -> None:
    """What was written of the call stays apart from the calls that follow."""
    task = a_task({"write": ["a.txt", "hello"]}, {"say": "Done."}, cuts=[5])
    async with opened(stage, tmp_path / "db") as engine:
        result = await engine.get_result(await engine.submit_task(task), timeout=30)
        chunks = [e.event for e in await engine.get_events(result.task_id)]
    told = "".join(e.text for e in chunks if isinstance(e, Chunk) and e.kind == "tool_call")
    broken, whole, _ = told.split("\n")
    assert broken == '{"id":"toolu_0","name":"Write","arguments":{"file_pa'
    assert json.loads(whole)["arguments"] == {"file_path": "a.txt", "content": "hello"}
    assert result.attempts == 2
    assert result.tool_calls[-1].arguments == {"file_path": "a.txt", "content": "hello"}


async def test_a_killed_process_is_taken_over(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9 the next engine ends the agent left behind, and takes its session up."""
    hurry(monkeypatch)
    database = tmp_path / "db"
    prompt = scenario(*WORK, deaf=True)
    arguments = [str(database), str(stage.directory), str(stage.home / "claude"), prompt]
    child = subprocess.Popen(  # noqa: ASYNC220 - it is waited for at once
        [sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    try:
        lines = iter(child.stdout.readline, "")
        task_id = next(lines).strip()
        said = ""
        while "I write two." not in said:
            said += next(lines).strip("\n")
        left = stage.alive
        assert len(left) == 1
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    assert stage.alive == left  # it hangs, deaf to everything
    async with opened(stage, database) as engine:
        result = await engine.get_result(task_id, timeout=30)
        events = [recorded.event for recorded in await engine.get_events(task_id)]
    assert (result.output, named(result)) == (SAID, ["one.txt", "two.txt"])
    assert len({run["session"] for run in stage.runs}) == 1
    assert len(stage.runs) == 2
    (lost,) = [event for event in events if isinstance(event, Interrupted)]
    assert (lost.outcome, lost.next) == ("reattachable", "reattach")
    assert stage.alive == []
    # What the lost process had used is part of what is told.
    assert (result.usage.output_tokens or 0) > 20


async def test_a_session_that_is_gone_begins_anew(stage: Stage, tmp_path: Path) -> None:
    """It isn't asked for again and again; the output is that of the new one."""
    async with opened(stage, tmp_path / "db") as engine:
        task_id = await engine.submit_task(a_task(*WORK))
        await until_said(engine, task_id, "I write two.")
        (pid,) = stage.alive
        for session in (stage.home / "sessions").iterdir():
            session.unlink()
        kill(pid)
        latest = time.monotonic() + 20
        while len(stage.runs) < 3 or not any((stage.home / "sessions").glob("*.json")):
            assert time.monotonic() < latest
            await asyncio.sleep(0.01)
        kill(stage.alive[0])  # the new one hangs in its first run, too
        result = await engine.get_result(task_id, timeout=30)
        events = [recorded.event for recorded in await engine.get_events(task_id)]
    assert result.output == SAID
    following = [event.next for event in events if isinstance(event, AttemptFailed)]
    assert following == ["reattach", "retry", "reattach"]


async def test_cancelling(stage: Stage, tmp_path: Path) -> None:
    """The process is gone with the task; its text and its files are kept."""
    async with opened(stage, tmp_path / "db") as engine:
        task_id = await engine.submit_task(a_task(*WORK))
        await until_said(engine, task_id, "I write two.")
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, timeout=30)
        assert stage.alive == []
    assert result.status is TaskStatus.CANCELLED
    assert result.partial_output == "I write one.\n\nI write two."
    assert named(result) == ["one.txt"]


async def test_the_time_limit(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that hangs ends as failed at its limit, and its process with it."""
    hurry(monkeypatch)
    async with opened(stage, tmp_path / "db") as engine:
        limits = TaskConstraints(timeout_seconds=1)
        task = a_task({"say": "I begin."}, {"hang": 9}, deaf=True, constraints=limits)
        result = await engine.get_result(await engine.submit_task(task), timeout=30)
        assert stage.alive == []
    assert (result.error_class, result.partial_output) == ("TimeLimitExceeded", "I begin.")


async def test_a_schema(stage: Stage, tmp_path: Path) -> None:
    """The value that Claude Code gives is the output, and is parsed."""
    schema = {"type": "object", "required": ["n"]}
    async with opened(stage, tmp_path / "db") as engine:
        given = {"structured_output": {"n": 1}}
        task = a_task({"say": "I count."}, result=given, output_schema=schema)
        result = await engine.get_result(await engine.submit_task(task), timeout=30)
    assert (result.output, result.parsed) == ('{"n": 1}', {"n": 1})


async def test_every_attempt_names_its_session(stage: Stage, tmp_path: Path) -> None:
    """The log knows the session before the first word."""
    async with opened(stage, tmp_path / "db") as engine:
        task_id = await engine.submit_task(a_task({"say": "So"}))
        await engine.get_result(task_id, timeout=30)
        events = [recorded.event for recorded in await engine.get_events(task_id)]
    accepted = [event for event in events if isinstance(event, Accepted)]
    assert {event.response_id for event in accepted} == {stage.runs[0]["session"]}
    assert accepted[-1].model == "claude-sonnet-5-5"
