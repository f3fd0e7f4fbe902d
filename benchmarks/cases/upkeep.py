"""`rebuild` and `verify` in events a second, beside decoding the events' JSON and no more.

As the program does it: where there is more than one processor, all of them work.
"""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import orjson

from benchmarks.measuring import Row, Target, samples
from benchmarks.session import Session


def measure(session: Session) -> Sequence[Row]:
    """Measure events a second."""
    count = session.size(500_000, 500)
    path = session.log(count)
    own = Path(shutil.copy(path, session.place("rebuilt.db")))

    def timed(what: str, database: Path) -> float:
        return count / float(session.run_child("upkeeping", what, database)["seconds"])

    subjects = {
        "rebuild": lambda: timed("rebuild", own),
        "verify": lambda: timed("verify", path),
        "bare decoding": lambda: _decode(path, count),
    }
    found = samples("events/s", subjects, session.rounds)
    session.forget(own)
    bare = found["bare decoding"]
    note = "judged by events a second, beside sqlite3 and orjson alone, which use one processor"
    rows: list[Row] = []
    for name, bound in (("rebuild", 150_000.0), ("verify", 200_000.0)):
        target = Target("at least", bound, "events/s")
        rows.append(Row(name, found[name], bare, "value", target, note))
    return rows


def _decode(path: Path, count: int) -> float:
    connection = sqlite3.connect(path)
    began = time.perf_counter()
    for (data,) in connection.execute("SELECT data FROM events ORDER BY position"):
        orjson.loads(data)
    taken = time.perf_counter() - began
    connection.close()
    return count / taken
