"""What a worker still has to do of what it was told to do."""

from __future__ import annotations

import pytest

from perdure.events import Cancelled
from perdure.store.scoping import LOOK_UP_AT_LEAST, NamedTasks
from store.backends import Backend, Store, opened


async def _end(store: Store, task_id: str) -> None:
    await store.log.append(task_id, [Cancelled(reason="enough")], None)


async def test_what_has_ended_is_forgotten(store: Store) -> None:
    """As soon as enough has happened; what is open, or unknown as yet, stays."""
    named = NamedTasks()
    for number in range(LOOK_UP_AT_LEAST - 1):
        task_id = f"task_{number}"
        await store.submit(task_id)
        assert named.add(task_id)
        if number:
            await _end(store, task_id)
    assert not named.add("task_0")
    await named.forget_ended(store.database)
    assert len(named.task_ids) == LOOK_UP_AT_LEAST - 1, "it isn't looked up for every few tasks"
    named.add("unknown as yet")
    await named.forget_ended(store.database)
    assert named.task_ids == {"task_0", "unknown as yet"}


async def test_what_others_end_is_forgotten(database_url: str) -> None:
    """Another process has ended them all: the next look finds it."""
    async with opened(database_url) as here, opened(database_url) as there:
        ids = [f"task_{number}" for number in range(LOOK_UP_AT_LEAST)]
        for task_id in ids:
            await here.submit(task_id)
        named = NamedTasks(ids)
        for task_id in ids:
            await _end(there, task_id)
        await named.forget_ended(here.database)
    assert named.task_ids == set()


async def test_what_a_newer_perdure_calls_it_is_not_over(
    backend: Backend, database_url: str
) -> None:
    """A status that isn't known here ends nothing."""
    async with opened(database_url) as store:
        ids = [f"task_{number}" for number in range(LOOK_UP_AT_LEAST)]
        for task_id in ids:
            await store.submit(task_id)
        backend.change(database_url, "UPDATE tasks SET status = 'resting' WHERE stream_id = 1")
        await _end(store, "task_1")
        named = NamedTasks(ids)
        await named.forget_ended(store.database)
    assert named.task_ids == {*ids} - {"task_1"}


@pytest.mark.parametrize("running", [10, 1000])
async def test_looks_are_rare(store: Store, monkeypatch: pytest.MonkeyPatch, running: int) -> None:
    """What is looked up grows with the number of tasks, not with its square."""
    looked_up = 0
    read = store.database.rows

    async def rows(statement: object) -> list[object]:
        nonlocal looked_up
        looked_up += len(named.task_ids)
        return await read(statement)  # type: ignore[arg-type, return-value]

    monkeypatch.setattr(store.database, "rows", rows)
    named = NamedTasks(f"runs on {number}" for number in range(running))
    for number in range(2000):
        named.add(f"task_{number}")
        await named.forget_ended(store.database)
        named.note_change(f"task_{number}")
    assert looked_up <= 5 * (2000 + running)
