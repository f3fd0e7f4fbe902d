"""Claude Code held to the contract, by a program of our own that speaks its protocol."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agents import KEY, Stage, a_call, events_of, hurry, kill, scenario
from yielded import text_of

from perdure import Task
from perdure.adapter import Adapter, Call, LoadedFile, Resume
from perdure.errors import (
    AuthenticationFailed,
    InvalidRequest,
    NotConfigured,
    OutputInvalid,
    Overloaded,
    PlatformError,
    QuotaExhausted,
    RateLimited,
    StreamTruncated,
)
from perdure.events import Accepted, Chunk, Completed, Event, FileCreated, UsageReported
from perdure.task import Attachment, Message, TaskConstraints, Tool
from perdure.testing import AdapterContract
from perdure_adapters import ClaudeCodeAdapter
from perdure_adapters._agent_process import Bookmark, end_leftover, process_started
from servers.agent import TEXT, install

FAILED = {"subtype": "success", "is_error": True, "result": "API Error"}
WORK = scenario(
    {"think": "Let me see."},
    {"say": "I write it."},
    {"write": ["notes/a.txt", "hello"]},
    {"say": "Done writing."},
)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A directory, and the program."""
    return Stage.at(tmp_path)


async def failure_of(adapter: ClaudeCodeAdapter, call: Call) -> tuple[PlatformError, list[Event]]:
    """Return how a call fails, and what it yielded before."""
    events: list[Event] = []
    try:
        async for event in adapter.run(call):
            events.append(event)  # noqa: PERF401 - what came before the error is wanted
    except PlatformError as error:
        assert not any(isinstance(event, Completed) for event in events)
        return error, events
    pytest.fail("it did not fail")


class TestContract(AdapterContract):
    """The rules that hold for every adapter."""

    patience = 8.0
    at_once = 4

    @pytest.fixture(autouse=True)
    def _stage(self, stage: Stage) -> None:
        self.stage = stage

    def make_adapter(self) -> Adapter:
        """Return an adapter that runs the program."""
        return self.stage.adapter()

    def text(self) -> str:
        """Return what the program says."""
        return TEXT

    def endless(self) -> Call:
        """Return a call that says something and hangs."""
        return a_call(scenario({"say": "I begin."}, {"hang": 9}))

    def failures(self) -> Sequence[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""
        return [
            (InvalidRequest, a_call(scenario(result={"subtype": "error_max_turns"}))),
            (RateLimited, a_call(scenario(result=FAILED | {"api_error_status": 429}))),
            (StreamTruncated, a_call(scenario({"complain": f"no {KEY}"}, {"die": 3}))),
        ]

    def truncated(self) -> Sequence[Call]:
        """Return calls whose process ends, as if all were well, without a result."""
        return [a_call(scenario({"say": "So"}, result=None)), a_call(scenario(cuts=[0]))]

    def open_calls(self) -> int:
        """Return how many processes there are."""
        return len(self.stage.alive)

    def secrets(self) -> Sequence[str]:
        """Return the key."""
        return [KEY]


class TestWhatItSays:
    """The messages of a process as events."""

    async def test_a_whole_run(self, stage: Stage) -> None:
        """Thoughts, text in paragraphs, calls of tools, files, usage and the end."""
        events = await events_of(stage.adapter(), a_call(WORK))
        assert text_of(events) == "I write it.\n\nDone writing."
        assert text_of(events, "reasoning") == "Let me see."
        call = json.loads(text_of(events, "tool_call"))
        assert (call["name"], call["arguments"]["content"]) == ("Write", "hello")
        (file,) = [e for e in events if isinstance(e, FileCreated)]
        assert (file.path, file.size) == (str(stage.directory / "notes/a.txt"), 5)
        end = events[-1]
        assert isinstance(end, Completed)
        assert (end.finish_reason, end.platform_finish_reason) == ("stop", "end_turn")
        assert end.usage is not None
        assert (end.usage.input_tokens, end.usage.output_tokens) == (4 * 127, 40)
        assert (end.usage.raw or {})["total_cost_usd"] == 0.125

    async def test_the_session_is_named_before_anything_is_asked(self, stage: Stage) -> None:
        """The first event says how the session can be taken up, the next which model it is."""
        stream = stage.adapter().run(a_call())
        first = await anext(stream)
        assert isinstance(first, Accepted)
        assert first.reattachable
        assert stage.runs == []  # nothing was asked
        second = await anext(stream)
        assert isinstance(second, Accepted)
        assert second.model == "claude-sonnet-5-5"
        assert stage.runs[0]["session"] == first.response_id == second.response_id
        await stream.aclose()

    async def test_usage_comes_on_the_way(self, stage: Stage) -> None:
        """Each message adds to the count, when it has been said."""
        events = await events_of(stage.adapter(), a_call(WORK))
        counts = [e.usage.output_tokens for e in events if isinstance(e, UsageReported)]
        assert counts == [None, 10, 10, 20, 20, 30, 30, 40]

    async def test_versions_that_dont_stream(self, stage: Stage) -> None:
        """Whole messages are read where there were no pieces of them."""
        prompt = json.dumps(json.loads(WORK) | {"whole_messages": True})
        events = await events_of(stage.adapter(), a_call(prompt))
        assert text_of(events) == "I write it.\n\nDone writing."
        assert text_of(events, "reasoning") == "Let me see."
        assert json.loads(text_of(events, "tool_call"))["name"] == "Write"

    async def test_what_is_not_for_us_is_passed_over(self, stage: Stage) -> None:
        """Lines that are no JSON, unknown messages, and what agents of the agent's say."""
        delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}
        inner = {"type": "stream_event", "event": delta, "parent_tool_use_id": "toolu_9"}
        delta["delta"] = {"type": "text_delta", "text": "inner"}
        prompt = scenario(
            {"raw": "[Sandbox] ready"},
            {"tell": {"type": "of_the_future"}},
            {"tell": {"type": "system", "subtype": "status"}},
            {"tell": inner},
            {"say": "Well."},
        )
        assert text_of(await events_of(stage.adapter(), a_call(prompt))) == "Well."

    async def test_an_answer_that_only_the_result_holds(self, stage: Stage) -> None:
        """Where nothing was said, the text of the result is the output."""
        prompt = scenario(result={"result": "It is so."})
        assert text_of(await events_of(stage.adapter(), a_call(prompt))) == "It is so."

    async def test_an_answer_that_was_cut_short(self, stage: Stage) -> None:
        """The platform's word for it is translated."""
        prompt = scenario({"say": "So"}, result={"stop_reason": "max_tokens"})
        end = (await events_of(stage.adapter(), a_call(prompt)))[-1]
        assert isinstance(end, Completed)
        assert end.finish_reason == "length"

    async def test_with_a_schema_the_value_is_the_output(self, stage: Stage) -> None:
        """What is said on the way is reasoning then."""
        prompt = scenario({"say": "I look."}, result={"structured_output": {"n": 1}})
        call = a_call(prompt, output_schema={"type": "object"})
        events = await events_of(stage.adapter(), call)
        assert (text_of(events), text_of(events, "reasoning")) == ('{"n": 1}', "I look.")
        argv = stage.runs[0]["argv"]
        assert argv[argv.index("--json-schema") + 1] == '{"type": "object"}'

    async def test_files_are_told_on_the_way_and_changes_of_them_again(self, stage: Stage) -> None:
        """A cancelled task's files are known, too; what isn't due is told at the end."""
        (stage.directory / "old.txt").write_text("old")
        (stage.directory / "bad.txt").write_text("bad")
        prompt = scenario(
            {"write": ["new.txt", "1"]},
            {"write": ["old.txt", "changed"]},
            {"delete": "bad.txt"},
            {"say": "Done."},
        )
        events = await events_of(stage.adapter(), a_call(prompt))
        files = [Path(e.path).name for e in events if isinstance(e, FileCreated)]
        assert files == ["new.txt", "old.txt"]
        said = next(i for i, e in enumerate(events) if isinstance(e, Chunk) and e.kind == "text")
        assert any(isinstance(e, FileCreated) for e in events[:said])


class TestEndings:
    """No result, no success; and every bad result is an error of its class."""

    async def test_a_cut_after_every_message(self, stage: Stage) -> None:
        """Wherever the process ends, with or without an exit code: never a success."""
        for code in (0, 1):
            whole = json.loads(WORK) | {"exit_code": code}
            await events_of(stage.adapter(), a_call(json.dumps(whole)))
            cut = 0
            while True:
                prompt = json.dumps(whole | {"cuts": [cut]})
                call = a_call(prompt)
                events: list[Event] = []
                try:
                    async for event in stage.adapter().run(call):
                        events.append(event)  # noqa: PERF401
                except StreamTruncated as error:
                    assert not error.response_over  # noqa: PT017 - it can be taken up
                    assert "I write it.\n\nDone writing.".startswith(text_of(events))
                    assert not any(isinstance(event, Completed) for event in events)
                else:
                    break
                cut += 1
            assert isinstance(events[-1], Completed)
            assert cut > 25
        stage.wait_until_gone()

    @pytest.mark.parametrize(
        ("result", "kind", "words"),
        [
            ({"subtype": "error_max_turns"}, InvalidRequest, "options.max_turns"),
            ({"subtype": "error_max_budget_usd"}, QuotaExhausted, "options.max_budget_usd"),
            ({"subtype": "error_during_execution"}, Overloaded, "broke here"),
            ({"subtype": "error_max_structured_output_retries"}, OutputInvalid, "schema"),
            (FAILED | {"api_error_status": 401}, AuthenticationFailed, "API Error"),
            (FAILED | {"api_error_status": 429}, RateLimited, "API Error"),
            (FAILED | {"api_error_status": 529}, Overloaded, "API Error"),
            (FAILED | {"api_error_status": 400}, InvalidRequest, "API Error"),
            (FAILED, Overloaded, "API Error"),
        ],
    )
    async def test_results_that_are_errors(
        self, stage: Stage, result: dict[str, Any], kind: type[PlatformError], words: str
    ) -> None:
        """Each is of its class, with what to do about it, and the files and tokens before it."""
        if result["subtype"] == "error_during_execution":
            result = result | {"errors": ["it", "broke here"]}
        else:
            result = result | {"errors": []}
        prompt = scenario({"say": "So"}, {"write": ["a.txt", "1"]}, result=result)
        error, events = await failure_of(stage.adapter(), a_call(prompt))
        assert type(error) is kind
        assert words in error.message
        assert error.status == result.get("api_error_status")
        assert text_of(events) == "So"
        assert [Path(e.path).name for e in events if isinstance(e, FileCreated)] == ["a.txt"]
        last = events[-1]
        assert isinstance(last, UsageReported)
        assert last.usage.output_tokens == 20

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("authentication_failed", AuthenticationFailed),
            ("billing_error", QuotaExhausted),
            ("rate_limit", RateLimited),
            ("invalid_request", InvalidRequest),
            ("server_error", Overloaded),
            ("unknown", Overloaded),
        ],
    )
    async def test_failures_by_their_names(
        self, stage: Stage, fault: str, kind: type[PlatformError]
    ) -> None:
        """Where there is no status, the name in the last message decides; its text is no output."""
        content = [{"type": "text", "text": "Please run /login"}]
        said = {"id": "m", "model": "<synthetic>", "content": content}
        info = {"status": "rejected", "resetsAt": 2**33}
        prompt = scenario(
            {"tell": {"type": "rate_limit_event", "rate_limit_info": info}},
            {"tell": {"type": "assistant", "error": fault, "message": said}},
            result=FAILED | {"result": f"Please run /login, not {KEY}"},
        )
        error, events = await failure_of(stage.adapter(), a_call(prompt))
        assert type(error) is kind
        assert "Please run /login" in error.message
        assert KEY not in f"{error!r} {error} {error.message}"
        assert text_of(events) == ""
        assert error.retry_after == (600 if error.retryable else None)

    async def test_a_death_on_the_way(self, stage: Stage) -> None:
        """The last words of the process are in the message."""
        prompt = scenario({"say": "So"}, {"complain": "out of memory"}, {"die": 7})
        error, events = await failure_of(stage.adapter(), a_call(prompt))
        assert type(error) is StreamTruncated
        assert "exit code 7" in error.message
        assert "out of memory" in error.message
        assert text_of(events) == "So"

    @pytest.mark.parametrize("line", ['{"type": "assistant"', '{"type": "assistant"}', "{}"])
    async def test_garbage(self, stage: Stage, line: str) -> None:
        """What can't be read ends the run, and the process with it."""
        prompt = scenario({"say": "So"}, {"raw": line}, {"hang": 9})
        error, events = await failure_of(stage.adapter(), a_call(prompt))
        assert type(error) is StreamTruncated
        assert text_of(events) == "So"
        stage.wait_until_gone()

    async def test_a_program_that_doesnt_start(self, stage: Stage, tmp_path: Path) -> None:
        """What it says then is the message."""
        program = tmp_path / "bad"
        program.write_text(
            "#!/bin/sh\nread line\necho \"error: unknown option '--x'\" >&2\nexit 1\n"
        )
        program.chmod(0o755)
        error, _ = await failure_of(stage.adapter(cli_path=program), a_call())
        assert type(error) is InvalidRequest
        assert "unknown option" in error.message

    @pytest.mark.parametrize("kind", ["missing", "no program"])
    async def test_no_program(self, stage: Stage, tmp_path: Path, kind: str) -> None:
        """A program that isn't there, or can't be run, is named, and `check` says so before."""
        program = tmp_path / "claude"
        if kind != "missing":
            program.write_text("nothing")
        adapter = stage.adapter(cli_path=program)
        error, _ = await failure_of(adapter, a_call())
        assert type(error) is NotConfigured
        with pytest.raises(NotConfigured, match="cli_path"):
            adapter.check()


class TestLeaving:
    """However a run is left, its process is gone soon after."""

    @pytest.mark.parametrize("deaf", [False, True])
    @pytest.mark.parametrize("how", ["cancel", "close", "time"])
    async def test_the_process_is_gone(
        self, stage: Stage, how: str, deaf: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cancelled, closed or out of time; also one that neither listens nor can be asked."""
        if deaf:
            hurry(monkeypatch)
        call = a_call(scenario({"say": "I begin."}, {"hang": 9}, deaf=deaf))
        seen = asyncio.Event()
        stream = stage.adapter().run(call)

        async def read() -> None:
            async for event in stream:
                if isinstance(event, Chunk):
                    seen.set()
                    if how == "close":
                        break
            await stream.aclose()

        reading = asyncio.create_task(read())
        await asyncio.wait_for(seen.wait(), 10)
        began = time.monotonic()
        if how == "cancel":
            reading.cancel()
        elif how == "time":
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reading, 0.01)
        await asyncio.wait({reading})
        assert stage.alive == []  # by then, not some time later
        assert time.monotonic() - began < 6
        assert len(stage.runs) == 1

    async def test_a_second_cancellation_doesnt_leave_it_behind(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The ending of the process goes on whoever is in a hurry."""
        hurry(monkeypatch)
        adapter = stage.adapter()
        call = a_call(scenario({"say": "I begin."}, {"hang": 9}, deaf=True))
        seen = asyncio.Event()

        async def read() -> None:
            async for event in adapter.run(call):
                if isinstance(event, Chunk):
                    seen.set()

        reading = asyncio.create_task(read())
        await asyncio.wait_for(seen.wait(), 10)
        for _ in range(3):
            reading.cancel()
            await asyncio.sleep(0.05)
        await asyncio.wait({reading})
        assert reading.cancelled()
        assert stage.alive == []

    @pytest.mark.parametrize("turns", [1, 2, 5, 10, 20])
    async def test_cancelled_before_it_is_started(self, stage: Stage, turns: int) -> None:
        """At whatever step of its beginning."""
        program = stage.home / "silent"
        program.write_text("#!/bin/sh\nexec sleep 600\n")
        program.chmod(0o755)
        reading = asyncio.create_task(events_of(stage.adapter(cli_path=program), a_call()))
        for _ in range(turns):
            await asyncio.sleep(0.002)
        reading.cancel()
        done, _ = await asyncio.wait({reading}, timeout=5)
        assert done
        assert reading.cancelled()

    async def test_cancelled_while_it_starts(self, stage: Stage, tmp_path: Path) -> None:
        """A program that never answers is ended, too."""
        pid = tmp_path / "pid"
        program = tmp_path / "silent"
        program.write_text(f"#!/bin/sh\necho $$ > {pid}.new\nmv {pid}.new {pid}\nexec sleep 600\n")
        program.chmod(0o755)
        adapter = stage.adapter(cli_path=program)
        reading = asyncio.create_task(events_of(adapter, a_call()))
        async with asyncio.timeout(10):
            while not pid.exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled()
        assert process_started(int(pid.read_text())) is None


class TestTakingUp:
    """A session that was lost on the way goes on."""

    async def test_from_every_cut_the_parts_are_the_whole(self, stage: Stage) -> None:
        """Text, files and tokens: as if nothing had happened, in one session."""
        for cut in range(2, 34, 3):
            for old in stage.directory.glob("**/*.txt"):
                old.unlink()
            prompt = json.dumps(json.loads(WORK) | {"cuts": [cut]})
            before = len(stage.runs)
            error, first = await failure_of(stage.adapter(), a_call(prompt))
            assert not error.response_over
            accepted = next(e for e in first if isinstance(e, Accepted))
            cursors = [e.cursor for e in first if isinstance(e, Accepted | Chunk) and e.cursor]
            said = text_of(first)
            resume = Resume("reattach", said, accepted.response_id, cursors[-1])
            rest = await events_of(stage.adapter(), a_call(prompt, resume=resume))
            assert said + text_of(rest) == "I write it.\n\nDone writing.", cut
            both = stage.runs[before:]
            assert len(both) == 2
            assert {run["session"] for run in both} == {accepted.response_id}
            # Written in the first process or in the second: the last look names it.
            files = {e.path for e in (*first, *rest) if isinstance(e, FileCreated)}
            assert files == {str(stage.directory / "notes/a.txt")}

    async def test_tokens_of_the_lost_process_are_kept(self, stage: Stage) -> None:
        """What is counted in the end includes them."""
        spent = {"input_tokens": 1000, "output_tokens": 100}
        first = await events_of(stage.adapter(), a_call())
        accepted = first[0]
        assert isinstance(accepted, Accepted)
        assert accepted.cursor is not None
        cursor = json.dumps(json.loads(accepted.cursor) | {"spent": spent})
        resume = Resume("reattach", TEXT[:5], accepted.response_id, cursor)
        events = await events_of(stage.adapter(), a_call(resume=resume))
        end = events[-1]
        assert isinstance(end, Completed)
        assert end.usage is not None
        assert (end.usage.input_tokens, end.usage.output_tokens) == (1127, 110)
        counts = [e.usage.output_tokens for e in events if isinstance(e, UsageReported)]
        assert counts == [100, 110]

    async def test_a_session_nobody_knows(self, stage: Stage) -> None:
        """It is over: the next attempt begins anew instead of asking for it again."""
        resume = Resume("reattach", "So", "3f0d2b6e-0000-4000-8000-000000000000", None)
        error, _ = await failure_of(stage.adapter(), a_call(resume=resume))
        assert type(error) is StreamTruncated
        assert error.retryable
        assert error.response_over

    async def test_a_process_left_behind_is_ended_first(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Two agents of one session never work on the same files."""
        hurry(monkeypatch)
        prompt = scenario({"say": "I begin."}, {"hang": 1}, {"say": "I end."}, deaf=True)
        stream = stage.adapter().run(a_call(prompt))
        first: list[Event] = []
        async for event in stream:
            first.append(event)
            if text_of(first) == "I begin.":
                break
        accepted = first[0]
        assert isinstance(accepted, Accepted)
        (pid,) = stage.alive
        resume = Resume("reattach", "I begin.", accepted.response_id, accepted.cursor)
        rest = await events_of(stage.adapter(), a_call(prompt, resume=resume))
        assert text_of(rest) == "\n\nI end."
        assert pid not in stage.alive
        await stream.aclose()

    async def test_other_processes_are_left_alone(self, stage: Stage) -> None:
        """An id that another process has by now, or one of another machine, is not touched."""
        stream = stage.adapter().run(a_call(scenario({"say": "So"}, {"hang": 9})))
        while not isinstance(await anext(stream), Chunk):
            pass
        (pid,) = stage.alive
        mark = Bookmark(since=1).of_process(pid)
        assert not await asyncio.to_thread(end_leftover, replace(mark, started="1"))
        assert not await asyncio.to_thread(end_leftover, replace(mark, host="elsewhere"))
        assert not await asyncio.to_thread(end_leftover, replace(mark, pid=None))
        assert stage.alive == [pid]
        kill(pid)
        await stream.aclose()

    async def test_stopping_a_session_ends_who_works_on_it(self, stage: Stage) -> None:
        """By its name alone, and nobody else."""
        streams = [
            stage.adapter().run(a_call(scenario({"say": "So"}, {"hang": 9}))) for _ in range(2)
        ]
        for stream in streams:
            while not isinstance(await anext(stream), Chunk):
                pass
        first, second = stage.runs
        await stage.adapter().stop(first["session"])
        assert stage.alive == [second["pid"]]
        await stage.adapter().stop("")
        assert stage.alive == [second["pid"]]
        for stream in streams:
            await stream.aclose()

    @pytest.mark.parametrize("text", [None, "", "x", "[]", "{}", '{"since":"x"}'])
    def test_cursors_that_are_none(self, text: str | None) -> None:
        """Whatever the log holds, it is read with suspicion."""
        assert Bookmark.read(text) is None

    def test_a_cursor_comes_back_as_it_was(self) -> None:
        """What is written can be read."""
        mark = Bookmark(since=5, host="h", pid=77, started="9")
        assert Bookmark.read(mark.written()) == mark


class TestTheRequest:
    """What a task says reaches the program, or is refused."""

    async def argv(self, stage: Stage, prompt: str = "Do it.", **fields: Any) -> list[str]:
        """Return the program's arguments."""
        call = replace(a_call(prompt, **fields), model=fields.pop("model", None))
        await events_of(stage.adapter(), call)
        return list(stage.runs[-1]["argv"])

    async def test_options_are_passed_on(self, stage: Stage) -> None:
        """What the SDK takes and JSON can say."""
        options = {
            "permission_mode": "plan",
            "allowed_tools": ["Read", "Bash(ls:*)"],
            "disallowed_tools": ["WebFetch"],
            "max_turns": 3,
            "max_budget_usd": 1.5,
            "add_dirs": ["/tmp"],  # noqa: S108
            "mcp_servers": {"x": {"command": "true"}},
            "agents": {"a": {"description": "d", "prompt": "p"}},
        }
        argv = await self.argv(stage, options=options)
        for name, value in {
            "--permission-mode": "plan",
            "--allowedTools": "Read,Bash(ls:*)",
            "--disallowedTools": "WebFetch",
            "--max-turns": "3",
            "--max-budget-usd": "1.5",
            "--add-dir": "/tmp",  # noqa: S108
            "--mcp-config": '{"mcpServers": {"x": {"command": "true"}}}',
        }.items():
            assert argv[argv.index(name) + 1] == value
        assert "--system-prompt" not in argv  # Claude Code's own

    async def test_the_system_prompt_is_added_to(self, stage: Stage) -> None:
        """A task's `system` is added; the option replaces."""
        argv = await self.argv(stage, system="Be brief.")
        assert argv[argv.index("--append-system-prompt") + 1] == "Be brief."
        argv = await self.argv(stage, options={"system_prompt": "You are a cat."})
        assert argv[argv.index("--system-prompt") + 1] == "You are a cat."

    async def test_effort(self, stage: Stage) -> None:
        """The task's words for it are the SDK's."""
        argv = await self.argv(stage, constraints=TaskConstraints(reasoning_effort="minimal"))
        assert argv[argv.index("--effort") + 1] == "low"
        argv = await self.argv(stage, constraints=TaskConstraints(reasoning_effort="none"))
        assert argv[argv.index("--thinking") + 1] == "disabled"

    async def test_the_conversation_facts_and_files(self, stage: Stage) -> None:
        """All of it is in the prompt, in order."""
        messages = (
            Message(role="user", content="First?"),
            Message(role="assistant", content="One."),
            Message(role="user", content="Second?"),
        )
        note = Attachment(name="n.md", media_type="text/markdown", size=4, digest="0" * 64)
        task = Task(messages=messages, context={"team": "blue"})
        call = Call(task=task, task_id="t", files=(LoadedFile(note, b"note"),))
        await events_of(stage.adapter(), call)
        prompt = stage.runs[0]["prompt"]
        places = [prompt.index(t) for t in ("First?", "One.", "blue", "note", "Second?")]
        assert places == sorted(places)

    async def test_an_answer_is_handed_back_for_repair(self, stage: Stage) -> None:
        """With what is wrong with it."""
        resume = Resume("repair", output='{"n":', problem="it is no JSON")
        await events_of(stage.adapter(), a_call("Count.", resume=resume))
        prompt = stage.runs[0]["prompt"]
        assert prompt.index("Count.") < prompt.index('{"n":') < prompt.index("it is no JSON")

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"options": {"directory": "/nowhere/at/all"}}, "doesn't exist"),
            ({"options": {"directory": __file__}}, "is no directory"),
            ({"options": {"directory": "~nobody-of-that-name/x"}}, "options.directory"),
            ({"options": {"directory": "x" * 5000}}, "too long"),
            ({"options": {"directory": 5}}, "options.directory"),
            ({"options": {"max_turn": 5}}, "did you mean 'max_turns'"),
            ({"options": {"max_turns": "5"}}, "must be a whole number"),
            ({"options": {"max_turns": True}}, "must be a whole number"),
            ({"options": {"allowed_tools": [1]}}, "list of texts"),
            ({"options": {"agents": {"a": {"x": 1}}}}, "refuses"),
            ({"options": {"resume": "x"}}, "takes up sessions itself"),
            ({"options": {"cwd": "/"}}, "options.directory"),
            ({"options": {"hooks": {}}}, "no such option"),
            ({"options": {"system_prompt": "x"}, "system": "y"}, "one of the two"),
            ({"constraints": TaskConstraints(temperature=1)}, "temperature"),
            ({"constraints": TaskConstraints(max_tokens=1)}, "max_turns"),
            ({"constraints": TaskConstraints(stop_sequences=("x",))}, "stop_sequences"),
            ({"tools": (Tool(name="t"),)}, "mcp_servers"),
        ],
    )
    async def test_what_it_cant_do_is_refused(
        self, stage: Stage, fields: dict[str, Any], words: str
    ) -> None:
        """In one line, before anything is started."""
        error, events = await failure_of(stage.adapter(), a_call("x", **fields))
        assert type(error) is InvalidRequest
        assert words in error.message
        assert events == []
        assert stage.runs == []

    async def test_a_system_prompt_that_is_too_long(self, stage: Stage) -> None:
        """The system takes no such argument; that is said, and what to do."""
        error, _ = await failure_of(stage.adapter(), a_call(system="x" * 300_000))
        assert type(error) is InvalidRequest
        assert "128 KB" in error.message

    async def test_files_of_other_kinds_are_refused(self, stage: Stage) -> None:
        """With what to do about them."""
        picture = Attachment(name="p.png", media_type="image/png", size=1, digest="0" * 64)
        call = replace(a_call(), files=(LoadedFile(picture, b"x"),))
        error, _ = await failure_of(stage.adapter(), call)
        assert "into the directory" in error.message

    async def test_without_a_directory(self, stage: Stage) -> None:
        """Neither the task nor a setting names one."""
        error, _ = await failure_of(stage.adapter(directory=None), a_call())
        assert type(error) is InvalidRequest
        assert "options.directory" in error.message

    async def test_a_relative_directory(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It counts from where perdure runs, and the files are named by it."""
        monkeypatch.chdir(stage.directory.parent)
        call = a_call(WORK, options={"directory": "work"})
        events = await events_of(stage.adapter(directory=None), call)
        assert [e.path for e in events if isinstance(e, FileCreated)] == ["work/notes/a.txt"]
        assert stage.runs[0]["cwd"] == str(stage.directory.resolve())


class TestSettings:
    """Keys and addresses reach the program by its environment."""

    async def test_arguments_beat_the_environment(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The environment goes along as it is."""
        monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-the-environment")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://environment")
        await events_of(stage.adapter(), a_call())
        await events_of(stage.adapter(api_key=None), a_call())
        given = {"base_url": "http://file", "api_key": "key-of-the-file"}
        await events_of(stage.adapter(api_key=None, settings=given), a_call())
        seen = [
            (run["env"]["ANTHROPIC_API_KEY"], run["env"]["ANTHROPIC_BASE_URL"])
            for run in stage.runs
        ]
        assert seen[0] == (KEY, "http://environment")
        assert seen[1] == ("key-of-the-environment", "http://environment")
        assert seen[2][1] == "http://environment"

    async def test_no_key_of_the_environment_goes_to_an_address_of_the_file(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It needs a key of its own; nor is the login of Claude Code used there."""
        monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "token-of-the-environment")
        given = {"base_url": "http://file"}
        with pytest.raises(NotConfigured, match="api_key"):
            stage.adapter(api_key=None, settings=given).check()
        given["api_key"] = "key-of-the-file"
        await events_of(stage.adapter(api_key=None, settings=given), a_call())
        assert stage.runs[0]["env"] == {
            "ANTHROPIC_API_KEY": "key-of-the-file",
            "ANTHROPIC_AUTH_TOKEN": "",
            "ANTHROPIC_BASE_URL": "http://file",
        }

    def test_the_bundled_program_needs_nothing(self, tmp_path: Path) -> None:
        """`check` is content with the SDK alone; one that was named has to be there."""
        ClaudeCodeAdapter().check()
        ClaudeCodeAdapter(cli_path=install(tmp_path)).check()

    async def test_the_program_of_the_environment(
        self, stage: Stage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The environment may name the program; a file that came with a project may not."""
        monkeypatch.setenv("PERDURE_CLAUDE_CODE_CLI", str(stage.home / "claude"))
        await events_of(stage.adapter(cli_path=None), a_call())
        assert len(stage.runs) == 1
        with pytest.raises(NotConfigured, match="cli_path: there is no such setting"):
            ClaudeCodeAdapter(settings={"cli_path": "./claude"})

    def test_unknown_settings_are_refused(self) -> None:
        """With the name that was meant."""
        with pytest.raises(NotConfigured, match="did you mean 'directory'"):
            ClaudeCodeAdapter(settings={"directroy": "x"})
