"""Durable writes on 100 streams: each write is committed before the next one of its stream.

The way of `DBOS.write_stream`: whoever writes awaits the commit. (Adapters don't wait for each of
their chunks, and what gathers meanwhile becomes one event; this is the slower way.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from benchmarks.cases.appends import append_rate
from benchmarks.measuring import Row, Target, samples
from benchmarks.peers import peer_subjects
from benchmarks.session import Session

STREAMS: Final = 100
TARGETS: Final = {"DBOS (SQLite)": 30.0}


def measure(session: Session) -> Sequence[Row]:
    """Measure writes a second."""
    streams = session.size(STREAMS, 10)
    each = session.size(100, 3)
    subjects = {"perdure": lambda: asyncio.run(append_rate(session.database(), streams, each))}
    peers = peer_subjects(session, "streams", session.size(3000, 20), streams)
    found = samples("writes/s", {**subjects, **peers}, session.rounds)
    rows = [
        Row(
            f"against {name}",
            found["perdure"],
            found[name],
            target=Target("at least", TARGETS[name]) if name in TARGETS else None,
            note="" if name in TARGETS else "ours on SQLite: no verdict",
        )
        for name in peers
    ]
    return rows or [Row("by itself", found["perdure"], relation="value", note="needs --peers")]
