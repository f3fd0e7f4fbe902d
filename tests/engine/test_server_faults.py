"""Engines on a PostgreSQL server: its faults don't become theirs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from string import ascii_letters

import psycopg
import pytest
from harness import FAST, PATIENCE, Nursery, assert_sound, count_events, demo, eventually, query

from perdure import Completed, Engine, Submission, Task
from perdure.errors import DatabaseUnavailable
from perdure.store.database import Database
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter
from servers.cutting import CuttingProxy
from servers.postgresql import Server


@pytest.fixture
def db(own_server: Server) -> str:
    """The URL of an empty database on a server that a test may stop."""
    return own_server.url("own")


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
        settings = replace(FAST, lease_seconds=2.0)
        async with Engine.open(network.url, adapters=[silent], settings=settings) as first:
            task_id = await first.submit_task(Task(prompt="Say hello."))
            await hold.reached.wait()
            await eventually(lambda: count_events(db, "chunk"))
            network.hold()
            async with Engine.open(
                db, adapters=[ScriptedAdapter(platform=silent.platform)], settings=FAST
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


async def test_an_outage_beyond_all_patience(
    own_server: Server, db: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits is told; when the server is back, the same engines go on as if nothing had been."""
    monkeypatch.setattr("perdure.store.database.READING_PATIENCE", (0.0, 0.1))
    monkeypatch.setattr("perdure.store.postgresql.PATIENCE_SECONDS", 0.3)
    hold = Hold()
    async with (
        Engine.open(
            db, adapters=[ScriptedAdapter("half", hold, Completed())], settings=FAST
        ) as first,
        Engine.open(db, adapters=[DemoAdapter()], run=False) as other,
    ):
        task_id = await first.submit_task(Task(prompt="Say hello."))
        await hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk"))
        waiting = [asyncio.create_task(engine.get_result(task_id)) for engine in (first, other)]
        await asyncio.sleep(0.1)
        await asyncio.to_thread(own_server.stop)
        hold.release()
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(waiting[0], 60)
        with pytest.raises(DatabaseUnavailable):
            await asyncio.wait_for(first.submit_task(Task(prompt="Not now.")), 60)
        await asyncio.to_thread(own_server.start)
        assert await asyncio.wait_for(other.get_status(task_id), 60)
        again = asyncio.create_task(other.get_result(task_id, 60))
        hold.release()
        assert (await first.get_result(task_id, 60)).success
        assert (await again).success
        assert (
            await first.get_result(await first.submit_task(Task(prompt="And now?")), 60)
        ).success
        waiting[1].cancel()
        await asyncio.wait({waiting[1]})
    assert_sound(db)


async def test_a_network_that_is_gone(db: str, nursery: Nursery) -> None:
    """The same where the kernel drops the packets, and a worker finds no way to the database."""
    child = nursery.start("run_on_an_island", db=db)
    said = await eventually(lambda: child.has_said("n"))
    if said.startswith("no network"):
        pytest.skip(f"this system has no network of its own for us ({said})")
    task = demo("Go on.", words=2000, chunk_words=1, delay=0.01)
    async with Engine.open(db, adapters=[DemoAdapter()], run=False) as engine:
        task_id = await engine.submit_task(task)
        await eventually(lambda: count_events(db, "chunk") >= 5)
        ((first,),) = query(db, "SELECT worker FROM tasks")
        child.signal(signal.SIGUSR1)
        async with Engine.open(db, adapters=[DemoAdapter()], settings=FAST) as second:
            await eventually(lambda: query(db, "SELECT attempts FROM tasks") == [(2,)])
            assert await second.cancel_task(task_id)
            await second.get_result(task_id, 60)
        before = query(db, "SELECT count(*) FROM events")
        known = f"SELECT count(*) FROM workers WHERE worker_id = '{first}'"
        assert query(db, known) == [(0,)]
        child.signal(signal.SIGUSR2)
        await eventually(lambda: query(db, known) == [(1,)], what="it shows itself again")
        assert query(db, "SELECT count(*) FROM events") == before
        assert await engine.submit_task(demo("Back?", words=1))
        await eventually(lambda: query(db, "SELECT count(*) FROM tasks WHERE output <> ''")[0][0])
    child.kill()
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


async def test_every_connection_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the server takes no more connections, what needs one waits for it.

    What only begins is told so after some seconds.
    """
    monkeypatch.setattr("perdure.store.reaching.OPENING_SECONDS", 0.3)
    with Server(max_connections="20") as server:
        server.execute("CREATE DATABASE own")
        url = server.url("own")
        Database(url).upgrade()
        async with Engine.open(url, adapters=[DemoAdapter()], settings=FAST) as engine:
            first = await engine.submit_task(demo("first", words=3))
            await eventually(lambda: engine.log.hears)
            with ExitStack() as others:
                with contextlib.suppress(psycopg.OperationalError):
                    while True:
                        others.enter_context(psycopg.connect(url))
                written = await engine.submit_tasks(demo(f"{n}", words=3) for n in range(30))
                ids = [first, *(one.task_id for one in written if isinstance(one, Submission))]
                reading = asyncio.gather(*(engine.get_result(task_id) for task_id in ids))
                with pytest.raises(DatabaseUnavailable) as refused:
                    async with Engine.open(url, adapters=[DemoAdapter()]):
                        pass
                assert "too many clients" in str(refused.value)
                assert len(str(refused.value).splitlines()) == 1
                monkeypatch.setattr("perdure.store.reaching.OPENING_SECONDS", PATIENCE)
                late = Engine.open(url, adapters=[DemoAdapter()], run=False)
                opening = asyncio.create_task(late.__aenter__())
                await asyncio.sleep(0.3)
                assert not opening.done()
            assert await asyncio.wait_for(opening, PATIENCE) is late
            await late.close()
            results = await asyncio.wait_for(reading, PATIENCE)
        assert {result.status for result in results} == {"completed"}
        assert_sound(url)


async def test_the_disk_is_full() -> None:
    """Who writes is told so in one line; what was acknowledged is there, and goes on later."""
    with Server(small_disk="4m") as server:
        server.execute("CREATE DATABASE own")
        url = server.url("own")
        Database(url).upgrade()
        server.fill_up("own", "events")
        acknowledged: list[str] = []
        async with Engine.open(url, adapters=[DemoAdapter()], run=False) as engine:
            text = "".join(random.choices(ascii_letters, k=50_000))  # which can't be compressed

            async def fill() -> None:
                while len(acknowledged) < 1000:
                    acknowledged.append(await engine.submit_task(demo(text, words=3)))

            with pytest.raises(DatabaseUnavailable, match="no space left") as full:
                await fill()
            assert len(str(full.value).splitlines()) == 1
        assert 10 < len(acknowledged) < 1000
        assert_sound(url)
        async with Engine.open(url, adapters=[DemoAdapter()], settings=FAST) as engine:
            with pytest.raises(DatabaseUnavailable, match="no space left"):
                await engine.run_until_done()
        server.make_room("own", "events")
        async with Engine.open(url, adapters=[DemoAdapter()], settings=FAST) as engine:
            await asyncio.wait_for(engine.run_until_done(), PATIENCE)
        ended = query(url, "SELECT task_id FROM tasks WHERE status = 'completed'")
        assert {task_id for (task_id,) in ended} == {*acknowledged}
        assert_sound(url)
