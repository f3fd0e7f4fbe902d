"""Going on with a batch of which all rows but one are finished: until that one is dispatched.

In a process of its own, with what `perdure run` uses: read the file, find each row in the database,
submit what isn't there, claim it. Memory is compared with that of a batch a tenth as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import Row, Sample, Target
from benchmarks.resuming import make_batch
from benchmarks.session import Session


def measure(session: Session) -> Sequence[Row]:
    """Measure seconds until the row is dispatched, and memory."""
    rows = session.size(100_000, 200)
    session.say(f"making batches of {rows:,} and {rows // 10:,} finished rows ...")
    large, small = _made(session, rows), _made(session, rows // 10)
    found: list[tuple[Any, Any]] = []
    for _ in range(session.rounds):
        one, other = (
            session.run_child("resuming", *_copied(session, batch)) for batch in (large, small)
        )
        found.append((one, other))
    seconds = tuple(one["seconds"] for one, _other in found)
    memory = tuple(one["peak_mb"] for one, _other in found)
    of_small = tuple(other["peak_mb"] for _one, other in found)
    return [
        Row(
            f"{rows:,} finished rows, one left",
            Sample("ready to dispatch", "s", seconds),
            relation="value",
            target=Target("at most", 2.0, "s"),
        ),
        Row(
            "memory, against a tenth of the rows",
            Sample(f"peak with {rows:,} rows", "MB", memory),
            Sample(f"peak with {rows // 10:,} rows", "MB", of_small),
            target=Target("at most", 1.1),
        ),
    ]


def _made(session: Session, rows: int) -> tuple[Path, Path]:
    database, source = session.database(), session.place("batch.jsonl")
    make_batch(database, source, rows)
    return database, source


def _copied(session: Session, batch: tuple[Path, Path]) -> tuple[Path, Path]:
    """Return the batch with a database of its own: dispatching the last row changes it."""
    import shutil

    database, source = batch
    return Path(shutil.copy(database, session.place("resumed.db"))), source
