"""From asking to the first text: through the engine, and with the bare SDK.

The server sends one delta at once and the rest a little later. Through the engine the clock runs
from before `submit_task` to the first text out of `stream_result`: the task was submitted, claimed
and its first chunk committed by then, three commits in a row.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from benchmarks.clients import Client, usable
from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Session
from perdure import Engine, Task

PAUSE_SECONDS = 0.02


def measure(session: Session) -> Sequence[Row]:
    """Measure milliseconds until the first text."""
    times = session.size(50, 2)
    rows: list[Row] = []
    with session.child("chat_server", 5, PAUSE_SECONDS) as server:
        address = f"http://127.0.0.1:{server.hear()['port']}"
        for client in usable():
            rounds = [
                asyncio.run(_round(session, client, address, times)) for _ in range(session.rounds)
            ]
            ours = Sample(f"perdure over {client.name}", "ms", tuple(one for one, _other in rounds))
            bare = Sample(f"bare {client.name}", "ms", tuple(other for _one, other in rounds))
            target = Target("at most", 5.0, "ms")
            rows.append(Row(f"over {client.name}", ours, bare, "difference", target))
    return rows


async def _round(session: Session, client: Client, address: str, times: int) -> tuple[float, float]:
    ask, close = client.bare(address)
    ours: list[float] = []
    bare: list[float] = []
    adapters = [client.adapter(address)]
    async with Engine.open(session.database(), adapters=adapters) as engine:
        for _ in range(times + 3):
            began = time.perf_counter()
            first: list[float] = []
            task_id = await engine.submit_task(Task(prompt="Question"))
            async for _text in engine.stream_result(task_id):
                first.append(time.perf_counter())  # noqa: PERF401 - the moment is the point
            ours.append((first[0] - began) * 1000)
            began = time.perf_counter()
            first = []
            await ask(lambda _text, first=first: first.append(time.perf_counter()))  # type: ignore[misc]
            bare.append((first[0] - began) * 1000)
    await close()
    return statistics.median(ours[3:]), statistics.median(bare[3:])  # the first ones warm up
