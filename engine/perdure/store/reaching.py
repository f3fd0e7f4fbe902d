"""Reaching a PostgreSQL server: what connections are opened with, and what its errors mean."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from perdure.errors import (
    DatabaseCorrupt,
    DatabaseIncompatible,
    DatabaseUnavailable,
    StoreError,
)
from perdure.store.dialect import origin_of, spelt_url
from perdure.store.readonly import BUSY_SECONDS, UNREADABLE_URL

__all__ = [
    "CONNECT",
    "conninfo_of",
    "is_lost",
    "is_passing",
    "is_read_only",
    "patiently",
    "shown_place",
    "translated",
]

T = TypeVar("T")

# So long one that takes no connections just now is asked again, before anything has begun.
OPENING_SECONDS: Final = 5.0
CONNECT: Final[Mapping[str, Any]] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "application_name": "perdure",
    "prepare_threshold": None,  # a prepared statement belongs to the session, too
}

# What another try can mend, by the class of the SQLSTATE or the whole of it: connections, too many
# of them, the server's shutdown and start, conflicts between transactions, a server that became a
# standby.
_READ_ONLY: Final = "25006"
_PASSING: Final = ("08", "40", "53300", "57P", "25P03", "25P04", _READ_ONLY)


# Too many connections, by the server's and PgBouncer's words; a server that starts or ends. Of a
# connection that was refused libpq tells the words and no SQLSTATE; in other languages they are
# unknown here, and said at once.
_NOT_NOW: Final = (
    "too many clients",
    "too many connections",
    "remaining connection slots",
    "no more connections allowed",
    "the database system is",
)


def conninfo_of(url: URL) -> str:
    """Return what the driver connects with, as SQLAlchemy does; it holds the password.

    Raises:
        DatabaseIncompatible: The URL can't be read.
    """
    dialect: Any = PGDialect_psycopg
    try:
        # libpq finds mistakes that are no longer seen in the parts, such as a lone bracket.
        conninfo_to_dict(spelt_url(url.set(drivername="postgresql")))
        _none, options = dialect().create_connect_args(url)
        return make_conninfo(**options)
    except (psycopg.ProgrammingError, ArgumentError, ValueError):  # which show the password
        raise DatabaseIncompatible(UNREADABLE_URL) from None


def patiently(connect: Callable[[], T]) -> T:
    """Return the connection that ``connect`` opens; for a moment again where none is taken now.

    Raises:
        SQLAlchemyError: It can't be opened; or psycopg's own error, as ``connect`` raises it.
    """
    deadline = time.monotonic() + OPENING_SECONDS
    pause = 0.05
    while True:
        try:
            return connect()
        except (SQLAlchemyError, psycopg.Error) as error:
            said = str(origin_of(error))
            passes = is_lost(error) and any(words in said for words in _NOT_NOW)
            if not passes or time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def shown_place(url: URL) -> str:
    """Return where a database is, for people to read: no password, no options."""
    host = url.host or url.query.get("host") or "localhost"
    port = f":{url.port}" if url.port else ""
    return f"PostgreSQL database {url.database or url.username or ''} at {host}{port}"


def is_passing(error: BaseException) -> bool:
    """Return whether another try can mend what the driver raised, or what was made of it."""
    state = getattr(_raised(error), "sqlstate", None) or ""
    return is_lost(error) or state.startswith(_PASSING)


def is_lost(error: BaseException) -> bool:
    """Return whether the connection is gone with it."""
    origin = _raised(error)
    if not isinstance(origin, psycopg.OperationalError | psycopg.InterfaceError):
        return False
    state = origin.sqlstate
    return state is None or state.startswith(("08", "57P", "25P03", "25P04"))


def is_read_only(error: BaseException) -> bool:
    """Return whether it says that nothing may be written, as on a standby."""
    return getattr(_raised(error), "sqlstate", None) == _READ_ONLY


def _raised(error: BaseException) -> BaseException:
    cause = error.__cause__ if isinstance(error, StoreError) and error.__cause__ else error
    return origin_of(cause)


def translated(error: BaseException, place: str) -> StoreError:
    """Return the error of one line for what the driver or SQLAlchemy raised."""
    origin = origin_of(error)
    state = getattr(origin, "sqlstate", None) or ""
    what = " ".join(str(origin).split())
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable(f"{place}: all reading connections are busy: try again")
    if state == "55P03":
        return DatabaseUnavailable(
            f"{place} is locked by another session for more than {BUSY_SECONDS:.0f} s: "
            "end what holds it and try again"
        )
    if state == "53100":
        return DatabaseUnavailable(f"no space left for {place}: free some and run again")
    if state == _READ_ONLY:
        return DatabaseUnavailable(
            f"{place} takes no writes ({what}): it is read-only, or a standby; name the primary"
        )
    if state == "42501":
        return DatabaseUnavailable(f"{place} refuses: {what}; check the role's rights")
    if state == "3D000":
        return DatabaseUnavailable(f"{place} does not exist: create it with createdb")
    if state in ("28P01", "28000"):
        return DatabaseUnavailable(f"{place} does not let us in: check user and password")
    if state.startswith("XX"):
        return DatabaseCorrupt(f"{place} is damaged ({what}): restore a backup")
    return DatabaseUnavailable(f"{place}: {what}")
