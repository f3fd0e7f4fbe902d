"""Cancelling: from anywhere, at any moment, with exactly one ending and nothing lost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import (
    FAST,
    Nursery,
    assert_sound,
    count_events,
    demo,
    eventually,
    query,
    status_of,
    stored_events,
    text_of,
)

from perdure import (
    Accepted,
    Call,
    Completed,
    Engine,
    Overloaded,
    Result,
    Submission,
    Task,
    TaskConstraints,
    TaskStatus,
    Usage,
    UsageReported,
)
from perdure.calls import make_call
from perdure.events import Cancelled, CancelRequested
from perdure.policy import RetryPolicy
from perdure.store.claims import Scope, claim
from perdure.store.liveness import register_worker
from perdure.store.transaction import Transaction
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter

ASK = Task(prompt="Say hello.")
USED = UsageReported(usage=Usage(input_tokens=7, output_tokens=2))


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


def assert_cancelled(db: Path, result: Result, text: str | None = None) -> None:
    """Hold a cancelled task against its log: one ending, and all committed text kept."""
    events = stored_events(db, result.task_id)
    assert status_of(events) == "cancelled"
    assert result.status is TaskStatus.CANCELLED
    assert not result.success
    assert result.output == ""
    assert result.partial_output == text_of(events)
    if text is not None:
        assert result.partial_output == text
    assert_sound(db)


# -- when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [False, True])
async def test_a_reason_that_can_not_be_stored_keeps_nothing_from_being_cancelled(
    db: Path, *, run: bool
) -> None:
    """What can't be is replaced, as in what platforms send; whether it waits or runs."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter(hold, Completed()), run=run) as engine:
        task_id = await engine.submit_task(ASK)
        if run:
            await hold.reached.wait()
        assert await engine.cancel_task(task_id, "no\udcff need\x00", by="m\udce9")
        await engine.get_result(task_id, 30)
        await engine.redact_task(task_id, "for\udcff good", by="m\udce9")
    data = dict(stored_events(db, task_id))
    cancelled = data["cancel_requested" if run else "cancelled"]
    assert (cancelled["by"], cancelled["reason"]) == ("m\ufffd", "no\ufffd need\ufffd")
    assert (data["redacted"]["by"], data["redacted"]["reason"]) == ("m\ufffd", "for\ufffd good")


async def test_before_it_starts(db: Path) -> None:
    """A task that waits ends at once, and its platform is never asked."""
    async with engine_on(db, run=False) as engine:
        task_id = await engine.submit_task(ASK)
        assert await engine.cancel_task(task_id, "no need", by="me")
        result = await engine.get_result(task_id)
        (ending,) = [
            e.event for e in await engine.get_events(task_id) if isinstance(e.event, Cancelled)
        ]
    assert (ending.by, ending.reason) == ("me", "no need")
    assert_cancelled(db, result, "")
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter, run=False) as engine:
        await engine.run_until_done()
    assert adapter.calls == []


async def test_during_the_first_wait(db: Path) -> None:
    """A platform that has not said anything yet is stopped."""
    hold = Hold()
    adapter = ScriptedAdapter(hold, "never", Completed())
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert adapter.cancelled == [task_id]
    assert_cancelled(db, result, "")


async def test_in_the_middle_of_the_stream(db: Path) -> None:
    """What had come by then is the partial output, and the tokens known by then are kept."""
    hold = Hold()
    adapter = ScriptedAdapter("one ", USED, "two ", hold, "three", Completed())
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert_cancelled(db, result, "one two ")
    assert result.usage == Usage(input_tokens=7, output_tokens=2)
    assert result.tokens_used == 9
    assert query(db, "SELECT input_tokens, output_tokens FROM tasks") == [(7, 2)]


async def test_text_that_had_only_gathered_is_kept_too(db: Path) -> None:
    """Pieces that came but were not written yet, and their tokens, go in with the ending."""
    hold = Hold()
    timing = replace(FAST.timing, chunk_interval=3600, usage_interval=3600)
    adapter = ScriptedAdapter(
        "a", USED, 0.1, "b", "c", UsageReported(usage=Usage(output_tokens=3)), hold
    )
    async with engine_on(db, adapter, settings={"timing": timing}) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert_cancelled(db, result, "abc")
    assert result.usage.output_tokens == 3


async def test_the_platform_is_told_where_it_would_go_on(db: Path) -> None:
    """A response that lives on without us is stopped by name; one that doesn't isn't."""
    hold = Hold()
    adapter = ScriptedAdapter(
        per_call=lambda call: [
            Accepted(response_id=f"of {call.task.prompt}", reattachable=call.task.prompt == "yes"),
            hold,
        ]
    )
    async with engine_on(db, adapter) as engine:
        for prompt in ("yes", "no"):
            task_id = await engine.submit_task(Task(prompt=prompt))
            await eventually(lambda: adapter.running)
            await hold.reached.wait()
            await engine.cancel_task(task_id)
            await engine.get_result(task_id, 30)
    assert adapter.stopped == ["of yes"]


async def test_while_waiting_for_another_attempt(db: Path) -> None:
    """A task in its back-off ends at once; what the last attempt had said is kept."""
    policy = RetryPolicy(retry_after_cap_seconds=3600)
    adapter = ScriptedAdapter("half", USED, Overloaded("later", retry_after=3000))
    async with engine_on(db, adapter, settings={"retry": policy}) as engine:
        task_id = await engine.submit_task(ASK)
        await eventually(lambda: count_events(db, "attempt_failed"))
        assert await engine.get_status(task_id) is TaskStatus.PENDING
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert_cancelled(db, result, "half")
    assert result.tokens_used == 9
    assert len(adapter.calls) == 1


async def test_between_claim_and_call(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation that comes right after the claim isn't missed, even if nothing more happens.

    The moment is the one at which nobody listens yet: the worker has claimed the task and puts the
    call together.
    """
    hold = Hold()
    adapter = ScriptedAdapter(hold)
    async with engine_on(db, run=False) as other, engine_on(db, adapter, run=False) as engine:

        async def slow(database: Any, claimed: Any) -> Any:
            assert await other.cancel_task(claimed.task_id)
            await asyncio.sleep(0.3)  # for the news of it to come and go
            return await make_call(database, claimed)

        monkeypatch.setattr("perdure.worker.make_call", slow)
        task_id = await engine.submit_task(ASK)
        engine.start_running()
        # Nobody else may follow the task: then somebody would listen all the time.
        await eventually(lambda: count_events(db, "cancelled"), 30)
        result = await engine.get_result(task_id)
    assert_cancelled(db, result, "")


async def test_in_the_very_transaction_of_the_claim(db: Path) -> None:
    """Cancelled and claimed in one commit, the task is cancelled, and the others are claimed."""
    async with engine_on(db, run=False) as engine:
        ids = [await engine.submit_task(Task(prompt=f"{n}")) for n in range(5)]

        def together(tx: Transaction) -> list[str]:
            register_worker(tx, "w")
            tx.append(ids[2], (Cancelled(),), 1)
            return [one.task_id for one in claim(tx, "w", 10, Scope(), {})]

        assert await engine.log.write(together) == [*ids[:2], *ids[3:]]
    assert query(db, "SELECT status FROM tasks ORDER BY stream_id") == [
        ("running",),
        ("running",),
        ("cancelled",),
        ("running",),
        ("running",),
    ]
    assert_sound(db)


async def test_submitting_and_cancelling_at_once(db: Path, chance: random.Random) -> None:
    """Cancelling right after submitting, while the worker claims, never ends the worker."""
    async with engine_on(db, ScriptedAdapter("a", 0.01, "b", Completed())) as engine:
        ids: list[str] = []
        for _ in range(20):
            outcomes = await engine.submit_tasks(Task(prompt=f"{n}") for n in range(6))
            fresh = [one.task_id for one in outcomes if isinstance(one, Submission)]
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.gather(
                *(engine.cancel_task(task_id) for task_id in chance.sample(fresh, 3))
            )
            ids += fresh
        results = [await engine.get_result(task_id, 60) for task_id in ids]
    assert {result.status for result in results} <= {TaskStatus.CANCELLED, TaskStatus.COMPLETED}
    assert_sound(db)


@pytest.mark.parametrize("pieces", [1, 4])
async def test_at_the_very_end(db: Path, chance: random.Random, pieces: int) -> None:
    """In the race with completion one of the two wins, and never both.

    The platform itself starts the cancellation, some turns of the event loop before its end.
    """
    cancelling: list[asyncio.Task[bool]] = []

    async def begin_to_cancel(call: Call) -> None:
        cancelling.append(asyncio.create_task(cancel(call.task_id, chance.choice([0, 4, 20, 60]))))
        await turns(chance.choice([0, 20]))
        await asyncio.sleep(chance.choice([0, 0, chance.uniform(0, 0.01)]))

    async def cancel(task_id: str, most: int) -> bool:
        await turns(most)
        return await engine.cancel_task(task_id)

    async def turns(most: int) -> None:
        for _ in range(chance.randint(0, most)):
            await asyncio.sleep(0)

    adapter = ScriptedAdapter(
        per_call=lambda _call: [
            *(f"{n} " for n in range(pieces)),
            USED,
            begin_to_cancel,
            *(["last"] if chance.random() < 0.5 else []),
            Completed(usage=USED.usage),
        ]
    )
    outcomes: Counter[str] = Counter()
    async with engine_on(db, adapter) as engine:
        for _ in range(100):
            task_id = await engine.submit_task(ASK)
            result = await engine.get_result(task_id, 30)
            accepted = await cancelling.pop()
            events = stored_events(db, task_id)
            types = [type_ for type_, _ in events]
            assert accepted == ("cancel_requested" in types)
            assert result.status in (TaskStatus.CANCELLED, TaskStatus.COMPLETED)
            assert accepted or result.status is TaskStatus.COMPLETED
            text = text_of(events)
            assert text == (result.output or result.partial_output)
            assert result.status is TaskStatus.CANCELLED or text.removesuffix("last") == whole(
                pieces
            )
            assert result.tokens_used == 9
            outcomes[f"{result.status}, {'accepted' if accepted else 'too late'}"] += 1
    print(dict(outcomes))
    assert_sound(db)


def whole(pieces: int) -> str:
    """Return the text of so many pieces."""
    return "".join(f"{n} " for n in range(pieces))


async def test_many_at_once_while_they_stream(db: Path, chance: random.Random) -> None:
    """Forty streaming tasks, cancelled at any moment: always one ending, always all the text."""
    script = [step for n in range(30) for step in (f"{n} ", 0.002)]
    adapter = ScriptedAdapter(*script, Completed())
    async with engine_on(db, adapter, settings={"concurrency": 40}) as engine:
        outcomes = await engine.submit_tasks(Task(prompt=f"{n}") for n in range(40))
        ids = [one.task_id for one in outcomes if isinstance(one, Submission)]

        async def later(task_id: str) -> bool:
            await asyncio.sleep(chance.uniform(0, 0.4))
            return await engine.cancel_task(task_id)

        accepted = await asyncio.gather(*(later(task_id) for task_id in ids))
        results = [await engine.get_result(task_id, 60) for task_id in ids]
    for yes, result in zip(accepted, results, strict=True):
        text = text_of(stored_events(db, result.task_id))
        assert text == (result.output or result.partial_output)
        assert "".join(f"{n} " for n in range(30)).startswith(text)
        assert yes or result.success
    assert not adapter.running
    assert_sound(db)


# -- from where ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"first_delay": 600.0},
        {"delay": 0.02, "words": 10_000, "chunk_words": 1},
        {"stall_after": 3},
    ],
    ids=["before the first piece", "in the stream", "in a stall"],
)
async def test_from_another_process(db: Path, nursery: Nursery, options: dict[str, Any]) -> None:
    """It doesn't matter who runs the task: it ends, with all that was committed."""
    runner = nursery.start("run", db=db, options=options, until_done=False)
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(demo("Count."))
        await eventually(lambda: count_events(db, "running"))
        if "first_delay" not in options:
            await eventually(lambda: count_events(db, "chunk"))
        canceller = nursery.start("cancel", db=db, task_ids=[task_id, task_id])
        assert await canceller.gone() == 0, canceller.said()
        assert canceller.lines()[1:] == [f"{task_id} True", f"{task_id} False"]
        result = await engine.get_result(task_id, 30)
    assert result.usage.input_tokens is not None
    assert_cancelled(db, result)
    assert result.partial_output or "first_delay" in options
    (request,) = [data for type_, data in stored_events(db, task_id) if type_ == "cancel_requested"]
    assert request["reason"] == "from afar"
    runner.kill()


async def test_from_another_process_at_random(
    db: Path, nursery: Nursery, chance: random.Random
) -> None:
    """Thirty tasks of one process, cancelled by another at any moment: one ending each."""
    runner = nursery.start(
        "run", db=db, options={"words": 60, "chunk_words": 1, "delay": 0.004}, until_done=False
    )
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        outcomes = await engine.submit_tasks(demo(f"task {n}") for n in range(30))
        ids = [one.task_id for one in outcomes if isinstance(one, Submission)]
        await eventually(lambda: count_events(db, "chunk"))

        async def later(task_id: str) -> bool:
            await asyncio.sleep(chance.uniform(0, 1.5))
            return await engine.cancel_task(task_id)

        accepted = await asyncio.gather(*(later(task_id) for task_id in ids))
        results = [await engine.get_result(task_id, 60) for task_id in ids]
    runner.kill()
    for yes, result in zip(accepted, results, strict=True):
        events = stored_events(db, result.task_id)
        assert text_of(events) == (result.output or result.partial_output)
        assert yes or result.success
        assert yes == any(
            type_ == "cancel_requested" or (type_ == "cancelled" and len(events) == 2)
            for type_, _ in events
        )
    assert_sound(db)


async def test_of_a_task_whose_worker_is_dead(db: Path, nursery: Nursery) -> None:
    """It can be asked for while nobody runs the task; whoever recovers it sees to it."""
    runner = nursery.start("run", db=db, options={"stall_after": 3}, until_done=False)
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(demo("Count."))
        await eventually(lambda: count_events(db, "chunk"))
        await eventually(lambda: count_events(db, "usage"))
        runner.kill()
        assert await engine.cancel_task(task_id)
        assert await engine.get_status(task_id) is TaskStatus.RUNNING
    adapter = DemoAdapter()
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(task_id, 30)
    assert_cancelled(db, result)
    assert result.partial_output
    assert result.usage.input_tokens is not None
    types = [type_ for type_, _ in stored_events(db, task_id)]
    assert types[-3:] == ["cancel_requested", "interrupted", "cancelled"]
    assert types.count("running") == 1


async def test_all_that_runs_here(db: Path) -> None:
    """Stopping an engine can also mean to cancel what it runs (the second Ctrl-C)."""
    from perdure.stopping import Stop

    hold = Hold()
    async with engine_on(db, ScriptedAdapter("half", USED, hold)) as engine:
        ids = [await engine.submit_task(Task(prompt=f"{n}")) for n in range(3)]
        await eventually(lambda: count_events(db, "chunk") == 3)
        await engine.stop_running(Stop.CANCEL)
        for task_id in ids:
            result = await engine.get_result(task_id, 30)
            assert (result.status, result.partial_output) == (TaskStatus.CANCELLED, "half")
            assert result.tokens_used == 9
    assert_sound(db)


# -- in vain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled"])
async def test_too_late(db: Path, end: str) -> None:
    """Cancelling what has ended returns False and writes nothing."""
    script = [Overloaded("no")] if end == "failed" else ["x", Completed()]
    async with engine_on(db, ScriptedAdapter(*script), run=end != "cancelled") as engine:
        task = Task(prompt="?", constraints=TaskConstraints(max_attempts=1))
        task_id = await engine.submit_task(task)
        if end == "cancelled":
            assert await engine.cancel_task(task_id)
        assert (await engine.get_result(task_id, 30)).status == end
        before = count_events(db)
        for _ in range(3):
            assert await engine.cancel_task(task_id) is False
    assert count_events(db) == before
    assert_sound(db)


async def test_twice(db: Path) -> None:
    """A second request while the first is being obeyed returns False and writes nothing."""
    hold = Hold()

    async def slow_to_stop(_call: Any) -> None:
        try:
            await hold.wait()
        finally:
            await asyncio.sleep(0.1)

    async with engine_on(db, ScriptedAdapter("x", slow_to_stop)) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        answers = await asyncio.gather(*(engine.cancel_task(task_id) for _ in range(10)))
        result = await engine.get_result(task_id, 30)
        requests = [
            e for e in await engine.get_events(task_id) if isinstance(e.event, CancelRequested)
        ]
    assert sorted(answers) == [False] * 9 + [True]
    assert len(requests) == 1
    assert_cancelled(db, result, "x")


async def test_unknown(db: Path) -> None:
    """Cancelling a task that isn't there returns False and writes nothing."""
    async with engine_on(db) as engine:
        assert await engine.cancel_task("nobody") is False
    assert count_events(db) == 0


async def test_a_failure_that_comes_first_still_ends_as_cancelled(
    db: Path,
) -> None:
    """When the platform fails after cancelling was asked for, nothing is tried again."""
    hold = Hold()

    async def fail_on_cancel(_call: Any) -> None:
        try:
            await hold.wait()
        except asyncio.CancelledError:
            raise Overloaded("as you wish") from None

    async with engine_on(db, ScriptedAdapter("x", fail_on_cancel)) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert_cancelled(db, result, "x")
    assert count_events(db, "attempt_failed") == 0
