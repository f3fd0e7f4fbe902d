"""One database: where it is, how it is opened, and all that differs between SQLite and PostgreSQL.

Writing and reading go separate ways. The log's writer thread has one ordinary, synchronous
connection; everybody else reads through asynchronous ones. Nothing that an asyncio task does while
it can be cancelled ever holds a write lock, and reads are shielded, since a cancelled await leaks
the connection it was using.

SQLite before 3.51.3 can lose a commit when a checkpoint runs while another connection commits and
starts the WAL anew ("WAL-reset bug", https://sqlite.org/wal.html#walresetbug). So no connection of
ours checkpoints by itself: the writer does, while a second connection of its own holds the write
lock, and with that lock taken nobody can commit. The checkpoint at the close of the last connection
is safe, for then nobody else is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from perdure.errors import (
    DatabaseIncompatible,
    DatabaseUnavailable,
    StoreError,
)
from perdure.store import schema
from perdure.store.readonly import BUSY_SECONDS, Reader, describe_error, refuse_missing

__all__ = ["Database", "Writer", "any_text", "parse_url", "translate"]

T = TypeVar("T")

OLDEST_SQLITE: Final = (3, 35, 0)
FIRST_SAFE_SQLITE: Final = (3, 51, 3)
CHECKPOINT_BYTES: Final = 4 * 2**20
CHECKPOINT_STEP: Final = 2**20
ERASING_SECONDS: Final = 2.0
ERASED_BYTES: Final = 2**16  # a commit or two, of those who came in between


def parse_url(url: str | os.PathLike[str]) -> URL:
    """Return the database that ``url``, a URL or a SQLite file's path, stands for.

    Raises:
        DatabaseIncompatible: It names a database that perdure can't use.
    """
    text = os.fspath(url)
    if "://" not in text:
        return URL.create("sqlite", database=str(Path(text).expanduser()))
    try:
        parsed = make_url(text)
    except ArgumentError:
        raise DatabaseIncompatible(
            "the database URL can't be read: give a file's path or sqlite:///FILE"
        ) from None
    if parsed.get_backend_name() != "sqlite":
        raise DatabaseIncompatible(
            f"{parsed.get_backend_name()!r} is no database that perdure can use: give a file's "
            "path or sqlite:///FILE"
        )
    if parsed.database in (None, "", ":memory:"):
        raise DatabaseIncompatible(
            "a database in memory is gone with the process: give a file, as in sqlite:///perdure.db"
        )
    return URL.create("sqlite", database=str(Path(str(parsed.database)).expanduser()))


class Database:
    """A database that may not exist yet.

    Attributes:
        url: Where it is.
        path: The SQLite file.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = parse_url(url)
        self.path = Path(str(self.url.database))
        self._readers: AsyncEngine | None = None
        self._reads: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"Database({self.url.render_as_string(hide_password=True)!r})"

    # -- opening ---------------------------------------------------------------------------------

    def prepare(self, *, create: bool = True, upgrade: bool = True) -> None:
        """Make sure that the database is there, is ours, and has today's schema. Blocking.

        Args:
            create: Create it when it isn't there.
            upgrade: Bring an older schema up to today's.

        Raises:
            DatabaseUnavailable: It can't be opened, or isn't there and may not be created.
            DatabaseIncompatible: It isn't perdure's, or was written by a newer perdure.
        """
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise DatabaseIncompatible(
                f"SQLite {sqlite3.sqlite_version} is too old: perdure needs 3.35 or newer"
            )
        self._touch(create=create)
        with translate(self.path):
            revision = self._revision()
            if revision == schema.REVISION:
                return
            if not upgrade and revision is None:
                raise DatabaseIncompatible(
                    f"{self.path} is empty: run a task to set it up, or choose another with --db"
                )
            if not upgrade:
                raise DatabaseIncompatible(
                    f"{self.path} has schema {revision}, this perdure needs {schema.REVISION}: "
                    "run `perdure db upgrade`"
                )
            self._migrate()

    def _touch(self, *, create: bool) -> None:
        """Create the file, readable by its owner only, where it is missing."""
        if not create or self.path.is_dir():
            refuse_missing(self.path)
        if self.path.exists():
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
            return _revision(connection, self.path)

    def _migrate(self) -> None:
        from alembic import command

        with self.migration() as connection:
            # Under the write lock: of several processes that start at once, one migrates.
            if _revision(connection, self.path) != schema.REVISION:
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

    # -- writing ---------------------------------------------------------------------------------

    def writer(self) -> Writer:
        """Open the connection to write with. Belongs to the thread that calls this."""
        with translate(self.path):
            return Writer(self.path, self._sync_engine())

    def _sync_engine(self) -> Engine:
        engine = sa.create_engine(self.url, poolclass=NullPool)
        event.listen(engine, "connect", _prepare_connection)
        event.listen(engine, "begin", _begin_immediate)
        return engine

    # -- reading ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Connection, None, None]:
        """Give a connection that sees one state of the database and keeps no writer out. Blocking.

        Text that is no UTF-8, which only somebody else can have written, comes with surrogates.
        """
        engine = sa.create_engine(self.url, poolclass=NullPool)
        event.listen(engine, "connect", _prepare_snapshot)
        event.listen(engine, "begin", _begin)
        try:
            with translate(self.path), engine.begin() as connection:
                yield connection
        finally:
            engine.dispose()

    async def read(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return what ``query`` returns on a connection that can't write.

        Cancelling the caller doesn't cancel the query: a cancelled await would leak its connection.
        """
        task = asyncio.ensure_future(self._read(query))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)
        return await asyncio.shield(task)

    async def _read(self, query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        with translate(self.path):
            async with self._reader_engine().connect() as connection:
                return await query(connection)

    async def rows(self, statement: sa.Executable) -> list[sa.RowMapping]:
        """Return all rows of one statement, by column name."""

        async def query(connection: AsyncConnection) -> list[sa.RowMapping]:
            return list((await connection.execute(statement)).mappings())

        return await self.read(query)

    def pairs(self, values: Mapping[str, str]) -> sa.TableValuedAlias:
        """Return a table of ``values``, with the columns `key` and `value`, as one parameter."""
        return sa.func.json_each(orjson.dumps(values).decode()).table_valued("key", "value")

    def is_one_of(self, column: sa.Column[Any], values: Iterable[str]) -> sa.ColumnElement[bool]:
        """Return the condition that ``column`` has one of ``values``: one parameter for all."""
        listed = sa.func.json_each(orjson.dumps(list(values)).decode()).table_valued("value")
        return column.in_(sa.select(listed.c.value))

    async def pages(
        self, statement: sa.Select[Any], after: sa.Column[Any], size: int = 1000
    ) -> AsyncGenerator[list[sa.RowMapping], None]:
        """Yield the rows page by page along ``after``, an ascending column of the selection.

        No transaction stays open in between, so a long export never holds back a checkpoint.
        """
        last: Any = None
        while True:
            page = statement.order_by(after).limit(size)
            rows = await self.rows(page if last is None else page.where(after > last))
            if rows:
                yield rows
            if len(rows) < size:
                return
            last = rows[-1][after.name]

    def _reader_engine(self) -> AsyncEngine:
        if self._readers is None:
            url = self.url.set(drivername="sqlite+aiosqlite")
            self._readers = create_async_engine(url, pool_size=4, max_overflow=0, pool_timeout=60)
            event.listen(self._readers.sync_engine, "connect", _prepare_reader)
        return self._readers

    async def close(self) -> None:
        """Give back the reading connections."""
        if self._reads:
            await asyncio.wait(self._reads)
        if self._readers is not None:
            await self._readers.dispose()
            self._readers = None

    def read_only(self) -> Reader:
        """Open a plain connection that can't change anything, for people's own SQL."""
        return Reader.open(self.path)


class Writer:
    """The write side of a database: one connection, and what differs per dialect around it."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self._path = path
        self._engine = engine
        self.connection = engine.connect()
        self._raw: Any = self.connection.connection.dbapi_connection
        self._guard: sqlite3.Connection | None = None
        self._wal = path.with_name(path.name + "-wal")
        self._wal_size = 0
        self._checkpoint_at = CHECKPOINT_BYTES
        self._data_version = self._read_data_version()

    @contextlib.contextmanager
    def transaction(self) -> Generator[Connection, None, None]:
        """Give the connection in a write transaction; commit at the end, roll back on an error."""
        with translate(self._path), self.connection.begin():
            yield self.connection

    def now(self) -> datetime:
        """Return the time that is written into the log (UTC)."""
        return datetime.now(UTC)

    def _read_data_version(self) -> int:
        return int(self._raw.execute("PRAGMA data_version").fetchone()[0])

    def others_committed(self) -> bool:
        """Return whether another connection has committed since this was last asked."""
        with translate(self._path):
            seen = self._read_data_version()
        changed = seen != self._data_version
        self._data_version = seen
        return changed

    def checkpoint_if_due(self) -> None:
        """Copy the WAL back into the database once it has grown, with all writers kept out."""
        size = self._wal.stat().st_size if self._wal.exists() else 0
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
        with translate(self._path):
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
        with translate(self._path):
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
        with translate(self._path):
            if full:
                self._raw.execute("PRAGMA auto_vacuum = INCREMENTAL").close()
            # Each step of it frees a page, and `execute` would make only the first one.
            self._raw.executescript("VACUUM" if full else "PRAGMA incremental_vacuum").close()
        self.checkpoint()

    def close(self) -> None:
        """Close everything; the last one to leave copies the WAL back."""
        if self._guard is not None:
            self._guard.close()
        self.connection.close()
        self._engine.dispose()


@contextlib.contextmanager
def any_text(connection: Connection) -> Generator[None, None, None]:
    """Let text that is no UTF-8, which only somebody else can have stored, come with surrogates."""
    if connection.dialect.name != "sqlite":
        yield
        return
    raw: Any = connection.connection.dbapi_connection
    before, raw.text_factory = raw.text_factory, _decode_leniently
    try:
        yield
    finally:
        raw.text_factory = before


def alembic_config(connection: Connection) -> Any:  # noqa: ANN401 - alembic is imported lazily
    """Return alembic's configuration for migrations over ``connection``."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "perdure_migrations:")
    config.attributes["connection"] = connection
    return config


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


def _prepare_snapshot(dbapi: Any, _record: object) -> None:  # noqa: ANN401
    dbapi.isolation_level = None
    dbapi.text_factory = _decode_leniently
    _prepare_reader(dbapi, _record)


def _decode_leniently(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _revision(connection: Connection, path: Path) -> str | None:
    """Return the schema's revision; None for an empty database.

    Raises:
        DatabaseIncompatible: It isn't perdure's, or is newer than this code.
    """
    names = set(sa.inspect(connection).get_table_names())
    if not names - {"alembic_version"}:
        return None
    if not {"alembic_version", "log_head", "events"} <= names:
        raise DatabaseIncompatible(
            f"{path} is a database of some other program: choose another file with --db"
        )
    found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    revision = str(found) if found is not None else None
    if revision != schema.REVISION and revision not in _known_revisions():
        raise DatabaseIncompatible(
            f"{path} has schema {revision}, written by a newer perdure than this one "
            f"(schema {schema.REVISION}): upgrade perdure"
        )
    return revision


def _known_revisions() -> set[str]:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "perdure_migrations:")
    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}


@contextlib.contextmanager
def translate(path: Path) -> Generator[None, None, None]:
    """Turn what the driver raises into a `StoreError` of one line. The one boundary for that."""
    try:
        yield
    except StoreError:
        raise
    except IntegrityError:
        raise  # the log knows what it was doing, and decides
    except (SQLAlchemyError, sqlite3.Error) as error:
        raise _translated(error, path) from error


def _translated(error: Exception, path: Path) -> StoreError:
    origin = error.orig if isinstance(error, DBAPIError) and error.orig else error
    return describe_error(str(origin), path)
