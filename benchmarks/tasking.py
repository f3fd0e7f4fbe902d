"""Tasks end to end, in a process of its own, as each peer has one, and warm as it is.

python -m benchmarks.tasking DATABASE COUNT AT_ONCE as-perdure|as-python

The last one says how often Python looks for cycles of garbage: as often as in the program, or as in
programs that say nothing about it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from perdure import Engine, Task
from perdure.adapter import Call, Capabilities
from perdure.events import Chunk, Completed, Event
from perdure.settings import WorkerSettings

__all__ = ["OneChunk", "clients"]


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


async def clients(
    count: int, at_once: int, one: Callable[[int], Coroutine[Any, Any, None]]
) -> float:
    """Have so many clients at once do their share, one by one; returns how many a second."""
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            await one(number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    return count / (time.perf_counter() - began)


async def main(database: str, count: int, at_once: int) -> float:
    """Warm up, then measure."""
    settings = WorkerSettings(concurrency=at_once)
    async with Engine.open(database, adapters=[OneChunk()], settings=settings) as engine:

        async def one(number: int) -> None:
            task_id = await engine.submit_task(Task(prompt=f"Question {number}", platform="bench"))
            result = await engine.get_result(task_id)
            assert result.success

        await one(-1)
        return await clients(count, at_once, one)


if __name__ == "__main__":
    place, tasks, together, collecting = sys.argv[1:]
    if collecting == "as-perdure":
        gc.set_threshold(50_000, 20, 20)
    print(json.dumps({"a_second": asyncio.run(main(place, int(tasks), int(together)))}))
