"""What the file is larger than what was put into it.

A short task's payload is the JSON of its events. A long output's payload is its text, which is kept
twice: in its chunks, and in its task's row, where people query it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from benchmarks.logs import submitted, task_id_of
from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Session
from perdure.events import Chunk, Completed, Event, Running
from perdure.store.database import Database
from perdure.store.transaction import FoldCache, Transaction

_PIECE = "The quick brown fox jumps over the lazy dog, and sales rose by four per cent again. " * 6


def measure(session: Session) -> Sequence[Row]:
    """Measure bytes; one round, for they don't vary."""
    events = session.size(100_000, 1000)
    path = session.log(events)
    payload = _query(path, "SELECT sum(length(CAST(data AS BLOB))) FROM events")
    empty = session.database()
    size = _size(path) - _size(empty)
    rows = "SELECT count(*) FROM events"
    beyond = (size - payload) / _query(path, rows)
    long = _long_outputs(session, session.size(400, 10))
    text = _query(long, "SELECT sum(length(CAST(output AS BLOB))) FROM tasks")
    return [
        Row(
            "beyond the payload of an event",
            Sample("perdure", "bytes", (beyond,)),
            relation="value",
            target=Target("at most", 250.0, "bytes"),
            note="everything in the file: events, streams, rows of `tasks`, indexes",
        ),
        Row(
            "long outputs, against their text",
            Sample("file", "bytes", (float(_size(long) - _size(empty)),)),
            Sample("text", "bytes", (float(text),)),
            target=Target("at most", 2.2),
        ),
    ]


def _long_outputs(session: Session, tasks: int) -> Path:
    path = session.database()
    writer = Database(path).writer()
    pieces = 80
    for number in range(tasks):
        chunks = [Chunk(text=_PIECE, offset=index * len(_PIECE)) for index in range(pieces)]
        events: tuple[Event, ...] = (
            submitted(number),
            Running(attempt=1, worker="worker_000000000000", platform="bench"),
            *chunks,
            Completed(finish_reason="stop", output_length=pieces * len(_PIECE)),
        )
        with writer.transaction() as connection:
            transaction = Transaction(connection, FoldCache(), writer.now)
            transaction.append(task_id_of(number), events, 0)
            transaction.flush()
        writer.checkpoint_if_due()
    writer.close()
    return path


def _size(path: Path) -> int:
    assert not path.with_name(path.name + "-wal").exists()
    return path.stat().st_size


def _query(path: Path, statement: str) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute(statement).fetchone()[0])
    finally:
        connection.close()
