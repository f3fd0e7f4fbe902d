"""Tasks end to end, 200 at a time: submitted, running, one chunk, completed, all durable.

A client submits a task and awaits its result, then the next one; 200 clients at once. The bare
rival awaits the same four events of each task in turn, one group commit after the other, and knows
nothing of tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.bare import BareLog, event_row
from benchmarks.logs import finished_task
from benchmarks.measuring import Row, Target, samples
from benchmarks.peers import peer_subjects
from benchmarks.session import Session
from perdure import Engine, Task
from perdure.adapter import Call, Capabilities
from perdure.events import Chunk, Completed, Event, encode
from perdure.worker import WorkerSettings

AT_ONCE: Final = 200
OURS, ON_SERVER = "perdure", "perdure, PostgreSQL"
# What each peer has to be beaten by; huey keeps no history, so being level with it is enough.
TARGETS: Final = {
    "DBOS (SQLite)": 20.0,
    "LangGraph (SQLite)": 20.0,
    "huey (SQLite)": 1.0,
    "huey (SQLite, no fsync)": 1.0,
    "DBOS (PostgreSQL)": 5.0,
    "procrastinate (PostgreSQL)": 5.0,
}


class OneChunk:
    """A platform that answers at once, with one chunk."""

    platform = "bench"
    capabilities = Capabilities()
    default_model = None
    prices = None

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer."""
        yield Chunk(text="Sales rose by four per cent.")
        yield Completed(finish_reason="stop")

    async def stop(self, response_id: str) -> None:
        """Do nothing: there is nothing to stop."""

    async def close(self) -> None:
        """Do nothing: nothing is held."""


def measure(session: Session) -> Sequence[Row]:
    """Measure tasks a second."""
    at_once = session.size(AT_ONCE, 10)
    count = session.size(3000, 20)
    subjects = {
        OURS: lambda: asyncio.run(_ours(session.database(), count, at_once)),
        ON_SERVER: lambda: asyncio.run(_ours(session.on_server(), count, at_once)),
        "bare sqlite3, four awaited events": lambda: asyncio.run(_bare(session, count, at_once)),
    }
    peers = peer_subjects(session, "tasks", session.size(600, 10), at_once)
    found = samples("tasks/s", {**subjects, **peers}, session.rounds)
    rows = [
        Row(
            "against four bare events",
            found[OURS],
            found["bare sqlite3, four awaited events"],
            note="the ceiling of this design on this machine",
        )
    ]
    for name in peers:
        bound = TARGETS.get(name)
        ours = found[ON_SERVER if "PostgreSQL" in name else OURS]
        target = Target("at least", bound) if bound is not None else None
        rows.append(Row(f"against {name}", ours, found[name], target=target))
    if not peers:
        rows.append(Row("on PostgreSQL", found[ON_SERVER], relation="value"))
    return rows


async def _ours(database: Path | str, count: int, at_once: int) -> float:
    settings = WorkerSettings(concurrency=at_once)
    async with Engine.open(database, adapters=[OneChunk()], settings=settings) as engine:

        async def one(number: int) -> None:
            task_id = await engine.submit_task(Task(prompt=f"Question {number}", platform="bench"))
            result = await engine.get_result(task_id)
            assert result.success

        return await _rate(count, at_once, one)


async def _bare(session: Session, count: int, at_once: int) -> float:
    first, running, chunk, _chunk, completed = (encode(event) for event in finished_task(0))
    stored = [(event.type, event.data.decode()) for event in (first, running, chunk, completed)]
    async with BareLog(session.database()) as log:

        async def one(number: int) -> None:
            for version, (type_, data) in enumerate(stored, 1):
                await log.append(event_row(number + 1, version, data, type_))

        return await _rate(count, at_once, one)


async def _rate(count: int, at_once: int, one: Callable[[int], Coroutine[Any, Any, None]]) -> float:
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await one(number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return count / (time.perf_counter() - began)
