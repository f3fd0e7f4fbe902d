"""Rebuilding the projection: the rows of `tasks` are computed from the log, or held against it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, InvalidTransition
from perdure.events import Archived, decode
from perdure.store import scanning
from perdure.store.bulk import plain_rows
from perdure.store.dialect import any_text, take_time
from perdure.store.projection import TaskFold
from perdure.store.scanning import (
    NO_MOMENT,
    RECORDED_AT,
    UNREADABLE,
    AnyTimestamp,
    Progress,
    as_stored,
)
from perdure.store.schema import Timestamp, events, log_head, streams, tasks

__all__ = ["RebuildReport", "compare", "rebuild"]


@dataclass(slots=True)
class RebuildReport:
    """What `rebuild` found.

    Attributes:
        tasks: How many rows there are now.
        differed: How many of them were missing, too many, or not what the log says.
    """

    tasks: int = 0
    differed: int = 0


def rebuild(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Throw `tasks` away and compute it again from the log, in the connection's transaction.

    Raises:
        DatabaseCorrupt: The log can't be folded; nothing is changed then.
    """
    take_time(connection)
    connection.execute(sa.select(log_head.c.position).with_for_update())  # nobody writes from here
    with any_text(connection):  # what is to be thrown away may be anything
        report = compare(connection, progress)
    connection.execute(sa.delete(tasks))
    for folds in _folded(connection):
        rows = [row for row in folds.values() if row is not None]
        if rows:
            connection.execute(sa.insert(tasks), rows)
    return report


def compare(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Hold `tasks` against the log, and change nothing."""
    report = RebuildReport()
    total: int = connection.execute(sa.select(sa.func.count()).select_from(streams)).scalar_one()
    for folds in _folded(connection):
        stored = {
            row["stream_id"]: dict(row)
            for row in connection.execute(
                _STORED_ROWS.where(tasks.c.stream_id.between(min(folds), max(folds)))
            ).mappings()
        }
        for stream_id, row in folds.items():
            report.tasks += row is not None
            report.differed += stored.get(stream_id) != row
        if progress is not None:
            progress(report.tasks, total)
    surplus = sa.select(sa.func.count()).where(
        tasks.c.stream_id.not_in(sa.select(streams.c.stream_id))
    )
    report.differed += int(connection.execute(surplus).scalar_one())
    return report


def _stored(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return a column of `tasks` so that no value in it is an error, or passes for another one."""
    if isinstance(column.type, Timestamp):
        return sa.type_coerce(column, AnyTimestamp).label(column.name)
    if isinstance(column.type, sa.Boolean):
        return as_stored(column)
    return column


_STORED_ROWS: Final = sa.select(*(_stored(column) for column in tasks.c))


def _folded(connection: Connection) -> Iterator[dict[int, dict[str, Any] | None]]:
    """Yield the rows that the log says there should be, some at a time, by ascending stream."""
    last: int | None = None
    page = (
        sa.select(streams.c.stream_id, streams.c.task_id)
        .order_by(streams.c.stream_id)
        .limit(scanning.PAGE // 10)
    )
    while True:
        found = connection.execute(
            page if last is None else page.where(streams.c.stream_id > last)
        ).all()
        if not found:
            return
        folds = {row.stream_id: TaskFold(row.task_id, row.stream_id) for row in found}
        last = found[-1].stream_id
        rows = plain_rows(
            connection,
            sa.select(
                *(events.c.stream_id, events.c.version, events.c.type),
                *(events.c.schema_version, events.c.data),
                RECORDED_AT,
            )
            .where(events.c.stream_id.between(found[0].stream_id, last))
            .order_by(events.c.stream_id, events.c.version),
        )
        for stream_id, version, type_, schema_version, data, at in rows:
            _fold(folds[stream_id], version, type_, schema_version, data, at)
        yield {key: _row(fold) if fold.version else None for key, fold in folds.items()}


def _fold(
    fold: TaskFold, version: int, type_: str, schema_version: int, data: str, at: datetime
) -> None:
    # The events before an `archived` one are in an archive, and it says how many they were.
    follows = version == fold.version + 1 or (type_ == Archived.type and not fold.version)
    if at is NO_MOMENT or not follows:
        raise DatabaseCorrupt(
            f"{fold.task_id} version {version} can't be folded: run `perdure verify`"
        )
    event = decode(type_, schema_version, data)
    try:
        fold.apply((event,), at)
    except (InvalidTransition, *UNREADABLE) as error:
        raise DatabaseCorrupt(
            f"{fold.task_id} version {version} can't be folded ({error}): run `perdure verify`"
        ) from None
    if fold.version != version:
        raise DatabaseCorrupt(
            f"{fold.task_id} version {version} should be version {fold.version}: "
            "run `perdure verify`"
        )


def _row(fold: TaskFold) -> dict[str, Any]:
    try:
        return fold.new_row()
    except UNREADABLE as error:
        raise DatabaseCorrupt(
            f"{fold.task_id} can't be what was submitted ({error}): run `perdure verify`"
        ) from None
