"""Engines on a PostgreSQL server: idle they leave it alone, and its faults don't become theirs."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from harness import FAST, Nursery, assert_sound, count_events, demo, eventually, query

from perdure import Completed, Engine, Submission, Task, WorkerSettings
from perdure.store.database import Database
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter
from servers.cutting import CuttingProxy
from servers.postgresql import Server


@pytest.fixture
def own_server() -> Generator[Server, None, None]:
    """A server that a test may stop, and that writes down every statement."""
    with Server(log_statement="all", log_min_messages="info") as server:
        server.execute("CREATE DATABASE own")
        Database(server.url("own")).upgrade()
        yield server


@pytest.fixture
def db(own_server: Server) -> str:
    """The URL of an empty database on that server."""
    return own_server.url("own")


async def test_an_idle_worker_leaves_the_server_alone(own_server: Server, db: str) -> None:
    """Without work a worker asks a few things per lease, and is at work at once all the same."""
    lease = 2.0
    settings = replace(WorkerSettings(), lease_seconds=lease, heartbeat_seconds=lease / 6)

    def statements() -> int:
        log = (own_server.directory / "log").read_text(errors="replace")
        return sum("statement: " in line or "execute <" in line for line in log.splitlines())

    async with (
        Engine.open(db, adapters=[DemoAdapter()], settings=settings) as worker,
        Engine.open(db, adapters=[DemoAdapter()], run=False) as other,
    ):
        await eventually(lambda: worker.log.hears)
        await asyncio.sleep(0.3)
        before = statements()
        await asyncio.sleep(2 * lease)  # with the leases of everyday use that would be a minute
        asked = statements() - before
        began = time.monotonic()
        task_id = await other.submit_task(demo("Now.", words=1))
        await eventually(lambda: count_events(db, "running"))
        waited = time.monotonic() - began
        await other.get_result(task_id, 30)
    print(f"{asked} statements in two leases; work begun after {waited * 1000:.0f} ms")
    assert asked <= 50
    assert waited < lease / 4


async def test_a_restart_under_load(own_server: Server, db: str) -> None:
    """The server is restarted twice while tasks run: each is run once, and readers go on."""
    async with (
        Engine.open(db, adapters=[DemoAdapter()], settings=FAST) as worker,
        Engine.open(db, adapters=[DemoAdapter()], run=False) as other,
    ):
        outcomes = await other.submit_tasks(
            demo(f"task {n}", words=120, chunk_words=4, delay=0.02) for n in range(12)
        )
        ids = [one.task_id for one in outcomes if isinstance(one, Submission)]

        async def read(task_id: str) -> str:
            return "".join([chunk async for chunk in other.stream_result(task_id)])

        reading = [asyncio.create_task(read(task_id)) for task_id in ids]
        for mode in ("fast", "immediate"):
            before = count_events(db, "chunk")
            await eventually(lambda n=before: count_events(db, "chunk") > n + 20)
            await asyncio.to_thread(own_server.restart, mode)
        results = [await other.get_result(task_id, 60) for task_id in ids]
        assert await asyncio.wait_for(asyncio.gather(*reading), 60) == [r.output for r in results]
        assert not worker.worker.running
    assert {(result.status, result.attempts) for result in results} == {("completed", 1)}
    assert_sound(db)


async def test_cut_off_from_the_database(db: str) -> None:
    """A worker that the network keeps from the database loses its tasks and writes no more."""
    hold = Hold()
    silent = ScriptedAdapter("half", hold, "never", Completed())
    with CuttingProxy(db) as network:
        async with Engine.open(network.url, adapters=[silent], settings=FAST) as first:
            task_id = await first.submit_task(Task(prompt="Say hello."))
            await hold.reached.wait()
            await eventually(lambda: count_events(db, "chunk"))
            network.hold()
            settings = replace(FAST, lease_seconds=0.5)
            async with Engine.open(
                db, adapters=[ScriptedAdapter(platform=silent.platform)], settings=settings
            ) as second:
                result = await second.get_result(task_id, 60)
            assert result.attempts == 2
            before = query(db, "SELECT count(*) FROM events")
            hold.release()
            await asyncio.sleep(0.2)
            network.release()
            await eventually(lambda: not first.worker.running)
            assert query(db, "SELECT count(*) FROM events") == before
    assert_sound(db)


def test_stopped_in_the_middle_of_anything(db: str, nursery: Nursery, tmp_path: Path) -> None:
    """A process that is stopped wherever it is keeps nobody out for ever."""
    sleeper = nursery.start(
        "run", db=db, options={"words": 100_000, "chunk_words": 1, "delay": 0.001}, until_done=False
    )

    async def go() -> None:
        async with Engine.open(db, adapters=[DemoAdapter()], run=False) as engine:
            await engine.submit_tasks(demo(f"task {n}") for n in range(8))
            await eventually(lambda: count_events(db, "chunk") >= 20)
            sleeper.signal(signal.SIGSTOP)
            await asyncio.wait_for(engine.submit_task(demo("meanwhile")), 50)
            sleeper.signal(signal.SIGCONT)
            before = count_events(db, "chunk")
            await eventually(lambda: count_events(db, "chunk") > before)

    asyncio.run(go())
    sleeper.kill()
    assert_sound(db)
