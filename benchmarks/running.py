"""Runs a batch of many rows from end to end, and prints the most memory that took.

python -m benchmarks.running DATABASE ROWS
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator

from benchmarks.machine import peak_mb
from benchmarks.tasking import OneChunk
from perdure import Engine
from perdure.batch import Intake
from perdure.batch.reading import RawRow
from perdure.settings import WorkerSettings
from perdure.store.claims import Scope


def _rows(count: int) -> Iterator[RawRow]:
    for number in range(count):
        fields = {"id": f"row-{number:07d}", "prompt": f"Question {number}", "platform": "bench"}
        yield RawRow(number + 1, fields, size=80)


async def _run(path: str, count: int) -> None:
    settings = WorkerSettings(concurrency=200)
    scope = Scope(batch="bench")
    async with Engine.open(path, adapters=[OneChunk()], settings=settings, scope=scope) as engine:
        await Intake(engine, "bench").take(_rows(count))
        await engine.run_until_done()


if __name__ == "__main__":
    asyncio.run(_run(sys.argv[1], int(sys.argv[2])))
    print(json.dumps({"peak_mb": peak_mb()}))
