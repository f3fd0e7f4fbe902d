"""`rebuild` and `verify` in events a second, beside decoding the events' JSON and no more."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from benchmarks.measuring import Row, Target, samples
from benchmarks.session import Session
from perdure.store.database import Database
from perdure.store.rebuilding import rebuild
from perdure.store.verification import verify


def measure(session: Session) -> Sequence[Row]:
    """Measure events a second."""
    count = session.size(100_000, 500)
    path = session.log(count)
    own = Path(shutil.copy(path, session.place("rebuilt.db")))
    subjects = {
        "rebuild": lambda: _rebuild(own, count),
        "verify": lambda: _verify(path, count),
        "bare decoding": lambda: _decode(path, count),
    }
    found = samples("events/s", subjects, session.rounds)
    session.forget(own)
    bare = found["bare decoding"]
    note = "judged by events a second, beside sqlite3 and orjson alone"
    rows: list[Row] = []
    for name, bound in (("rebuild", 150_000.0), ("verify", 200_000.0)):
        target = Target("at least", bound, "events/s")
        rows.append(Row(name, found[name], bare, "value", target, note))
    return rows


def _rebuild(path: Path, count: int) -> float:
    writer = Database(path).writer()
    try:
        began = time.perf_counter()
        with writer.transaction() as connection:
            report = rebuild(connection)
        taken = time.perf_counter() - began
    finally:
        writer.close()
    assert report.differed == 0
    return count / taken


def _verify(path: Path, count: int) -> float:
    began = time.perf_counter()
    with Database(path).snapshot() as connection:
        report = verify(connection)
    taken = time.perf_counter() - began
    assert report.ok, report.problems
    return count / taken


def _decode(path: Path, count: int) -> float:
    connection = sqlite3.connect(path)
    began = time.perf_counter()
    for (data,) in connection.execute("SELECT data FROM events ORDER BY position"):
        orjson.loads(data)
    taken = time.perf_counter() - began
    connection.close()
    return count / taken
