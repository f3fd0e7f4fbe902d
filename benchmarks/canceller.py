"""Cancels the tasks it is told, from a process of its own, and says when it began to.

python -m benchmarks.canceller DATABASE
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from perdure import Engine


async def _cancel(path: str) -> None:
    async with Engine.open(path, adapters=[], run=False) as engine:
        print(json.dumps("ready"), flush=True)
        while task_id := (await asyncio.to_thread(sys.stdin.readline)).strip():
            began = time.monotonic()
            await engine.cancel_task(task_id)
            print(json.dumps(began), flush=True)


if __name__ == "__main__":
    asyncio.run(_cancel(sys.argv[1]))
