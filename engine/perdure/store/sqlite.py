"""A database in a SQLite file.

SQLite before 3.51.3 can lose a commit when a checkpoint runs while another connection commits and
starts the WAL anew ("WAL-reset bug", https://sqlite.org/wal.html#walresetbug). So no connection of
ours checkpoints by itself: the writer does, while a second connection of its own holds the write
lock, and with that lock taken nobody can commit. The checkpoint at the close of the last connection
is safe, for then nobody else is there.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from perdure.errors import DatabaseIncompatible, DatabaseUnavailable
from perdure.store import schema
from perdure.store.dialect import (
    ONE_MIGRATION,
    Dialect,
    Writer,
    alembic_config,
    origin_of,
    refuse_old,
    stored_revision,
    translating,
)
from perdure.store.readonly import (
    BUSY_SECONDS,
    Reader,
    describe_error,
    immutable,
    mentions,
    open_read_only,
    refuse_missing,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["Sqlite", "SqliteWriter"]

OLDEST_SQLITE: Final = (3, 35, 0)
CHECKPOINT_BYTES: Final = 4 * 2**20
CHECKPOINT_STEP: Final = 2**20
# Pages that one transaction gives back: writers wait for milliseconds, not for all of them.
VACUUM_STEP: Final = 2000
FAIR_PAUSE_SECONDS: Final = 0.003
ERASING_SECONDS: Final = 2.0
ERASED_BYTES: Final = 2**16  # a commit or two, of those who came in between


class Sqlite(Dialect):
    """A SQLite file that may not exist yet.

    Attributes:
        path: The file.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self.path = Path(str(url.database))
        self.place = str(self.path)

    def prepare(self, *, create: bool, upgrade: bool) -> None:
        """Make sure that the file is there, is ours, and has today's schema."""
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DatabaseIncompatible(
                f"SQLite {sqlite3.sqlite_version} is too old: perdure needs 3.35 or newer"
            )
        self._touch(create=create)
        with _translate(self.path):
            revision = self._revision()
            if revision == schema.REVISION:
                return
            if not upgrade:
                refuse_old(revision, self.path, _EMPTY)
            self._migrate()

    def upgrade(self) -> None:
        """Bring an older schema up to today's."""
        self.prepare(create=False, upgrade=True)

    def _touch(self, *, create: bool) -> None:
        """Create the file, readable by its owner only, where it is missing."""
        there = self.path.exists()
        if there or not create:
            refuse_missing(self.path)
        if there:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError as error:
            raise DatabaseUnavailable(
                f"can't create {self.path}: {error.strerror}; choose another place with --db"
            ) from None

    def _revision(self) -> str | None:
        """Return the schema's revision; None for an empty database."""
        with self.snapshot() as connection:  # looking at it must not wait for who writes
            return stored_revision(connection, self.path)

    def _migrate(self) -> None:
        from alembic import command

        with ONE_MIGRATION, self.migration() as connection:
            # Under the write lock: of several processes that start at once, one migrates.
            if stored_revision(connection, self.path) != schema.REVISION:
                command.upgrade(alembic_config(connection), "head")

    @contextlib.contextmanager
    def migration(self) -> Generator[Connection, None, None]:
        """Give a connection in a write transaction, for migrations, and commit at the end."""
        self._touch(create=True)
        _initialise(self.path)
        engine = self._sync_engine()
        try:
            with engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()

    def writer(self) -> SqliteWriter:
        """Open the connection to write with. Belongs to the thread that calls this."""
        with _translate(self.path):
            return SqliteWriter(self.path, self._sync_engine())

    def _sync_engine(self) -> Engine:
        engine = sa.create_engine(self.url, poolclass=NullPool)
        event.listen(engine, "connect", _prepare_connection)
        event.listen(engine, "begin", _begin_immediate)
        return engine

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Connection, None, None]:
        """Give a connection that sees one state of the database and keeps no writer out."""
        engine = sa.create_engine(
            self.url, poolclass=NullPool, creator=lambda: open_read_only(self.path)
        )
        event.listen(engine, "connect", _prepare_snapshot)
        event.listen(engine, "begin", _begin)
        try:
            with self.translate(), engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()

    def readers(self) -> AsyncEngine:
        """Make the pool of connections that can't write."""
        # Not before it is needed: it brings SQLAlchemy's ORM along, of which nothing is used.
        from sqlalchemy.ext.asyncio import create_async_engine

        url = self.url.set(drivername="sqlite+aiosqlite")
        if immutable(self.path):
            how = {"mode": "ro", "immutable": "1", "uri": "true"}
            url = url.set(database=self.path.absolute().as_uri(), query=how)
        # Who begins no transaction need not end one, which would be one more way to the thread.
        engine = create_async_engine(
            url, pool_size=4, max_overflow=0, pool_timeout=60, pool_reset_on_return=None
        )
        event.listen(engine.sync_engine, "connect", _prepare_reader)
        return engine

    def size(self) -> int:
        """Return how many bytes it takes on disk, with what is still in its WAL."""
        wal = self.path.with_name(self.path.name + "-wal")
        return sum(part.stat().st_size for part in (self.path, wal) if part.exists())

    def read_only(self) -> Reader:
        """Open a plain connection that can't change anything, for people's own SQL."""
        return Reader.open(self.path)

    def translate(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into a `StoreError` of one line."""
        return _translate(self.path)

    def pairs(self, values: Mapping[str, str]) -> sa.TableValuedAlias:
        """Return a table of ``values``, with the columns `key` and `value`, as one parameter."""
        return sa.func.json_each(orjson.dumps(values).decode()).table_valued("key", "value")

    def mentions(self, column: sa.Column[Any], text: str) -> sa.ColumnElement[bool]:
        """Return whether a column has a text in it, in upper or lower case."""
        if text.isascii():
            return super().mentions(column, text)
        # SQLite knows upper and lower case of ASCII letters only.
        return sa.func.perdure_mentions(column, text.casefold(), type_=sa.Boolean)


_EMPTY: Final = "run a task to set it up, or choose another with --db"


class SqliteWriter(Writer):
    """The connection that writes, and the one that keeps others out while it checkpoints."""

    def __init__(self, path: Path, engine: Engine) -> None:
        super().__init__()
        self._path = path
        self._engine = engine
        self.connection = engine.connect()
        self._raw: Any = self.connection.connection.dbapi_connection
        self._guard: sqlite3.Connection | None = None
        self._wal = path.with_name(path.name + "-wal")
        self._wal_size = 0
        self._checkpoint_at = CHECKPOINT_BYTES
        self._data_version = self._read_data_version()
        self._data_version_within = -1  # as the last transaction saw it

    def translated(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into a `StoreError` of one line."""
        return _translate(self._path)

    def begun(self) -> AbstractContextManager[object]:
        """Begin a transaction on the connection; commit at the end, roll back on an error."""
        return _Begun(self.connection, self._raw)

    def _read_data_version(self) -> int:
        return int(self._raw.execute("PRAGMA data_version").fetchone()[0])

    def others_committed(self) -> bool:
        """Return whether another connection has committed since this was last asked."""
        with _translate(self._path):
            seen = self._read_data_version()
        changed = seen != self._data_version
        self._data_version = seen
        return changed

    def undisturbed(self) -> bool:
        """Return, within a transaction, whether nobody else has written since this was asked last.

        Who holds the write lock sees the latest commit, and until it lets go there is no other.
        """
        seen = self._read_data_version()
        same = seen == self._data_version_within
        self._data_version_within = seen
        return same

    def checkpoint_if_due(self) -> None:
        """Copy the WAL back into the database once it has grown, with all writers kept out."""
        try:
            size = self._wal.stat().st_size
        except FileNotFoundError:
            size = 0
        if size < self._wal_size:  # it was started anew and cut
            self._checkpoint_at = CHECKPOINT_BYTES + CHECKPOINT_STEP
        self._wal_size = size
        if size < self._checkpoint_at:
            return
        self.checkpoint()
        # The next commit starts the WAL anew, unless a reader still looks at it; then trying again
        # at every commit would cost an fsync and bring nothing.
        self._checkpoint_at = max(size, CHECKPOINT_BYTES) + CHECKPOINT_STEP

    def checkpoint(self) -> None:
        """Copy the WAL back into the database, with all writers kept out."""
        with _translate(self._path):
            if self._guard is None:
                self._guard = sqlite3.connect(
                    self._path, isolation_level=None, timeout=BUSY_SECONDS
                )
                self._guard.execute("PRAGMA wal_autocheckpoint = 0")
            self._guard.execute("BEGIN IMMEDIATE")
            try:
                self._raw.execute("PRAGMA wal_checkpoint(PASSIVE)").close()
            finally:
                self._guard.execute("ROLLBACK")

    def erase(self) -> bool:
        """Make sure that what was overwritten is neither in the database nor in its WAL any more.

        Copies the WAL back and has it begin anew, cut to the last commit. Whoever still looks at an
        older state is waited for, for a while.

        Returns:
            Whether it is gone. If not, it goes with the next commits, or when the last one leaves.
        """
        deadline = time.monotonic() + ERASING_SECONDS
        with _translate(self._path):
            self._raw.execute("PRAGMA journal_size_limit = 0").close()
            try:
                while True:
                    self.checkpoint()
                    with self.connection.begin():  # it begins anew with the next commit: this one
                        # There and back: SQLite doesn't write what is equal to what was there.
                        for change in ("+ 1", "- 1"):
                            self.connection.exec_driver_sql(
                                f"UPDATE log_head SET position = position {change}"
                            ).close()
                    if self._wal.stat().st_size <= ERASED_BYTES:
                        return True
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(0.05)
            finally:
                self._raw.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_BYTES}").close()

    def vacuum(self, *, full: bool) -> None:
        """Give the space that nothing needs any more back to the disk.

        Args:
            full: Write the whole file anew, which takes as much space again while it lasts.
        """
        if full:
            with _translate(self._path):
                self._raw.execute("PRAGMA auto_vacuum = INCREMENTAL").close()
                self._raw.execute("VACUUM").close()
        else:
            while self._give_back(VACUUM_STEP):
                self.checkpoint_if_due()
                time.sleep(FAIR_PAUSE_SECONDS)  # for those who want to write
        self.checkpoint()

    def _give_back(self, pages: int) -> bool:
        """Give up to so many free pages back; returns whether there is more to give."""
        with _translate(self._path):
            before = self._raw.execute("PRAGMA freelist_count").fetchone()[0]
            # Each step of it frees a page, and `execute` would make only the first one.
            self._raw.executescript(f"PRAGMA incremental_vacuum({pages})").close()
            left = self._raw.execute("PRAGMA freelist_count").fetchone()[0]
        return bool(0 < left < before)

    def close(self) -> None:
        """Close everything; the last one to leave copies the WAL back."""
        if self._guard is not None:
            self._guard.close()
        self.connection.close()
        self._engine.dispose()


class _Begun:
    """A write transaction, by the driver alone where nothing is asked of SQLAlchemy.

    Its own way takes as long as all the statements of a small transaction.
    """

    def __init__(self, connection: Connection, raw: sqlite3.Connection) -> None:
        self._connection = connection
        self._raw = raw

    def __enter__(self) -> None:
        self._raw.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._roll_back()
            return
        try:
            noticed = self._connection.get_transaction()
            if noticed is None:
                self._raw.execute("COMMIT")
            else:
                noticed.commit()
        except BaseException:
            self._roll_back()
            raise

    def _roll_back(self) -> None:
        noticed = self._connection.get_transaction()
        try:
            if noticed is not None:
                noticed.rollback()
        finally:
            if self._raw.in_transaction:  # else SQLite has done it by itself, as on a full disk
                self._raw.execute("ROLLBACK")


def _initialise(path: Path) -> None:
    """Set what can only be set while a SQLite file is still empty."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
        try:
            if not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            # Changing the journal mode doesn't wait for others who do the same.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return
        finally:
            connection.close()


def _prepare_connection(dbapi: Any, _record: object) -> None:  # noqa: ANN401
    dbapi.isolation_level = None  # we say BEGIN ourselves
    for pragma in (
        f"busy_timeout = {int(BUSY_SECONDS * 1000)}",
        "synchronous = FULL",
        "foreign_keys = ON",
        "wal_autocheckpoint = 0",
        # Rows are written anew as a task goes on: each time its prompt's old place is overwritten,
        # or `redact` could not promise that the prompt is gone.
        "secure_delete = ON",
        f"journal_size_limit = {CHECKPOINT_BYTES}",
    ):
        dbapi.execute(f"PRAGMA {pragma}").close()


def _prepare_reader(dbapi: Any, _record: object) -> None:  # noqa: ANN401
    cursor = dbapi.cursor()
    for pragma in (
        f"busy_timeout = {int(BUSY_SECONDS * 1000)}",
        "query_only = ON",
        "wal_autocheckpoint = 0",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
    dbapi.create_function("perdure_mentions", 2, mentions, deterministic=True)


def _prepare_snapshot(dbapi: Any, _record: object) -> None:  # noqa: ANN401
    dbapi.row_factory = None
    dbapi.set_progress_handler(None, 0)
    _prepare_reader(dbapi, _record)


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Connection) -> None:
    raw: Any = connection.connection.dbapi_connection
    if not raw.in_transaction:  # else it takes part in one that was begun without it
        raw.execute("BEGIN IMMEDIATE")


def _translate(path: Path) -> AbstractContextManager[None]:
    return translating(lambda error: describe_error(str(origin_of(error)), path), sqlite3.Error)
