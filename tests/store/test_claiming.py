"""Claims in the very transaction that submits what they take."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Generator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from perdure.events import Interrupted, Running
from perdure.store import claims, liveness
from perdure.store.claims import Claimed, Scope
from perdure.store.schema import workers
from perdure.store.scoping import Unreadable
from perdure.store.transaction import Transaction
from store.backends import Backend, Store, append_newer, opened, submitted
from store.checks import assert_sound

ALL = Scope(("demo",))
MODELS: dict[str, str | None] = {"demo": "m"}


@contextlib.contextmanager
def held(store: Store) -> Generator[None, None, None]:
    """Keep the writer busy, so that what is asked for meanwhile goes into one transaction."""
    go = threading.Event()
    store.log.write(lambda _tx: go.wait(60), alone=True)
    try:
        yield
    finally:
        go.set()


def taking(limit: int, scope: Scope = ALL) -> Any:
    """Return the work of a claim."""

    def work(tx: Transaction) -> list[Claimed]:
        return claims.claim(tx, "worker", limit, scope, MODELS)

    return work


async def _registered(store: Store) -> None:
    await store.log.write(lambda tx: liveness.register_worker(tx, "worker"))


async def test_submitted_and_claimed_by_one_commit(
    store: Store, backend: Backend, database_url: str
) -> None:
    """A claim that was asked for first comes last, and the row says that the task runs."""
    await _registered(store)
    with held(store):
        claiming = asyncio.ensure_future(store.log.write_last(taking(5)))
        await asyncio.sleep(0)
        handed_in = store.log.append("one", [submitted(system="x" * 3000)], 0)
    ((claimed,), head) = await claiming
    assert await handed_in == 1
    assert (claimed.task_id, claimed.state.version, claimed.state.worker) == ("one", 2, "worker")
    assert claimed.submitted.task["system"] == "x" * 3000
    rows = backend.query(database_url, "SELECT status, worker, model, attempts FROM tasks")
    assert rows == [("running", "worker", "m", 1)]
    moments = backend.query(database_url, "SELECT DISTINCT recorded_at FROM events")
    assert (head, len(moments)) == (2, 1)
    assert await store.log.append("one", [], 2) == 2  # its owner may go on
    assert_sound(database_url)


async def test_a_worker_that_was_forgotten_keeps_its_lease(
    store: Store, backend: Backend, database_url: str
) -> None:
    """It was away for long, and claims before it shows itself again."""
    await store.submit("one")
    lease = timedelta(seconds=600)
    await store.log.write(lambda tx: claims.claim(tx, "worker", 1, Scope(), MODELS, lease=lease))
    assert backend.query(database_url, "SELECT lease_seconds FROM workers") == [(600.0,)]


@pytest.mark.parametrize("absurd", [1e300, -1.0, 0.0])
async def test_a_lease_that_can_not_be_counts_as_none(store: Store, absurd: float) -> None:
    """Only somebody else can have written it, and it is no trouble for others."""
    await _registered(store)
    await store.log.write(
        lambda tx: tx.connection.execute(sa.update(workers).values(lease_seconds=absurd))
    )
    usual = timedelta(seconds=30)
    census = await liveness.look_around(store.database, usual, store.database.now)
    assert (census.alive, census.lost) == (1, [])


async def test_by_priority_then_age(store: Store) -> None:
    """What was submitted before and now is served in one order, as far as there is room."""
    await _registered(store)
    for name, priority in (("old_5", 5), ("old_9", 9)):
        await store.submit(name, priority=priority)
    with held(store):
        new = [store.submit(name, priority=p) for name, p in (("new_5", 5), ("new_0", 0))]
        waiting = [asyncio.ensure_future(one) for one in new]
        await asyncio.sleep(0)
        claiming = asyncio.ensure_future(store.log.write_last(taking(3)))
        await asyncio.sleep(0)
    claimed, _head = await claiming
    await asyncio.gather(*waiting)
    assert [one.task_id for one in claimed] == ["new_0", "old_5", "new_5"]
    (last,), _head = await store.log.write_last(taking(3))
    assert last.task_id == "old_9"


@pytest.mark.parametrize(
    ("scope", "taken"),
    [
        (Scope(("demo",), batch="b"), ["in_b"]),
        (Scope(("demo",), task_ids=frozenset({"other"})), ["other"]),
        (Scope(("elsewhere",)), []),
        (Scope(), ["in_b", "other"]),
    ],
)
async def test_only_of_its_scope(store: Store, scope: Scope, taken: list[str]) -> None:
    """A claim takes nothing that isn't of its scope, though it was submitted just now."""
    await _registered(store)

    def work(tx: Transaction) -> list[str]:
        tx.append("in_b", (submitted(batch="b"),), 0)
        tx.append("other", (submitted(),), 0)
        return [one.task_id for one in taking(9, scope)(tx)]

    assert await store.log.write(work) == taken


async def test_of_any_number_of_named_tasks(store: Store) -> None:
    """A scope may name more tasks than a statement may have parameters."""
    await _registered(store)
    for name in ("named", "other"):
        await store.submit(name)
    many = frozenset({"named", *(f"demo_20260101_{n:08x}" for n in range(70_000))})
    scope = Scope(("demo",), task_ids=many)
    due = await claims.next_due(store.database, scope)
    assert due is not None
    assert due <= store.database.now
    assert await claims.unfinished(store.database, scope) == 1
    ((claimed,), _head) = await store.log.write_last(taking(9, scope))
    assert claimed.task_id == "named"
    assert await claims.next_due(store.database, scope) is None


async def test_what_can_not_be_read_is_left_alone(store: Store, database_url: str) -> None:
    """It takes the place of others only once, and its owner's other tasks are taken over."""
    await _registered(store)
    for name, priority in (("newer", 0), ("next", 5)):
        await store.submit(name, priority=priority)
    for name in ("runs", "newer, runs"):
        await store.start(name)
    append_newer(database_url, "newer", "newer, runs")
    unreadable = Unreadable()

    def take(scope: Scope) -> Any:
        return lambda tx: claims.claim(tx, "worker", 1, scope, MODELS, unreadable)

    assert (await store.log.write_last(take(ALL)))[0] == []
    assert unreadable.task_ids == {"newer"}
    left = replace(ALL, excluded=unreadable.task_ids)
    ((claimed,), _head) = await store.log.write_last(take(left))
    assert claimed.task_id == "next"
    assert await claims.next_due(store.database, left) is None
    assert await claims.unfinished_ids(store.database, ALL) == [
        *("newer", "next", "runs", "newer, runs")
    ]

    def recover(tx: Transaction) -> int:
        return claims.recover(tx, "w", lambda _state, _asked: [INTERRUPTED], unreadable).tasks

    assert [await store.log.write(recover) for _ in range(2)] == [1, 0]
    assert unreadable.task_ids == {"newer", "newer, runs"}
    ((again,), _head) = await store.log.write_last(take(left))
    assert again.task_id == "runs"


INTERRUPTED = Interrupted(
    attempt=1, worker="w", reason="worker_lost", outcome="unknown", next="restart"
)


async def test_each_task_once(database_url: str) -> None:
    """Two processes that submit and claim at the same time run each task once."""
    async with opened(database_url) as here, opened(database_url) as there:
        await _registered(here)

        async def work(store: Store, name: str) -> list[Claimed]:
            found: list[Claimed] = []
            for number in range(20):
                handed_in = store.log.append(f"{name}_{number}", [submitted()], 0)
                claimed, _head = await store.log.write_last(taking(2))
                await handed_in
                found += claimed
            return found

        first, second = await asyncio.gather(work(here, "here"), work(there, "there"))
        claimed = first + second
        while more := (await here.log.write_last(taking(9)))[0]:
            claimed += more
        assert sorted(one.task_id for one in claimed) == sorted(
            f"{name}_{number}" for name in ("here", "there") for number in range(20)
        )
    assert_sound(database_url)


async def test_what_was_taken_from_elsewhere_is_noticed(database_url: str) -> None:
    """A fold that is kept isn't trusted once another process has written to its stream."""
    async with opened(database_url) as here, opened(database_url) as there:
        await _registered(here)
        await here.submit("task")
        ((claimed,), _head) = await there.log.write_last(taking(1))
        assert claimed.task_id == "task"
        assert await here.log.write_last(taking(1)) == ([], 2)
        with pytest.raises(Exception, match="version"):
            await here.log.append("task", [Running(attempt=1, worker="x", platform="demo")], 1)
    assert_sound(database_url)
