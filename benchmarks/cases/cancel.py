"""From `cancel_task` in another process to the closed stream of the platform.

The platform streams a word every 20 ms. The clock runs from before the call in the other process to
the end of the adapter's generator, where its connection is closed.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from benchmarks.measuring import Row, Target, samples
from benchmarks.session import Session
from perdure import Engine, Task
from perdure.adapter import Call, Capabilities
from perdure.events import Chunk, Event


class Endless:
    """A platform that never stops by itself."""

    platform = "bench"
    capabilities = Capabilities()
    default_model = None
    prices = None

    def __init__(self) -> None:
        self.closed: dict[str, asyncio.Future[float]] = {}

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Stream until somebody closes it, and note when."""
        closed = self.closed.setdefault(call.task_id, asyncio.get_running_loop().create_future())
        try:
            while True:
                yield Chunk(text="word ")
                await asyncio.sleep(0.02)
        finally:
            closed.set_result(time.monotonic())

    async def stop(self, response_id: str) -> None:
        """Do nothing: nothing goes on by itself."""

    async def close(self) -> None:
        """Do nothing: nothing is held."""


def measure(session: Session) -> Sequence[Row]:
    """Measure milliseconds until the stream is closed."""
    times = session.size(20, 2)
    found = samples(
        "ms",
        {
            "perdure": lambda: asyncio.run(_delay(session, session.database(), times)),
            "perdure, PostgreSQL": lambda: asyncio.run(_delay(session, session.on_server(), times)),
        },
        session.rounds,
    )
    target = Target("at most", 100.0, "ms")
    return [
        Row("other process", found["perdure"], None, "value", target),
        Row("other process, on PostgreSQL", found["perdure, PostgreSQL"], None, "value", target),
    ]


async def _delay(session: Session, path: Path | str, times: int) -> float:
    adapter = Endless()
    delays: list[float] = []
    async with Engine.open(path, adapters=[adapter]) as engine:
        with session.child("canceller", path) as canceller:
            canceller.hear()
            for _ in range(times):
                task_id = await engine.submit_task(Task(prompt="Question"))
                async for _text in engine.stream_result(task_id):
                    break
                canceller.tell(task_id)
                began = float(await asyncio.to_thread(canceller.hear))
                delays.append((await adapter.closed[task_id] - began) * 1000)
    return statistics.median(delays)
