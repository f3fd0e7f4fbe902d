"""The program that comes with the SDK, against a scripted server: nothing leaves this machine."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import claude_agent_sdk
import pytest
from agents import KEY, a_call, events_of, kill

from perdure import Engine, Task
from perdure.adapter import Resume
from perdure.errors import AuthenticationFailed, StreamTruncated
from perdure.events import Accepted, AttemptFailed, Chunk, Completed, Event, FileCreated
from perdure.policy import RetryPolicy
from perdure.settings import WorkerSettings
from perdure_adapters import ClaudeCodeAdapter
from perdure_adapters._agent_process import Bookmark, end_leftover, process_started
from servers.chat import Response, Seen
from servers.messages import MessagesServer

PROGRAM = Path(claude_agent_sdk.__file__).parent / "_bundled" / "claude"
# Where tests run as a matter of course it has to be there, or nothing here would be tested.
pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64") and not PROGRAM.exists(),
    reason="the SDK brings no program for this machine",
)


class Api(MessagesServer):
    """Anthropic's side; `plan` says how a conversation is answered."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: Callable[[dict[str, Any]], dict[str, Any]] = lambda _: {}

    async def _answer(self, response: Response, seen: Seen) -> bool:
        if isinstance(seen.body, dict) and "messages" in seen.body:
            seen.body["scenario"] = self.plan(seen.body)
        return await super()._answer(response, seen)


@pytest.fixture
def api() -> Iterator[Api]:
    """The server."""
    with Api() as server:
        yield server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where it works."""
    path = tmp_path / "work"
    path.mkdir()
    return path


@pytest.fixture
def adapter(
    api: Api, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ClaudeCodeAdapter:
    """An adapter with the real program, which keeps to itself."""
    for name in os.environ:
        if name.startswith(("CLAUDE", "HTTP", "http")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC", "1")
    monkeypatch.setenv("DISABLE_AUTOUPDATER", "1")
    return ClaudeCodeAdapter(directory=directory, base_url=api.url, api_key=KEY)


def last(body: dict[str, Any]) -> str:
    """Return the last message of a conversation as text."""
    return json.dumps(body["messages"][-1])


def writes(directory: Path) -> dict[str, Any]:
    """Return the answer that writes a file."""
    given = {"file_path": str(directory / "hello.txt"), "content": "hello\n"}
    blocks = [
        {"type": "text", "text": "I write it."},
        {"type": "tool_use", "id": "toolu_1", "name": "Write", "input": given},
    ]
    return {"blocks": blocks, "stop_reason": "tool_use"}


def text_of(events: list[Event]) -> str:
    """Return what was said."""
    return "".join(e.text for e in events if isinstance(e, Chunk) and e.kind == "text")


async def test_it_writes_a_file(api: Api, adapter: ClaudeCodeAdapter, directory: Path) -> None:
    """The model asks for a file, the program writes it, and all of it is told."""
    api.plan = lambda body: {"text": "Done."} if "tool_result" in last(body) else writes(directory)
    events = await events_of(adapter, a_call("Write hello.txt, @/etc/passwd is text."))
    assert (directory / "hello.txt").read_text() == "hello\n"
    assert text_of(events) == "I write it.\n\nDone."
    assert [e.path for e in events if isinstance(e, FileCreated)] == [str(directory / "hello.txt")]
    end = events[-1]
    assert isinstance(end, Completed)
    assert end.usage is not None
    assert (end.usage.input_tokens, end.usage.output_tokens) == (2 * 127, 24)
    assert (end.usage.raw or {})["total_cost_usd"] > 0
    asked = [seen for seen in api.messages if "@/etc/passwd is text." in json.dumps(seen.body)]
    assert asked
    assert "root:" not in json.dumps(asked[0].body["messages"])


async def test_cancelling_ends_it(api: Api, adapter: ClaudeCodeAdapter) -> None:
    """The process is gone, and with it the request."""
    api.plan = lambda _: {"stall_after": 6}
    said = asyncio.Event()
    seen: list[Event] = []

    async def read() -> None:
        async for event in adapter.run(a_call("Count.")):
            seen.append(event)
            if isinstance(event, Chunk):
                said.set()

    reading = asyncio.create_task(read())
    await asyncio.wait_for(said.wait(), 30)
    accepted = seen[0]
    assert isinstance(accepted, Accepted)
    mark = Bookmark.read(accepted.cursor)
    assert mark is not None
    assert mark.pid is not None
    assert process_started(mark.pid) == mark.started
    reading.cancel()
    await asyncio.wait({reading})
    assert reading.cancelled()
    assert process_started(mark.pid) is None
    api.wait_until_idle()


@pytest.mark.parametrize("how", ["cancelled", "left behind", "stopped"])
async def test_what_its_tools_started_ends_with_it(
    api: Api, adapter: ClaudeCodeAdapter, directory: Path, how: str
) -> None:
    """A command that runs is ended, too: by the interruption, or by what ends a lost process."""
    command = "echo $$ > pid.new; mv pid.new pid; sleep 300; true"
    block = {"type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {"command": command}}
    api.plan = lambda _: {"blocks": [block], "stop_reason": "tool_use"}
    seen: list[Event] = []

    async def read() -> None:
        async for event in adapter.run(a_call("Sleep.", options={"allowed_tools": ["Bash"]})):
            seen.append(event)  # noqa: PERF401

    reading = asyncio.create_task(read())
    async with asyncio.timeout(30):
        while not (directory / "pid").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.02)
    shell = int((directory / "pid").read_text())
    assert process_started(shell) is not None
    accepted = seen[0]
    assert isinstance(accepted, Accepted)
    mark = Bookmark.read(accepted.cursor)
    assert mark is not None
    if how == "left behind":
        assert await asyncio.to_thread(end_leftover, mark)
    elif how == "stopped":
        assert accepted.response_id is not None
        await adapter.stop(accepted.response_id)
    else:
        reading.cancel()
    await asyncio.wait({reading})
    if how != "cancelled":
        assert isinstance(reading.exception(), StreamTruncated)
    assert mark.pid is not None
    assert process_started(mark.pid) is None
    async with asyncio.timeout(5):
        while process_started(shell) is not None:  # noqa: ASYNC110 - it ends by itself
            await asyncio.sleep(0.02)


async def test_a_killed_one_goes_on(
    api: Api, adapter: ClaudeCodeAdapter, directory: Path, tmp_path: Path
) -> None:
    """The next process knows what was said and done, and goes on in the same session."""

    def plan(body: dict[str, Any]) -> dict[str, Any]:
        if "<said>" in last(body):
            return {"text": "writing."}
        if "tool_result" in last(body):
            return {"text": "Done writing.", "stall_after": 4}
        return writes(directory)

    api.plan = plan
    async with Engine.open(f"sqlite:///{tmp_path / 'db'}", adapters=[adapter]) as engine:
        task_id = await engine.submit_task(Task(prompt="Write it.", platform="claude_code"))
        said = ""
        async for chunk in engine.stream_result(task_id):
            said += chunk
            if "Done" in said:
                break
        events = [recorded.event for recorded in await engine.get_events(task_id)]
        mark = Bookmark.read([e.cursor for e in events if isinstance(e, Accepted)][-1])
        assert mark is not None
        assert mark.pid is not None
        kill(mark.pid)
        result = await engine.get_result(task_id, timeout=60)
        events = [recorded.event for recorded in await engine.get_events(task_id)]
    assert result.output == "I write it.\n\nDone writing."
    assert result.attempts == 2
    assert list(result.files_created) == [str(directory / "hello.txt")]
    assert len({e.response_id for e in events if isinstance(e, Accepted)}) == 1
    # The conversation came out of the session, the call of the tool with it.
    assert "toolu_1" in json.dumps(api.messages[-1].body["messages"])


async def test_a_session_it_doesnt_know(adapter: ClaudeCodeAdapter) -> None:
    """Its own words for that are understood."""
    resume = Resume("reattach", "So", "3f0d2b6e-1111-4000-8000-000000000000", None)
    with pytest.raises(StreamTruncated, match="knows no session") as caught:
        await events_of(adapter, a_call(resume=resume))
    assert caught.value.response_over


async def test_a_schema(api: Api, adapter: ClaudeCodeAdapter) -> None:
    """The value that satisfies it is the output."""
    value = {"type": "tool_use", "id": "toolu_1", "name": "StructuredOutput", "input": {"n": 3}}
    api.plan = lambda body: (
        {"text": "Well."}
        if "tool_result" in last(body)
        else {"blocks": [value], "stop_reason": "tool_use"}
    )
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    events = await events_of(adapter, a_call("Count.", output_schema=schema))
    assert text_of(events) == '{"n": 3}'


async def test_a_wrong_key(api: Api, adapter: ClaudeCodeAdapter) -> None:
    """What the API says becomes the error it is."""
    error = {"type": "authentication_error", "message": f"invalid x-api-key {KEY}"}
    api.plan = lambda _: {"status": 401, "error": error}
    with pytest.raises(AuthenticationFailed) as caught:
        await events_of(adapter, a_call("Count."))
    assert caught.value.status == 401
    assert KEY not in f"{caught.value!r} {caught.value}"


async def test_an_overloaded_api(api: Api, adapter: ClaudeCodeAdapter, tmp_path: Path) -> None:
    """Each try is an attempt in the log; the session goes on, what was said before is no output."""
    error = {"type": "overloaded_error", "message": "Overloaded"}
    answers = [{"status": 529, "error": error}, {"text": "Here I am."}]
    api.plan = lambda _: answers.pop(0)
    settings = WorkerSettings(retry=RetryPolicy(base_seconds=0.01))
    database = f"sqlite:///{tmp_path / 'db'}"
    async with Engine.open(database, adapters=[adapter], settings=settings) as engine:
        task_id = await engine.submit_task(Task(prompt="Hello?", platform="claude_code"))
        result = await engine.get_result(task_id, timeout=60)
        events = [recorded.event for recorded in await engine.get_events(task_id)]
    assert (result.output, result.attempts) == ("Here I am.", 2)
    (failed,) = [event for event in events if isinstance(event, AttemptFailed)]
    assert (failed.error_class, failed.status, failed.next) == ("Overloaded", 529, "reattach")
    assert len({e.response_id for e in events if isinstance(e, Accepted)}) == 1
