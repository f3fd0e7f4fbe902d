"""Running, stopping and going on: what is asked of a worker, and for how long that holds."""

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
    StoreError,
    Task,
    TaskStatus,
)
from perdure.attempt import Stop
from perdure.store import claims
from perdure.store.claims import Scope
from perdure.testing import Hold, ScriptedAdapter
from perdure.worker import Worker

ASK: Final = Task(prompt="Say hello.", platform="scripted")


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


async def answer(engine: Engine, task: Task = ASK) -> str:
    """Submit a task and return its output."""
    return (await engine.get_result(await engine.submit_task(task), PATIENCE)).output


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
    adapter = ScriptedAdapter(
        per_call=lambda call: (
            [hold, Completed()] if call.task.prompt == "long" else ["b", Completed()]
        )
    )
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(Task(prompt="long", platform="scripted"))
        await hold.reached.wait()
        away.set()
        await eventually(lambda: failed[0] > 2)
        away.clear()
        assert await answer(engine) == "b"
        await eventually(lambda: engine.worker.running == (task_id,))
        hold.release()
        assert (await engine.get_result(task_id, PATIENCE)).success
    assert_sound(db)


async def test_signs_of_life_go_on_while_something_runs(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails is the worker's end, but not before what it runs has come to its own."""
    show, left = Worker._show_itself, [1]

    async def fails_once(worker: Worker) -> None:
        if worker.running and left[0]:
            left[0] -= 1
            raise LookupError("a bug")
        await show(worker)

    monkeypatch.setattr(Worker, "_show_itself", fails_once)
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
