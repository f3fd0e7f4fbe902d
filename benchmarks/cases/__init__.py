"""The cases, one a file, in the order of the table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from benchmarks.measuring import Row
from benchmarks.session import Session

__all__ = ["CASES", "Case"]


class Case(NamedTuple):
    """Something that is measured.

    Attributes:
        name: What it is called on the command line; its file and its results are named so.
        about: What it measures, in a line.
    """

    name: str
    about: str

    def run(self, session: Session) -> Sequence[Row]:
        """Measure, and return what the table shows."""
        module = importlib.import_module(f"benchmarks.cases.{self.name}")
        measure: Callable[[Session], Sequence[Row]] = module.measure
        return measure(session)


CASES: Final = (
    Case("appends", "Durable appends by 100 producers"),
    Case("lone_append", "One lone append, submitted to acknowledged"),
    Case("tasks", "Tasks end to end, 200 at a time"),
    Case("stream_writes", "Durable writes on 100 streams"),
    Case("streaming", "200 streams at full speed from a local server"),
    Case("first_chunk", "How long until the first text"),
    Case("readers", "From a commit to a reader"),
    Case("cancel", "From a cancellation to the closed stream"),
    Case("upkeep", "Rebuilding and verifying"),
    Case("growth", "What a large log costs"),
    Case("resume", "Going on with a batch that is nearly done"),
    Case("memory", "Memory of open streams and of large batches"),
    Case("disk", "Bytes on disk"),
    Case("commands", "Commands that look something up"),
)
