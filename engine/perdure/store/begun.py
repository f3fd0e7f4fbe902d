"""Streams that began in this process and go on, with what they have so far while that is short.

Whoever submits a task mostly waits for it, or reads it, at once: such a reader need not ask the
database for what has just passed by here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import orjson

from perdure.events import Chunk, RecordedEvent, Submitted
from perdure.store.projection import TaskFold

__all__ = ["Begun", "Ended"]

MOST_STREAMS: Final = 10_000
# Of so many streams the events are kept, as long as they are few and short.
MOST_KEPT: Final = 1000
MOST_EVENTS: Final = 10
MOST_CHARACTERS: Final = 10_000


class Ended(NamedTuple):
    """All that there is to know of a task that has ended.

    Attributes:
        asked: Its first event.
        fold: All of its events.
    """

    asked: Submitted
    fold: TaskFold


@dataclass(slots=True)
class _Kept:
    events: list[RecordedEvent] = field(default_factory=list[RecordedEvent])
    characters: int = 0


class Begun:
    """What is known of open streams without asking; it may always be forgotten."""

    def __init__(self) -> None:
        self._streams: dict[str, _Kept | None] = {}
        self._kept = 0
        self._ended: dict[str, Ended] = {}

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._streams

    def goes_on(self, task_id: str) -> bool:
        """Return whether a stream has more than its first event; False where that isn't kept."""
        kept = self._streams.get(task_id)
        return kept is not None and len(kept.events) > 1

    def events(self, task_id: str) -> tuple[RecordedEvent, ...] | None:
        """Return all events of a stream; None where they are not kept."""
        kept = self._streams.get(task_id)
        return None if kept is None else tuple(kept.events)

    def ended(self, task_id: str) -> Ended | None:
        """Return what came of a stream that ended in what was taken last; None if not kept."""
        return self._ended.get(task_id)

    def take(self, committed: Iterable[RecordedEvent], ended: Mapping[str, TaskFold]) -> None:
        """Take what was committed, of which nothing may be left out since `forget`.

        Args:
            committed: The events.
            ended: The tasks that have ended with them.
        """
        self._ended = {}
        for recorded in committed:
            task_id = recorded.task_id
            if recorded.version == 1 and len(self._streams) < MOST_STREAMS:
                keep = self._kept < MOST_KEPT
                self._kept += keep
                self._streams[task_id] = _Kept() if keep else None
            kept = self._streams.get(task_id)
            if kept is not None:
                kept.events.append(recorded)
            if recorded.event.ends_task:
                self._streams.pop(task_id, None)
                if kept is not None:
                    self._kept -= 1
                    asked = kept.events[0].event
                    if task_id in ended and isinstance(asked, Submitted):
                        self._ended[task_id] = Ended(asked, ended[task_id])
                continue
            if kept is None:
                continue
            kept.characters += _characters(recorded)
            if len(kept.events) > MOST_EVENTS or kept.characters > MOST_CHARACTERS:
                self._streams[task_id] = None
                self._kept -= 1

    def forget(self) -> None:
        """Forget everything: somebody has written what was not seen."""
        self._streams.clear()
        self._kept = 0


def _characters(recorded: RecordedEvent) -> int:
    event = recorded.event
    if type(event) is Chunk:
        return len(event.text)
    if type(event) is Submitted:
        return sum(map(_length, event.task.values()))
    return 0


def _length(value: object) -> int:
    return len(value if isinstance(value, str) else orjson.dumps(value))
