"""How far it is: counts, tokens and cost of a scope.

While tasks run, what has ended is read off the log since the last look, so a look costs what is new
and not what is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from perdure.events import ENDINGS
from perdure.store.claims import Scope, left_by_status
from perdure.store.database import Database
from perdure.store.schema import events, log_head, tasks

__all__ = ["Tally", "Tallying", "count_batch"]


@dataclass(frozen=True, slots=True)
class Tally:
    """Where tasks stand, and what they have used. A row that was run again counts once.

    Attributes:
        tokens: Input and output tokens of ended tasks, as far as they are known.
        cost_usd: US dollars of ended tasks, as far as they are known.
        priced: Ended tasks whose cost is known.
        unpriced: Ended tasks that were begun and whose cost is unknown.
    """

    pending: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    cost_usd: float = 0.0
    priced: int = 0
    unpriced: int = 0

    @property
    def ended(self) -> int:
        """Tasks to which nothing more happens."""
        return self.completed + self.failed + self.cancelled

    @property
    def left(self) -> int:
        """Tasks that are still to be run, or are running."""
        return self.pending + self.running

    @property
    def total(self) -> int:
        """All tasks."""
        return self.ended + self.left


_USED: Final = (
    sa.func.coalesce(sa.func.sum(tasks.c.input_tokens), 0).label("input_tokens"),
    sa.func.coalesce(sa.func.sum(tasks.c.output_tokens), 0).label("output_tokens"),
    sa.func.coalesce(sa.func.sum(tasks.c.cost_usd), 0.0).label("cost_usd"),
    sa.func.count(tasks.c.cost_usd).label("priced"),
    sa.func.count()
    .filter(tasks.c.cost_usd.is_(None), tasks.c.started_at.is_not(None))
    .label("unpriced"),
)


async def count_batch(database: Database, batch: str) -> Tally:
    """Count a whole batch, with what all of it has used: also runs that were followed by another.

    Reads every task of the batch.
    """
    rows = await database.rows(
        sa.select(tasks.c.status, sa.func.count().label("tasks"), *_USED)
        .where(tasks.c.batch == batch)
        .group_by(tasks.c.status)
    )
    counts = {row["status"]: row["tasks"] for row in rows}
    followed = await _followed(database, batch)
    ended = [row for row in rows if row["status"] in ENDINGS]
    return _tally({name: n - followed.get(name, 0) for name, n in counts.items()}, _used(ended))


@dataclass(frozen=True, slots=True)
class Failures:
    """Failed tasks of one class of error.

    Attributes:
        error_class: Its name: that of an error in `perdure.errors`; `Interrupted`, where the task's
            workers were lost too often, or `recovery` is "fail"; `AdapterFault`, where an adapter
            raised what is no error of `perdure.errors`.
        tasks: How many.
        example: One of their messages.
    """

    error_class: str
    tasks: int
    example: str


async def count_failures(database: Database, batch: str) -> list[Failures]:
    """Count a batch's failed tasks by the class of their error, the most frequent first.

    Without those that were run again.
    """
    again = tasks.alias("again")
    number = sa.func.count()
    rows = await database.rows(
        sa.select(
            tasks.c.error_class, number.label("tasks"), sa.func.min(tasks.c.error).label("example")
        )
        .where(
            tasks.c.batch == batch,
            tasks.c.status == "failed",
            ~sa.exists().where(again.c.retry_of == tasks.c.task_id),
        )
        .group_by(tasks.c.error_class)
        .order_by(number.desc(), tasks.c.error_class)
    )
    return [
        Failures(row["error_class"] or "unknown", row["tasks"], row["example"] or "")
        for row in rows
    ]


class Tallying:
    """Keeps count of a scope.

    Of a batch everything is counted; of any other scope what is to be done, and what has ended
    since the first look.
    """

    def __init__(self, database: Database, scope: Scope) -> None:
        self._database = database
        self._scope = scope
        self._seen: int | None = None
        self._ended: dict[str, int] = {}
        self._used = _Used()

    async def look(self) -> Tally:
        """Return where the scope stands now."""
        if self._seen is None:
            await self._begin()
        else:
            await self._catch_up(self._seen)
        rows = await self._database.rows(left_by_status(self._scope))
        counts = {row["status"]: row["tasks"] for row in rows} | self._ended
        if self._scope.batch is not None:
            for status, number in (await _followed(self._database, self._scope.batch)).items():
                counts[status] = max(0, counts.get(status, 0) - number)
        return _tally(counts, self._used)

    async def _begin(self) -> None:
        ended = (
            sa.select(tasks.c.status, sa.func.count().label("tasks"))
            .where(tasks.c.status.in_(ENDINGS), *self._scope.conditions())
            .group_by(tasks.c.status)
        )
        for row in await self._with_head(ended if self._scope.batch is not None else None):
            self._seen = row["position"]
            if row.get("status") is not None:
                self._ended[row["status"]] = row["tasks"]

    async def _catch_up(self, seen: int) -> None:
        fresh = (
            sa.select(tasks.c.status, sa.func.count().label("tasks"), *_USED)
            .join_from(events, tasks, tasks.c.stream_id == events.c.stream_id)
            .where(events.c.position > seen, events.c.type.in_(ENDINGS), *self._scope.conditions())
            .group_by(tasks.c.status)
        )
        for row in await self._with_head(fresh):
            self._seen = row["position"]
            if row["status"] is not None:
                self._ended[row["status"]] = self._ended.get(row["status"], 0) + row["tasks"]
                self._used += _used((row,))

    async def _with_head(
        self, statement: sa.Select[*tuple[Any, ...]] | None
    ) -> Sequence[sa.RowMapping]:
        """Run a statement together with the log's head: one statement sees one state."""
        head = sa.select(log_head.c.position)
        if statement is not None:
            found = statement.subquery()
            head = head.add_columns(*found.c).outerjoin(found, sa.true())
        return await self._database.rows(head)


async def _followed(database: Database, batch: str) -> dict[str, int]:
    """Return status -> how many ended tasks of a batch were run again."""
    again = tasks.alias("again")
    rows = await database.rows(
        sa.select(tasks.c.status, sa.func.count().label("tasks"))
        .join_from(again, tasks, tasks.c.task_id == again.c.retry_of)
        .where(again.c.retry_of.is_not(None), tasks.c.batch == batch)
        .group_by(tasks.c.status)
    )
    return {row["status"]: row["tasks"] for row in rows}


@dataclass(frozen=True, slots=True)
class _Used:
    tokens: int = 0
    cost_usd: float = 0.0
    priced: int = 0
    unpriced: int = 0

    def __add__(self, other: _Used) -> _Used:
        return _Used(
            self.tokens + other.tokens,
            self.cost_usd + other.cost_usd,
            self.priced + other.priced,
            self.unpriced + other.unpriced,
        )


def _used(rows: Sequence[sa.RowMapping]) -> _Used:
    return _Used(
        sum(row["input_tokens"] + row["output_tokens"] for row in rows),
        sum(row["cost_usd"] for row in rows),
        sum(row["priced"] for row in rows),
        sum(row["unpriced"] for row in rows),
    )


def _tally(counts: Mapping[str, int], used: _Used) -> Tally:
    names = ("pending", "running", "completed", "failed", "cancelled")
    return Tally(
        **{name: counts.get(name, 0) for name in names},
        tokens=used.tokens,
        cost_usd=used.cost_usd,
        priced=used.priced,
        unpriced=used.unpriced,
    )
