"""Memory of 1,000 open streams, and of a batch, in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Session

TARGET_ROWS = 1_000_000


def measure(session: Session) -> Sequence[Row]:
    """Measure megabytes of resident memory."""
    streams = session.size(1000, 10)
    rows = session.size(50_000, 100, full=1_000_000)
    open_streams: list[float] = []
    by_themselves: list[float] = []
    for _ in range(min(session.rounds, 3)):
        measured = session.run_child("holding", session.database(), streams)
        open_streams.append(measured["open_mb"])
        by_themselves.append(measured["before_mb"])
    peaks: dict[int, float] = {}
    for count in (rows // 10, rows):  # takes long, and memory doesn't vary: one round
        session.say(f"running a batch of {count:,} rows ...")
        database = session.database()
        peaks[count] = session.run_child("running", database, count)["peak_mb"]
        session.forget(database)
    return [
        Row(
            f"{streams:,} open streams, a reader each",
            Sample("resident, all open", "MB", tuple(open_streams)),
            Sample("resident, engine idle", "MB", tuple(by_themselves)),
            "value",
            Target("at most", 250.0, "MB"),
        ),
        Row(
            f"a batch of {rows:,} rows, against a tenth of it",
            Sample(f"peak with {rows:,} rows", "MB", (peaks[rows],)),
            Sample(f"peak with {rows // 10:,} rows", "MB", (peaks[rows // 10],)),
            target=Target("at most", 1.1) if rows >= TARGET_ROWS else None,
            note="" if rows >= TARGET_ROWS else "the target is for a million: --full",
        ),
    ]
