"""Running, stopping, going on: what is asked of a worker, and for how long that holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from harness import FAST, PATIENCE, assert_sound, eventually, query, status_of, stored_events

from perdure import (
    Call,
    Chunk,
    Completed,
    DatabaseUnavailable,
    Engine,
    Event,
    PerdureError,
    StoreError,
    Task,
    TaskStatus,
)
from perdure.presence import News, Presence
from perdure.stopping import Stop
from perdure.store import claims
from perdure.store.claims import Scope
from perdure.testing import Hold, ScriptedAdapter

ASK: Final = Task(prompt="Say hello.", platform="scripted")


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


async def answer(engine: Engine, task: Task = ASK) -> str:
    """Submit a task and return its output."""
    return (await engine.get_result(await engine.submit_task(task), PATIENCE)).output


def long_and_short(hold: Hold) -> ScriptedAdapter:
    """Return a platform that holds the task "long", and answers all others at once."""

    def script(call: Call) -> list[Any]:
        return ["long", hold, Completed()] if call.task.prompt == "long" else ["short", Completed()]

    return ScriptedAdapter(per_call=script)


async def begun(engine: Engine, hold: Hold) -> str:
    """Submit the task "long", and return it once it is held and nothing is left to be written."""
    task_id = await engine.submit_task(Task(prompt="long", platform="scripted"))
    await hold.reached.wait()

    async def written() -> bool:
        return isinstance((await engine.get_events(task_id))[-1].event, Chunk)

    await eventually(written)
    return task_id


def cut_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Have all writing fail as long as the event is set that is returned."""
    put, away = engine.log._put, asyncio.Event()

    def unreachable(*given: Any, **how: Any) -> Any:
        if away.is_set():
            raise DatabaseUnavailable("out of reach")
        return put(*given, **how)

    monkeypatch.setattr(engine.log, "_put", unreachable)
    return away


async def worker_ended(engine: Engine) -> None:
    """Wait until the worker runs no more."""
    await eventually(lambda: not engine._background._runs)


# -- for how long it holds what was asked ----------------------------------------------------------


async def test_what_comes_after_all_was_done_is_run_in_the_background(db: Path) -> None:
    """An engine that runs tasks goes on doing so after somebody has waited for all of them."""
    async with engine_on(db) as engine:
        for _ in range(3):
            await engine.submit_task(ASK)
            await asyncio.wait_for(engine.run_until_done(), PATIENCE)
            assert query(db, "SELECT DISTINCT status FROM tasks") == [("completed",)]
            assert await answer(engine) == "Hello, world."


async def test_without_a_background_nothing_is_run_after_all_was_done(db: Path) -> None:
    """It was asked for what was there, and for nothing else."""
    async with engine_on(db, run=False) as engine:
        await engine.submit_task(ASK)
        await asyncio.wait_for(engine.run_until_done(), PATIENCE)
        task_id = await engine.submit_task(ASK)
        await asyncio.sleep(5 * FAST.poll_seconds)
        assert await engine.get_status(task_id) is TaskStatus.PENDING


async def test_running_that_was_stopped_begins_again(db: Path) -> None:
    """Nothing is begun while it is stopped; all of it afterwards, as often as that happens."""
    async with engine_on(db) as engine:
        for _ in range(3):
            await engine.stop_running()
            task_id = await engine.submit_task(ASK)
            await asyncio.sleep(5 * FAST.poll_seconds)
            assert await engine.get_status(task_id) is TaskStatus.PENDING
            engine.start_running()
            assert (await engine.get_result(task_id, PATIENCE)).success
            assert await answer(engine) == "Hello, world."


async def test_running_that_was_stopped_can_be_done_to_its_end(db: Path) -> None:
    """The end is not that somebody has stopped it before."""
    async with engine_on(db) as engine:
        await engine.stop_running(Stop.CANCEL)
        task_id = await engine.submit_task(ASK)
        await asyncio.wait_for(engine.run_until_done(), PATIENCE)
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED


async def test_a_stop_before_the_first_step_counts(db: Path) -> None:
    """It was asked to run, and then to stop: in that order."""
    async with engine_on(db, run=False) as engine:
        task_id = await engine.submit_task(ASK)
        running = asyncio.create_task(engine.worker.run())
        engine.worker.stop_claiming()
        await asyncio.wait_for(running, PATIENCE)
        assert await engine.get_status(task_id) is TaskStatus.PENDING
        await asyncio.wait_for(engine.worker.run(until_done=True), PATIENCE)
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED


async def test_running_that_is_begun_while_it_is_being_stopped(db: Path) -> None:
    """What is asked last counts: it is stopped, and begins again."""
    hold = Hold()
    async with engine_on(db, long_and_short(hold)) as engine:
        await begun(engine, hold)
        stopping = asyncio.create_task(engine.stop_running())
        await asyncio.sleep(0)
        engine.start_running()
        await stopping
        assert await answer(engine) == "short"
        hold.release()


@pytest.mark.parametrize("last", ["stop_running", "close"])
async def test_running_that_waits_for_a_stop_and_is_stopped_itself(db: Path, last: str) -> None:
    """What is asked last counts: nothing runs after it."""
    hold = Hold()
    engine = await engine_on(db, long_and_short(hold)).__aenter__()
    task_id = await begun(engine, hold)
    asked = [asyncio.create_task(call()) for call in (engine.stop_running, engine.run_until_done)]
    await asyncio.sleep(0)
    asked.append(asyncio.create_task(getattr(engine, last)()))
    await asyncio.wait_for(asyncio.gather(*asked), PATIENCE)
    await asyncio.sleep(5 * FAST.poll_seconds)
    assert query(db, "SELECT status FROM tasks WHERE task_id = ?", task_id) == [("pending",)]
    assert engine.worker.running == ()
    await engine.close()
    assert query(db, "SELECT count(*) FROM workers") == [(0,)]


async def test_what_was_all_done_a_moment_ago(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for all to be done waits for what was submitted before, whoever asked first."""
    look, looked, may_go_on = claims.unfinished, asyncio.Event(), asyncio.Event()

    async def slow_look(*given: Any) -> int:
        found = await look(*given)
        if not found:
            looked.set()
            await may_go_on.wait()
        return found

    monkeypatch.setattr(claims, "unfinished", slow_look)
    async with engine_on(db, run=False) as engine:
        first = asyncio.create_task(engine.run_until_done())
        await looked.wait()
        task_id = await engine.submit_task(ASK)
        second = asyncio.create_task(engine.run_until_done())
        await asyncio.sleep(0)  # it joins the run of the first
        may_go_on.set()
        await asyncio.wait_for(asyncio.gather(first, second), PATIENCE)
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED


async def test_a_worker_runs_once_at_a_time(db: Path) -> None:
    """Whoever tries it twice is told, and the first goes on."""
    async with engine_on(db) as engine:
        assert await answer(engine) == "Hello, world."
        with pytest.raises(PerdureError, match="running already"):
            engine.worker.run()
        assert await answer(engine) == "Hello, world."


# -- what runs here --------------------------------------------------------------------------------


async def test_an_attempt_that_is_still_closing_is_not_taken_for_the_next_one(db: Path) -> None:
    """The next attempt at the same task is known as running, and is handed back at the end."""
    closing, second = asyncio.Event(), asyncio.Event()

    class SlowToClose(ScriptedAdapter):
        async def run(self, call: Call) -> AsyncGenerator[Event, None]:
            if call.attempt == 1:
                try:
                    yield Chunk(text="no JSON")
                    yield Completed()
                finally:
                    await closing.wait()
            second.set()
            yield Chunk(text="{")
            await asyncio.sleep(PATIENCE)

    settings = {"timing": replace(FAST.timing, closing_seconds=PATIENCE)}
    async with engine_on(db, SlowToClose(), settings=settings) as engine:
        task = ASK.model_copy(update={"output_schema": {"type": "object"}})
        task_id = await engine.submit_task(task)
        await asyncio.wait_for(second.wait(), PATIENCE)
        assert len(engine.worker._running) == 2
        assert engine.worker.running == (task_id,)
        closing.set()
        await eventually(lambda: len(engine.worker._running) == 1)
        assert engine.worker.running == (task_id,)
    assert status_of(stored_events(db, task_id)) == "pending"
    assert stored_events(db, task_id)[-1][0] == "interrupted"
    assert_sound(db)


async def test_platforms_of_the_scope_that_are_not_at_hand(db: Path) -> None:
    """Their tasks are left to those who have them, and the others run."""
    others = ScriptedAdapter(platform="other"), ScriptedAdapter()
    async with engine_on(db, *others, run=False) as engine:
        left = await engine.submit_task(Task(prompt="?", platform="other"))
    async with engine_on(db, scope=Scope(platforms=("other", "scripted"))) as engine:
        assert engine.worker.scope.platforms == ("scripted",)
        assert await answer(engine) == "Hello, world."
        assert await engine.get_status(left) is TaskStatus.PENDING
    async with engine_on(db, scope=Scope(platforms=("other",))) as engine:
        task_id = await engine.submit_task(ASK)
        await asyncio.sleep(5 * FAST.poll_seconds)
        assert await engine.get_status(task_id) is TaskStatus.PENDING


# -- errors of its own -----------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, when: asyncio.Event) -> list[int]:
    """Have looking for what is due fail while ``when`` is set; returns a count of that."""
    look, failed = claims.next_due, [0]

    async def next_due(*given: Any) -> Any:
        if when.is_set():
            failed[0] += 1
            raise error
        return await look(*given)

    monkeypatch.setattr(claims, "next_due", next_due)
    return failed


async def test_what_runs_is_kept_alive_when_the_worker_fails(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would take it over, and pay for it again, if it didn't show that it lives."""
    broken = asyncio.Event()
    failing(monkeypatch, LookupError("a bug"), broken)
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("a", hold, "b", Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        broken.set()
        await eventually(lambda: engine.worker._run.failure)
        (shown,) = query(db, "SELECT heartbeat_at FROM workers")
        await eventually(lambda: query(db, "SELECT heartbeat_at FROM workers") != [shown])
        await eventually(lambda: query(db, "SELECT heartbeat_at FROM workers") > [shown])
        hold.release()
        with pytest.raises(StoreError, match="the worker failed: LookupError: a bug"):
            await engine.run_until_done()
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED
    assert_sound(db)


async def test_what_runs_gives_a_database_time_to_come_back(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as something runs here the worker tries again, and goes on as if nothing was."""
    away = asyncio.Event()
    failed = failing(monkeypatch, DatabaseUnavailable("out of reach"), away)
    hold = Hold()
    async with engine_on(db, long_and_short(hold)) as engine:
        task_id = await begun(engine, hold)
        away.set()
        await eventually(lambda: failed[0] > 2)
        away.clear()
        assert await answer(engine) == "short"
        await eventually(lambda: engine.worker.running == (task_id,))
        hold.release()
        assert (await engine.get_result(task_id, PATIENCE)).success
    assert_sound(db)


async def test_signs_of_life_that_fail_for_a_while_are_no_end(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as something runs here, the database may come back: new tasks run beside it."""
    hold = Hold()
    failed = asyncio.Event()
    show = Presence.show

    async def noted(presence: Presence, scope: Scope | None) -> News:
        try:
            return await show(presence, scope)
        except DatabaseUnavailable:
            failed.set()
            raise

    monkeypatch.setattr(Presence, "show", noted)
    async with engine_on(db, long_and_short(hold)) as engine:
        away = cut_off(engine, monkeypatch)
        task_id = await begun(engine, hold)
        away.set()
        await failed.wait()
        away.clear()
        assert await answer(engine) == "short"
        assert task_id in engine.worker.running
        hold.release()
        assert (await engine.get_result(task_id, PATIENCE)).success
    assert_sound(db)


async def test_what_is_claimed_while_a_sign_of_life_fails_gets_others(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker ends by it; what it claimed just then is kept alive to its end all the same."""
    hold = Hold()
    async with engine_on(db, long_and_short(hold)) as engine:
        assert await answer(engine) == "short"
        await eventually(lambda: not engine.worker.running)
        claiming, may_claim, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        claim, show = engine.log.write_last, Presence.show

        async def slow_claim(work: Any) -> Any:
            claiming.set()
            await may_claim.wait()
            return await claim(work)

        async def fails_once(presence: Presence, scope: Scope | None) -> News:
            if claiming.is_set() and not failed.is_set():
                failed.set()
                raise DatabaseUnavailable("out of reach")
            return await show(presence, scope)

        monkeypatch.setattr(engine.log, "write_last", slow_claim)
        monkeypatch.setattr(Presence, "show", fails_once)
        submitted = asyncio.create_task(begun(engine, hold))
        await failed.wait()
        may_claim.set()
        task_id = await submitted
        (shown,) = query(db, "SELECT heartbeat_at FROM workers")
        await eventually(lambda: query(db, "SELECT heartbeat_at FROM workers") > [shown])
        hold.release()
        await worker_ended(engine)
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED
    assert_sound(db)


async def test_what_an_outage_left_is_taken_over_however_long_it_was(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first ones to try again were too early."""
    hold = Hold()
    settings = {"lease_seconds": 1.0}
    async with engine_on(db, long_and_short(hold), settings=settings) as engine:
        away = cut_off(engine, monkeypatch)
        task_id = await begun(engine, hold)
        away.set()
        hold.release()
        await worker_ended(engine)
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable):
                await engine.submit_task(ASK)
            await worker_ended(engine)
        away.clear()
        assert await answer(engine) == "short"
        assert (await engine.get_result(task_id, PATIENCE)).success
    assert_sound(db)


async def test_a_claim_of_which_nobody_knows_whether_it_was_done(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may have been claimed isn't left with a worker that doesn't know of it."""
    hold = Hold()
    settings = {"lease_seconds": 1.0}
    async with engine_on(db, long_and_short(hold), settings=settings) as engine:
        long = await begun(engine, hold)
        claim = engine.log.write_last

        async def unanswered(work: Any) -> Any:
            found = await claim(work)
            if found[0]:
                monkeypatch.setattr(engine.log, "write_last", claim)
                raise DatabaseUnavailable("gone; what was written last may be there")
            return found

        monkeypatch.setattr(engine.log, "write_last", unanswered)
        task_id = await engine.submit_task(ASK)
        await eventually(lambda: engine.worker._run.failure)
        hold.release()
        await worker_ended(engine)
        assert (await engine.get_result(task_id, PATIENCE)).output == "short"
        assert (await engine.get_result(long, PATIENCE)).success
    assert_sound(db)


async def test_what_was_stopped_is_not_begun_again_by_an_outage(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for results again, and runs nothing that it wasn't asked to run."""
    for run in (True, False):
        async with engine_on(db, run=run) as engine:
            away = cut_off(engine, monkeypatch)
            away.set()
            if run:
                await worker_ended(engine)
                await engine.stop_running()
            else:
                with pytest.raises(DatabaseUnavailable):
                    await engine.run_until_done()
            away.clear()
            task_id = await engine.submit_task(ASK)
            waiting = asyncio.create_task(engine.get_result(task_id, PATIENCE))
            await asyncio.sleep(5 * FAST.poll_seconds)
            assert await engine.get_status(task_id) is TaskStatus.PENDING
            async with engine_on(db):
                assert (await waiting).success


async def test_signs_of_life_go_on_while_something_runs(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails is the worker's end, but not before what it runs has come to its own."""
    show, left = Presence.show, [1]

    async def fails_once(presence: Presence, scope: Scope | None) -> News:
        if scope is None and left[0]:  # something runs
            left[0] -= 1
            raise LookupError("a bug")
        return await show(presence, scope)

    monkeypatch.setattr(Presence, "show", fails_once)
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("a", hold, "b", Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        await eventually(lambda: not left[0])
        (shown,) = query(db, "SELECT heartbeat_at FROM workers")
        await eventually(lambda: query(db, "SELECT heartbeat_at FROM workers") > [shown])
        hold.release()
        with pytest.raises(StoreError, match="that it is alive: LookupError: a bug"):
            await engine.run_until_done()
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED
    assert_sound(db)
