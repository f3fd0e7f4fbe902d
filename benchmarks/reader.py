"""Follows a task from a process of its own, and tells when it saw which version.

python -m benchmarks.reader DATABASE TASK
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from perdure import Engine


async def _follow(path: str, task_id: str) -> None:
    seen: dict[int, float] = {}
    async with Engine.open(path, adapters=[], run=False) as engine:
        replayed = asyncio.Event()

        async def read() -> None:
            async for event in engine.stream_events(task_id):
                seen[event.version] = time.monotonic()
                replayed.set()

        reading = asyncio.create_task(read())
        await replayed.wait()
        print(json.dumps("ready"), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(json.dumps(seen), flush=True)
        reading.cancel()
        await asyncio.wait({reading})


if __name__ == "__main__":
    asyncio.run(_follow(sys.argv[1], sys.argv[2]))
