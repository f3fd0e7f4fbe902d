"""Goes on with a batch, in a process of its own, until its one row that is left is dispatched.

python -m benchmarks.resuming DATABASE FILE
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

from benchmarks.machine import peak_mb
from perdure import Engine
from perdure.adapter import Call, Capabilities
from perdure.batch import Defaults, Intake, open_source
from perdure.batch.reading import RawRow
from perdure.batch.rows import identify, make_task
from perdure.events import Chunk, Completed, Event, Running, Submitted
from perdure.store.claims import Scope
from perdure.store.content import separate
from perdure.store.database import Database
from perdure.store.transaction import FoldCache, Transaction

BATCH = "bench"
_ROWS_A_COMMIT = 5000


class Waiting:
    """A platform that notes when it is asked first."""

    platform = BATCH
    capabilities = Capabilities()
    default_model = None
    prices = None

    def __init__(self) -> None:
        self.asked: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer at once."""
        if not self.asked.done():
            self.asked.set_result(time.perf_counter())
        yield Chunk(text=call.task_id)
        yield Completed(finish_reason="stop")

    async def stop(self, response_id: str) -> None:
        """Do nothing: there is nothing to stop."""

    async def close(self) -> None:
        """Do nothing: nothing is held."""


def _lines(rows: int) -> Iterator[dict[str, str]]:
    for number in range(rows + 1):
        prompt = f"Summarise report {number} in two lines, with the most important figure first."
        yield {"id": f"row-{number:07d}", "prompt": prompt, "platform": BATCH}


def make_batch(database: Path, source: Path, rows: int) -> None:
    """Write a file of ``rows`` rows and one more, and a database in which that one is missing."""
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in _lines(rows))
    writer = Database(database).writer()
    lines = enumerate(_lines(rows), 1)
    left = rows
    while left:
        page = min(left, _ROWS_A_COMMIT)
        left -= page
        with writer.transaction() as connection:
            transaction = Transaction(connection, FoldCache(), writer.now)
            finished = dict(_finished(*next(lines)) for _ in range(page))
            transaction.prefetch(finished)
            transaction.prefetch_keys(
                str(events[0].task["key"])
                for events in finished.values()
                if isinstance(events[0], Submitted)
            )
            for task_id, events in finished.items():
                transaction.append(task_id, events, 0)
            transaction.flush()
        writer.checkpoint_if_due()
    writer.close()


def _finished(number: int, line: dict[str, str]) -> tuple[str, tuple[Event, ...]]:
    defaults = Defaults()
    row = identify(RawRow(number, line), BATCH, defaults)
    plain, places, _content = separate(make_task(row, BATCH, defaults))
    return f"{BATCH}_20260101_{number:08x}", (
        Submitted(task=plain, platforms=(BATCH,), blobs=places),
        Running(attempt=1, worker="worker_000000000000", platform=BATCH),
        Chunk(text="Sales rose by four per cent, mostly in the north."),
        Completed(finish_reason="stop", output_length=49),
    )


async def _resume(database: Path, source: Path) -> float:
    began = time.perf_counter()
    adapter = Waiting()
    async with Engine.open(database, adapters=[adapter], scope=Scope(batch=BATCH)) as engine:
        intake = Intake(engine, BATCH)
        rows = open_source(str(source)).rows()
        await intake.take(rows)
        assert intake.counts.new == 1, intake.counts
        return await adapter.asked - began


if __name__ == "__main__":
    seconds = asyncio.run(_resume(Path(sys.argv[1]), Path(sys.argv[2])))
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))
