"""What everyday operations cost on a large log, against the same on a log of 10 thousand events.

Turn by turn on both, so that the disk's and the machine's moods hit both alike. Both logs end with
some thousand pending tasks, which claims take from.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from benchmarks.logs import EVENTS_A_TASK, submitted, task_id_of
from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Session
from perdure import Engine, TaskStatus
from perdure.store.claims import Scope, claim
from perdure.store.records import TaskFilter

PENDING: Final = 4000
TARGET_EVENTS: Final = 10_000_000
OPERATIONS: Final = ("append", "claim", "status", "open a task", "list page", "list completed")


def measure(session: Session) -> Sequence[Row]:
    """Measure milliseconds of each operation on both logs, in SQLite and on PostgreSQL."""
    few = session.size(10_000, 500)
    many = session.size(1_000_000, 1_000, full=10_000_000)
    pending = session.size(PENDING, 200)
    files: dict[int, str | Path] = {
        # The large one is worked on as it is: a copy would take as much disk again.
        few: shutil.copy(session.log(few, pending=pending), session.place("few.db")),
        many: session.log(many, pending=pending),
    }
    rows = _compare(session, files, "")
    served: dict[int, str | Path] = {
        events: session.log_on_server(events, pending=pending) for events in (few, many)
    }
    return rows + _compare(session, served, ", on PostgreSQL")


def _compare(session: Session, places: dict[int, str | Path], where: str) -> list[Row]:
    """Measure everything on a small and on a large log, in that order."""
    few, many = places
    times = session.size(60, 3)
    rounds = [
        asyncio.run(_round(places, times, turn, (few, many))) for turn in range(session.rounds)
    ]
    rows: list[Row] = []
    for operation in OPERATIONS:
        large, small = (
            Sample(
                f"{operation}{where}, {events:,} events",
                "ms",
                tuple(r[operation][i] for r in rounds),
            )
            for i, events in ((1, many), (0, few))
        )
        target = Target("at most", 1.3) if many >= TARGET_EVENTS else None
        note = "" if target else "the target is for 10 million: --full"
        rows.append(Row(operation + where, large, small, target=target, note=note))
    return rows


async def _round(
    paths: dict[int, str | Path], times: int, turn: int, sizes: tuple[int, int]
) -> dict[str, tuple[float, float]]:
    chance = random.Random(turn)
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in OPERATIONS}
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(Engine.open(paths[size], adapters=[], run=False))
            for size in sizes
        ]
        for index in range(times + 3):
            # Ended tasks from all over the log, and a new one of its own for the append.
            place = chance.random()
            for which, (engine, size) in enumerate(zip(engines, sizes, strict=True)):
                ended = task_id_of(int(place * (size // EVENTS_A_TASK)))
                new = 0x40000000 + turn * 10_000 + index
                for name, operation in _operations(engine, ended, new).items():
                    began = time.perf_counter()
                    outcome = await operation()
                    if index >= 3:  # the first ones warm up
                        taken[name][which].append((time.perf_counter() - began) * 1000)
                    assert outcome, f"{name} found nothing"
    return {
        name: (statistics.median(one), statistics.median(other))
        for name, (one, other) in taken.items()
    }


def _operations(engine: Engine, ended: str, new: int) -> dict[str, Callable[[], Awaitable[object]]]:
    scope = Scope(platforms=("bench",))

    async def open_task() -> object:
        await engine.get_task(ended)
        await engine.get_definition(ended)
        return await engine.get_events(ended)

    async def status() -> bool:
        return await engine.get_status(ended) is TaskStatus.COMPLETED

    completed = TaskFilter(statuses=(TaskStatus.COMPLETED,))
    return {
        "append": lambda: engine.log.append(task_id_of(new), (submitted(new),), 0),
        "claim": lambda: engine.log.write(lambda tx: claim(tx, "worker_bench", 8, scope, {})),
        "status": status,
        "open a task": open_task,
        "list page": lambda: engine.list_tasks(limit=100),
        "list completed": lambda: engine.list_tasks(completed, limit=100),
    }
