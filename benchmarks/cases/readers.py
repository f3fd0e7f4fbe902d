"""From a commit to a reader, in the same process and in another one.

The moment of a commit is taken in the writer thread, right after it. The clock is the system's
monotonic one, which all processes share. The rival in the other process does the least: it looks at
`PRAGMA data_version` every 10 ms and reads what is new with bare sqlite3.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.logs import submitted, task_id_of
from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Child, Session
from perdure.events import Chunk, Running
from perdure.store.database import Database, Writer
from perdure.store.log import EventLog

NEAR, FAR, POLLING = "same process", "other process", "bare poll, other process"
ON_SERVER = "other process, PostgreSQL"


def measure(session: Session) -> Sequence[Row]:
    """Measure milliseconds from a commit until a reader has it."""
    times = session.size(100, 5)
    rounds = [asyncio.run(_round(session, times)) for _ in range(session.rounds)]
    found = {
        name: Sample(name, "ms", tuple(one[name] for one in rounds))
        for name in (NEAR, FAR, POLLING, ON_SERVER)
    }
    return [
        Row(NEAR, found[NEAR], relation="value", target=Target("at most", 1.5, "ms")),
        Row(
            FAR,
            found[FAR],
            found[POLLING],
            "value",
            Target("at most", 8.0, "ms"),
            note="beside a bare poll of `data_version` every 10 ms",
        ),
        Row(ON_SERVER, found[ON_SERVER], None, "value", Target("at most", 5.0, "ms")),
    ]


async def _round(session: Session, times: int) -> dict[str, float]:
    here = await _delays(session, session.database(), times)
    there = await _delays(session, session.on_server(), times)
    return {**here, ON_SERVER: there[FAR]}


async def _delays(session: Session, database: Path | str, times: int) -> dict[str, float]:
    committed: dict[int, float] = {}
    seen: dict[int, float] = {}
    stamps: list[float] = []
    original = Writer.transaction

    @contextmanager
    def stamped(writer: Writer) -> Generator[Any, None, None]:
        with original(writer) as connection:
            yield connection
        stamps.append(time.monotonic())

    with mock.patch.object(Writer, "transaction", stamped):
        log = EventLog(Database(database))
        await log.open()
        task_id = task_id_of(1)
        begun = (submitted(1), Running(attempt=1, worker="w", platform="bench"))
        version = await log.append(task_id, begun, 0)

        async def read() -> None:
            async for event in log.feed.follow(task_id, 2):
                seen[event.version] = time.monotonic()

        reading = asyncio.create_task(read())
        chance = random.Random(1)
        with ExitStack() as children:
            others = [children.enter_context(session.child("reader", database, task_id))]
            if isinstance(database, Path):
                others.append(children.enter_context(session.child("polling", database)))
            for child in others:
                child.hear()
            for _ in range(times):
                await asyncio.sleep(chance.uniform(0.012, 0.032))
                chunk = Chunk(text="and so ", offset=(version - 2) * 7)
                version = await log.append(task_id, (chunk,), version)
                committed[version] = stamps[-1]
            await asyncio.sleep(0.1)
            told = [_told(child) for child in others]
        await log.close()
        reading.cancel()
        await asyncio.wait({reading})
    delays = [_median(committed, one) for one in (seen, *told)]
    return dict(zip((NEAR, FAR, POLLING), delays, strict=False))


def _told(child: Child) -> dict[int, float]:
    child.tell("what was seen?")
    return {int(version): at for version, at in child.hear().items()}


def _median(committed: dict[int, float], seen: dict[int, float]) -> float:
    delays = [(seen[version] - at) * 1000 for version, at in committed.items() if version in seen]
    if len(delays) < len(committed):
        raise RuntimeError(f"a reader saw {len(delays)} of {len(committed)} commits")
    return statistics.median(delays)
