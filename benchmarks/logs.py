"""Logs of any size, written as fast as the store can: through its own `Transaction`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from perdure.events import Chunk, Completed, Event, Running, Submitted
from perdure.store.database import Database
from perdure.store.transaction import FoldCache, Transaction
from perdure.task import Usage

__all__ = ["EVENTS_A_TASK", "build_log", "finished_task", "submitted", "task_id_of"]

EVENTS_A_TASK: Final = 5
_TASKS_A_COMMIT: Final = 2000
_PROMPT: Final = "Summarise what the following report says about the third quarter, in two lines."
_ANSWER: Final = "Sales rose by four per cent, mostly in the north; costs stayed where they were. "


def task_id_of(number: int) -> str:
    """Return a task id of the usual form."""
    return f"bench_20260101_{number:08x}"


def submitted(number: int, *, key: str | None = None) -> Submitted:
    """Return the first event of a task."""
    task = {"prompt": f"{_PROMPT} ({number})", "platform": "bench"}
    return Submitted(task=task if key is None else {**task, "key": key}, platforms=("bench",))


def finished_task(number: int) -> tuple[Event, ...]:
    """Return all events of a task that was completed."""
    return (
        submitted(number),
        Running(attempt=1, worker="worker_000000000000", platform="bench", model="model-1"),
        Chunk(text=_ANSWER),
        Chunk(text=_ANSWER, offset=len(_ANSWER)),
        Completed(
            finish_reason="stop",
            usage=Usage(input_tokens=24, output_tokens=38),
            output_length=2 * len(_ANSWER),
        ),
    )


def build_log(database: Path | str, events: int, *, pending: int = 0) -> None:
    """Write ``events`` events of ended tasks, and so many pending tasks after them.

    Vacuumed in between and in the end, as a server does by itself: where the rows come to lie is
    then the same for logs of all sizes, which one that is being written for longer would not be.
    """
    numbers = iter(range(events // EVENTS_A_TASK))
    ended = ((task_id_of(number), finished_task(number)) for number in numbers)
    _write(database, ended)
    first = events // EVENTS_A_TASK
    waiting = ((task_id_of(n), (submitted(n),)) for n in range(first, first + pending))
    _write(database, waiting)


def _write(database: Path | str, tasks: Iterator[tuple[str, tuple[Event, ...]]]) -> None:
    made = Database(database)
    writer = made.writer()
    try:
        left = True
        while left:
            left = False
            with writer.transaction() as connection:
                transaction = Transaction(connection, FoldCache(), writer.now)
                page: list[tuple[str, tuple[Event, ...]]] = []
                for task in tasks:
                    page.append(task)
                    if len(page) == _TASKS_A_COMMIT:
                        left = True
                        break
                transaction.prefetch(task_id for task_id, _events in page)
                for task_id, events in page:
                    transaction.append(task_id, events, 0)
                transaction.flush()
            writer.checkpoint_if_due()
        if made.url.get_backend_name() == "postgresql":
            writer.vacuum(full=False)
    finally:
        writer.close()
