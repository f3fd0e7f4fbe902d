"""What of its scope a worker still has to do: without what has ended, and what it can't read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Final

import sqlalchemy as sa

from perdure.errors import DatabaseCorrupt, DatabaseIncompatible
from perdure.events import ENDINGS
from perdure.store.database import Database
from perdure.store.direct import has_one_of
from perdure.store.schema import tasks

__all__ = ["NamedTasks", "Unreadable"]

# Not fewer are looked up at a time.
LOOK_UP_AT_LEAST: Final = 32
_logger: Final = logging.getLogger("perdure")


class NamedTasks:
    """The tasks that a worker was told to run, one by one, and that have yet to end.

    Which of them have ended, here or elsewhere, is looked up whenever half as much has happened as
    there are tasks: so what that costs is the same for each task, however many there are, and those
    that have ended are never more than half of them.
    """

    def __init__(self, task_ids: Iterable[str] = ()) -> None:
        self._open = set(task_ids)
        self._known: frozenset[str] | None = None
        self._happened = len(self._open)

    @property
    def task_ids(self) -> frozenset[str]:
        """Those that have yet to end, and some that have ended."""
        if self._known is None:
            self._known = frozenset(self._open)
        return self._known

    def __contains__(self, task_id: object) -> bool:
        """Return whether it is one of `task_ids`."""
        return task_id in self._open

    def add(self, task_id: str) -> bool:
        """Take one more; returns whether it is new."""
        if task_id in self._open:
            return False
        self._open.add(task_id)
        self._known = None
        self._happened += 1
        return True

    def note_change(self, task_id: str) -> None:
        """Note that one of them may have ended."""
        self._happened += task_id in self._open

    async def forget_ended(self, database: Database) -> None:
        """Look up which have ended, if it is time for that, and forget these."""
        if self._happened < max(LOOK_UP_AT_LEAST, len(self._open) // 2):
            return
        self._happened = 0
        rows = await database.rows(
            sa.select(tasks.c.task_id, tasks.c.status).where(
                has_one_of(tasks.c.task_id, self.task_ids)
            )
        )
        # What nobody knows may yet be submitted.
        self._open.difference_update(row["task_id"] for row in rows if row["status"] in ENDINGS)
        self._known = None


class Unreadable:
    """Tasks whose streams this perdure can't read: left alone by it, and named once in its log."""

    def __init__(self) -> None:
        self._errors: dict[str, DatabaseCorrupt | DatabaseIncompatible] = {}
        self._lock = threading.Lock()  # it is the writer's thread that finds out

    def note(self, task_id: str, error: DatabaseCorrupt | DatabaseIncompatible) -> None:
        """Take one more."""
        with self._lock:
            if task_id in self._errors:
                return
            self._errors[task_id] = error
        _logger.warning("%s is left alone: %s", task_id, error)

    @property
    def task_ids(self) -> frozenset[str]:
        """Which tasks they are."""
        with self._lock:
            return frozenset(self._errors)

    def __getitem__(self, task_id: str) -> DatabaseCorrupt | DatabaseIncompatible:
        """Return why one of them can't be read."""
        return self._errors[task_id]
