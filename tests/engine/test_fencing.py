"""One owner: a worker that was declared lost writes nothing, and nothing is ever run by two."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import (
    FAST,
    Child,
    Nursery,
    assert_sound,
    count_events,
    demo,
    eventually,
    is_writing,
    journal_of,
    query,
    stored_events,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from perdure import Accepted, Completed, Engine, InvalidRequest, Submission, Task, TaskStatus
from perdure.policy import RetryPolicy, after_interruption
from perdure.store import claims, liveness
from perdure.store.claims import Scope
from perdure.store.transaction import Transaction
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter

ASK = Task(prompt="Say hello.")
SILENT = {"heartbeat_seconds": 3600, "lease_seconds": 7200}  # as a worker that doesn't show itself
DECIDE = partial(after_interruption, policy=RetryPolicy())


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


async def declare_lost(engine: Engine, worker: str) -> int:
    """Take everything away from a worker, as another one does that finds it silent."""
    return (await engine.log.write(lambda tx: claims.recover(tx, worker, DECIDE))).tasks


async def test_a_worker_that_was_declared_lost_writes_nothing_more(db: Path) -> None:
    """Its next piece of output isn't written, its adapter is stopped, it may take new tasks."""
    hold, go_on = Hold(), Hold()
    adapter = ScriptedAdapter(
        per_call=lambda call: (
            ["one ", hold, "two ", go_on, "three", Completed()]
            if call.attempt == 1 and call.task.prompt == ASK.prompt
            else ["fine", Completed()]
        )
    )
    async with engine_on(db, run=False) as other, engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk"))
        engine.worker.stop_claiming()  # so that it doesn't get the task again at once
        assert await declare_lost(other, engine.worker.worker_id) == 1
        before = stored_events(db, task_id)
        hold.release()  # should it not have noticed yet, it does so now
        await eventually(lambda: not adapter.running)
        await eventually(lambda: not engine.worker.running)
        assert adapter.cancelled == [task_id]
        assert stored_events(db, task_id) == before
        assert await engine.get_status(task_id) is TaskStatus.PENDING
    async with engine_on(db, adapter) as engine:
        assert (await engine.get_result(task_id, 30)).output == "fine"
    assert_sound(db)


@pytest.mark.parametrize("how", ["waiting", "in the stream", "at its end", "failing"])
async def test_whatever_it_was_doing(db: Path, how: str) -> None:
    """Waiting, streaming, ending or failing: after the loss there is nothing of it in the log.

    The news of it are kept from the worker, so that only the log's own check is left.
    """
    hold = Hold()
    then: dict[str, list[Any]] = {
        "waiting": [],
        "in the stream": ["more ", 0.01, "and more", Hold()],
        "at its end": [Completed()],
        "failing": [ValueError("broken")],
    }
    adapter = ScriptedAdapter("one ", hold, *then[how], "x" if how == "waiting" else Hold())
    async with engine_on(db, run=False) as other, engine_on(db, adapter) as engine:
        engine.log.feed._deliver = lambda committed: None  # type: ignore[method-assign]
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk"))
        engine.worker.stop_claiming()
        await declare_lost(other, engine.worker.worker_id)
        before = stored_events(db, task_id)
        hold.release()
        await eventually(lambda: not engine.worker.running)
        assert adapter.running == 0
        assert stored_events(db, task_id) == before
    assert_sound(db)


async def test_it_notices_even_if_it_only_waits(db: Path) -> None:
    """A worker whose platform is silent is told by the log, not only at its next write."""
    hold = Hold()
    adapter = ScriptedAdapter(Accepted(response_id="r", reattachable=True), hold)
    async with engine_on(db, run=False) as other, engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        engine.worker.stop_claiming()
        await declare_lost(other, engine.worker.worker_id)
        await eventually(lambda: not adapter.running)
        assert adapter.cancelled == [task_id]
        assert adapter.stopped == [], "the response belongs to the next owner"
    assert_sound(db)


async def test_the_next_owners_response_goes_on(db: Path) -> None:
    """A worker that fails for good, and was declared lost before, stops nothing at the platform."""
    hold = Hold()
    adapter = ScriptedAdapter(
        Accepted(response_id="r", reattachable=True), "one ", hold, InvalidRequest("no")
    )
    async with engine_on(db, run=False) as other, engine_on(db, adapter) as engine:
        engine.log.feed._deliver = lambda committed: None  # type: ignore[method-assign]
        await engine.submit_task(ASK)
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk"))
        engine.worker.stop_claiming()
        await declare_lost(other, engine.worker.worker_id)
        hold.release()
        await eventually(lambda: not engine.worker.running)
        assert adapter.stopped == []
    assert_sound(db)


async def test_a_task_taken_over_and_over_has_one_owner_at_a_time(
    db: Path, chance: random.Random
) -> None:
    """Engines that keep declaring each other lost still end every task once, with its own text."""

    def script(call: Any) -> list[Any]:
        words = [f"{call.task.prompt}/{call.attempt}/{n} " for n in range(8)]
        return [step for word in words for step in (word, 0.003)] + [Completed()]

    adapters = [ScriptedAdapter(per_call=script) for _ in range(3)]
    policy = RetryPolicy(max_interruptions=1000)
    async with (
        engine_on(db, adapters[0], settings={"retry": policy}) as one,
        engine_on(db, adapters[1], settings={"retry": policy}) as two,
        engine_on(db, adapters[2], settings={"retry": policy}) as three,
    ):
        engines = [one, two, three]
        outcomes = await one.submit_tasks(Task(prompt=f"task {n}") for n in range(40))
        ids = [outcome.task_id for outcome in outcomes if isinstance(outcome, Submission)]
        for _ in range(12):
            await asyncio.sleep(chance.uniform(0, 0.05))
            lost, finder = chance.sample(engines, 2)
            await declare_lost(finder, lost.worker.worker_id)
        results = [await chance.choice(engines).get_result(task_id, 60) for task_id in ids]
    for n, result in enumerate(results):
        last = result.attempts
        assert result.output == "".join(f"task {n}/{last}/{k} " for k in range(8))
    made = Counter((call.task_id, call.attempt) for adapter in adapters for call in adapter.calls)
    assert set(made.values()) == {1}
    assert_sound(db)


async def test_a_short_lease_takes_a_silent_worker_over(db: Path) -> None:
    """A worker that doesn't show itself for the length of the lease has lost its tasks."""
    hold = Hold()
    silent = ScriptedAdapter("half", hold, "never", Completed())
    async with engine_on(db, silent, settings=SILENT) as first:
        task_id = await first.submit_task(ASK)
        await hold.reached.wait()
        first.worker.stop_claiming()
        await first.log.write(
            lambda tx: tx.connection.exec_driver_sql("UPDATE workers SET lease_seconds = 0.3")
        )
        async with engine_on(db) as second:
            assert (await second.get_result(task_id, 30)).output == "Hello, world."
        await eventually(lambda: not silent.running)
    assert_sound(db)


async def test_a_worker_that_shows_itself_keeps_its_tasks(db: Path) -> None:
    """However long a task takes: as long as its worker is alive nobody takes it."""
    hold = Hold()
    adapter = ScriptedAdapter(hold, "done", Completed())
    others = ScriptedAdapter()
    settings = {"lease_seconds": 4.0, "heartbeat_seconds": 0.05}
    async with engine_on(db, adapter, settings=settings) as first:
        task_id = await first.submit_task(ASK)
        await hold.reached.wait()
        async with engine_on(db, others, settings=settings):
            await asyncio.sleep(4.5)
        hold.release()
        assert (await first.get_result(task_id, 30)).attempts == 1
    assert others.calls == []


async def test_a_worker_that_registers_while_others_look_is_not_lost(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who begins and claims in the middle of a search for the dead is not among them."""
    async with engine_on(db, run=False) as engine:
        await engine.submit_task(ASK)
        asked: list[str] = []

        def begin(tx: Transaction) -> None:
            liveness.register_worker(tx, "newcomer")
            assert claims.claim(tx, "newcomer", 1, Scope(), {})

        real = AsyncConnection.execute

        async def execute(self: AsyncConnection, *how: Any, **more: Any) -> Any:
            found = await real(self, *how, **more)
            asked.append(str(how[0]))
            if len(asked) == 1:
                await engine.log.write(begin)
            return found

        monkeypatch.setattr(AsyncConnection, "execute", execute)
        lease = timedelta(seconds=30)
        lost = (await liveness.look_around(engine.database, lease, datetime.now(UTC))).lost
        monkeypatch.undo()
    assert len(asked) > 1, "it didn't begin in the middle"
    assert query(db, "SELECT worker FROM tasks") == [("newcomer",)]
    assert lost == []


async def test_whoever_claims_is_known(db: Path) -> None:
    """A worker that was forgotten as lost is known again as soon as it owns something."""
    async with engine_on(db, run=False) as engine:
        await engine.submit_task(ASK)
        await engine.log.write(lambda tx: liveness.register_worker(tx, "w"))
        await declare_lost(engine, "w")
        assert query(db, "SELECT count(*) FROM workers") == [(0,)]
        await engine.log.write(lambda tx: claims.claim(tx, "w", 1, Scope(), {}))
        assert query(db, "SELECT worker_id FROM workers") == [("w",)]
        lease = timedelta(seconds=30)
        assert (await liveness.look_around(engine.database, lease, datetime.now(UTC))).lost == []


# -- several engines, several processes ------------------------------------------------------------


async def test_several_engines_share_the_work(db: Path) -> None:
    """Five engines on one file run two hundred tasks, each of them once."""
    adapters = [ScriptedAdapter("a", "b", Completed()) for _ in range(5)]
    engines = [engine_on(db, adapter, run=False) for adapter in adapters]
    async with engines[0], engines[1], engines[2], engines[3], engines[4]:
        await engines[0].submit_tasks(Task(prompt=f"{n}") for n in range(200))
        async with asyncio.timeout(60):
            await asyncio.gather(*(engine.run_until_done() for engine in engines))
    made = Counter(call.task_id for adapter in adapters for call in adapter.calls)
    assert len(made) == 200
    assert set(made.values()) == {1}
    assert query(db, "SELECT DISTINCT status, attempts FROM tasks") == [("completed", 1)]
    assert_sound(db)


async def test_several_processes_share_the_work(db: Path, nursery: Nursery, tmp_path: Path) -> None:
    """Three processes on one file run three hundred tasks, each of them once."""
    journal = tmp_path / "journal"
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        await engine.submit_tasks(demo(f"task {n}") for n in range(300))
    options = {"journal": str(journal), "words": 12}
    children = [nursery.start("run", db=db, options=options) for _ in range(3)]
    for child in children:
        assert await child.gone() == 0, child.said()
    calls = Counter(entry["call"] for entry in journal_of(journal) if "call" in entry)
    assert len(calls) == 300
    assert set(calls.values()) == {1}
    assert query(db, "SELECT DISTINCT status, attempts FROM tasks") == [("completed", 1)]
    assert query(db, "SELECT count(*) FROM workers") == [(0,)]
    owners = {data["worker"] for data in _of_type(db, "running")}
    assert len(owners) > 1, "one process did everything"
    assert_sound(db)


async def stop_between_writes(child: Child, db: Path) -> None:
    """Stop a process at a moment at which it doesn't hold the database's write lock.

    Stopped in the middle of a commit it would keep everyone out: on SQLite for ever, on PostgreSQL
    until the server ends it.
    """
    while True:
        child.signal(signal.SIGSTOP)
        if not is_writing(db):
            return
        child.signal(signal.SIGCONT)
        await asyncio.sleep(0.003)


def _of_type(db: Path, type_: str) -> list[dict[str, Any]]:
    return [json.loads(row[0]) for row in query(db, "SELECT data FROM events WHERE type=?", type_)]


async def test_a_stopped_process_that_comes_back_writes_nothing(
    db: Path, nursery: Nursery, tmp_path: Path
) -> None:
    """SIGSTOP past the lease, takeover, SIGCONT: its tasks are no longer its own."""
    journal = tmp_path / "journal"
    sleeper = nursery.start(
        "run",
        db=db,
        options={"journal": str(journal), "words": 100_000, "chunk_words": 1, "delay": 0.01},
        settings={"lease_seconds": 2.0},
        until_done=False,
    )
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        outcomes = await engine.submit_tasks(demo(f"task {n}") for n in range(4))
        ids = [one.task_id for one in outcomes if isinstance(one, Submission)]
        await eventually(lambda: count_events(db, "chunk") >= 8)
        await stop_between_writes(sleeper, db)
    adapter = DemoAdapter(words=30, journal=str(journal))
    (asleep,) = query(db, "SELECT worker_id FROM workers")[0]
    async with engine_on(db, adapter) as engine:
        results = [await engine.get_result(task_id, 60) for task_id in ids]
        assert all(result.success and result.attempts == 2 for result in results)
        before = {task_id: stored_events(db, task_id) for task_id in ids}
        sleeper.signal(signal.SIGCONT)
        # Its calls end: the journal has an end for each of them.
        await eventually(
            lambda: sum(entry.get("outcome") == "cancelled" for entry in journal_of(journal)) == 4
        )
        fresh = await engine.submit_task(demo("after", words=5))
        assert (await engine.get_result(fresh, 30)).success
    assert {task_id: stored_events(db, task_id) for task_id in ids} == before
    for task_id in ids:
        types = [type_ for type_, _ in before[task_id]]
        interrupted = next(data for type_, data in before[task_id] if type_ == "interrupted")
        assert types.count("running") == 2
        assert (interrupted["worker"], interrupted["reason"]) == (asleep, "worker_lost")
    await eventually(lambda: (asleep,) in query(db, "SELECT worker_id FROM workers"))
    sleeper.kill()
    assert_sound(db)


async def test_processes_that_lose_each_other_end_everything_once(
    db: Path, nursery: Nursery, chance: random.Random, tmp_path: Path
) -> None:
    """With a lease shorter than the pauses of stopped processes, still one ending each."""
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        outcomes = await engine.submit_tasks(
            demo(f"task {n}", words=40, chunk_words=2, delay=0.01) for n in range(60)
        )
    ids = [one.task_id for one in outcomes if isinstance(one, Submission)]
    settings = {"lease_seconds": 0.3, "heartbeat_seconds": 0.05}
    options = {"journal": str(tmp_path / "journal")}
    children = [nursery.start("run", db=db, options=options, settings=settings) for _ in range(3)]
    for _ in range(6):
        await asyncio.sleep(chance.uniform(0.1, 0.3))
        stopped = chance.choice(children)
        stopped.signal(signal.SIGSTOP)
        await asyncio.sleep(chance.uniform(0.3, 0.8))
        stopped.signal(signal.SIGCONT)
    for child in children:
        assert await child.gone() == 0, child.said()
    assert query(db, "SELECT DISTINCT status FROM tasks") == [("completed",)]
    calls = Counter(
        (entry["call"], entry["attempt"])
        for entry in journal_of(tmp_path / "journal")
        if "call" in entry
    )
    assert set(calls.values()) == {1}, "an attempt was made twice"
    assert {task_id for task_id, _ in calls} == set(ids)
    assert_sound(db)
