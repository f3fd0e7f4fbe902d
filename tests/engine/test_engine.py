"""The engine as people use it: submit, watch, read, wait; and what happens when a platform errs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from harness import (
    FAST,
    assert_sound,
    count_events,
    demo,
    eventually,
    log_text,
    query,
    stored_events,
    text_of,
)

import perdure
from perdure import (
    Accepted,
    Attachment,
    AuthenticationFailed,
    Call,
    Capabilities,
    Chunk,
    Completed,
    ConnectionLost,
    ContentRefused,
    Engine,
    EngineClosed,
    Event,
    FileCreated,
    InvalidConfig,
    InvalidTask,
    Message,
    Overloaded,
    RateLimited,
    RunningLoop,
    StoreError,
    Submission,
    Task,
    TaskConstraints,
    TaskFilter,
    TaskNotFound,
    TaskStatus,
    UnknownPlatform,
    Usage,
    UsageReported,
    collect_stream,
)
from perdure.appending import Timing
from perdure.events import AttemptFailed, Failed, Interrupted, Running
from perdure.platforms import GROUP
from perdure.policy import RetryPolicy
from perdure.store.database import Writer
from perdure.store.sqlite import SqliteWriter
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter

ASK = Task(prompt="Say hello.")


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


# -- the five methods ------------------------------------------------------------------------------


async def test_a_task_goes_from_submission_to_result(db: Path) -> None:
    """What is submitted is run, can be streamed while it runs, and has a result at its end."""
    adapter = ScriptedAdapter(
        "Hel", "lo", Completed(finish_reason="stop", usage=Usage(input_tokens=3, output_tokens=2))
    )
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        assert task_id.startswith("scripted_")
        assert await collect_stream(engine.stream_result(task_id)) == "Hello"
        result = await engine.get_result(task_id)
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED
    assert result.success
    assert result.status is TaskStatus.COMPLETED
    assert result.output == "Hello"
    assert result.partial_output is None
    assert result.error is None
    assert result.tokens_used == 5
    assert result.finish_reason == "stop"
    assert result.attempts == 1
    assert result.task.prompt == ASK.prompt
    assert result.task_id == task_id
    assert result.platform == "scripted"
    assert result.duration_seconds >= 0
    assert result.completed_at is not None
    assert_sound(db)


async def test_an_unknown_task_is_unknown(db: Path) -> None:
    """Asking for the status of a task that isn't there says so; the other methods raise."""
    async with engine_on(db) as engine:
        assert await engine.get_status("nobody") is TaskStatus.UNKNOWN
        with pytest.raises(TaskNotFound, match="nobody"):
            await engine.get_result("nobody")
        with pytest.raises(TaskNotFound, match="nobody"):
            await collect_stream(engine.stream_result("nobody"))
        with pytest.raises(TaskNotFound, match="nobody"):
            await engine.get_events("nobody")
        with pytest.raises(TaskNotFound, match="nobody"):
            await engine.retry_task("nobody")
        assert await engine.cancel_task("nobody") is False
    assert count_events(db) == 0


@pytest.mark.parametrize("odd", ["\udcff", "a\x00b", 7, b"a", None])
async def test_what_can_be_no_task_is_unknown(db: Path, odd: Any) -> None:
    """It is no error of the database, and no trouble for who asks at the same time."""
    async with engine_on(db, run=False) as engine:
        task_id = await engine.submit_task(ASK)
        looking = await asyncio.gather(engine.get_status(odd), engine.get_status(task_id))
        assert looking == [TaskStatus.UNKNOWN, TaskStatus.PENDING]
        cancelling = await asyncio.gather(engine.cancel_task(odd), engine.cancel_task(task_id))
        assert cancelling == [False, True]
        for ask in (
            *(engine.get_result, engine.get_task, engine.get_events, engine.get_definition),
            *(engine.retry_task, engine.redact_task),
        ):
            with pytest.raises(TaskNotFound):
                await ask(odd)
        with pytest.raises(TaskNotFound):
            await collect_stream(engine.stream_result(odd))


async def test_a_result_that_another_engine_brings_about(db: Path) -> None:
    """Who has submitted a task and nobody to tell it of its end meanwhile still gets the result."""
    async with engine_on(db, run=False) as here:
        for other_writes_between in (False, True):
            task_id = await here.submit_task(ASK)
            assert here.log.feed.knows_open(task_id)
            async with engine_on(db, ScriptedAdapter("done", Completed())) as there:
                assert (await there.get_result(task_id, 30)).output == "done"
            if other_writes_between:  # so that what others have written was passed over
                await here.submit_task(Task(prompt="Another.", platform="scripted"))
                assert not here.log.feed.knows_open(task_id)
            assert (await here.get_result(task_id, 30)).output == "done"


async def test_get_result_waits_and_gives_up_in_time(db: Path) -> None:
    """The result is waited for, as long as that is allowed; the task goes on all the same."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter(hold, "late", Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        with pytest.raises(TimeoutError):
            await engine.get_result(task_id, timeout=0.05)
        waiting = asyncio.create_task(engine.get_result(task_id))
        await hold.reached.wait()
        assert not waiting.done()
        hold.release()
        assert (await waiting).output == "late"


async def test_the_output_is_streamed_as_it_comes(db: Path) -> None:
    """A reader has a piece of output before the platform has sent the next."""
    holds = [Hold() for _ in range(5)]
    script = [step for n, hold in enumerate(holds) for step in (f"{n};", hold)]
    async with engine_on(db, ScriptedAdapter(*script, Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        stream = engine.stream_result(task_id)
        for n, hold in enumerate(holds):
            assert await anext(stream) == f"{n};"
            assert await engine.get_status(task_id) is TaskStatus.RUNNING
            hold.release()
        assert [piece async for piece in stream] == []


async def test_a_task_of_another_process_is_run(db: Path) -> None:
    """A task that one engine only wrote down is run by the next that comes along."""
    async with engine_on(db, run=False) as engine:
        task_id = await engine.submit_task(ASK)
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter) as engine:
        assert (await engine.get_result(task_id, 30)).output == "Hello, world."
    assert len(adapter.calls) == 1
    assert_sound(db)


async def test_many_tasks_at_once_all_end(db: Path) -> None:
    """A hundred tasks of different lengths end, each with its own text."""
    adapter = ScriptedAdapter(
        per_call=lambda call: [*(f"{call.task.prompt}.{n} " for n in range(7)), Completed()]
    )
    async with engine_on(db, adapter) as engine:
        outcomes = await engine.submit_tasks(Task(prompt=f"task {n}") for n in range(100))
        ids = [outcome.task_id for outcome in outcomes if isinstance(outcome, Submission)]
        assert len(set(ids)) == 100
        results = await asyncio.gather(*(engine.get_result(task_id) for task_id in ids))
    for n, result in enumerate(results):
        assert result.output == "".join(f"task {n}.{k} " for k in range(7))
    assert adapter.most_running <= FAST.concurrency
    assert_sound(db)


async def test_a_submission_that_is_cancelled_is_written_whole_or_not_at_all(
    db: Path, chance: Any
) -> None:
    """Cancelling the caller at any moment leaves no half of a task, and harms nobody else."""
    async with engine_on(db) as engine:
        for n in range(60):
            submitting = asyncio.create_task(
                engine.submit_task(Task(prompt=f"{n}", key=f"key {n}"))
            )
            for _ in range(chance.randrange(6)):
                await asyncio.sleep(0)
            submitting.cancel()
            await asyncio.wait({submitting})
        for n in range(60):
            task_id = await engine.submit_task(Task(prompt=f"{n}", key=f"key {n}"))
            assert (await engine.get_result(task_id)).success
    assert query(db, "SELECT count(*) FROM tasks") == [(60,)]
    assert_sound(db)


# -- what is asked ---------------------------------------------------------------------------------


async def test_the_platform_gets_everything_that_was_asked(db: Path) -> None:
    """Messages, context, system prompt, options and constraints reach the adapter unchanged."""
    task = Task(
        messages=(
            Message(role="user", content="Hi"),
            Message(role="assistant", content="long " * 2000),
            Message(role="user", content="And now?"),
        ),
        system="You are a test. " * 1000,
        context={"manual": "read me " * 1000, "number": 7, "list": [1, {"a": None}]},
        options={"seed": 1},
        metadata={"mine": [True]},
        labels={"colour": "blue"},
        constraints=TaskConstraints(max_tokens=7, temperature=0.5, model="m-2"),
    )
    adapter = ScriptedAdapter(default_model="m-1")
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(task)
        result = await engine.get_result(task_id)
        definition = await engine.get_definition(task_id)
    (call,) = adapter.calls
    wanted = task.model_copy(update={"task_id": task_id})
    assert call.task == wanted
    assert result.task == wanted
    assert definition == wanted
    assert result.metadata == {"mine": [True]}
    assert (call.task_id, call.attempt, call.model, call.resume) == (task_id, 1, "m-2", None)


async def test_long_texts_that_tasks_share_are_stored_once(db: Path) -> None:
    """Twenty tasks with one long system prompt keep it once."""
    system = "the same for all " * 5000
    async with engine_on(db) as engine:
        for n in range(20):
            await engine.submit_task(Task(prompt=f"{n}", system=system))
    assert query(db, "SELECT count(*), sum(size) FROM blobs") == [(1, len(system))]


async def test_the_default_model_is_the_adapters(db: Path) -> None:
    """Where a task names no model, the adapter's default is used and written down."""
    adapter = ScriptedAdapter(default_model="m-1")
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(await engine.submit_task(ASK))
    assert adapter.calls[0].model == "m-1"
    assert result.model == "m-1"


async def test_files_are_taken_as_they_were_at_submission(db: Path, tmp_path: Path) -> None:
    """A file that changes on disk afterwards, or disappears, changes nothing for the task."""
    changing, vanishing = tmp_path / "notes.txt", tmp_path / "image.png"
    changing.write_bytes(b"as it was")
    vanishing.write_bytes(bytes(range(256)) * 100)
    async with engine_on(db, run=False) as engine:
        task_id = await engine.submit_task(Task(prompt="Read.", files=(changing, str(vanishing))))
    changing.write_bytes(b"changed meanwhile")
    vanishing.unlink()
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(task_id)
        again = await engine.retry_task(task_id)
        await engine.get_result(again.task_id)
    for call in adapter.calls:
        notes, image = call.files
        assert notes.data == b"as it was"
        assert image.data == bytes(range(256)) * 100
        assert (notes.attachment.name, notes.attachment.media_type) == ("notes.txt", "text/plain")
        assert image.attachment.size == 25600
    assert len(adapter.calls) == 2
    assert all(isinstance(file, Attachment) for file in result.task.files)
    assert query(db, "SELECT count(*) FROM blobs") == [(2,)]


async def test_a_file_that_has_gone_meanwhile_is_not_attached_again(
    db: Path, tmp_path: Path
) -> None:
    """What another task had attached, and a redaction took away, can't be part of a new one."""
    (tmp_path / "notes.txt").write_bytes(b"as it was")
    async with engine_on(db, run=False) as engine:
        first = await engine.submit_task(Task(prompt="Read.", files=(tmp_path / "notes.txt",)))
        task = (await engine.get_definition(first)).model_copy(update={"task_id": None})
        assert task.files
        await engine.submit_task(task)
        await engine.log.write(lambda tx: tx.connection.exec_driver_sql("DELETE FROM blobs"))
        with pytest.raises(InvalidTask, match="not in the database any more"):
            await engine.submit_task(task)
    assert count_events(db) == 2


@pytest.mark.parametrize("missing", ["no such file", "folder"])
async def test_a_file_that_cannot_be_read_is_refused(
    db: Path, tmp_path: Path, missing: str
) -> None:
    """A missing file or a folder is an error that names it, and nothing is written."""
    (tmp_path / "folder").mkdir()
    path = tmp_path / missing
    async with engine_on(db) as engine:
        with pytest.raises(InvalidTask, match=missing):
            await engine.submit_task(Task(prompt="Read.", files=(path,)))
    assert count_events(db) == 0


async def test_a_key_is_taken_once(db: Path) -> None:
    """A second task with a known key is not written; the first one's id is the answer."""
    async with engine_on(db) as engine:
        first = await engine.submit_task(Task(prompt="one", key="k"))
        assert await engine.submit_task(Task(prompt="two", key="k")) == first
        await engine.get_result(first)
        assert await engine.submit_task(Task(prompt="three", key="k")) == first
        same = await engine.submit_tasks(Task(prompt="x", key="new") for _ in range(5))
    assert [isinstance(one, Submission) and one.new for one in same] == [True] + [False] * 4
    assert len({one.task_id for one in same if isinstance(one, Submission)}) == 1
    assert count_events(db, "submitted") == 2


async def test_keys_hold_between_engines(db: Path) -> None:
    """Engines that submit the same keys at the same time write each task once."""
    async with engine_on(db, run=False) as one, engine_on(db, run=False) as two:
        batches = await asyncio.gather(
            *(
                engine.submit_task(Task(prompt=f"{n}", key=f"key {n}"))
                for n in range(40)
                for engine in (one, two)
            )
        )
    assert len(set(batches)) == 40
    assert count_events(db, "submitted") == 40
    assert_sound(db)


async def test_a_task_id_that_is_taken_is_refused(db: Path) -> None:
    """Ids that people give are theirs to keep apart; the good tasks beside it are written."""
    async with engine_on(db) as engine:
        await engine.submit_task(Task(prompt="one", task_id="mine"))
        outcomes = await engine.submit_tasks(
            [Task(prompt="two", task_id="mine"), Task(prompt="three", task_id="other")]
        )
    assert isinstance(outcomes[0], InvalidTask)
    assert isinstance(outcomes[1], Submission)


async def test_a_bad_task_does_not_stop_the_good_ones(db: Path) -> None:
    """Of many tasks, those that can't be accepted are answered with their error, in place."""
    async with engine_on(db) as engine:
        outcomes = await engine.submit_tasks(
            [
                Task(prompt="good"),
                Task(prompt="bad", platform="scriptd"),
                Task(prompt="bad", files=("/nowhere/at/all",)),
                Task(prompt="good too"),
            ]
        )
    assert [type(outcome) for outcome in outcomes] == [
        Submission,
        UnknownPlatform,
        InvalidTask,
        Submission,
    ]
    assert "did you mean 'scripted'" in str(outcomes[1])
    assert count_events(db, "submitted") == 2


# -- once more -------------------------------------------------------------------------------------


async def test_an_ended_task_is_run_again_as_a_new_one(db: Path) -> None:
    """The new task is linked to the old; the old one stays as it is; asking twice makes one."""
    answers = iter([ContentRefused("no"), "yes"])
    adapter = ScriptedAdapter(per_call=lambda _call: [next(answers), Completed()])
    async with engine_on(db, adapter) as engine:
        old = await engine.submit_task(Task(prompt="Please?", labels={"a": "b"}, key="mine"))
        assert not (await engine.get_result(old)).success
        before = stored_events(db, old)
        first, second = await asyncio.gather(engine.retry_task(old), engine.retry_task(old))
        assert first.task_id == second.task_id != old
        assert {first.new, second.new} == {True, False}
        result = await engine.get_result(first.task_id)
        assert result.output == "yes"
        assert result.task.retry_of == old
        assert result.task.labels == {"a": "b"}
        assert stored_events(db, old) == before
        (latest,) = await engine.list_tasks(TaskFilter(latest=True))
        assert latest.task_id == first.task_id
        assert (await engine.retry_task(first.task_id)).new


async def test_only_ended_tasks_are_run_again(db: Path) -> None:
    """A task that still runs can't be run again."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter(hold, Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        with pytest.raises(InvalidTask, match="only ended tasks"):
            await engine.retry_task(task_id)
        hold.release()


# -- order -----------------------------------------------------------------------------------------


async def test_priority_comes_before_age(db: Path) -> None:
    """0 is served first; among equals the older one."""
    async with engine_on(db, run=False) as engine:
        for n, priority in enumerate([5, 10, 0, 5, 0, 1]):
            await engine.submit_task(Task(prompt=f"{n}", priority=priority))
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter, settings={"concurrency": 1}, run=False) as engine:
        await engine.run_until_done()
    assert "".join(call.task.prompt for call in adapter.calls) == "245031"


async def test_running_until_done_ends(db: Path) -> None:
    """It ends with nothing to do, and when all is done, also what comes while it runs."""
    async with engine_on(db, ScriptedAdapter(), run=False) as engine:
        await engine.run_until_done()

    async def one_more(call: Call) -> None:
        if call.task.prompt == "first":
            await other.submit_task(Task(prompt="second"))

    adapter = ScriptedAdapter(one_more, "ok", Completed())
    async with engine_on(db, run=False) as other, engine_on(db, adapter, run=False) as engine:
        await engine.submit_task(Task(prompt="first"))
        await engine.run_until_done()
    assert query(db, "SELECT prompt, status FROM tasks ORDER BY stream_id") == [
        ("first", "completed"),
        ("second", "completed"),
    ]


async def test_running_until_done_can_be_repeated(db: Path) -> None:
    """What is submitted after everything was done is run by the next call."""
    for run in (False, True):
        async with engine_on(db, run=run) as engine:
            for n in range(3):
                await engine.submit_task(Task(prompt=f"{n}"))
                async with asyncio.timeout(30):
                    await engine.run_until_done()
                assert query(db, "SELECT DISTINCT status FROM tasks") == [("completed",)]


# -- errors and retries ----------------------------------------------------------------------------


async def test_a_retryable_error_is_tried_again(db: Path) -> None:
    """Every attempt is in the log with its error; the output begins anew; all tokens count."""

    def script(call: Call) -> list[Any]:
        used = UsageReported(usage=Usage(input_tokens=10, output_tokens=call.attempt))
        if call.attempt < 3:
            return [f"lost {call.attempt} ", used, ConnectionLost(f"gone {call.attempt}")]
        return ["kept", used, Completed()]

    adapter = ScriptedAdapter(per_call=script)
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        result = await engine.get_result(task_id)
        events = await engine.get_events(task_id)
    assert result.output == "kept"
    assert result.attempts == 3
    assert result.usage.input_tokens == 30
    assert result.usage.output_tokens == 6
    assert result.error is None
    failures = [e.event for e in events if isinstance(e.event, AttemptFailed)]
    assert [(f.attempt, f.error_class, f.message) for f in failures] == [
        (1, "ConnectionLost", "gone 1"),
        (2, "ConnectionLost", "gone 2"),
    ]
    assert [call.attempt for call in adapter.calls] == [1, 2, 3]
    assert_sound(db)


async def test_attempts_are_limited(db: Path) -> None:
    """After `max_attempts` the task fails with the last error, its partial output kept."""
    adapter = ScriptedAdapter("half", Overloaded("busy", status=529, request_id="req_1"))
    async with engine_on(db, adapter) as engine:
        task = Task(prompt="?", constraints=TaskConstraints(max_attempts=3))
        result = await engine.get_result(await engine.submit_task(task))
        (failed,) = [
            e.event for e in await engine.get_events(result.task_id) if isinstance(e.event, Failed)
        ]
    assert (result.status, result.error_class, result.error) == (
        TaskStatus.FAILED,
        "Overloaded",
        "busy",
    )
    assert result.output == ""
    assert result.partial_output == "half"
    assert result.attempts == 3 == len(adapter.calls)
    assert (failed.status, failed.request_id) == (529, "req_1")
    assert_sound(db)


@pytest.mark.parametrize("error", [AuthenticationFailed("key"), ContentRefused("no")])
async def test_a_final_error_is_not_tried_again(db: Path, error: Exception) -> None:
    """What can't get better ends the task at once."""
    adapter = ScriptedAdapter(error)
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(await engine.submit_task(ASK))
    assert result.error_class == type(error).__name__
    assert len(adapter.calls) == 1


async def test_the_time_a_platform_asks_for_is_waited(db: Path) -> None:
    """No attempt begins before what `Retry-After` said is over."""
    answers = iter([RateLimited("slow down", retry_after=0.4), "ok"])
    adapter = ScriptedAdapter(per_call=lambda _call: [next(answers), Completed()])
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        result = await engine.get_result(task_id)
        events = await engine.get_events(task_id)
    assert result.output == "ok"
    (failed,) = [e for e in events if isinstance(e.event, AttemptFailed)]
    second = [e for e in events if isinstance(e.event, Running)][1]
    assert isinstance(failed.event, AttemptFailed)
    assert failed.event.retry_after == 0.4
    assert second.recorded_at >= failed.event.retry_at
    assert second.recorded_at - failed.recorded_at >= timedelta(seconds=0.35)


@pytest.mark.parametrize("wait", [float("nan"), -5.0])
async def test_a_senseless_wait_is_none(db: Path, wait: float) -> None:
    """A platform that asks for an impossible wait is asked again all the same."""
    answers = iter([RateLimited("?", retry_after=wait), "ok"])
    adapter = ScriptedAdapter(per_call=lambda _call: [next(answers), Completed()])
    async with engine_on(db, adapter) as engine:
        assert (await engine.get_result(await engine.submit_task(ASK), 30)).output == "ok"


async def test_the_wait_between_attempts_survives_a_restart(db: Path) -> None:
    """The time of the next attempt is in the database; another engine keeps to it."""
    policy = RetryPolicy(retry_after_cap_seconds=3600)
    first = ScriptedAdapter(RateLimited("later", retry_after=1.2))
    async with engine_on(db, first, settings={"retry": policy}) as engine:
        task_id = await engine.submit_task(ASK)
        await eventually(lambda: count_events(db, "attempt_failed"))
    ((due, status, worker),) = query(db, "SELECT available_at, status, worker FROM tasks")
    assert (status, worker) == ("pending", None)
    second = ScriptedAdapter()
    async with engine_on(db, second) as engine:
        result = await engine.get_result(task_id)
        events = await engine.get_events(task_id)
    assert (result.output, result.attempts) == ("Hello, world.", 2)
    began = [e.recorded_at for e in events if isinstance(e.event, Running)]
    assert began[1] >= datetime.fromisoformat(due)
    assert began[1] < datetime.fromisoformat(due) + timedelta(seconds=10)


async def test_the_next_platform_is_tried(db: Path) -> None:
    """When a platform has failed for good the next one gets the task, from the beginning."""
    broken = ScriptedAdapter("half", AuthenticationFailed("wrong key"), platform="one")
    busy = ScriptedAdapter(Overloaded("busy"), platform="two", default_model="m-two")
    good = ScriptedAdapter("whole", Completed(), platform="three", default_model="m-three")
    async with engine_on(db, broken, busy, good) as engine:
        task = Task(
            prompt="?",
            fallbacks=("two", "three"),
            constraints=TaskConstraints(max_attempts=2, model="only-for-one"),
        )
        result = await engine.get_result(await engine.submit_task(task))
    assert (result.output, result.platform, result.model) == ("whole", "three", "m-three")
    assert result.attempts == 4
    assert [len(adapter.calls) for adapter in (broken, busy, good)] == [1, 2, 1]
    assert_sound(db)


@pytest.mark.parametrize("named", [None, "one"])
async def test_a_model_is_that_of_the_platform_it_was_named_for(
    db: Path, named: str | None
) -> None:
    """What fell back is run again from the first platform on; who goes on asks the second one."""
    answers = iter([[AuthenticationFailed("wrong key")], ["again", Completed()]])
    first = ScriptedAdapter(per_call=lambda _call: next(answers), platform="one")
    second = ScriptedAdapter("fine", Completed(), platform="two", default_model="m-two")
    async with engine_on(db, first, second) as engine:
        constraints = TaskConstraints(model="only-for-one")
        task = Task(prompt="?", platform=named, fallbacks=("two",), constraints=constraints)
        before = await engine.get_result(await engine.submit_task(task), 30)
        assert (before.platform, before.model) == ("two", "m-two")
        more = Task(prompt="And?", continue_from=before.task_id)
        after = await engine.get_result(await engine.submit_task(more), 30)
        assert (after.platform, after.model) == ("two", "m-two")
        again = await engine.retry_task(before.task_id)
        result = await engine.get_result(again.task_id, 30)
        assert (result.platform, result.output, result.model) == ("one", "again", "only-for-one")


async def test_when_all_platforms_fail_the_last_error_counts(db: Path) -> None:
    """A task whose last platform fails for good has failed."""
    one = ScriptedAdapter(AuthenticationFailed("first"), platform="one")
    two = ScriptedAdapter(ContentRefused("second"), platform="two")
    async with engine_on(db, one, two) as engine:
        result = await engine.get_result(
            await engine.submit_task(Task(prompt="?", fallbacks=("two",)))
        )
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "ContentRefused")
    assert result.platform == "two"


async def test_the_time_limit_keeps_what_was_there(db: Path) -> None:
    """A task that takes too long fails, with its partial output and the tokens known by then."""
    used = UsageReported(usage=Usage(input_tokens=4, output_tokens=2))
    adapter = ScriptedAdapter("so ", "far", used, Hold())
    async with engine_on(db, adapter) as engine:
        task = Task(prompt="?", constraints=TaskConstraints(timeout_seconds=0.3))
        result = await engine.get_result(await engine.submit_task(task), 30)
        await eventually(lambda: not adapter.running)
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "TimeLimitExceeded")
    assert result.partial_output == "so far"
    assert result.tokens_used == 6
    assert adapter.cancelled == [result.task_id]
    assert len(adapter.calls) == 1
    assert_sound(db)


async def test_a_stream_that_merely_stops_is_no_success(db: Path) -> None:
    """Without the platform's end marker there is no `completed`, however much text there was."""
    adapter = ScriptedAdapter("all of ", "the text")
    async with engine_on(db, adapter) as engine:
        task = Task(prompt="?", constraints=TaskConstraints(max_attempts=2))
        result = await engine.get_result(await engine.submit_task(task))
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "StreamTruncated")
    assert result.partial_output == "all of the text"
    assert result.attempts == 2
    assert count_events(db, "completed") == 0


# -- adapters that err -----------------------------------------------------------------------------


class Wrong(ScriptedAdapter):
    """An adapter with a fault in it."""

    def __init__(self, fault: Callable[[Call], Any]) -> None:
        super().__init__()
        self._fault = fault

    def run(self, call: Call) -> Any:
        """Do something an adapter must not do."""
        if call.task.prompt == "good":
            return super().run(call)
        return self._fault(call)


def _raises_at_once(call: Call) -> Any:
    raise KeyError(call.task_id)


def _no_generator(call: Call) -> Any:
    async def answer() -> Call:
        return call

    coroutine = answer()
    coroutine.close()  # or whichever test runs when it is collected is warned of it
    return coroutine


async def _raises(call: Call) -> AsyncGenerator[Any, None]:
    yield Chunk(text="half")
    raise ZeroDivisionError("by nobody")


async def _raises_a_cancellation(call: Call) -> AsyncGenerator[Any, None]:
    yield Chunk(text="half")
    raise asyncio.CancelledError


async def _raises_a_group(call: Call) -> AsyncGenerator[Any, None]:
    yield Chunk(text="half")
    raise BaseExceptionGroup("both", [ValueError("a"), ConnectionLost("b")])


async def _raises_what_is_no_exception(call: Call) -> AsyncGenerator[Any, None]:
    yield Chunk(text="half")
    raise BaseException("of a kind of its own")  # noqa: TRY002 - as some libraries do


async def _raises_what_cannot_be_stored(call: Call) -> AsyncGenerator[Any, None]:
    yield Chunk(text="half")
    raise ContentRefused("bad \ud800 text \x00", request_id="\udfff")


async def _yields_text(call: Call) -> AsyncGenerator[Any, None]:
    yield "no event"


async def _yields_nothing(call: Call) -> AsyncGenerator[Any, None]:
    yield None


async def _yields_the_engines_event(call: Call) -> AsyncGenerator[Any, None]:
    yield Running(attempt=2, worker="me", platform="wrong")


async def _yields_an_ending_of_its_own(call: Call) -> AsyncGenerator[Any, None]:
    yield Failed(error_class="Mine", message="I decide", attempts=1)


async def _yields_huge_numbers(call: Call) -> AsyncGenerator[Any, None]:
    yield UsageReported(usage=Usage(input_tokens=2**63))
    yield Completed()


async def _yields_beyond_json(call: Call) -> AsyncGenerator[Any, None]:
    yield Completed(usage=Usage(input_tokens=1, raw={"what": object()}))


FAULTS = [
    _raises_at_once,
    _no_generator,
    _raises,
    _raises_a_cancellation,
    _raises_a_group,
    _raises_what_is_no_exception,
    _raises_what_cannot_be_stored,
    _yields_text,
    _yields_nothing,
    _yields_the_engines_event,
    _yields_an_ending_of_its_own,
    _yields_huge_numbers,
    _yields_beyond_json,
]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
async def test_a_fault_of_an_adapter_fails_its_task_and_no_other(
    db: Path, fault: Callable[[Call], Any]
) -> None:
    """Whatever an adapter does wrong, its task ends as failed, and the engine goes on."""
    async with engine_on(db, Wrong(fault)) as engine:
        bad = await engine.submit_task(Task(prompt="bad"))
        result = await engine.get_result(bad, 30)
        assert result.status is TaskStatus.FAILED
        assert result.error
        good = await engine.submit_task(Task(prompt="good"))
        assert (await engine.get_result(good, 30)).success
    assert_sound(db)


async def test_an_adapter_that_swallows_its_cancellation_is_ended(db: Path) -> None:
    """It is stopped at its next piece of output, and the task ends with what was there."""
    ended = asyncio.Event()

    async def stubborn(call: Call) -> AsyncGenerator[Event, None]:
        try:
            yield Chunk(text="one")
            for n in range(10_000):
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01 if n else 60)
                yield Chunk(text="more")
        finally:
            ended.set()

    async with engine_on(db, Wrong(stubborn)) as engine:
        task_id = await engine.submit_task(ASK)
        await anext(engine.stream_result(task_id))
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
        assert (result.status, result.partial_output) == (TaskStatus.CANCELLED, "one")
        async with asyncio.timeout(10):
            await ended.wait()
    assert_sound(db)


async def test_an_adapter_that_does_not_let_itself_be_stopped_is_left_behind(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The task ends, the engine closes, and the log names the adapter."""
    let_go = asyncio.Event()

    async def deaf(call: Call) -> AsyncGenerator[Event, None]:
        yield Chunk(text="one")
        while not let_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await let_go.wait()

    async with engine_on(db, Wrong(deaf)) as engine:
        task_id = await engine.submit_task(ASK)
        await anext(engine.stream_result(task_id))
        await engine.cancel_task(task_id)
        assert (await engine.get_result(task_id, 30)).partial_output == "one"
    assert "does not let itself be stopped" in caplog.text
    let_go.set()
    await asyncio.sleep(0.05)
    assert_sound(db)


async def test_an_adapter_that_never_ends_after_its_end_is_left_behind(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What the platform sent counts, even if its adapter hangs while tidying up."""

    async def lingering(call: Call) -> AsyncGenerator[Event, None]:
        try:
            yield Chunk(text="all")
            yield Completed()
        finally:
            await asyncio.sleep(3600)

    async with engine_on(db, Wrong(lingering)) as engine:
        result = await engine.get_result(await engine.submit_task(ASK), 30)
        assert result.output == "all"
        await eventually(lambda: not engine.worker.running)
    assert "does not end its stream" in caplog.text


async def test_an_adapter_that_cannot_be_closed_does_not_keep_the_engine(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine closes everything else."""

    class Unclosable(ScriptedAdapter):
        async def close(self) -> None:
            raise OSError("stuck")

    last = ScriptedAdapter(platform="last")
    async with engine_on(db, Unclosable(), last) as engine:
        await engine.get_result(await engine.submit_task(ASK))
    assert "could not be closed" in caplog.text
    assert last.closed == 1
    with pytest.raises(EngineClosed):
        await engine.submit_task(ASK)


async def test_stopping_at_the_platform_may_fail(
    db: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A platform's own cancel that fails changes nothing about the task's end."""

    class Unstoppable(ScriptedAdapter):
        async def stop(self, response_id: str) -> None:
            raise RuntimeError(f"{response_id} goes on")

    hold = Hold()
    adapter = Unstoppable(Accepted(response_id="r-1", reattachable=True), "one", hold)
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert (result.status, result.partial_output) == (TaskStatus.CANCELLED, "one")
    assert "r-1 goes on" in caplog.text


class FakeEntryPoint:
    """An installed platform."""

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name = name
        self.load = load


def _not_installed() -> Any:
    raise ModuleNotFoundError("No module named 'sdk'")


def _without_key() -> Any:
    def make() -> Any:
        raise perdure.NotConfigured("set THE_KEY to use it")

    return make


def _broken() -> Any:
    def make() -> Any:
        raise KeyError("THE_KEY")

    return make


@pytest.mark.parametrize("load", [_not_installed, _without_key, _broken])
async def test_a_platform_that_cannot_be_used_fails_only_its_own_tasks(
    db: Path, monkeypatch: pytest.MonkeyPatch, load: Callable[[], Any]
) -> None:
    """A missing SDK or key, or a broken adapter, is that platform's affair; fallbacks work."""
    found = [
        FakeEntryPoint("bad", load),
        FakeEntryPoint("good", lambda: lambda: ScriptedAdapter(platform="good")),
    ]
    monkeypatch.setattr("perdure.platforms.entry_points", lambda group: found * (group == GROUP))
    async with Engine.open(db, settings=FAST) as engine:
        bad, good, saved = [
            await engine.submit_task(task)
            for task in (
                Task(prompt="?", platform="bad"),
                Task(prompt="?", platform="good"),
                Task(prompt="?", platform="bad", fallbacks=("good",)),
            )
        ]
        failed = await engine.get_result(bad, 30)
        assert (failed.status, failed.error_class) == (TaskStatus.FAILED, "NotConfigured")
        assert (await engine.get_result(good, 30)).success
        assert (await engine.get_result(saved, 30)).platform == "good"
    assert_sound(db)


# -- what models say -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["a\x00b"], "a\ufffdb"),
        (["a\ud800b", "\udfff"], "a\ufffdb\ufffd"),
        (["\ud83d", "\ude00"], "\ufffd\ufffd"),
        (["\x1b[2J", "\u202e", "\r\n"], "\x1b[2J\u202e\r\n"),
        (
            ["é", "\N{GRINNING FACE}" * 3, "한국어"],
            "é\N{GRINNING FACE}\N{GRINNING FACE}" + "\N{GRINNING FACE}한국어",
        ),
    ],
)
async def test_odd_characters_in_output_do_no_harm(db: Path, sent: list[str], kept: str) -> None:
    """What can't be stored is replaced, everything else is kept; the answer is never lost."""
    async with engine_on(db, ScriptedAdapter(*sent, Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        result = await engine.get_result(task_id, 30)
        assert await collect_stream(engine.stream_result(task_id)) == kept
    assert result.output == kept
    assert_sound(db)


@pytest.mark.parametrize("odd", ["\x00", "\ud800"])
async def test_odd_characters_in_names_do_no_harm(db: Path, odd: str) -> None:
    """One bad character in what a platform calls things doesn't cost the answer."""
    name, kept = f"a{odd}b", "a\ufffdb"
    adapter = ScriptedAdapter(
        Accepted(response_id=name, request_id=name, model=name, cursor=name, note=name),
        FileCreated(path=name),
        Chunk(text="Hello", cursor=name),
        Completed(
            platform_finish_reason=name, usage=Usage(input_tokens=1, raw={name: [{"of": name}]})
        ),
    )
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        result = await engine.get_result(task_id, 30)
    assert (result.output, result.model, result.files_created) == ("Hello", kept, (kept,))
    words = [word for _, data in stored_events(db, task_id) for word in data.values()]
    assert words.count(kept) == 8
    raw = stored_events(db, task_id)[-1][1]["usage"]["raw"]
    assert raw == {kept: [{"of": kept}]}
    assert_sound(db)


async def test_huge_outputs_are_kept_whole(db: Path) -> None:
    """Megabytes in one piece, and in many, come out as they went in."""
    piece = "0123456789abcdef" * 64
    big = "x" * 5_000_000
    script = {"pieces": [piece] * 4000, "one": [big]}
    adapter = ScriptedAdapter(per_call=lambda call: [*script[call.task.prompt], Completed()])
    async with engine_on(db, adapter) as engine:
        ids = [await engine.submit_task(Task(prompt=name)) for name in script]
        results = [await engine.get_result(task_id) for task_id in ids]
        streamed = [await collect_stream(engine.stream_result(task_id)) for task_id in ids]
    assert results[0].output == streamed[0] == piece * 4000
    assert results[1].output == streamed[1] == big
    assert_sound(db)


async def test_a_platform_that_is_faster_than_the_disk_has_to_wait(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gathers in memory is bounded: an adapter has to wait for room."""
    sent = 0
    slow = Writer.transaction

    def transaction(self: Writer) -> Any:
        time.sleep(0.02)
        return slow(self)

    monkeypatch.setattr(Writer, "transaction", transaction)
    gathered: list[int] = []

    async def flood(call: Call) -> AsyncGenerator[Event, None]:
        nonlocal sent
        for _ in range(2000):
            sent += 1000
            yield Chunk(text="x" * 1000)
            gathered.append(sent - written())
        yield Completed()

    def written() -> int:
        (attempt,) = engine.worker._attempts
        return attempt._gathered.length()

    async with engine_on(db, Wrong(flood)) as engine:
        result = await engine.get_result(await engine.submit_task(ASK))
    assert len(result.output) == 2_000_000
    assert max(gathered) <= FAST.timing.buffer_characters + 2000


def test_the_pieces_of_a_long_answer_grow() -> None:
    """Fine at first, then in proportion to what the answer has taken, never coarser than 0.5 s."""
    timing = Timing()
    assert [timing.pause(at) for at in (0.0, 2.0, 10.0, 60.0)] == pytest.approx(
        [0.05, 0.05, 0.25, 0.5]
    )
    assert Timing(chunk_interval=0.0).pause(60.0) == 0.0

    def pieces(seconds: float) -> int:
        at, count = 0.0, 1
        while (at := at + timing.pause(at)) < seconds:
            count += 1
        return count

    assert pieces(2) == pytest.approx(40, abs=1)
    assert pieces(10) < 110
    assert pieces(100) < 300


async def test_reasoning_and_tool_calls_are_kept_apart_from_text(db: Path) -> None:
    """Each kind has offsets of its own; the output is the text alone."""
    adapter = ScriptedAdapter(
        Chunk(text="hm ", kind="reasoning"),
        "Hel",
        Chunk(text='{"name":', kind="tool_call"),
        "lo",
        Chunk(text="so", kind="reasoning"),
        Chunk(text='"f"}', kind="tool_call"),
        Completed(finish_reason="tool_calls"),
    )
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        assert await collect_stream(engine.stream_result(task_id)) == "Hello"
        result = await engine.get_result(task_id)
    assert (result.output, result.finish_reason) == ("Hello", "tool_calls")
    kinds: dict[str, str] = {}
    for type_, data in stored_events(db, task_id):
        if type_ == "chunk":
            assert data["offset"] == len(kinds.get(data["kind"], ""))
            kinds[data["kind"]] = kinds.get(data["kind"], "") + data["text"]
    assert kinds == {"reasoning": "hm so", "text": "Hello", "tool_call": '{"name":"f"}'}
    assert_sound(db)


async def test_an_answer_may_be_empty(db: Path) -> None:
    """A platform that says nothing and ends properly has succeeded."""
    async with engine_on(db, ScriptedAdapter("", Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        assert await collect_stream(engine.stream_result(task_id)) == ""
        result = await engine.get_result(task_id)
    assert result.success
    assert result.output == ""


async def test_files_that_a_platform_writes_are_named(db: Path) -> None:
    """The result tells which files came out."""
    adapter = ScriptedAdapter(
        FileCreated(path="a.py", size=3), "done", FileCreated(path="b.py"), Completed()
    )
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(await engine.submit_task(ASK))
    assert result.files_created == ("a.py", "b.py")


# -- what it costs ---------------------------------------------------------------------------------

USED = Usage(input_tokens=1000, output_tokens=100)


async def test_the_price_of_a_known_model_is_written_down(db: Path) -> None:
    """By the price table, with its version."""
    adapter = ScriptedAdapter(Accepted(model="gpt-4o"), "x", Completed(usage=USED), prices="openai")
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(await engine.submit_task(ASK))
    assert result.cost == pytest.approx(1000 * 2.5e-6 + 100 * 10e-6)
    (_, data) = stored_events(db, result.task_id)[-1]
    assert data["price_version"].startswith("genai-prices ")
    assert query(db, "SELECT cost_usd FROM tasks") == [(result.cost,)]


@pytest.mark.parametrize(
    ("prices", "model", "usage"),
    [
        ("openai", "no-such-model", USED),
        ("no-such-provider", "gpt-4o", USED),
        (None, "gpt-4o", USED),
        ("openai", "gpt-4o", None),
        ("openai", "gpt-4o", Usage(cache_read_tokens=5)),
        ("openai", "gpt-4o", Usage(input_tokens=1, cache_read_tokens=50)),
        ("openai", "gpt-4o", Usage(input_tokens=-1, output_tokens=1)),
        ("openai", None, USED),
    ],
)
async def test_an_unknown_price_is_not_zero(
    db: Path, prices: str | None, model: str | None, usage: Usage | None
) -> None:
    """Where model, provider or tokens are unknown or make no sense, the cost is unknown."""
    adapter = ScriptedAdapter(Accepted(model=model), "x", Completed(usage=usage), prices=prices)
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(await engine.submit_task(ASK), 30)
    assert result.success
    assert result.cost is None
    assert query(db, "SELECT cost_usd FROM tasks") == [(None,)]


async def test_all_attempts_are_paid_for(db: Path) -> None:
    """The cost is the sum over the attempts, and unknown as soon as one of them is."""

    def script(call: Call) -> list[Any]:
        unknown = call.task.prompt == "unknown" and call.attempt == 1
        begin = [Accepted(model="who-knows" if unknown else "gpt-4o"), UsageReported(usage=USED)]
        return [*begin, Overloaded("again")] if call.attempt < 3 else [*begin, Completed()]

    async with engine_on(db, ScriptedAdapter(per_call=script, prices="openai")) as engine:
        known, unknown = [
            await engine.get_result(await engine.submit_task(Task(prompt=prompt)))
            for prompt in ("known", "unknown")
        ]
    assert known.cost == pytest.approx(3 * (1000 * 2.5e-6 + 100 * 10e-6))
    assert known.tokens_used == unknown.tokens_used == 3300
    assert unknown.cost is None
    assert_sound(db)


# -- blocking --------------------------------------------------------------------------------------


def test_execute_blocks_until_the_result_is_there(db: Path) -> None:
    """The blocking form runs one task, and no other that waits in the same database."""

    async def another() -> str:
        async with engine_on(db, run=False) as engine:
            return await engine.submit_task(ASK)

    waiting = asyncio.run(another())
    result = perdure.execute(Task(prompt="Now."), url=db, adapters=[ScriptedAdapter()])
    assert result.output == "Hello, world."
    assert query(db, "SELECT status FROM tasks WHERE task_id = ?", waiting) == [("pending",)]


def test_execute_gives_up_in_time_and_can_be_resumed(db: Path) -> None:
    """When it takes too long the task is handed back, to be run later."""
    with pytest.raises(TimeoutError):
        perdure.execute(ASK, url=db, adapters=[ScriptedAdapter(60)], timeout=0.3)
    assert query(db, "SELECT status FROM tasks") == [("pending",)]

    async def resume() -> None:
        async with engine_on(db, run=False) as engine:
            await engine.run_until_done()

    asyncio.run(resume())
    assert query(db, "SELECT status FROM tasks") == [("completed",)]
    assert_sound(db)


async def test_execute_refuses_to_block_a_running_loop(db: Path) -> None:
    """Where an event loop is running, it says what to use instead."""
    with pytest.raises(RunningLoop, match="use Engine"):
        perdure.execute(ASK, url=db, adapters=[ScriptedAdapter()])


# -- closing ---------------------------------------------------------------------------------------


async def test_a_closed_engine_hands_its_tasks_back(db: Path) -> None:
    """What runs when an engine is closed waits in the log, and another engine finishes it."""
    hold = Hold()
    first = ScriptedAdapter("half", hold)
    async with engine_on(db, first) as engine:
        ids = [await engine.submit_task(Task(prompt=f"{n}")) for n in range(20)]
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk") >= FAST.concurrency)
    assert first.running == 0
    assert query(db, "SELECT DISTINCT status FROM tasks") == [("pending",)]
    assert query(db, "SELECT count(*) FROM workers") == [(0,)]
    assert len(first.calls) == FAST.concurrency
    second = ScriptedAdapter("whole", Completed())
    async with engine_on(db, second) as engine:
        results = [await engine.get_result(task_id) for task_id in ids]
        events = [await engine.get_events(task_id) for task_id in ids[: FAST.concurrency]]
    assert {result.output for result in results} == {"whole"}
    for stream in events:
        (handed,) = [e.event for e in stream if isinstance(e.event, Interrupted)]
        assert (handed.reason, handed.outcome, handed.next) == ("handed_back", "unknown", "restart")
    assert_sound(db)


async def test_closing_at_any_moment_loses_nothing(db: Path, chance: Any) -> None:
    """Whenever an engine is closed, nothing keeps running, and all tasks can be finished."""
    calls: list[tuple[str, int]] = []
    for _ in range(25):
        adapter = ScriptedAdapter("a", 0.002, "b", 0.002, "c", Completed())
        async with engine_on(db, adapter) as engine:
            await engine.submit_tasks(Task(prompt=f"{n}") for n in range(4))
            for _ in range(chance.randrange(30)):
                await asyncio.sleep(0)
            await asyncio.sleep(chance.choice([0, 0, 0.005, 0.02]))
        assert not adapter.running
        assert not engine.worker.running
        calls += [(call.task_id, call.attempt) for call in adapter.calls]
        assert query(db, "SELECT count(*) FROM tasks WHERE status = 'running'") == [(0,)]
        assert query(db, "SELECT count(*) FROM workers") == [(0,)]
    last = ScriptedAdapter("a", "b", "c", Completed())
    async with engine_on(db, last, run=False) as engine:
        await engine.run_until_done()
    assert query(db, "SELECT count(*), min(output), max(output) FROM tasks") == [
        (100, "abc", "abc")
    ]
    assert len(calls) == len(set(calls)), "an attempt was made twice"
    assert_sound(db)


async def test_an_engine_is_entered_once(db: Path) -> None:
    """Leaving it inside would close it for those outside."""
    async with engine_on(db, ScriptedAdapter(Completed())) as engine:
        with pytest.raises(perdure.PerdureError, match="only once"):
            async with engine:
                pass
        await engine.get_result(await engine.submit_task(ASK))


async def test_a_closed_engine_takes_nothing(db: Path) -> None:
    """After closing, everything that would write or wait says so at once."""
    async with engine_on(db, ScriptedAdapter(Hold())) as engine:
        task_id = await engine.submit_task(ASK)
        await eventually(lambda: count_events(db, "running"))
    with pytest.raises(EngineClosed):
        await engine.submit_task(ASK)
    with pytest.raises(EngineClosed):
        await engine.cancel_task(task_id)
    with pytest.raises(EngineClosed):
        await engine.get_result(task_id, 30)
    with pytest.raises(EngineClosed):
        await anext(engine.stream_result(task_id))
    await engine.close()


def writers() -> int:
    """Return how many writer threads there are in this process."""
    return sum(thread.name == "perdure-writer" for thread in threading.enumerate())


async def test_closing_goes_on_when_its_caller_is_cancelled(db: Path) -> None:
    """Who closes once more waits for the end; nothing is left behind."""

    class Slow(ScriptedAdapter):
        async def close(self) -> None:
            slowly.set()
            await may_close.wait()

    slowly, may_close = asyncio.Event(), asyncio.Event()
    before = writers()
    engine = await engine_on(db, Slow(Hold())).__aenter__()
    await engine.submit_task(ASK)
    await eventually(lambda: count_events(db, "running"))
    closing = asyncio.create_task(engine.close())
    await slowly.wait()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert writers() == before + 1
    again = asyncio.create_task(engine.close())
    may_close.set()
    await again
    assert writers() == before
    assert query(db, "SELECT status FROM tasks") == [("pending",)]


async def test_an_engine_whose_opening_is_cancelled_leaves_nothing(db: Path) -> None:
    """At whatever moment it is."""
    before = writers()
    for turns in (*range(12), 100, 1000):
        entering = asyncio.create_task(engine_on(db).__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        entering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await entering).close()
        assert writers() == before, turns


async def test_an_engine_that_was_not_entered_says_so(db: Path, tmp_path: Path) -> None:
    """It tells how to use it, and not what the database lacks; and makes no file of its own."""
    engine = engine_on(db, run=False)
    task_id = "demo_20260101_00000000"
    calls: list[Callable[[], Any]] = [
        lambda: engine.submit_task(ASK),
        lambda: engine.get_status(task_id),
        lambda: engine.cancel_task(task_id),
        lambda: engine.redact_task(task_id),
        lambda: engine.archive_tasks(datetime.now(UTC), tmp_path / "archive.db"),
        engine.recover_lost,
        engine.run_until_done,
        engine.stop_running,
    ]

    async def all_say(what: str) -> None:
        for call in calls:
            with pytest.raises(EngineClosed, match=what):
                await call()
        with pytest.raises(EngineClosed, match=what):
            engine.start_running()

    before = [(file.name, file.stat().st_size) for file in tmp_path.iterdir()]
    await all_say("async with")
    assert [(file.name, file.stat().st_size) for file in tmp_path.iterdir()] == before
    async with engine:
        pass
    await all_say("was closed")


async def test_an_engine_belongs_to_one_event_loop(db: Path) -> None:
    """From another one it refuses, and goes on working in its own."""
    async with engine_on(db, ScriptedAdapter(Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        calls: list[Callable[[], Any]] = [
            lambda: engine.submit_task(ASK),
            lambda: engine.get_status(task_id),
            lambda: engine.get_result(task_id, 30),
            lambda: anext(engine.stream_result(task_id)),
            lambda: engine.cancel_task(task_id),
        ]
        for call in calls:
            with pytest.raises(perdure.PerdureError, match="another event loop"):
                await asyncio.to_thread(lambda: asyncio.run(_awaited(call)))  # noqa: B023
        await engine.get_result(await engine.submit_task(ASK), 30)
    assert query(db, "SELECT count(*) FROM tasks") == [(2,)]


async def _awaited(call: Callable[[], Any]) -> Any:
    return await call()


@pytest.mark.parametrize("given", [None, "Say hello.", {"prompt": "Say hello."}, Task])
async def test_what_is_no_task_is_refused(db: Path, given: Any) -> None:
    """One line says what to make of it; the others are taken."""
    async with engine_on(db, run=False) as engine:
        with pytest.raises(InvalidTask, match=r"must be a perdure\.Task"):
            await engine.submit_task(given)
        outcomes = await engine.submit_tasks([given, ASK])
        assert [type(outcome) for outcome in outcomes] == [InvalidTask, Submission]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("demo", "give a list"),
        (DemoAdapter(), "give a list"),
        (["demo"], "'demo' is no adapter"),
        ([None], "None is no adapter"),
        ([DemoAdapter], r"give an instance, DemoAdapter\(\)"),
        ([ScriptedAdapter(), ScriptedAdapter()], "two of them are for the platform"),
    ],
)
def test_what_are_no_adapters_is_refused(db: Path, given: Any, said: str) -> None:
    """Before anything is opened."""
    with pytest.raises(InvalidConfig, match=said):
        Engine.open(db, adapters=given)


@pytest.mark.parametrize("name", ["scope", "settings"])
def test_what_is_no_scope_and_no_settings_is_refused(db: Path, name: str) -> None:
    """At once, and not by a worker that fails later."""
    wrong: dict[str, Any] = {name: {"concurrency": 3}}
    with pytest.raises(InvalidConfig, match=f"{name}: give a "):
        Engine.open(db, adapters=[ScriptedAdapter()], **wrong)


async def test_readers_are_told_when_the_engine_closes(db: Path) -> None:
    """Who waits for a task that won't end any more is not left waiting."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("one", hold)) as engine:
        task_id = await engine.submit_task(ASK)
        waiting = [
            asyncio.create_task(engine.get_result(task_id)),
            asyncio.create_task(collect_stream(engine.stream_result(task_id))),
        ]
        await hold.reached.wait()
    done, pending = await asyncio.wait(waiting, timeout=10)
    assert not pending
    assert all(isinstance(task.exception(), EngineClosed) for task in done)


async def test_adapters_are_closed_with_the_engine(db: Path) -> None:
    """The engine gives back what its adapters hold, once."""
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter) as engine:
        await engine.get_result(await engine.submit_task(ASK))
        await engine.close()
    assert adapter.closed == 1


# -- a database that fails -------------------------------------------------------------------------


async def test_nobody_waits_for_an_engine_whose_database_fails(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the log can't be written any more, those who wait and those who come get the error."""
    hold = Hold()
    adapter = ScriptedAdapter("one", hold, "two", Completed())
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        waiting = asyncio.create_task(engine.get_result(task_id))
        reading = asyncio.create_task(collect_stream(engine.stream_result(task_id)))
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk"))

        def full(self: Writer) -> Any:
            raise perdure.DatabaseUnavailable("no space left")

        monkeypatch.setattr(Writer, "transaction", full)
        hold.release()
        done, pending = await asyncio.wait({waiting, reading}, timeout=30)
        assert not pending
        assert all(isinstance(task.exception(), StoreError) for task in done)
        with pytest.raises(StoreError):
            await engine.get_result(task_id, 30)
        with pytest.raises(StoreError):
            await engine.submit_task(ASK)
        monkeypatch.undo()
    second = ScriptedAdapter()
    async with engine_on(db, second) as engine:
        assert (await engine.get_result(task_id, 30)).success
    assert_sound(db)


async def test_nobody_waits_for_a_writer_that_is_gone(
    sqlite_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a fault of the writer thread itself reaches everyone."""
    hold = Hold()
    async with engine_on(sqlite_db, ScriptedAdapter("one", hold)) as engine:
        task_id = await engine.submit_task(ASK)
        waiting = asyncio.create_task(engine.get_result(task_id))
        await hold.reached.wait()

        def broken(self: Writer) -> bool:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(SqliteWriter, "others_committed", broken)
        done, _ = await asyncio.wait({waiting}, timeout=30)
        assert done
        assert isinstance(waiting.exception(), StoreError)
        for _ in range(2):
            with pytest.raises(StoreError, match="out of luck"):
                async with asyncio.timeout(30):
                    await engine.submit_task(ASK)
        monkeypatch.undo()
    assert_sound(sqlite_db)


async def test_a_locked_database_is_an_error_that_passes(
    sqlite_db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another program holds the lock for too long writes fail; afterwards they don't."""
    import sqlite3

    monkeypatch.setattr("perdure.store.sqlite.BUSY_SECONDS", 0.2)
    async with engine_on(sqlite_db, run=False) as engine:
        other = sqlite3.connect(sqlite_db, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(perdure.DatabaseUnavailable, match="locked"):
            await engine.submit_task(ASK)
        other.execute("ROLLBACK")
        other.close()
        task_id = await engine.submit_task(ASK)
        assert await engine.get_status(task_id) is TaskStatus.PENDING
    assert_sound(sqlite_db)


async def test_work_that_fails_fails_alone(db: Path) -> None:
    """Writes that share a transaction with one that breaks it are done all the same."""

    def broken(_tx: Any) -> None:
        raise ArithmeticError("mine alone")

    async with engine_on(db, run=False) as engine:
        outcomes = await asyncio.gather(
            *(engine.submit_task(Task(prompt=f"{n}")) for n in range(10)),
            engine.log.write(broken),
            *(engine.submit_task(Task(prompt=f"{n}")) for n in range(10)),
            return_exceptions=True,
        )
    assert [type(outcome) for outcome in outcomes] == [str] * 10 + [ArithmeticError] + [str] * 10
    assert count_events(db, "submitted") == 20
    assert_sound(db)


# -- the demo platform -----------------------------------------------------------------------------


async def test_the_demo_platform_runs_in_the_engine(db: Path) -> None:
    """A slow, long and failing demonstration comes out whole."""
    async with engine_on(db, DemoAdapter()) as engine:
        task = demo(
            "Tell.", words=300, chunk_words=3, fail="Overloaded", fail_attempts=2, fail_after=5
        )
        task_id = await engine.submit_task(task)
        result = await engine.get_result(task_id)
        events = await engine.get_events(task_id)
    assert len(result.output.split()) == 300
    assert result.attempts == 3
    assert log_text(events) == result.output == text_of(stored_events(db, task_id))


def test_unclosed_engines_end_with_their_process(db: Path, tmp_path: Path) -> None:
    """A program that forgets to close its engine ends all the same, and loses nothing."""
    import subprocess
    import sys

    script = tmp_path / "forgetful.py"
    script.write_text(
        "import asyncio, sys\n"
        "from perdure import Engine, Task\n"
        "from perdure.testing import ScriptedAdapter\n"
        "async def main():\n"
        "    engine = Engine.open(sys.argv[1], adapters=[ScriptedAdapter('a', 60)])\n"
        "    await engine.__aenter__()\n"
        "    task_id = await engine.submit_task(Task(prompt='?'))\n"
        "    print(await anext(engine.stream_result(task_id)))\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, str(script), str(db)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert (ended.returncode, ended.stdout) == (0, "a\n"), ended.stderr
    perdure_log = logging.getLogger("perdure")
    assert perdure_log.name not in ended.stderr
    assert_sound(db)


def test_capabilities_do_not_matter_to_the_engine(db: Path) -> None:
    """An adapter that can do nothing but answer is enough."""
    adapter = ScriptedAdapter("x", Completed(), capabilities=Capabilities())
    assert perdure.execute(ASK, url=db, adapters=[adapter]).output == "x"
