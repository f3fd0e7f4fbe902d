"""Opens many streams at once, with a reader each, and prints the memory that takes.

python -m benchmarks.holding DATABASE STREAMS
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator

from benchmarks.machine import resident_mb
from perdure import Engine, Task
from perdure.adapter import Call, Capabilities
from perdure.events import Chunk, Completed, Event
from perdure.settings import WorkerSettings


class Held:
    """A platform that streams a page of text and then waits."""

    platform = "bench"
    capabilities = Capabilities()
    default_model = None
    prices = None

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream, wait, end."""
        for _ in range(20):
            yield Chunk(text="Sales rose by four per cent, mostly in the north. " * 2)
        await self.go_on.wait()
        yield Completed(finish_reason="stop")

    async def stop(self, response_id: str) -> None:
        """Do nothing: there is nothing to stop."""

    async def close(self) -> None:
        """Do nothing: nothing is held."""


async def _hold(path: str, streams: int) -> None:
    adapter = Held()
    settings = WorkerSettings(concurrency=streams)
    async with Engine.open(path, adapters=[adapter], settings=settings) as engine:
        warm = await engine.submit_task(Task(prompt="Question", constraints=None))
        async for _text in engine.stream_result(warm):
            break
        before = resident_mb()
        shown = 0
        all_shown = asyncio.Event()

        async def read(task_id: str) -> None:
            nonlocal shown
            length = 0
            async for text in engine.stream_result(task_id):
                length += len(text)
                if length == 20 * 100:
                    shown += 1
                    if shown == streams - 1:
                        all_shown.set()

        ids = [await engine.submit_task(Task(prompt="Question")) for _ in range(streams - 1)]
        readers = [asyncio.create_task(read(task_id)) for task_id in ids]
        await all_shown.wait()
        print(json.dumps({"before_mb": before, "open_mb": resident_mb()}))
        adapter.go_on.set()
        await asyncio.gather(*readers)


if __name__ == "__main__":
    asyncio.run(_hold(sys.argv[1], int(sys.argv[2])))
