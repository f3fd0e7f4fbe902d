"""Reading rows that somebody else may have written: whatever is stored, reading it is no error."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import sqlalchemy as sa

from perdure.store.readonly import iso
from perdure.store.schema import Timestamp, events

__all__ = [
    "NO_MOMENT",
    "PAGE",
    "RECORDED_AT",
    "UNREADABLE",
    "AnyTimestamp",
    "Progress",
    "as_stored",
]

# Called with how much is done, and how much there is.
Progress = Callable[[int, int], None]

PAGE: Final = 5000

# What comes of values that only somebody else can have stored.
UNREADABLE: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def as_stored(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return the column's values as they are stored, whatever they are."""
    raw: sa.ColumnElement[Any] = sa.type_coerce(column, sa.types.NullType()).label(column.name)
    return raw


class AnyTimestamp(Timestamp):
    """A moment as it is stored; the year 1, which fits no digest, where it is none."""

    cache_ok = True

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:  # noqa: ANN401
        """Turn what is stored into a moment."""
        if value is None:
            return None
        if isinstance(value, datetime):  # the driver's year 1 is what Python has no value for
            return max(NO_MOMENT, value)
        try:
            return _moment(value)
        except (TypeError, ValueError, OverflowError):
            return NO_MOMENT


@lru_cache(maxsize=1024)  # all events of a transaction have one, and reading it takes as long as
def _moment(value: str) -> datetime:  # all the rest of the event
    moment = datetime.fromisoformat(value)
    written = iso(moment) if moment.tzinfo is not None else None
    return moment if value == written else NO_MOMENT  # else it would sort in another place


NO_MOMENT: Final = datetime(1, 1, 1, tzinfo=UTC)
RECORDED_AT: Final = sa.type_coerce(events.c.recorded_at, AnyTimestamp).label("recorded_at")
