"""Tasks that this perdure can't read, as of a newer one: left alone, and nobody else waits."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from harness import FAST, count_events, eventually, query

from perdure import Completed, Engine, Submission, Task, TaskStatus, TasksUnreadable
from perdure.store.database import Database
from perdure.store.schema import tasks
from perdure.testing import Hold, ScriptedAdapter
from store.backends import append_newer


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that runs one task at a time."""
    settings = replace(FAST, concurrency=1, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


async def submitted(engine: Engine, *prompts: str) -> list[str]:
    """Hand tasks in, all at once."""
    outcomes = await engine.submit_tasks(Task(prompt=prompt) for prompt in prompts)
    return [one.task_id for one in outcomes if isinstance(one, Submission)]


async def test_others_are_run(db: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that are first in the queue, too; each is named once; whoever waits for all is told."""
    async with engine_on(db, run=False) as engine:
        first, *others, last = await submitted(engine, *(f"task {n}" for n in range(5)))
    append_newer(str(db), first, last)
    for _again in range(2):  # after a restart the same
        caplog.clear()
        async with engine_on(db, run=False) as engine:
            async with asyncio.timeout(30):
                with pytest.raises(TasksUnreadable, match=r"all else is done.*invented") as left:
                    await engine.run_until_done()
            assert left.value.task_ids == (first, last)
            for task_id in others:
                assert (await engine.get_result(task_id)).success
        said = [record.message.split()[0] for record in caplog.records]
        assert said == [first, last]
    assert query(db, "SELECT count(*) FROM tasks WHERE status = 'pending'") == [(2,)]


async def test_a_worker_goes_on(db: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It runs what comes later, and doesn't look again and again at what it can't read."""
    async with engine_on(db, run=False) as engine:
        (unreadable,) = await submitted(engine, "newer")
    append_newer(str(db), unreadable)
    async with engine_on(db) as engine:
        await eventually(lambda: caplog.records)
        for number in range(3):
            (task_id,) = await submitted(engine, f"later {number}")
            assert (await engine.get_result(task_id, 30)).success
        assert await engine.get_status(unreadable) is TaskStatus.PENDING
        scope = engine.worker.scope
        assert scope.excluded == {unreadable}
    assert len(caplog.records) == 1


async def test_what_ends_elsewhere_is_no_longer_left(db: Path) -> None:
    """Once a newer perdure has ended it, all is done."""
    hold = Hold()
    async with engine_on(db, run=False) as engine:
        unreadable, task_id = await submitted(engine, "newer", "other")
    append_newer(str(db), unreadable)
    async with engine_on(db, ScriptedAdapter(hold, "done"), run=False) as engine:
        working = asyncio.create_task(engine.run_until_done())
        await hold.reached.wait()
        writer = Database(db).writer()
        with writer.transaction() as connection:
            ended = sa.update(tasks).where(tasks.c.task_id == unreadable)
            connection.execute(ended.values(status="cancelled"))
        writer.close()
        hold.release()
        async with asyncio.timeout(30):
            await working
        assert (await engine.get_result(task_id)).status.ended


async def test_what_a_lost_worker_had(db: Path) -> None:
    """Of its tasks those that can be read are taken over; the others don't keep a worker busy."""
    hold = Hold()
    silent = ScriptedAdapter(hold)
    settings = replace(FAST, heartbeat_seconds=600, lease_seconds=3600)
    async with Engine.open(db, adapters=[silent], settings=settings) as lost:
        unreadable, task_id = await submitted(lost, "newer", "other")
        await eventually(lambda: count_events(db, "running") == 2)
        append_newer(str(db), unreadable)
        lost.worker.stop_claiming()
        await lost.log.write(
            lambda tx: tx.connection.exec_driver_sql("UPDATE workers SET lease_seconds = 0.3")
        )
        async with engine_on(db) as engine:
            assert (await engine.get_result(task_id, 30)).success
            assert await engine.recover_lost() == 0
            assert await engine.get_status(unreadable) is TaskStatus.RUNNING
        hold.release()


async def test_while_it_runs(db: Path) -> None:
    """A newer perdure writes to a task that runs here: its attempt ends, and the others run."""
    hold = Hold()
    adapter = ScriptedAdapter(
        per_call=lambda call: [
            "one ",
            *([hold] if call.task.prompt == "newer" else ()),
            Completed(),
        ]
    )
    async with engine_on(db, adapter, run=False) as engine:
        unreadable, task_id = await submitted(engine, "newer", "other")
        working = asyncio.create_task(engine.run_until_done())
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk"))
        append_newer(str(db), unreadable)
        hold.release()
        with pytest.raises(TasksUnreadable) as left:
            await asyncio.wait_for(working, 30)
        assert left.value.task_ids == (unreadable,)
        assert (await engine.get_result(task_id)).success
    assert query(db, "SELECT status FROM tasks ORDER BY stream_id") == [
        ("running",),
        ("completed",),
    ]


async def test_what_waits_for_others_goes_on_waiting(db: Path) -> None:
    """Whoever waits for a task that can't be read is told; who waits for another one is not."""
    platforms = ScriptedAdapter(platform="other"), ScriptedAdapter()
    async with engine_on(db, *platforms, run=False) as engine:
        unreadable = await engine.submit_task(Task(prompt="?", platform="scripted"))
        left = await engine.submit_task(Task(prompt="?", platform="other"))
    append_newer(str(db), unreadable)
    async with (
        engine_on(db, ScriptedAdapter(), run=False) as engine,
        engine_on(db, platforms[0], run=False) as other,
    ):
        waiting = asyncio.create_task(engine.get_result(left, 30))
        in_vain = asyncio.create_task(engine.get_result(unreadable, 30))
        await eventually(lambda: len(engine.log.feed._readers) == 2)
        with pytest.raises(TasksUnreadable):
            await engine.run_until_done()
        with pytest.raises(TasksUnreadable):
            await in_vain
        await other.run_until_done()
        assert (await waiting).success
