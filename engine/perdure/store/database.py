"""One database, of whatever kind: where it is, and how it is read and written.

Writing and reading go separate ways. The log's writer thread has one ordinary, synchronous
connection; everybody else reads through asynchronous ones. Nothing that an asyncio task does while
it can be cancelled ever holds a write lock, and reads are shielded, since a cancelled await leaks
the connection it was using.

What SQLite and PostgreSQL do differently is in the module of each, behind `Dialect`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import unquote

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from perdure.errors import DatabaseIncompatible, StoreError
from perdure.store.dialect import HURRIED_SECONDS, Dialect, Writer, spelt_url, stored_revision
from perdure.store.direct import Statement
from perdure.store.readonly import (
    IN_MEMORY,
    UNREADABLE_URL,
    Reader,
    file_at,
    path_of,
    text_of,
)
from perdure.store.sqlite import Sqlite

if TYPE_CHECKING:  # on SQLite, who reads in threads does without (see `Dialect.readers`)
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["Database", "Writer", "parse_url", "shown_url"]

T = TypeVar("T")

# Seconds to wait before each further try of a read that failed for reasons that pass.
READING_PATIENCE: Final = (0.0, 0.05, 0.1, 0.2, 0.5, *(1.0,) * 59)

# SQLAlchemy before 2.1 takes the name of a database as it is spelt.
_LEFT_SPELT: Final = make_url("postgresql:///%25").database == "%25"


def parse_url(url: str | os.PathLike[str]) -> URL:
    """Return the database that ``url``, a URL or a SQLite file's path, stands for.

    Raises:
        DatabaseIncompatible: It names a database that perdure can't use.
    """
    text = text_of(url)
    if "://" not in text:
        return URL.create("sqlite", database=str(path_of(text)))
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise DatabaseIncompatible(UNREADABLE_URL) from None
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        if _LEFT_SPELT and parsed.database is not None:
            parsed = parsed.set(database=unquote(parsed.database))
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite":
        raise DatabaseIncompatible(
            f"{parsed.drivername!r} is no database that perdure can use: give a file's path, "
            "sqlite:///FILE or postgresql://USER@HOST/NAME"
        )
    if parsed.host:
        raise DatabaseIncompatible(
            "the URL of a file has three slashes, as in sqlite:///perdure.db, or four before a "
            "path from the root"
        )
    if not parsed.database:
        raise DatabaseIncompatible(IN_MEMORY)
    return URL.create("sqlite", database=str(file_at(parsed.database)))


def shown_url(url: URL) -> str:
    """Return a URL for people to read: without passwords, wherever they are in it."""
    secret = [name for name in url.query if "password" in name]
    shown = url.update_query_dict(dict.fromkeys(secret, "***"))
    return spelt_url(shown, hide_password=True)


def _dialect(url: URL) -> Dialect:
    if url.get_backend_name() == "sqlite":
        return Sqlite(url)
    from perdure.store.postgresql import Postgresql  # its driver need not be installed

    return Postgresql(url)


class Database:
    """A database that may not exist yet.

    Attributes:
        url: Where it is.
        dialect: What its kind does in its own way.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = parse_url(url)
        self.dialect: Dialect = _dialect(self.url)
        self._readers: AsyncEngine | None = None
        self._reads: set[asyncio.Task[Any]] = set()
        self._hurried = False

    def __repr__(self) -> str:
        return f"Database({shown_url(self.url)!r})"

    @property
    def path(self) -> Path:
        """The SQLite file.

        Raises:
            DatabaseIncompatible: The database isn't one.
        """
        if isinstance(self.dialect, Sqlite):
            return self.dialect.path
        raise DatabaseIncompatible(f"{self.dialect.place} is no file")

    @property
    def address(self) -> str:
        """What another process opens the same database with; it holds the password."""
        if isinstance(self.dialect, Sqlite):
            return str(self.dialect.path)
        return spelt_url(self.url)

    # -- opening ---------------------------------------------------------------------------------

    def prepare(self, *, create: bool = True, upgrade: bool = True) -> None:
        """Make sure that the database is there, is ours, and has today's schema. Blocking.

        Args:
            create: Create it when it isn't there. Only files; a server's databases are set up with
                `upgrade`.
            upgrade: Bring an older schema up to today's. Only files.

        Raises:
            DatabaseUnavailable: It can't be opened, or isn't there and may not be created.
            DatabaseIncompatible: It isn't perdure's, or was written by a newer perdure.
        """
        self.dialect.prepare(create=create, upgrade=upgrade)

    def revision(self) -> str | None:
        """Return the revision of the schema; None where there is none. Blocking.

        Raises:
            DatabaseUnavailable: It can't be reached.
            DatabaseIncompatible: It isn't perdure's, or was written by a newer perdure.
        """
        with self.snapshot() as connection:
            return stored_revision(connection, self.dialect.place)

    def upgrade(self) -> None:
        """Create the tables in a database that is there, or bring an older schema up. Blocking.

        Raises:
            DatabaseUnavailable: It can't be reached or written to.
            DatabaseIncompatible: It isn't perdure's, or was written by a newer perdure.
        """
        self.dialect.upgrade()

    def migration(self) -> AbstractContextManager[Connection]:
        """Give a connection in a write transaction, for migrations, and commit at the end."""
        return self.dialect.migration()

    # -- writing ---------------------------------------------------------------------------------

    def writer(self) -> Writer:
        """Open the connection to write with. Belongs to the thread that calls this."""
        return self.dialect.writer()

    # -- reading ---------------------------------------------------------------------------------

    def snapshot(self) -> AbstractContextManager[Connection]:
        """Give a connection that sees one state of the database and keeps no writer out. Blocking.

        Text that is no UTF-8, which only somebody else can have written, comes with surrogates.
        """
        return self.dialect.snapshot()

    async def read(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return what ``query`` returns on a connection that can't write.

        Cancelling the caller doesn't cancel the query: a cancelled await would leak its connection.
        """
        task = asyncio.ensure_future(self._read(query))
        self._reads.add(task)
        task.add_done_callback(self._forget_read)
        return await asyncio.shield(task)

    def _forget_read(self, task: asyncio.Task[Any]) -> None:
        self._reads.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked may be gone, and asyncio would print it

    async def _read(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        if self._readers is None:
            self._readers = self.dialect.readers()
        patience = list(READING_PATIENCE)
        waited = 0.0
        while True:
            try:
                with self.dialect.translate():
                    async with self._readers.connect() as connection:
                        return await query(connection)
            except StoreError as error:
                # A server is away for a moment when it is restarted. Reading twice does no harm.
                over = not patience or (self._hurried and waited >= HURRIED_SECONDS)
                if over or not self.dialect.is_passing(error):
                    raise
                waited += patience[0]
                await asyncio.sleep(patience.pop(0))

    def hurry(self) -> None:
        """Wait no longer than some seconds for a database that is in trouble, from now on."""
        self._hurried = True

    async def rows(self, statement: sa.Executable) -> list[sa.RowMapping]:
        """Return all rows of one statement, by column name."""

        async def query(connection: AsyncConnection) -> list[sa.RowMapping]:
            return list((await connection.execute(statement)).mappings())

        return await self.read(query)

    async def fetch(self, statement: Statement, *values: object) -> list[dict[str, Any]]:
        """Return all rows of a statement that is asked again and again, by column name.

        Args:
            statement: A SELECT.
            values: For its parameters, in their order.
        """
        return await self.read(lambda connection: statement.mappings(connection, *values))

    def pairs(self, values: Mapping[str, str]) -> sa.TableValuedAlias:
        """Return a table of ``values``, with the columns `key` and `value`, as one parameter."""
        return self.dialect.pairs(values)

    @property
    def now(self) -> datetime:
        """The time by the clock that all who share the database go by (UTC)."""
        return self.dialect.now

    async def close(self) -> None:
        """Give back the reading connections."""
        if self._reads:
            await asyncio.wait(self._reads)
        if self._readers is not None:
            await self._readers.dispose()
            self._readers = None

    def read_only(self) -> Reader:
        """Open a plain connection that can't change anything, for people's own SQL."""
        return self.dialect.read_only()
