"""What became of rows: found by key, followed along their retries to the latest run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from perdure.store.database import Database
from perdure.store.direct import has_one_of
from perdure.store.schema import tasks

__all__ = ["Run", "find_unsettled", "latest_runs", "select_where"]

Statement: TypeAlias = "sa.Select[*tuple[Any, ...]]"
Row: TypeAlias = "sa.Row[*tuple[Any, ...]]"

_PAGE: Final = 1000
_UNSUCCESSFUL: Final = ("failed", "cancelled")


class Run(NamedTuple):
    """One task of a row.

    Attributes:
        task_id: The task.
        status: Where it stands.
        fingerprint: Of the row, and the defaults, that it was made from.
        stream_id: Its place in the order of submission: a position in the log.
    """

    task_id: str
    status: str
    fingerprint: str | None
    stream_id: int

    @property
    def unsuccessful(self) -> bool:
        """Whether it ended, and not well."""
        return self.status in _UNSUCCESSFUL


_RUN: Final = (tasks.c.task_id, tasks.c.status, tasks.c.fingerprint, tasks.c.stream_id)
_BY_ORIGIN: Final = sa.select(tasks.c.retry_of, *_RUN)


async def find_unsettled(
    database: Database, rows: Mapping[str, str], since: int
) -> dict[str, Run | None]:
    """Return those of a batch's rows about which there is something to decide.

    A row is settled, and left out, when its task is in the database, was made from the same content
    and defaults, and didn't end badly. What a million finished rows cost is this one comparison,
    made where they are.

    Args:
        database: Where to look.
        rows: Key -> fingerprint.
        since: Tasks after this position in the log are not settled either.

    Returns:
        Key -> the latest run of the row; None where it has none.
    """
    given = database.pairs(rows)
    settled = sa.and_(
        tasks.c.fingerprint.is_not_distinct_from(given.c.value),
        tasks.c.status.not_in(_UNSUCCESSFUL),
        tasks.c.stream_id <= since,
    )
    found = await _all(
        database,
        sa.select(given.c.key, *_RUN)
        .select_from(given.outerjoin(tasks, tasks.c.key == given.c.key))
        .where(sa.or_(tasks.c.key.is_(None), sa.not_(settled))),
    )
    runs = {row[0]: Run(*row[1:]) if row[1] is not None else None for row in found}
    ended = [run.task_id for run in runs.values() if run is not None and run.unsuccessful]
    latest = await latest_runs(database, ended) if ended else {}
    return {key: run and latest.get(run.task_id, run) for key, run in runs.items()}


async def latest_runs(database: Database, task_ids: Iterable[str]) -> dict[str, Run]:
    """Return task id -> its latest retry, for those that were run again."""
    origin = {task_id: task_id for task_id in task_ids}
    found: dict[str, Run] = {}
    while origin:
        again: dict[str, str] = {}
        for row in await select_where(database, _BY_ORIGIN, tasks.c.retry_of, origin):
            run = Run(*row[1:])
            start = origin[row[0]]
            found[start] = run
            again[run.task_id] = start
        origin = again
    return found


async def select_where(
    database: Database, statement: Statement, column: sa.Column[Any], values: Iterable[str]
) -> list[Row]:
    """Return the rows in which ``column`` has one of ``values``, however many these are."""
    wanted = list(values)
    found: list[Row] = []
    for begin in range(0, len(wanted), _PAGE):
        page = has_one_of(column, wanted[begin : begin + _PAGE])
        found += await _all(database, statement.where(page))
    return found


async def _all(database: Database, statement: Statement) -> Sequence[Row]:
    async def query(connection: AsyncConnection) -> Sequence[Row]:
        return (await connection.execute(statement)).all()

    return await database.read(query)
