"""Conversations, answers bound to a schema, tools: what the platform gets, and what comes of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import FAST, assert_sound, eventually, query, stored_events
from pydantic import BaseModel

from perdure import (
    Accepted,
    Chunk,
    Completed,
    ConnectionLost,
    Engine,
    InvalidTask,
    Message,
    OutputInvalid,
    Resume,
    Task,
    TaskConstraints,
    TaskStatus,
    ToolCall,
    Usage,
)
from perdure.checking import Checker
from perdure.cli.main import run
from perdure.policy import RetryPolicy
from perdure.testing import Hold, ScriptedAdapter, Step

NUMBER: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
}


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    return Engine.open(db, adapters=adapters, settings=replace(FAST, **changes))


def answers(*scripts: list[Step]) -> ScriptedAdapter:
    """Return a platform with one script a call."""
    left = iter(scripts)
    return ScriptedAdapter(per_call=lambda _call: next(left))


# -- conversations ---------------------------------------------------------------------------------


async def test_a_conversation_goes_on(db: Path, tmp_path: Path) -> None:
    """The platform gets all turns, the facts and files of before, and the same system prompt."""
    (tmp_path / "a.txt").write_text("file a")
    (tmp_path / "b.txt").write_text("file b")
    adapter = answers(["Bonn.", Completed()], ["On the Rhine.", Completed()], ["No.", Completed()])
    async with engine_on(db, adapter) as engine:
        first = await engine.submit_task(
            Task(
                prompt="Which city?",
                system="Be short.",
                context={"country": "Germany"},
                files=(str(tmp_path / "a.txt"),),
                constraints=TaskConstraints(model="m-1"),
            )
        )
        await engine.get_result(first, 30)
        second = await engine.submit_task(
            Task(prompt="Where?", continue_from=first, files=(str(tmp_path / "b.txt"),))
        )
        await engine.get_result(second, 30)
        third = await engine.submit_task(
            Task(prompt="Sure?", continue_from=second, context={"country": "Austria"})
        )
        assert (await engine.get_result(third, 30)).output == "No."
        again = await engine.retry_task(third)
        repeated = await engine.get_definition(again.task_id)
        assert (await engine.get_task(third)).parent == second
    call = adapter.calls[2]
    assert call.task.messages == (
        Message(role="user", content="Which city?"),
        Message(role="assistant", content="Bonn."),
        Message(role="user", content="Where?"),
        Message(role="assistant", content="On the Rhine."),
        Message(role="user", content="Sure?"),
    )
    assert (call.task.system, call.task.context) == ("Be short.", {"country": "Austria"})
    assert [file.data for file in call.files] == [b"file a", b"file b"]
    assert call.model == "m-1"
    assert repeated.messages == call.task.messages  # not the conversation twice
    assert query(db, "SELECT prompt FROM tasks WHERE task_id = ?", third) == [("Sure?",)]
    assert_sound(db)


async def test_a_conversation_moves_to_another_platform(db: Path) -> None:
    """The platform stays unless another is named; a model's name stays only with its platform."""
    one, other = ScriptedAdapter(platform="one"), ScriptedAdapter(platform="other")
    async with engine_on(db, other, one) as engine:
        first = await engine.submit_task(
            Task(prompt="a", platform="one", constraints=TaskConstraints(model="m-1"))
        )
        await engine.get_result(first, 30)
        for platform in (None, "other"):
            task_id = await engine.submit_task(
                Task(prompt="b", continue_from=first, platform=platform)
            )
            await engine.get_result(task_id, 30)
    assert [call.model for call in one.calls] == ["m-1", "m-1"]
    assert [call.model for call in other.calls] == [None]


async def test_nothing_to_go_on_from(db: Path) -> None:
    """What isn't there, hasn't completed, said nothing or was redacted can't be continued."""
    hold = Hold()
    adapter = answers(["x", hold], [Completed()], ["said", Completed()])
    async with engine_on(db, adapter) as engine:
        running = await engine.submit_task(Task(prompt="1"))
        await hold.reached.wait()
        silent = await engine.submit_task(Task(prompt="2"))
        await engine.get_result(silent, 30)
        redacted = await engine.submit_task(Task(prompt="3"))
        await engine.get_result(redacted, 30)
        await engine.redact_task(redacted)
        for task_id, says in {
            "nobody": "there is no task 'nobody'",
            running: "is running; only a completed task",
            silent: "has no text to go on from",
            redacted: "was redacted",
        }.items():
            with pytest.raises(InvalidTask, match=says):
                await engine.submit_task(Task(prompt="more", continue_from=task_id))
        await engine.cancel_task(running)


# -- schemas ---------------------------------------------------------------------------------------


class Number(BaseModel):
    """What is asked for."""

    n: int


async def test_the_value_is_in_the_result(db: Path) -> None:
    """An answer that satisfies the schema comes as a value, and as the model that was asked for."""
    adapter = ScriptedAdapter('{"n"', ": 7}", Completed())
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(Task(prompt="?", output_schema=Number))  # type: ignore[arg-type]
        result = await engine.get_result(task_id, 30)
    assert result.parsed == {"n": 7}
    assert result.parse(Number) == Number(n=7)
    assert adapter.calls[0].task.output_schema == Number.model_json_schema()


async def test_an_invalid_answer_is_handed_back_once(db: Path) -> None:
    """The platform gets its answer and what is wrong with it; the output is the corrected one."""
    usage = Usage(input_tokens=3, output_tokens=2)
    adapter = answers(["seven", Completed(usage=usage)], ['{"n": 7}', Completed(usage=usage)])
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(Task(prompt="?", output_schema=NUMBER))
        chunks = [str(chunk) async for chunk in engine.stream_result(task_id)]
        result = await engine.get_result(task_id, 30)
    assert (result.output, result.parsed, result.attempts) == ('{"n": 7}', {"n": 7}, 2)
    assert chunks == ["seven", "", '{"n": 7}']
    assert result.tokens_used == 10
    resume = adapter.calls[1].resume
    assert resume is not None
    assert (resume.mode, resume.output) == ("repair", "seven")
    assert resume.problem is not None
    assert "is no JSON" in resume.problem
    (failed,) = [data for type_, data in stored_events(db, task_id) if type_ == "attempt_failed"]
    assert (failed["error_class"], failed["next"]) == ("OutputInvalid", "repair")
    assert_sound(db)


async def test_an_answer_that_stays_invalid(db: Path) -> None:
    """After one repair the task fails, with what is wrong, and its last answer kept."""
    adapter = answers(["seven", Completed()], ['{"n": "7"}', Completed()])
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(Task(prompt="?", output_schema=NUMBER))
        result = await engine.get_result(task_id, 30)
        with pytest.raises(ValueError, match="no parsed output: it is failed"):
            result.parse(Number)
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "OutputInvalid")
    assert result.error is not None
    assert "$.n" in result.error
    assert result.partial_output == '{"n": "7"}'


async def test_repairs_can_be_switched_off(db: Path) -> None:
    """With no repairs allowed the first invalid answer is the last."""
    adapter = ScriptedAdapter("seven", Completed())
    async with engine_on(db, adapter, retry=RetryPolicy(max_repairs=0)) as engine:
        task_id = await engine.submit_task(Task(prompt="?", output_schema=NUMBER))
        assert (await engine.get_result(task_id, 30)).error_class == OutputInvalid.__name__
    assert len(adapter.calls) == 1


@pytest.mark.parametrize(
    ("reason", "status", "error_class"),
    [
        ("length", TaskStatus.FAILED, "OutputInvalid"),
        ("content_filter", TaskStatus.COMPLETED, None),
        ("tool_calls", TaskStatus.COMPLETED, None),
    ],
)
async def test_answers_that_are_none(
    db: Path, reason: str, status: TaskStatus, error_class: str | None
) -> None:
    """What was cut off is invalid; what ended in a refusal or a tool call isn't checked."""
    adapter = ScriptedAdapter("I can", Completed(finish_reason=reason))
    async with engine_on(db, adapter, retry=RetryPolicy(max_repairs=0)) as engine:
        task_id = await engine.submit_task(Task(prompt="?", output_schema=NUMBER))
        result = await engine.get_result(task_id, 30)
    assert (result.status, result.error_class, result.parsed) == (status, error_class, None)


ENDLESS: dict[str, Any] = {"type": "string", "pattern": "(a+)+$"}


class PatientChecker(Checker):
    """Gives patterns all the time that they take, and says when it is asked for a check."""

    def __init__(self) -> None:
        super().__init__(seconds=600.0)
        self.begun = asyncio.Event()

    async def check(self, text: str, schema: Mapping[str, Any]) -> None:
        """Check as ever."""
        self.begun.set()
        await super().check(text, schema)


async def test_an_answer_on_which_a_pattern_takes_for_ever(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails and isn't handed back; what else there is to do is done meanwhile."""
    monkeypatch.setattr("perdure.worker.Checker", partial(Checker, seconds=1.0))
    bad = f'"{"a" * 40}!"'
    adapter = ScriptedAdapter(
        per_call=lambda call: [bad if call.task.prompt == "bad" else '"aa"', Completed()]
    )
    async with engine_on(db, adapter, concurrency=3) as engine:
        stuck = await engine.submit_task(Task(prompt="bad", output_schema=ENDLESS))
        waiting = asyncio.create_task(engine.get_result(stuck, 30))
        good = await engine.submit_task(Task(prompt="good", output_schema=ENDLESS))
        other = await engine.submit_task(Task(prompt="good"))
        assert (await engine.get_result(other, 30)).success
        assert (await engine.get_result(good, 30)).parsed == "aa"
        result = await waiting
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "OutputInvalid")
    assert result.error is not None
    assert "takes too long on this output (more than 1 s)" in result.error
    assert "a pattern such as '(a+)+$'" in result.error
    assert (result.attempts, result.partial_output) == (1, bad)
    assert_sound(db)


UNIQUE: dict[str, Any] = {"type": "array", "uniqueItems": True}
BRANCH: dict[str, Any] = {"properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["x"]}
BRANCHING: dict[str, Any] = {"$defs": {"n": {"anyOf": [BRANCH] * 3}}, "$ref": "#/$defs/n"}


@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        (UNIQUE, json.dumps([{"a": n} for n in range(4000)])),
        (BRANCHING, '{"c":' * 16 + "{}" + "}" * 16),
    ],
)
async def test_a_check_that_takes_long_holds_nobody_up(
    db: Path, monkeypatch: pytest.MonkeyPatch, schema: dict[str, Any], answer: str
) -> None:
    """It isn't only patterns that can take for ever; others go on meanwhile, and it is ended."""
    monkeypatch.setattr("perdure.worker.Checker", partial(Checker, seconds=2.0))
    longest = 0.0

    async def beat() -> None:
        nonlocal longest
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await asyncio.sleep(0.01)
            longest = max(longest, clock() - began)

    async with engine_on(db, ScriptedAdapter(answer, Completed())) as engine:
        beating = asyncio.create_task(beat())
        task_id = await engine.submit_task(Task(prompt="?", output_schema=schema))
        result = await engine.get_result(task_id, 60)
        beating.cancel()
    assert longest < 10.0  # alone it would take 30 s and more; 0.1 s where nobody else works
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "OutputInvalid")
    assert result.error is not None
    assert "takes too long on this output" in result.error
    assert_sound(db)


async def test_a_result_is_read_without_another_check(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers pay for reading; what wasn't checked before has no value."""
    schema = {"type": "array", "uniqueItems": True}
    refused = Completed(finish_reason="content_filter")
    adapter = answers(["[1, 2]", Completed()], ["[1, 2]", refused])
    async with engine_on(db, adapter, concurrency=1) as engine:
        answered = await engine.submit_task(Task(prompt="?", output_schema=schema))
        assert (await engine.get_result(answered, 60)).success
        cut = await engine.submit_task(Task(prompt="?", output_schema=schema))
        assert (await engine.get_result(cut, 60)).success
        monkeypatch.setattr("jsonschema.validators.Draft202012Validator.iter_errors", None)
        assert (await engine.get_result(answered)).parsed == [1, 2]
        assert (await engine.get_result(cut)).parsed is None
    assert_sound(db)


async def test_a_worker_that_closes_does_not_wait_for_a_pattern(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What isn't known to be valid by then is handed back, to be done later."""
    checker = PatientChecker()
    monkeypatch.setattr("perdure.worker.Checker", lambda: checker)
    adapter = ScriptedAdapter(f'"{"a" * 40}!"', Completed())
    timing = replace(FAST.timing, closing_seconds=0.1)
    async with engine_on(db, adapter, timing=timing) as engine:
        task_id = await engine.submit_task(Task(prompt="bad", output_schema=ENDLESS))
        await checker.begun.wait()
    assert query(db, "SELECT status FROM tasks") == [("pending",)]
    assert stored_events(db, task_id)[-1][0] == "interrupted"
    assert_sound(db)


async def test_an_answer_is_written_down_before_it_is_checked(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash during the check doesn't lose what was paid for, though it came in one piece."""
    checker = PatientChecker()
    monkeypatch.setattr("perdure.worker.Checker", lambda: checker)
    answer = f'"{"a" * 40}!"'
    timing = replace(FAST.timing, closing_seconds=0.1)
    async with engine_on(db, ScriptedAdapter(answer, Completed()), timing=timing) as engine:
        task_id = await engine.submit_task(Task(prompt="bad", output_schema=ENDLESS))
        await checker.begun.wait()
        assert [kind for kind, *_ in stored_events(db, task_id)] == [
            "submitted",
            "running",
            "chunk",
        ]
        assert query(db, "SELECT text FROM task_output") == [(answer,)]
    assert_sound(db)


async def test_cancelling_does_not_wait_for_a_pattern(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer and its tokens are kept."""
    checker = PatientChecker()
    monkeypatch.setattr("perdure.worker.Checker", lambda: checker)
    answer = f'"{"a" * 40}!"'
    usage = Usage(input_tokens=3, output_tokens=2)
    adapter = ScriptedAdapter(answer, Completed(usage=usage))
    timing = replace(FAST.timing, closing_seconds=0.1)
    async with engine_on(db, adapter, timing=timing) as engine:
        task_id = await engine.submit_task(Task(prompt="bad", output_schema=ENDLESS))
        await checker.begun.wait()
        await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert (result.status, result.partial_output) == (TaskStatus.CANCELLED, answer)
    assert result.tokens_used == 5
    assert_sound(db)


async def test_no_schema_is_refused_at_once(db: Path) -> None:
    """A schema that is none never gets into the log."""
    async with engine_on(db, ScriptedAdapter()) as engine:
        with pytest.raises(InvalidTask, match="output_schema: is no JSON schema"):
            await engine.submit_task(Task(prompt="?", output_schema={"type": 7}))
    assert query(db, "SELECT count(*) FROM events") == [(0,)]


# -- tools -----------------------------------------------------------------------------------------


async def test_tool_calls_are_in_the_result_and_in_the_table(db: Path) -> None:
    """Each call with its name and arguments; what a model garbled stays readable."""
    adapter = answers(
        ["lost", Chunk(text='{"id":"0","name":"no","arguments":{}}\n', kind="tool_call"),
         ConnectionLost("cut")],
        [
            Chunk(text='{"id":"1","name":"look_up","arguments":{"city":', kind="tool_call"),
            Chunk(text='"Bonn"}}\n{"id":"2","name":"add","arguments":{"n": 1', kind="tool_call"),
            Chunk(text="}\n", kind="tool_call"),
            Completed(finish_reason="tool_calls"),
        ],
    )  # fmt: skip
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(
            Task(prompt="?", tools=[{"name": "look_up"}, {"name": "add"}])  # type: ignore[arg-type]
        )
        result = await engine.get_result(task_id, 30)
    assert result.tool_calls == (
        ToolCall(id="1", name="look_up", arguments={"city": "Bonn"}),
        ToolCall(id="2", name="add", arguments='{"n": 1'),
    )
    ((stored,),) = query(db, "SELECT tool_calls FROM tasks")
    calls = json.loads(stored) if isinstance(stored, str) else stored
    assert calls[0]["arguments"]["city"] == "Bonn"
    assert_sound(db)


@pytest.mark.parametrize(
    "call",
    [
        {"id": 1, "name": "f"},
        {"id": "1", "name": "f", "arguments": {}, "type": "function"},
        {"name": None},
        {},
        [1, 2],
        5,
        r'{"id":"1","name":"\q","arguments":{}}',
    ],
)
async def test_a_tool_call_that_is_none_stays_as_it_came(db: Path, call: Any) -> None:
    """What a model garbled can be fetched: right after, later, as a record, and by the command."""
    line = call if isinstance(call, str) else json.dumps(call)
    end = Completed(finish_reason="tool_calls")
    async with engine_on(db, answers([Chunk(text=line, kind="tool_call"), end])) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        at_once = await engine.get_result(task_id, 30)
        later = await engine.get_result(task_id)
        (record,) = await engine.list_tasks()
    expected = (ToolCall(name="", arguments=call),)
    assert at_once.tool_calls == later.tool_calls == record.tool_calls == expected
    assert_sound(db)
    for command in (["show", task_id], ["export"]):
        assert await asyncio.to_thread(run, [*command, "--db", str(db)]) == 0


# -- picking up ------------------------------------------------------------------------------------


async def test_a_cut_connection_is_picked_up(db: Path) -> None:
    """The same response goes on where it was; nothing is asked, or paid for, twice."""
    adapter = answers(
        [
            Accepted(response_id="r1", reattachable=True, cursor="0"),
            Chunk(text="one ", cursor="1"),
            ConnectionLost("cut"),
        ],
        ["two", Completed(usage=Usage(input_tokens=3, output_tokens=2))],
    )
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        result = await engine.get_result(task_id, 30)
    assert (result.output, result.tokens_used, result.attempts) == ("one two", 5, 2)
    assert adapter.calls[1].resume == Resume("reattach", "one ", "r1", "1")
    assert_sound(db)


async def test_cancelled_while_nobody_listens(db: Path) -> None:
    """A response that goes on while its task waits to be picked up is stopped at the platform."""
    adapter = answers([Accepted(response_id="r1", reattachable=True), ConnectionLost("cut")])
    patient = RetryPolicy(base_seconds=1000, cap_seconds=1000)
    async with engine_on(db, adapter, retry=patient) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        async for recorded in engine.stream_events(task_id):
            if recorded.event.type == "attempt_failed":
                break
        assert await engine.cancel_task(task_id)
        assert (await engine.get_result(task_id, 30)).status is TaskStatus.CANCELLED
    assert adapter.stopped == ["r1"]
    assert_sound(db)


async def test_a_response_that_nobody_will_ask_for_is_stopped(db: Path) -> None:
    """A task that gives up leaves no work behind at the platform that is paid for in vain."""
    adapter = answers([Accepted(response_id="r1", reattachable=True), ConnectionLost("cut")])
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(
            Task(prompt="?", constraints=TaskConstraints(max_attempts=1))
        )
        assert (await engine.get_result(task_id, 30)).status is TaskStatus.FAILED
        await eventually(lambda: not engine.worker.running)
    assert adapter.stopped == ["r1"]
