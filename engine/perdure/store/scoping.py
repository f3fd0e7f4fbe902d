"""Which tasks are a worker's, and what of them it still has to do.

That is without those that have ended, and those that it can't read.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from perdure.errors import DatabaseCorrupt, DatabaseIncompatible
from perdure.events import Submitted
from perdure.store.database import Database
from perdure.store.direct import has_one_of, is_among
from perdure.store.projection import TaskFold
from perdure.store.schema import tasks
from perdure.task import TaskStatus

__all__ = ["RULES", "NamedTasks", "Rule", "Scope", "Unreadable"]

# Not fewer are looked up at a time.
LOOK_UP_AT_LEAST: Final = 32
_ENDED: Final = frozenset(status for status in TaskStatus if status.ended)
_logger: Final = logging.getLogger("perdure")


@dataclass(frozen=True, slots=True)
class Scope:
    """Which tasks a worker runs; everything that is None is no restriction.

    Attributes:
        platforms: Only these platforms' tasks.
        batch: Only this batch's tasks.
        task_ids: Only these tasks.
        excluded: But not these tasks.
    """

    platforms: tuple[str, ...] | None = None
    batch: str | None = None
    task_ids: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """Return the scope as SQL."""
        return [rule.condition(values) for rule, values in self.rules()]

    def rules(self) -> list[tuple[Rule, Any]]:
        """Return what restricts it, each with the field's value."""
        given = [(rule, getattr(self, rule.field)) for rule in RULES]
        return [
            (rule, values)
            for rule, values in given
            if values is not None and (values or not rule.excludes)
        ]


class Rule(NamedTuple):
    """What a field of a scope means: of rows, in SQL, and of a task that has no row as yet.

    Attributes:
        field: The field: its value is one, or several of which a task has to have one.
        column: What of a task's row it is about.
        value_of: Returns the same of a task without a row, from its fold and its first event.
        single: It is one.
        many: There may be thousands.
        excludes: A task must have none of them.
    """

    field: str
    column: sa.Column[Any]
    value_of: Callable[[TaskFold, Submitted], object]
    single: bool = False
    many: bool = False
    excludes: bool = False

    def condition(self, values: Any) -> sa.ColumnElement[bool]:  # noqa: ANN401 - the field's
        """Return the rule with its values as SQL."""
        if self.single:
            found: sa.ColumnElement[bool] = self.column == values
        else:
            found = has_one_of(self.column, values) if self.many else self.column.in_(values)
        return sa.not_(found) if self.excludes else found

    def condition_on_parameter(self) -> sa.ColumnElement[bool]:
        """Return the rule as SQL that is the same for all values: a parameter, named as the field.

        The batch is only one, and equal to it: so its tasks are found in the order asked for.
        """
        if self.single:
            found: sa.ColumnElement[bool] = self.column == sa.bindparam(self.field)
        else:
            found = is_among(self.column, self.field, many=self.many)
        return sa.not_(found) if self.excludes else found

    def admits(self, values: Any, fold: TaskFold, asked: Submitted) -> bool:  # noqa: ANN401
        """Return whether a task without a row goes by the rule."""
        value = self.value_of(fold, asked)
        return (value == values if self.single else value in values) is not self.excludes


def _batch(_fold: TaskFold, asked: Submitted) -> object:
    return asked.task.get("batch")


def _platform(fold: TaskFold, _asked: Submitted) -> object:
    return fold.state.platform


def _task_id(fold: TaskFold, _asked: Submitted) -> object:
    return fold.task_id


RULES: Final = (
    Rule("batch", tasks.c.batch, _batch, single=True),
    Rule("platforms", tasks.c.platform, _platform),
    Rule("task_ids", tasks.c.task_id, _task_id, many=True),
    Rule("excluded", tasks.c.task_id, _task_id, many=True, excludes=True),
)


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
        self._open.difference_update(row["task_id"] for row in rows if row["status"] in _ENDED)
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
