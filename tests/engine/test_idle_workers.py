"""Workers without work on a PostgreSQL server: they leave it alone, and miss nothing."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import datetime

import pytest
from harness import PATIENCE, assert_sound, count_events, demo, eventually, query

from perdure import Engine, WorkerSettings
from perdure.events import Running, Submitted
from perdure.store import liveness
from perdure.store.transaction import Transaction
from perdure_adapters import DemoAdapter
from servers.cutting import CuttingProxy
from servers.postgresql import Server


@pytest.fixture
def db(own_server: Server) -> str:
    """The URL of an empty database on a server of its own."""
    return own_server.url("own")


def _everyday(lease: float) -> WorkerSettings:
    """Return settings in the proportions of everyday use, where a lease is 30 s."""
    usual = WorkerSettings()
    heartbeat = usual.heartbeat_seconds / usual.lease_seconds * lease
    return replace(usual, lease_seconds=lease, heartbeat_seconds=heartbeat)


async def _begun(server: Server) -> None:
    """Wait until a server isn't asked for anything any more, as it is when engines begin."""
    seen, since = -1, time.monotonic()

    def still() -> bool:
        nonlocal seen, since
        if seen != (seen := server.transactions()):
            since = time.monotonic()
        return time.monotonic() > since + 0.3

    await eventually(still)


async def test_an_idle_worker_leaves_the_server_alone(own_server: Server, db: str) -> None:
    """Without work it asks for five transactions in two leases at most, and begins at once."""
    lease = 4.0
    async with (
        Engine.open(db, adapters=[DemoAdapter()], settings=_everyday(lease)) as worker,
        Engine.open(db, adapters=[DemoAdapter()], run=False) as other,
    ):
        await eventually(lambda: worker.log.hears)
        await _begun(own_server)
        before, began = own_server.transactions(), time.monotonic()
        await asyncio.sleep(2 * lease)  # with the leases of everyday use that would be a minute
        took = time.monotonic() - began
        asked = own_server.transactions() - before
        began = time.monotonic()
        task_id = await other.submit_task(demo("Now.", words=1))
        await eventually(lambda: count_events(db, "running"))
        waited = time.monotonic() - began
        await other.get_result(task_id, 30)
    print(f"{asked} transactions in {took / lease:.2f} leases; begun after {waited * 1000:.0f} ms")
    assert 3 <= asked <= 5 * took / (2 * lease)
    assert waited < lease / 4


async def test_an_idle_worker_takes_over_when_a_lease_is_over(db: str) -> None:
    """It looks when the lease of another one ends, and not only when it shows itself again."""
    lease = 8.0
    async with Engine.open(db, adapters=[DemoAdapter()], settings=_everyday(lease)) as idle:
        await eventually(lambda: idle.log.hears)
        mine = "SELECT heartbeat_at FROM workers WHERE worker_id = ?"
        before = query(db, mine, idle.worker.worker_id)
        await eventually(lambda: before != query(db, mine, idle.worker.worker_id))
        await asyncio.sleep(lease / 8)  # so that its next signs of life come too early and too late

        def begin(tx: Transaction) -> None:  # from now on it is silent, though its process lives
            liveness.register_worker(tx, "silent")
            asked = Submitted(task={"prompt": "Go on.", "platform": "demo"}, platforms=("demo",))
            began = Running(attempt=1, worker="silent", platform="demo", model=None)
            tx.append("task", (asked, began), 0)

        await idle.log.write(begin)
        result = await idle.get_result("task", 60)
    assert (result.status, result.attempts) == ("completed", 2)
    times = dict(query(db, "SELECT type, recorded_at FROM events WHERE version IN (2, 3)"))
    waited = datetime.fromisoformat(times["interrupted"]) - datetime.fromisoformat(times["running"])
    print(f"taken over after {waited.total_seconds():.2f} s")
    # Its next sign of life is due after 11 s.
    assert lease <= waited.total_seconds() < 1.3 * lease
    assert_sound(db)


async def test_what_nobody_was_told_of_is_found(db: str) -> None:
    """A task whose notification got lost is begun when an idle worker shows itself."""
    lease = 2.0
    with CuttingProxy(db) as network:
        settings = _everyday(lease)
        async with (
            Engine.open(network.url, adapters=[DemoAdapter()], settings=settings) as worker,
            Engine.open(db, adapters=[DemoAdapter()], run=False) as other,
        ):
            await eventually(lambda: worker.log.hears)
            network.deaf = True
            task_id = await other.submit_task(demo("Who hears me?", words=1))
            assert (await other.get_result(task_id, PATIENCE)).attempts == 1
            assert worker.log.hears


async def test_few_of_many_idle_workers_run_for_one_task(own_server: Server, db: str) -> None:
    """Of ten workers that are told of a task, half at most try to take it on average.

    On an idle machine it is two; without turns it is nine, however busy the machine.
    """
    workers, tasks = 10, 60

    def claims() -> int:
        return own_server.log().count("SKIP LOCKED")

    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(
                Engine.open(db, adapters=[DemoAdapter()], settings=_everyday(6.0))
            )
            for _ in range(workers)
        ]
        other = await stack.enter_async_context(Engine.open(db, run=False))
        await eventually(lambda: all(engine.log.hears for engine in engines))
        await eventually(lambda: all(engine.worker._pace.workers == workers for engine in engines))
        before = claims()
        for number in range(tasks):
            task_id = await other.submit_task(demo(f"task {number}", words=1))
            assert (await other.get_result(task_id, PATIENCE)).attempts == 1
        tried = claims() - before
    print(f"{tried / tasks:.2f} claims for a task by {workers} workers")
    assert tried < workers / 2 * tasks
