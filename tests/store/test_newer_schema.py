"""Code on a database that a newer release has upgraded: workers needn't all be changed at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from perdure import Engine, Submission, Task, TaskStatus
from perdure.errors import DatabaseIncompatible
from perdure.store.database import Database
from perdure.store.readonly import Reader
from perdure.store.rebuilding import rebuild
from perdure.store.schema import REVISION
from perdure_adapters import DemoAdapter
from store.backends import Backend
from store.checks import assert_sound

# What a release may add without breaking the one before it.
ADDITIONS = (
    "ALTER TABLE tasks ADD COLUMN mood text",
    "ALTER TABLE events ADD COLUMN shard integer",
    "ALTER TABLE streams ADD COLUMN tenant text DEFAULT 'us'",
    "ALTER TABLE log_head ADD COLUMN epoch integer",
    "ALTER TABLE workers ADD COLUMN version text",
    "ALTER TABLE blobs ADD COLUMN kind text",
    "CREATE TABLE quotas (name text PRIMARY KEY, amount integer)",
    "CREATE INDEX tasks_by_mood ON tasks (mood)",
    "UPDATE alembic_version SET version_num = '9999'",
    "INSERT INTO compatible VALUES ('9999')",
)


def task(prompt: str, **options: Any) -> Task:
    """Return a task for the demonstration platform."""
    return Task(prompt=prompt, platform="demo", options={"words": 5, **options})


@pytest.fixture
def newer(backend: Backend, database_url: str) -> str:
    """A database that tomorrow's release has added something to."""
    for statement in ADDITIONS:
        backend.change(database_url, statement)
    return database_url


async def test_all_goes_on(backend: Backend, newer: str) -> None:
    """Tasks are submitted, run, cancelled, run again, redacted; the log verifies and rebuilds."""
    database = Database(newer)
    assert database.revision() == REVISION
    async with Engine.open(newer, adapters=[DemoAdapter()]) as engine:
        outcomes = await engine.submit_tasks(
            [
                task("one"),
                task("two", fail="InvalidRequest"),
                task("three", delay=30.0),
                task("x" * 10_000),
            ]
        )
        ids = [one.task_id for one in outcomes if isinstance(one, Submission)]
        async for _chunk in engine.stream_result(ids[2]):
            break
        assert await engine.cancel_task(ids[2])
        results = [await engine.get_result(task_id, 60) for task_id in ids]
        again = await engine.retry_task(ids[0])
        assert (await engine.get_result(again.task_id, 60)).success
        assert await engine.redact_task(ids[3])
        assert len(await engine.list_tasks()) == 5
    assert results[0].status is results[3].status is TaskStatus.COMPLETED
    assert results[1].status is TaskStatus.FAILED
    assert results[2].status is TaskStatus.CANCELLED
    with Reader.open(newer) as reader:
        assert reader.one("SELECT count(*) FROM task_events") is not None
    writer = database.writer()
    try:
        with writer.transaction() as connection:
            assert rebuild(connection).differed == 0
    finally:
        writer.close()
    assert_sound(newer)
    (version,) = backend.query(newer, "SELECT version_num FROM alembic_version")[0]
    assert version == "9999", "it was taken back"


async def test_an_event_of_a_newer_release_is_no_trouble_for_others(
    backend: Backend, newer: str
) -> None:
    """Who appends to its task is refused; who is in the same transaction isn't."""
    async with Engine.open(newer, adapters=[DemoAdapter()], run=False) as engine:
        theirs = await engine.submit_task(task("one"))
    with backend.shell(newer) as shell:
        shell.run("UPDATE events SET type = 'annotated'")
    async with Engine.open(newer, adapters=[DemoAdapter()], run=False) as engine:
        refused, submitted = await asyncio.gather(
            engine.cancel_task(theirs), engine.submit_task(task("two")), return_exceptions=True
        )
        assert isinstance(refused, DatabaseIncompatible)
        assert isinstance(submitted, str)
        assert await engine.get_status(submitted) is TaskStatus.PENDING


def test_upgrading_leaves_it_as_it_is(backend: Backend, newer: str) -> None:
    """The older release's `perdure db upgrade` takes nothing back."""
    Database(newer).upgrade()
    assert backend.query(newer, "SELECT version_num FROM alembic_version") == [("9999",)]
    assert backend.query(newer, "SELECT mood FROM tasks") == []


def test_what_breaks_says_so(backend: Backend, newer: str) -> None:
    """A release that the one before can't work with empties the table: the old code is refused."""
    backend.change(newer, "DELETE FROM compatible")
    backend.change(newer, "INSERT INTO compatible VALUES ('9999')")
    with pytest.raises(DatabaseIncompatible, match="upgrade perdure"):
        Database(newer).prepare(create=False)
    with pytest.raises(DatabaseIncompatible, match="upgrade perdure"):
        Reader.open(newer)
