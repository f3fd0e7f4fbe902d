"""Tasks end to end, 200 at a time: submitted, running, one chunk, completed, all durable.

A client submits a task and awaits its result, then the next one; 200 clients at once. Ours and
each peer run in a process of their own, warmed up by one task. Ours looks for cycles of garbage as
rarely as the program `perdure` does; what it does in a program that leaves Python's usual setting
is shown too. The bare rival awaits the same four events of each task in turn, one group commit
after the other, and knows nothing of tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.bare import BareLog, event_row
from benchmarks.logs import finished_task
from benchmarks.measuring import Row, Target, samples
from benchmarks.peers import peer_subjects
from benchmarks.session import Session
from benchmarks.tasking import clients
from perdure.events import encode

AT_ONCE: Final = 200
OURS, ON_SERVER = "perdure", "perdure, PostgreSQL"
USUAL: Final = "perdure, Python's usual garbage collection"
# What each peer has to be beaten by; huey keeps no history, so being level with it is enough.
TARGETS: Final = {
    "DBOS (SQLite)": 20.0,
    "LangGraph (SQLite)": 20.0,
    "huey (SQLite)": 1.0,
    "huey (SQLite, no fsync)": 1.0,
    "DBOS (PostgreSQL)": 5.0,
    "procrastinate (PostgreSQL)": 5.0,
}


def measure(session: Session) -> Sequence[Row]:
    """Measure tasks a second."""
    at_once = session.size(AT_ONCE, 10)
    count = session.size(3000, 20)
    subjects = {
        OURS: lambda: _ours(session, session.database(), count, at_once),
        ON_SERVER: lambda: _ours(session, session.on_server(), count, at_once),
        USUAL: lambda: _ours(session, session.database(), count, at_once, "as-python"),
        "bare sqlite3, four awaited events": lambda: asyncio.run(_bare(session, count, at_once)),
    }
    peers = peer_subjects(session, "tasks", session.size(600, 10), at_once)
    found = samples("tasks/s", {**subjects, **peers}, session.many_rounds)
    rows = [
        Row(
            "against four bare events",
            found[OURS],
            found["bare sqlite3, four awaited events"],
            note="the ceiling of this design on this machine",
        ),
        Row(
            "against itself with Python's usual garbage collection",
            found[OURS],
            found[USUAL],
            note="what a program of one's own gains by `gc.set_threshold(50_000, 20, 20)`",
        ),
    ]
    for name in peers:
        bound = TARGETS.get(name)
        ours = found[ON_SERVER if "PostgreSQL" in name else OURS]
        target = Target("at least", bound) if bound is not None else None
        rows.append(Row(f"against {name}", ours, found[name], target=target))
    if not peers:
        rows.append(Row("on PostgreSQL", found[ON_SERVER], relation="value"))
    return rows


def _ours(
    session: Session,
    database: Path | str,
    count: int,
    at_once: int,
    collecting: str = "as-perdure",
) -> float:
    done = session.run_child("tasking", database, count, at_once, collecting)
    return float(done["a_second"])


async def _bare(session: Session, count: int, at_once: int) -> float:
    first, running, chunk, _chunk, completed = (encode(event) for event in finished_task(0))
    stored = [(event.type, event.data.decode()) for event in (first, running, chunk, completed)]
    async with BareLog(session.database()) as log:

        async def one(number: int) -> None:
            for version, (type_, data) in enumerate(stored, 1):
                await log.append(event_row(number + 1, version, data, type_))

        return await clients(count, at_once, one)
