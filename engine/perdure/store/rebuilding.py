"""Rebuilding the projection: the rows of `tasks` are computed from the log, or held against it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, InvalidTransition
from perdure.events import LOOK_CLOSER, Archived, Running, decode, decode_text
from perdure.store import scanning
from perdure.store.bulk import Bulk, plain_rows
from perdure.store.dialect import take_time
from perdure.store.helping import NO_HELP, Helpers
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
from perdure.store.walking import MOST_PROBLEMS

__all__ = ["RebuildReport", "compare", "rebuild"]


@dataclass(slots=True)
class RebuildReport:
    """What `rebuild` or `compare` found.

    Attributes:
        tasks: How many rows there are now, or should be.
        differed: How many of them were missing, too many, or not what the log says.
        problems: Tasks whose events can't be folded, a line each; at most the first hundred.
    """

    tasks: int = 0
    differed: int = 0
    problems: list[str] = field(default_factory=list[str])


# What the driver gets for a row, or gives for one, in the order of the columns.
_Values = Sequence[Any]

_COLUMNS: Final = TaskRow._fields
_INSERT: Final = Bulk(tasks, _COLUMNS)
_SURPLUS: Final = tasks.c.stream_id.not_in(sa.select(streams.c.stream_id))


def rebuild(
    connection: Connection, progress: Progress | None = None, helpers: Helpers = NO_HELP
) -> RebuildReport:
    """Make `tasks` what the log says it is, in the connection's transaction.

    It comes out as if all of it were thrown away and computed again, to the last bit; a row that
    is right already is left as it is.

    Raises:
        DatabaseCorrupt: The log can't be folded; nothing is changed then.
    """
    take_time(connection)
    # Nobody writes from here on: what is committed, which helpers see, stays as it is.
    connection.execute(sa.select(log_head.c.position).with_for_update())
    with connection.begin_nested():
        report = RebuildReport()
        report.differed = connection.execute(sa.delete(tasks).where(_SURPLUS)).rowcount
        removed: set[int] = set()
        for share, found in _each_share(connection, helpers, report, progress):
            for problem in found.problems:
                raise DatabaseCorrupt(f"{problem}: {LOOK_CLOSER}")
            again = {key for key in removed if share.after < key <= share.last}
            if again:  # since it was looked at
                found = _look(connection, share)
            report.differed += len(again.union(found.wrong))
            if found.to_write:
                removed.update(_replace(connection, found.to_write, share.last))
        return report


def compare(
    connection: Connection, progress: Progress | None = None, helpers: Helpers = NO_HELP
) -> RebuildReport:
    """Hold `tasks` against the log, and change nothing.

    Helpers may see a later state than this connection; no task differs for that.
    """
    counted = sa.select(sa.func.count()).select_from(tasks).where(_SURPLUS)
    report = RebuildReport(differed=connection.execute(counted).scalar_one())
    for _share, found in _each_share(connection, helpers, report, progress):
        report.differed += len(found.wrong)
        report.problems += found.problems[: MOST_PROBLEMS - len(report.problems)]
    return report


class _Share(NamedTuple):
    """Streams that follow each other: those behind ``after``, up to ``last``."""

    after: int
    last: int


class _Found(NamedTuple):
    """What was found in a share.

    Attributes:
        tasks: How many rows there should be.
        wrong: The streams whose row is missing, too many, or not what the log says.
        to_write: Streams whose row is to be written anew, with the right one; None for none.
        problems: What keeps streams from being folded; their rows aren't looked at.
    """

    tasks: int
    wrong: list[int]
    to_write: dict[int, _Values | None]
    problems: list[str]


def _each_share(
    connection: Connection, helpers: Helpers, report: RebuildReport, progress: Progress | None
) -> Iterator[tuple[_Share, _Found]]:
    """Yield what is found in all streams, and count the tasks."""
    total: int = connection.execute(sa.select(sa.func.count()).select_from(streams)).scalar_one()
    for share, found in helpers.each(connection, _look, _shares(connection)):
        report.tasks += found.tasks
        yield share, found
        if progress is not None:
            progress(report.tasks, total)


def _shares(connection: Connection) -> Iterator[_Share]:
    """Divide all streams, by ascending stream."""
    ends = sa.select(sa.func.min(streams.c.stream_id) - 1, sa.func.max(streams.c.stream_id))
    last, end = connection.execute(ends).one()
    ahead = sa.select(streams.c.stream_id).order_by(streams.c.stream_id)
    ahead = ahead.offset(max(scanning.PAGE // 10, 1) - 1).limit(1)
    while end is not None and last < end:
        share = _Share(last, connection.scalar(ahead.where(streams.c.stream_id > last)) or end)
        yield share
        last = share.last


def _look(connection: Connection, share: _Share) -> _Found:
    """Hold what the driver gives for each row against what it would get for the right one."""
    folds, problems = leniently(connection, lambda: _fold(connection, share))
    right = _right_rows(connection, folds.values(), problems)
    folds = {key: fold for key, fold in folds.items() if key not in problems}
    on_server = connection.dialect.name == "postgresql"
    page = page_of(connection, _stored_rows(connection.dialect.name), share._asdict())
    stored = {row[0]: row for row in page}
    wrong = [key for key in folds if stored.get(key) != right.get(key)]
    written = set(wrong)
    if on_server:
        written.update(key for key, row in right.items() if _may_hide_a_difference(row))
    to_write = {key: right.get(key) for key in sorted(written)}
    return _Found(len(right), wrong, to_write, [problems[key] for key in sorted(problems)])


def _within_share(column: sa.Column[int]) -> sa.ColumnElement[bool]:
    """Return whether a stream is in the share that the statement is executed with."""
    return sa.and_(column > sa.bindparam("after"), column <= sa.bindparam("last"))


# Made once: to put them together for each share took a twentieth of the time.
_TOLD: Final = (
    sa.select(
        *(events.c.stream_id, events.c.version, events.c.type),
        *(events.c.schema_version, events.c.data),
        as_stored(events.c.recorded_at),
    )
    .where(_within_share(events.c.stream_id))
    .order_by(events.c.stream_id, events.c.version)
)
_THERE: Final = (
    sa.select(streams.c.stream_id, streams.c.task_id)
    .where(_within_share(streams.c.stream_id))
    .order_by(streams.c.stream_id)
)


def _replace(
    connection: Connection, to_write: Mapping[int, _Values | None], last: int
) -> list[int]:
    """Write the rows of these streams anew.

    Returns:
        The streams behind ``last`` that lost their row, because it had taken the name or the key
        of one of these.
    """
    rows = [row for row in to_write.values() if row is not None]
    taken: list[int] = []
    connection.execute(sa.delete(tasks).where(tasks.c.stream_id.in_(list(to_write))))
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
    ).where(_within_share(tasks.c.stream_id))


def _right_rows(
    connection: Connection, folds: Iterable[TaskFold], problems: dict[int, str]
) -> dict[int, _Values]:
    """Return the rows that there should be, by stream; adds to ``problems`` where that fails."""
    rows: list[TaskRow] = []
    for fold in folds:
        if fold.version and fold.stream_id not in problems:
            try:
                rows.append(fold.new_row())
            except UNREADABLE as error:
                problems[fold.stream_id] = f"{fold.task_id} can't be what was submitted ({error})"
    return {row[0]: row for row in _INSERT.bound(connection.dialect, rows)}


def _fold(connection: Connection, share: _Share) -> tuple[dict[int, TaskFold], dict[int, str]]:
    """Return the folds of these streams, by ascending stream, and what is wrong with others."""
    given = share._asdict()
    folds = {
        stream_id: TaskFold(task_id, stream_id)
        for stream_id, task_id in plain_rows(connection, _THERE, given)
    }
    with closing(plain_rows(connection, _TOLD, given)) as rows:
        return folds, _fold_in(folds, rows)


def _fold_in(folds: Mapping[int, TaskFold], rows: Iterable[tuple[Any, ...]]) -> dict[int, str]:
    """Fold events, by stream and version, into the folds of their streams.

    Returns:
        What is wrong with streams that can't be folded, by stream.
    """
    problems: dict[int, str] = {}
    fold: TaskFold | None = None
    expected = 1
    moment: datetime = NO_MOMENT
    moment_as_stored: object = None
    for stream_id, version, type_, schema_version, data, recorded_at in rows:
        if fold is None or stream_id != fold.stream_id:
            if stream_id in problems:
                continue
            fold = folds.get(stream_id)
            if fold is None:
                problems[stream_id] = (
                    f"an event of stream {stream_id} can't be folded, for there is no such stream"
                )
                continue
            expected = 1
        if recorded_at != moment_as_stored:
            moment, moment_as_stored = moment_of(recorded_at), recorded_at
        if type_ == Archived.type and expected == 1:
            expected = version  # what was before is in an archive; the event says how much it was
        problem: str | None = None
        if moment is NO_MOMENT:
            problem = "its time is none"
        elif version != expected:
            problem = f"version {expected} should come first"
        else:
            piece = decode_text(schema_version, data) if type_ == "chunk" else None
            if piece is None or not fold.apply_text(*piece):
                problem = _apply(fold, version, type_, schema_version, data, moment)
        expected += 1
        if problem is not None:
            problems[stream_id] = f"{fold.task_id} version {version} can't be folded ({problem})"
            fold = None
    return problems


def _apply(
    fold: TaskFold, version: int, type_: str, schema_version: int, data: str | bytes, at: datetime
) -> str | None:
    """Fold the next event in; returns what keeps it from that."""
    known = _decode_again if type_ == Running.type else decode
    try:
        fold.apply_one(known(type_, schema_version, data), at)
    except (DatabaseCorrupt, InvalidTransition, *UNREADABLE) as error:
        return str(error).removesuffix(f": {LOOK_CLOSER}")
    if fold.version != version:  # of what stands in for an archive
        return f"it should be version {fold.version}"
    return None


# What one worker claims with one model begins alike.
_decode_again: Final = lru_cache(maxsize=256)(decode)
