"""Events as they are read back from the log: those of one stream, or what is new in many.

A row that can't be read, as of a newer perdure, is no trouble of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection

from perdure.errors import DatabaseCorrupt, StoreError
from perdure.events import LOOK_CLOSER, RecordedEvent, decode
from perdure.store.direct import Statement, is_among
from perdure.store.schema import Timestamp, events, log_head, streams

__all__ = [
    "ALL",
    "EVENTS_OF",
    "FIRST_EVENTS",
    "Unread",
    "fetch_news",
    "head_and_news",
    "recorded",
]

# With more streams than that to follow, naming them all costs more than looking at every event.
MOST_NAMED: Final = 200


class _Moment(Timestamp):
    """A moment; None for one that is none, so that the rows beside it can be fetched."""

    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ANN401
        """Turn what is stored into a moment."""
        try:
            return super().process_result_value(value, dialect)
        except ValueError:
            return None


_EVENTS: Final = sa.select(
    events.c.position,
    streams.c.task_id,
    events.c.version,
    events.c.type,
    events.c.schema_version,
    events.c.data,
    sa.type_coerce(events.c.recorded_at, _Moment).label("recorded_at"),
)
_OF_STREAMS: Final = _EVENTS.join_from(events, streams, events.c.stream_id == streams.c.stream_id)
ALL: Final = 2**62  # as many as there are
EVENTS_OF: Final = Statement(
    _OF_STREAMS.where(
        streams.c.task_id == sa.bindparam("task_id"), events.c.version > sa.bindparam("after")
    )
    .order_by(events.c.version)
    .limit(sa.bindparam("most", type_=sa.BigInteger)),
    ("task_id", "after", "most"),
)
FIRST_EVENTS: Final = Statement(
    _OF_STREAMS.where(is_among(streams.c.task_id, "task_ids"), events.c.version == 1),
    ("task_ids",),
)
# For what is new. What is computed is in no index: so SQLite begins with the events after a
# position, and not with the streams and all events of each, which a long task has many of.
_SELECT_NEWS: Final = _EVENTS.join_from(
    events, streams, streams.c.stream_id == events.c.stream_id + 0
)
_NAME: Final = streams.c.task_id + ""


def recorded(row: Mapping[str, Any]) -> RecordedEvent:
    """Return the event that a row of one of these statements holds.

    Raises:
        DatabaseIncompatible: A newer perdure wrote it.
        DatabaseCorrupt: It can't be what was written.
    """
    if row["recorded_at"] is None:
        raise DatabaseCorrupt(
            f"the moment of the event at position {row['position']} is unreadable: {LOOK_CLOSER}"
        )
    return RecordedEvent(
        position=row["position"],
        task_id=row["task_id"],
        version=row["version"],
        event=decode(row["type"], row["schema_version"], row["data"]),
        recorded_at=row["recorded_at"],
    )


class Unread(NamedTuple):
    """Where an event is that can't be read, and why: a newer perdure wrote it, or it is damaged."""

    position: int
    task_id: str
    error: StoreError


async def fetch_news(
    connection: AsyncConnection,
    *,
    wanted: tuple[str, ...],
    since: int,
    late: tuple[str, ...],
    before: int,
) -> tuple[int, list[RecordedEvent | Unread]]:
    """Return the log's head and what is new: of ``late`` after ``before``, else after ``since``."""
    head, news = await _behind(connection, wanted, since)
    if late and before < since:
        _head, missed = await _behind(connection, late, before)
        news = [one for one in missed if one.position <= since] + news
    return head, news


async def _behind(
    connection: AsyncConnection, wanted: tuple[str, ...], after: int
) -> tuple[int, list[RecordedEvent | Unread]]:
    """Return the log's head and the events of these streams after ``after``."""
    if len(wanted) <= MOST_NAMED:
        rows = await _NEWS_OF.mappings(connection, after, wanted)
    else:
        rows = await _NEWS.mappings(connection, after)
    if not rows:
        raise DatabaseCorrupt("the log has lost its head row: restore a backup")
    names = frozenset(wanted)
    return rows[0]["head"], [_read_row(row) for row in rows if row["task_id"] in names]


def _read_row(row: Mapping[str, Any]) -> RecordedEvent | Unread:
    """Return the event that a row holds; one that can't be read is no trouble of the others."""
    try:
        return recorded(row)
    except StoreError as error:
        return Unread(row["position"], row["task_id"], error)


def head_and_news(*, of_some: bool) -> sa.Select[*tuple[Any, ...]]:
    """Return the statement for the log's head, beside each event behind the position ``after``.

    One statement, since each takes some switches from thread to thread, and readers wait.

    Args:
        of_some: Only those of the tasks ``names``.
    """
    news = _SELECT_NEWS.where(events.c.position > sa.bindparam("after"))
    if of_some:
        news = news.where(is_among(_NAME, "names"))
    found = news.subquery()
    return (
        sa.select(log_head.c.position.label("head"), found)
        .join_from(log_head, found, sa.true(), isouter=True)
        .order_by(found.c.position)
    )


_NEWS: Final = Statement(head_and_news(of_some=False), ("after",))
_NEWS_OF: Final = Statement(head_and_news(of_some=True), ("after", "names"))
