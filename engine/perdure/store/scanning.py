"""Reading rows that somebody else may have written: whatever is stored, reading it is no error."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from perdure.store.bulk import plain_pages
from perdure.store.dialect import any_text
from perdure.store.readonly import iso

__all__ = [
    "NO_MOMENT",
    "PAGE",
    "UNREADABLE",
    "Progress",
    "as_stored",
    "leniently",
    "moment_of",
    "page_of",
]

T = TypeVar("T")

# Called with how much is done, and how much there is.
Progress = Callable[[int, int], None]

PAGE: Final = 5000

# What comes of values that only somebody else can have stored.
UNREADABLE: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def as_stored(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return the column's values as they are stored, whatever they are."""
    raw: sa.ColumnElement[Any] = sa.type_coerce(column, sa.types.NullType()).label(column.name)
    return raw


def page_of(
    connection: Connection,
    statement: sa.Select[*tuple[Any, ...]],
    parameters: Mapping[str, object] | None = None,
) -> list[tuple[Any, ...]]:
    """Return all rows of a query, as `leniently` reads them."""
    return leniently(
        connection,
        lambda: list(chain.from_iterable(plain_pages(connection, statement, parameters))),
    )


def leniently(connection: Connection, read: Callable[[], T]) -> T:
    """Return what ``read`` returns, text that is no UTF-8 with surrogates in it.

    Decoding leniently takes a call in Python for each text, as long as all else that is done to
    an event. So it is read as UTF-8, and once more where some of it turns out not to be that.
    """
    if connection.dialect.name != "sqlite":
        return read()
    try:
        with _utf8(connection):
            return read()
    except (sqlite3.OperationalError, OperationalError) as error:
        if "decode" not in str(error):
            raise
    with any_text(connection):
        return read()


@contextmanager
def _utf8(connection: Connection) -> Generator[None, None, None]:
    raw: Any = connection.connection.dbapi_connection
    before, raw.text_factory = raw.text_factory, str
    try:
        yield
    finally:
        raw.text_factory = before


def moment_of(stored: Any) -> datetime:  # noqa: ANN401 - somebody else may have stored anything
    """Return a moment that was read as it is stored; the year 1, which fits no digest, if none."""
    if isinstance(stored, datetime):  # the driver's year 1 is what Python has no value for
        return max(NO_MOMENT, stored)
    try:
        return _moment(stored)
    except (TypeError, ValueError, OverflowError):
        return NO_MOMENT


@lru_cache(maxsize=1024)  # all events of a transaction have one, and reading it takes as long as
def _moment(value: str) -> datetime:  # all the rest of the event
    moment = datetime.fromisoformat(value)
    written = iso(moment) if moment.tzinfo is not None else None
    return moment if value == written else NO_MOMENT  # else it would sort in another place


NO_MOMENT: Final = datetime(1, 1, 1, tzinfo=UTC)
