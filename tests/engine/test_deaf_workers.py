"""A PostgreSQL server that takes no new connections: who was told of news looks for itself."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from harness import FAST, PATIENCE, count_events, demo, eventually, query, stored_events

from perdure import Completed, Engine, Task
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter
from servers.postgresql import Server

# Signs of life, with which a worker looks as well, come too late for what is tested here.
SETTINGS = replace(FAST, heartbeat_seconds=300.0, lease_seconds=900.0)


@pytest.fixture
def db(own_server: Server) -> str:
    """The URL of an empty database, as its owner."""
    return own_server.url("own")


@pytest.fixture
def guest(own_server: Server, db: str) -> str:
    """The URL of the same, as somebody who may be kept out."""
    own_server.execute("CREATE ROLE guest LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO guest")
    own_server.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO guest", "own")
    return db.replace("perdure@", "guest@")


async def _deafen(server: Server, engine: Engine) -> None:
    """End the connection on which an engine of the guest listens; it gets no new one."""
    await eventually(lambda: engine.log.hears)
    server.execute("ALTER ROLE guest CONNECTION LIMIT 0")
    listens = "usename = 'guest' AND query LIKE 'SELECT pg_notify%'"
    with server.connect("own") as connection:
        ended = connection.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {listens}".encode()
        ).fetchall()
    assert ended == [(True,)]
    await eventually(lambda: not engine.log.hears)


async def test_an_idle_worker_looks(own_server: Server, db: str, guest: str) -> None:
    """A task of another process is begun at the next look, and not only when it hears again."""
    async with (
        Engine.open(guest, adapters=[DemoAdapter()], settings=SETTINGS) as worker,
        Engine.open(db, adapters=[DemoAdapter()], run=False) as other,
    ):
        await eventually(lambda: worker.worker._pace.has_looked)
        await _deafen(own_server, worker)
        began = time.monotonic()
        task_id = await other.submit_task(demo("Who hears me?", words=1))
        await eventually(lambda: count_events(db, "running"), 30)
        print(f"begun after {(time.monotonic() - began) * 1000:.0f} ms")
        assert (await other.get_result(task_id, PATIENCE)).success
        assert not worker.log.hears


async def test_owners_and_readers_look(own_server: Server, db: str, guest: str) -> None:
    """A cancellation reaches the owner of a task, and text its readers, while nobody is told."""
    hold, other_hold = Hold(), Hold()
    async with (
        Engine.open(guest, adapters=[ScriptedAdapter("a ", hold)], settings=SETTINGS) as worker,
        Engine.open(
            db,
            adapters=[ScriptedAdapter("b ", other_hold, "c", Completed(), platform="elsewhere")],
            settings=SETTINGS,
        ) as other,
    ):
        mine = await worker.submit_task(Task(prompt="mine", platform="scripted"))
        await hold.reached.wait()
        theirs = await other.submit_task(Task(prompt="theirs", platform="elsewhere"))
        await other_hold.reached.wait()
        await eventually(lambda: count_events(db, "chunk") == 2)
        stream = worker.stream_result(theirs)
        assert await anext(stream) == "b "
        await _deafen(own_server, worker)
        async with asyncio.timeout(30):
            other_hold.release()
            assert [piece async for piece in stream] == ["c"]
            await other.cancel_task(mine)
            assert (await worker.get_result(mine)).status == "cancelled"
        assert not worker.log.hears
    assert stored_events(db, mine)[-1][0] == "cancelled"
    assert query(db, "SELECT count(*) FROM tasks WHERE ended_at IS NOT NULL") == [(2,)]
