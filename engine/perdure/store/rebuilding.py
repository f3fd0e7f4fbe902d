"""Rebuilding the projection: the rows of `tasks` are computed from the log, or held against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, InvalidTransition
from perdure.events import Archived, Event, decode, decode_text
from perdure.store import scanning
from perdure.store.bulk import Bulk, plain_rows
from perdure.store.dialect import take_time
from perdure.store.projection import TaskFold, TaskRow
from perdure.store.scanning import (
    NO_MOMENT,
    UNREADABLE,
    Progress,
    as_stored,
    leniently,
    moment_of,
    page_of,
)
from perdure.store.schema import CanonicalJson, events, log_head, streams, tasks

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


# What the driver gets for a row, or gives for one, in the order of the columns.
_Values = Sequence[Any]

_COLUMNS: Final = TaskRow._fields
_INSERT: Final = Bulk(tasks, _COLUMNS)
_SURPLUS: Final = tasks.c.stream_id.not_in(sa.select(streams.c.stream_id))


def rebuild(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Make `tasks` what the log says it is, in the connection's transaction.

    It comes out as if all of it were thrown away and computed again, to the last bit; a row that
    is right already is left as it is.

    Raises:
        DatabaseCorrupt: The log can't be folded; nothing is changed then.
    """
    take_time(connection)
    connection.execute(sa.select(log_head.c.position).with_for_update())  # nobody writes from here
    with connection.begin_nested():
        surplus = connection.execute(sa.delete(tasks).where(_SURPLUS)).rowcount
        return _hold(connection, progress, surplus, mend=True)


def compare(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Hold `tasks` against the log, and change nothing."""
    counted = sa.select(sa.func.count()).select_from(tasks).where(_SURPLUS)
    surplus: int = connection.execute(counted).scalar_one()
    return _hold(connection, progress, surplus, mend=False)


def _hold(
    connection: Connection, progress: Progress | None, surplus: int, *, mend: bool
) -> RebuildReport:
    """Hold what the driver gives for each row against what it would get for the right one."""
    report = RebuildReport(differed=surplus)
    total: int = connection.execute(sa.select(sa.func.count()).select_from(streams)).scalar_one()
    removed: set[int] = set()
    for folds in _folded(connection):
        right = _right_rows(connection, folds.values())
        first, last = min(folds), max(folds)
        page = _stored_rows(connection.dialect.name).where(tasks.c.stream_id.between(first, last))
        stored = {row[0]: row for row in page_of(connection, page)}
        wrong = {key for key in folds if stored.get(key) != right.get(key) or key in removed}
        report.tasks += len(right)
        report.differed += len(wrong)
        if mend:
            if connection.dialect.name == "postgresql":
                wrong.update(key for key, row in right.items() if _may_hide_a_difference(row))
            if wrong:
                removed.update(_replace(connection, sorted(wrong), right, last))
        if progress is not None:
            progress(report.tasks, total)
    return report


def _replace(
    connection: Connection, stream_ids: Sequence[int], right: Mapping[int, _Values], last: int
) -> list[int]:
    """Write the rows of these streams anew.

    Returns:
        The streams behind ``last`` that lost their row, because it had taken the name or the key
        of one of these.
    """
    rows = [right[key] for key in stream_ids if key in right]
    taken: list[int] = []
    connection.execute(sa.delete(tasks).where(tasks.c.stream_id.in_(stream_ids)))
    for column in (tasks.c.task_id, tasks.c.key):
        index = _COLUMNS.index(column.name)
        values = [row[index] for row in rows if row[index] is not None]
        if values:
            others = sa.and_(column.in_(values), tasks.c.stream_id > last)
            taken.extend(connection.scalars(sa.select(tasks.c.stream_id).where(others)))
            connection.execute(sa.delete(tasks).where(others))
    _INSERT.execute_bound(connection, rows)
    return taken


_COST: Final = _COLUMNS.index("cost_usd")
_TOOL_CALLS: Final = _COLUMNS.index("tool_calls")


def _may_hide_a_difference(row: _Values) -> bool:
    """Return whether PostgreSQL has two values for one of these that are equal to Python.

    Zero has a sign, and numbers in `jsonb` have digits behind the point that say nothing.
    """
    return row[_COST] == 0 or row[_TOOL_CALLS] is not None


@cache
def _stored_rows(dialect: str) -> sa.Select[*tuple[Any, ...]]:
    spelt_anew = CanonicalJson if dialect == "postgresql" else ()
    return sa.select(
        *(
            column if isinstance(column.type, spelt_anew) else as_stored(column)
            for column in tasks.c
        )
    )


def _right_rows(connection: Connection, folds: Iterable[TaskFold]) -> dict[int, _Values]:
    """Return the rows that there should be, by stream."""
    rows = [_row(fold) for fold in folds if fold.version]
    return {row[0]: row for row in _INSERT.bound(connection.dialect, rows)}


def _folded(connection: Connection) -> Iterator[dict[int, TaskFold]]:
    """Yield all streams, folded, some at a time, by ascending stream."""
    last: int | None = None
    page = (
        sa.select(streams.c.stream_id, streams.c.task_id)
        .order_by(streams.c.stream_id)
        .limit(scanning.PAGE // 10)
    )
    while True:
        found = page_of(
            connection, page if last is None else page.where(streams.c.stream_id > last)
        )
        if not found:
            return
        last = found[-1][0]
        yield leniently(connection, lambda: _fold(connection, found))  # noqa: B023 - called at once


def _fold(connection: Connection, found: Sequence[tuple[Any, ...]]) -> dict[int, TaskFold]:
    """Return the folds of these streams, which follow each other."""
    folds = {stream_id: TaskFold(task_id, stream_id) for stream_id, task_id in found}
    rows = plain_rows(
        connection,
        sa.select(
            *(events.c.stream_id, events.c.version, events.c.type),
            *(events.c.schema_version, events.c.data),
            as_stored(events.c.recorded_at),
        )
        .where(events.c.stream_id.between(found[0][0], found[-1][0]))
        .order_by(events.c.stream_id, events.c.version),
    )
    fold: TaskFold | None = None
    expected = 1
    moment: datetime = NO_MOMENT
    moment_as_stored: object = None
    for stream_id, version, type_, schema_version, data, recorded_at in rows:
        if fold is None or stream_id != fold.stream_id:
            fold = folds.get(stream_id)
            if fold is None:
                raise DatabaseCorrupt(
                    f"an event of stream {stream_id} can't be folded, for there is no such stream: "
                    "run `perdure verify`"
                )
            expected = 1
        if recorded_at != moment_as_stored:
            moment, moment_as_stored = moment_of(recorded_at), recorded_at
        if type_ == Archived.type and expected == 1:
            expected = version  # what was before is in an archive; the event says how much it was
        if moment is NO_MOMENT or version != expected:
            raise DatabaseCorrupt(
                f"{fold.task_id} version {version} can't be folded: run `perdure verify`"
            )
        expected += 1
        piece = decode_text(schema_version, data) if type_ == "chunk" else None
        if piece is not None and fold.apply_text(*piece):
            continue
        _take(fold, decode(type_, schema_version, data), moment)
        if fold.version != version:
            raise DatabaseCorrupt(
                f"{fold.task_id} version {version} should be version {fold.version}: "
                "run `perdure verify`"
            )
    return folds


def _take(fold: TaskFold, event: Event, at: datetime) -> None:
    try:
        fold.apply_one(event, at)
    except (InvalidTransition, *UNREADABLE) as error:
        raise DatabaseCorrupt(
            f"{fold.task_id} version {fold.version + 1} can't be folded ({error}): "
            "run `perdure verify`"
        ) from None


def _row(fold: TaskFold) -> TaskRow:
    try:
        return fold.new_row()
    except UNREADABLE as error:
        raise DatabaseCorrupt(
            f"{fold.task_id} can't be what was submitted ({error}): run `perdure verify`"
        ) from None
