"""Durable appends by 100 producers, against a bare sqlite3 thread that inserts the same rows.

A producer appends to a stream of its own and awaits each append. The rival does the least that is
durable (`benchmarks.bare`). What is appended was made before the clock started: events for us, and
rows, encoded, for the rival. In between: our thread and our queue with a transaction that neither
folds, chains nor projects, which shows what these three cost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final
from unittest import mock

from benchmarks.bare import BareLog, BareServerLog, event_row
from benchmarks.logs import submitted, task_id_of
from benchmarks.measuring import Row, Target, samples
from benchmarks.peers import peer_subjects
from benchmarks.session import Session
from perdure.events import Chunk, Event, RecordedEvent, Running, encode
from perdure.store.bulk import Bulk
from perdure.store.database import Database
from perdure.store.log import EventLog
from perdure.store.schema import events
from perdure.store.transaction import Transaction

PRODUCERS: Final = 100
TEXT: Final = "and so the third quarter was better than the "


def measure(session: Session) -> Sequence[Row]:
    """Measure appends a second."""
    producers = session.size(PRODUCERS, 10)
    each = session.size(200, 5)
    subjects = {
        "perdure": lambda: asyncio.run(append_rate(session.database(), producers, each)),
        "perdure without chain and projection": lambda: asyncio.run(
            _unchained(session.database(), producers, each)
        ),
        "bare sqlite3": lambda: asyncio.run(_bare(BareLog(session.database()), producers, each)),
        "perdure, PostgreSQL": lambda: asyncio.run(
            append_rate(session.on_server(), producers, each)
        ),
        "bare psycopg": lambda: asyncio.run(
            _bare(BareServerLog(session.on_server(bare=True)), producers, each)
        ),
    }
    peers = peer_subjects(session, "appends", session.size(1000, 20), producers)
    found = samples("appends/s", {**subjects, **peers}, session.rounds)
    bare = found["bare sqlite3"]
    return [
        Row("through the log", found["perdure"], bare, target=Target("at least", 0.5)),
        Row(
            "without chain and projection",
            found["perdure without chain and projection"],
            bare,
            note="the same thread and queue; shows what fold, chain and projection cost",
        ),
        Row(
            "through the log, on PostgreSQL",
            found["perdure, PostgreSQL"],
            found["bare psycopg"],
            target=Target("at least", 0.5),
        ),
        *(Row(f"against {name}", found["perdure"], found[name]) for name in peers),
    ]


async def append_rate(database: Path | str, producers: int, each: int) -> float:
    """Return how many chunks a second `producers` append to a stream each, awaiting each one."""
    await _begin(database, producers)
    log = EventLog(Database(database))
    await log.open()
    try:
        return await _rate(producers, each, _appending(log, producers, each))
    finally:
        await log.close()


async def _begin(database: Path | str, producers: int) -> None:
    """Have every producer's task running, at version 2."""
    log = EventLog(Database(database))
    await log.open()
    try:
        for number in range(producers):
            begun = (submitted(number), Running(attempt=1, worker="w", platform="bench"))
            await log.append(task_id_of(number), begun, 0)
    finally:
        await log.close()


async def _unchained(database: Path, producers: int, each: int) -> float:
    await _begin(database, producers)
    with mock.patch("perdure.store.log.Transaction", _Unchained):
        log = EventLog(Database(database))
        await log.open()
        try:
            return await _rate(producers, each, _appending(log, producers, each))
        finally:
            await log.close()


def _appending(log: EventLog, producers: int, each: int) -> Callable[[int, int], Awaitable[Any]]:
    """Return what appends a producer's so-many-th chunk."""
    ids = [task_id_of(number) for number in range(producers)]
    chunks = [(Chunk(text=TEXT, offset=index * len(TEXT)),) for index in range(each)]
    return lambda number, index: log.append(ids[number], chunks[index], index + 2)


async def _bare(bare: BareLog, producers: int, each: int) -> float:
    data = [
        encode(Chunk(text=TEXT, offset=index * len(TEXT))).data.decode() for index in range(each)
    ]
    rows = [
        [event_row(number + 1, index + 3, data[index]) for index in range(each)]
        for number in range(producers)
    ]
    async with bare as log:
        return await _rate(producers, each, lambda n, i: log.append(rows[n][i]))


async def _rate(producers: int, each: int, append: Callable[[int, int], Awaitable[Any]]) -> float:
    async def produce(number: int) -> None:
        for index in range(each):
            await append(number, index)

    began = time.perf_counter()
    await asyncio.gather(*(produce(number) for number in range(producers)))
    return producers * each / (time.perf_counter() - began)


class _Unchained(Transaction):
    """Inserts events and moves the head on, and does nothing else that a transaction does."""

    def __init__(self, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - as they are
        super().__init__(*arguments, **named)
        self._plain: list[tuple[str, int, str, int, str]] = []

    def append(self, task_id: str, new: Sequence[Event], expected: int | None) -> int:
        version = expected or 0
        for event in new:
            version += 1
            stored = encode(event)
            self._plain.append(
                (task_id, version, stored.type, stored.schema_version, stored.data.decode())
            )
        return version

    def prefetch(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - not used
        return

    def flush(self) -> tuple[int, list[RecordedEvent]]:
        (position,) = self.connection.exec_driver_sql("SELECT position FROM log_head").one()
        rows: list[tuple[Any, ...]] = []
        for task_id, version, type_, schema_version, data in self._plain:
            position += 1
            stream = 2 * int(task_id[-8:], 16) + 1  # as `_begin` has made them
            rows.append(
                (position, stream, version, type_, schema_version, data, self.at, bytes(32))
            )
        _INSERT.execute(self.connection, rows)
        self.connection.exec_driver_sql("UPDATE log_head SET position = ?", (position,))
        return position, []


_INSERT: Final = Bulk(
    events,
    (
        *("position", "stream_id", "version", "type", "schema_version"),
        *("data", "recorded_at", "digest"),
    ),
)
