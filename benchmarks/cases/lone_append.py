"""One append by itself, submitted to acknowledged, against a bare commit of the same row.

Turn by turn in one process, on two databases next to each other, so that the disk's moods hit both.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from benchmarks.bare import INSERT, connect, event_row
from benchmarks.logs import submitted, task_id_of
from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Session
from perdure.events import Chunk, Running, encode
from perdure.store.database import Database
from perdure.store.log import EventLog

TEXT = "and so the third quarter was better than the "


def measure(session: Session) -> Sequence[Row]:
    """Measure milliseconds from submitting to the acknowledgement."""
    times = session.size(200, 3)
    rounds = [asyncio.run(_round(session, times)) for _ in range(session.rounds)]
    ours = Sample("perdure", "ms", tuple(one for one, _other in rounds))
    bare = Sample("bare commit", "ms", tuple(other for _one, other in rounds))
    return [
        Row("lone append", ours, bare, "difference", Target("at most", 0.3, "ms")),
    ]


async def _round(session: Session, times: int) -> tuple[float, float]:
    connection = connect(session.database())
    log = EventLog(Database(session.database()))
    await log.open()
    task_id = task_id_of(1)
    ours: list[float] = []
    bare: list[float] = []
    try:
        begun = (submitted(1), Running(attempt=1, worker="w", platform="bench"))
        await log.append(task_id, begun, 0)
        for index in range(times + 5):
            chunk = Chunk(text=TEXT, offset=index * len(TEXT))
            row = (index + 1, *event_row(1, index + 3, encode(chunk).data.decode()))
            began = time.perf_counter()
            await log.append(task_id, (chunk,), index + 2)
            between = time.perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(INSERT, row)
            connection.execute("COMMIT")
            ended = time.perf_counter()
            ours.append((between - began) * 1000)
            bare.append((ended - between) * 1000)
    finally:
        await log.close()
        connection.close()
    return statistics.median(ours[5:]), statistics.median(bare[5:])  # the first ones warm up
