"""A database on a PostgreSQL server.

Any number of processes write. What keeps them apart is PostgreSQL's own: row locks on the streams
that a transaction appends to (taken in one order by all), then on the head of the log; a process
waits for another one only for the moment between those two and the commit. The time is the
server's, so hosts need not agree on it.

Nothing is set for a session, only for a transaction: behind a proxy that pools transactions the
session belongs to others as well.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from perdure.errors import DatabaseIncompatible, DatabaseUnavailable, StoreError
from perdure.store import schema
from perdure.store.dialect import (
    HURRIED_SECONDS,
    ONE_MIGRATION,
    Dialect,
    News,
    Writer,
    alembic_config,
    refuse_old,
    spelt_url,
    stored_revision,
    take_time,
    translating,
)
from perdure.store.direct import ROUND_TRIPS
from perdure.store.readonly import BUSY_SECONDS, Reader
from perdure.store.schema import events, log_head

try:
    import psycopg
    from psycopg.types.datetime import TimestamptzLoader
    from psycopg.types.string import TextLoader
except ImportError:
    raise DatabaseIncompatible(
        "for PostgreSQL a driver is missing: pip install 'perdure[postgres]'"
    ) from None

from perdure.store.listening import CHANNEL, Listener
from perdure.store.reaching import (
    CONNECT,
    conninfo_of,
    is_lost,
    is_passing,
    is_read_only,
    patiently,
    shown_place,
    translated,
)
from perdure.store.roundtrips import RoundTrips

__all__ = ["Postgresql", "PostgresqlWriter"]

OLDEST_POSTGRESQL: Final = 12_00_00
# So long the server may be away, restarted or replaced, before whoever waits for it is told.
PATIENCE_SECONDS: Final = 60.0
# Between two tries.
FIRST_PAUSE_SECONDS: Final = 0.01
LONGEST_PAUSE_SECONDS: Final = 1.0
# A writer that stops in the middle of a transaction (paused, cut off) keeps everybody waiting: the
# server ends it after that time. Before version 17 it does so only where it waits for the next
# statement, not where it waits for the rest of one.
ABANDONED_SECONDS: Final = 20
# Any number will do, as long as nobody else takes the same one.
_MIGRATION_LOCK: Final = schema.APPLICATION_ID


class Postgresql(Dialect):
    """A database on a server."""

    def __init__(self, url: URL) -> None:
        self.url = url.set(drivername="postgresql+psycopg")
        self._conninfo = conninfo_of(self.url)
        self.place = shown_place(url)
        self.skew = timedelta()
        self.token = secrets.token_hex(6)

    def prepare(self, *, create: bool, upgrade: bool) -> None:
        """Make sure that the database is there, is ours, and has today's schema.

        It is never created or changed on the way, whatever the arguments say: on a server that many
        workers share that is a step of its own.
        """
        with self.snapshot() as connection:
            self._check_server(connection)
            revision = self._revision(connection)
        if revision != schema.REVISION:
            refuse_old(revision, self.place, "`perdure db upgrade` sets it up")

    def upgrade(self) -> None:
        """Create the tables, or bring an older schema up to today's."""
        from alembic import command

        with ONE_MIGRATION, self.translate(), self.migration() as connection:
            take_time(connection)
            self._check_server(connection)
            if self._revision(connection) != schema.REVISION:
                command.upgrade(alembic_config(connection), "head")

    def _check_server(self, connection: Connection) -> None:
        raw: Any = connection.connection.dbapi_connection
        if raw.info.server_version < OLDEST_POSTGRESQL:
            raise DatabaseIncompatible(
                f"{self.place} is on PostgreSQL {raw.info.server_version // 10000}: perdure needs "
                f"{OLDEST_POSTGRESQL // 10000} or newer"
            )

    def _revision(self, connection: Connection) -> str | None:
        known = connection.exec_driver_sql(
            "SELECT to_regclass('log_head') IS NOT NULL AND to_regclass('alembic_version') IS NOT "
            "NULL"
        ).scalar()
        if known:
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            if found == schema.REVISION:
                return str(found)
        return stored_revision(connection, self.place)

    @contextlib.contextmanager
    def migration(self) -> Generator[Connection, None, None]:
        """Give a connection in a write transaction, for migrations, and commit at the end."""
        engine = self._sync_engine()
        try:
            with patiently(engine.connect) as connection, connection.begin():
                # Of several that start at once, one migrates; DDL is in the transaction.
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
                yield connection
        finally:
            engine.dispose()

    def writer(self) -> PostgresqlWriter:
        """Open the connection to write with. Belongs to the thread that calls this."""
        with self.translate():
            return PostgresqlWriter(self, self._sync_engine())

    def _sync_engine(self) -> Engine:
        engine = sa.create_engine(self.url, poolclass=NullPool, **_ENGINE)
        event.listen(engine, "connect", self._prepare_writer)
        event.listen(engine, "begin", _begin)
        event.listen(engine, "before_cursor_execute", _sync)
        event.listen(engine, "commit", _sync)
        event.listen(engine, "rollback", _drop)
        return engine

    def _prepare_writer(self, dbapi: Any, record: Any) -> None:  # noqa: ANN401
        _prepare_connection(dbapi, record)
        dbapi.autocommit = True  # we say BEGIN ourselves
        record.info[ROUND_TRIPS] = RoundTrips(dbapi, _BEGIN, self._set_skew)

    def _set_skew(self, skew: timedelta) -> None:
        self.skew = skew

    @contextlib.contextmanager
    def snapshot(self) -> Generator[Connection, None, None]:
        """Give a connection that sees one state of the database and keeps no writer out."""
        engine = sa.create_engine(
            self.url,
            poolclass=NullPool,
            **_ENGINE,
            isolation_level="REPEATABLE READ",
            execution_options={"postgresql_readonly": True},
        )
        event.listen(engine, "connect", _prepare_connection)
        try:
            with self.translate(), patiently(engine.connect) as connection, connection.begin():
                yield connection
        finally:
            engine.dispose()

    def readers(self) -> AsyncEngine:
        """Make the pool of connections that can't write."""
        engine = create_async_engine(
            self.url, pool_size=4, max_overflow=0, pool_timeout=60, **_ENGINE
        )
        event.listen(engine.sync_engine, "connect", _prepare_reader)
        return engine

    def listener(self, on_news: Callable[[News], None], active: Callable[[], bool]) -> Listener:
        """Return what hears of other processes' commits."""
        return Listener(self._connect_plainly, on_news, active, self.token)

    async def _connect_plainly(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True, **CONNECT)

    def size(self) -> int:
        """Return how many bytes its tables and indexes take on disk."""
        with self.snapshot() as connection:
            return sum(
                connection.exec_driver_sql(f"SELECT pg_total_relation_size('{table}')").scalar_one()
                for table in schema.metadata.tables
            )

    def read_only(self) -> Reader:
        """Open a plain connection that can't change anything, for people's own SQL."""
        return Reader.open(spelt_url(self.url))

    def translate(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into a `StoreError` of one line."""
        return translating(lambda error: translated(error, self.place), psycopg.Error)

    @property
    def now(self) -> datetime:
        """The time by the server's clock (UTC), as far as this process has heard of it."""
        return datetime.now(UTC) + self.skew

    def is_passing(self, error: BaseException) -> bool:
        """Return whether a read that failed with ``error`` may be tried again."""
        return is_passing(error) and not is_read_only(error)

    def pairs(self, values: Mapping[str, str]) -> sa.TableValuedAlias:
        """Return a table of ``values``, with the columns `key` and `value`, as one parameter."""
        given = sa.cast(orjson.dumps(values).decode(), schema.PostgresqlJson("JSONB"))
        return sa.func.jsonb_each_text(given).table_valued("key", "value")


class PostgresqlWriter(Writer):
    """The connection that writes."""

    races = True
    tells = True

    def __init__(self, dialect: Postgresql, engine: Engine) -> None:
        super().__init__()
        self._dialect = dialect
        self._engine = engine
        self._trouble_since: float | None = None
        self.connection = patiently(engine.connect)

    def translated(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into a `StoreError` of one line."""
        return self._dialect.translate()

    def now(self) -> datetime:
        """Return the time that is written into the log (UTC): the server's."""
        return _trips_of(self.connection).now

    def settle(self, error: BaseException, mark: tuple[int, bytes] | None) -> bool:
        """Find out what became of a transaction that ended in an error, where another try can help.

        Whether a commit whose answer never came has happened is read back, on a new connection: the
        head of the log is locked for that, so that whoever had it locked before has come to an end,
        one way or the other. What is found then is final.

        Trouble is waited out for `PATIENCE_SECONDS` from its first error on, whatever the errors
        are: a server may refuse for ever what it answers at once. It isn't counted from the
        beginning of the transaction, in which a process may have been stopped for hours, and lasts
        until a transaction is committed: when patience is over, all that comes is tried once.

        Args:
            error: What `transaction` raised.
            mark: The position and the digest of the last event that was to be written.

        Returns:
            Whether it was committed; if not, nothing was, and it may be done again.

        Raises:
            BaseException: ``error``, where another try can't help, or waiting was in vain.
        """
        if not is_passing(error):
            raise error
        if self._trouble_since is None:
            self._trouble_since = time.monotonic()
        unknown = self.committing and mark is not None
        failure = error
        while unknown or not self._is_out_of_patience():
            self._pause()
            try:
                # Where nothing may be written, another server may have become the primary.
                if is_lost(error) or is_read_only(error) or self._is_disconnected() or unknown:
                    self._reconnect()
                if unknown and mark is not None and self._has(mark):
                    return True
                unknown = False
                if not self._is_out_of_patience():
                    return False
            except (SQLAlchemyError, psycopg.Error) as caught:
                failure = caught
                if self._is_out_of_patience():
                    break
        self._disconnect()  # whoever comes next begins with a new connection
        final = failure
        if not isinstance(failure, StoreError):
            final = translated(failure, self._dialect.place)
        if unknown:
            final = DatabaseUnavailable(f"{final}; what was written last may be there")
        if final is error:
            raise error
        raise final from failure

    def _is_out_of_patience(self) -> bool:
        since = self._trouble_since
        patience = HURRIED_SECONDS if self.hurried.is_set() else PATIENCE_SECONDS
        return since is not None and time.monotonic() - since > patience

    def _pause(self) -> None:
        """Wait for a moment: as long as the trouble has lasted, and up to a second."""
        lasted = time.monotonic() - (self._trouble_since or 0.0)
        pause = min(max(lasted, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        pause = random.uniform(pause / 2, pause)  # noqa: S311 - so that rivals part
        if self.hurried.is_set():
            time.sleep(pause)
        else:
            self.hurried.wait(pause)

    @contextlib.contextmanager
    def begun(self) -> Generator[None, None, None]:
        """Begin a transaction on the connection; commit at the end, roll back on an error."""
        with self.connection.begin():
            yield
            _trips_of(self.connection).commit()
        self._trouble_since = None

    def ready(self) -> None:
        """Make sure that there is a connection to begin a transaction on."""
        if self._is_disconnected():
            self._reconnect()

    def _is_disconnected(self) -> bool:
        return self.connection.closed or self.connection.invalidated

    def _disconnect(self) -> None:
        if not self.connection.closed:
            self.connection.invalidate()
            self.connection.close()

    def _reconnect(self) -> None:
        self._disconnect()
        self.connection = self._engine.connect()

    def _has(self, mark: tuple[int, bytes]) -> bool:
        position, digest = mark
        with self.connection.begin():
            self.connection.execute(sa.select(log_head.c.position).with_for_update())
            found = self.connection.execute(
                sa.select(events.c.digest).where(events.c.position == position)
            ).scalar()
        return found is not None and bytes(found) == digest

    def others_committed(self) -> bool:
        """Return whether another connection has committed since this was last asked."""
        return False  # a listener hears of it, not the writer

    def announce(self, *, work: bool) -> None:
        """Tell other processes that something was committed: a hint, which may get lost."""
        raw: Any = self.connection.connection.dbapi_connection
        payload = f"{self._dialect.token} {'w' if work else '-'}"
        # What others are told of is safe already: this needs no flush of its own.
        with self.translated():
            raw.execute(
                "BEGIN; SET LOCAL synchronous_commit = off; "
                f"SELECT pg_notify('{CHANNEL}', '{payload}'); COMMIT"
            )

    def checkpoint_if_due(self) -> None:
        """Do nothing: the server sees to that."""

    def erase(self) -> bool:
        """Have what was overwritten overwritten on disk as well; returns whether it is gone.

        The server keeps old versions of rows until it vacuums. What it has written to its
        write-ahead log, and what was backed up, stays until those are recycled.
        """
        return False

    def vacuum(self, *, full: bool) -> None:
        """Give the space that nothing needs any more back to the server, with ``full`` to the disk.

        Args:
            full: Write the tables anew; nobody can use them meanwhile.

        Raises:
            DatabaseUnavailable: The role may not do it to all tables; to the others it was done.
        """
        raw: Any = self.connection.connection.dbapi_connection
        warnings: list[str] = []

        def hear(said: psycopg.errors.Diagnostic) -> None:
            if said.severity_nonlocalized == "WARNING":
                warnings.append(said.message_primary or "")

        refused: list[str] = []
        raw.add_notice_handler(hear)
        try:
            with self.translated():
                for table in schema.metadata.tables:
                    raw.execute(f"VACUUM ({'FULL, ANALYZE' if full else 'ANALYZE'}) {table}")
                    # A table that it may not touch the server skips, and only warns of that.
                    refused += [said for said in warnings if table in said]
                    warnings.clear()
        finally:
            raw.remove_notice_handler(hear)
        if refused:
            raise DatabaseUnavailable(
                f"{self._dialect.place} was not vacuumed ({refused[0]}): what was redacted may "
                "still be in its files; do it as the role that owns the tables"
            )

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(SQLAlchemyError, psycopg.Error):
            self.connection.close()
        self._engine.dispose()


_ENGINE: Final[Mapping[str, Any]] = {"use_native_hstore": False, "connect_args": CONNECT}
_BEGIN: Final = f"""
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SELECT set_config('idle_in_transaction_session_timeout', '{ABANDONED_SECONDS}s', true),
        set_config('lock_timeout', '{BUSY_SECONDS:.0f}s', true),
        CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
        THEN set_config('transaction_timeout', '{ABANDONED_SECONDS}s', true) END,
        clock_timestamp()"""


class _AnyTimestamptz(TimestamptzLoader):
    """A moment in UTC; the year 1 for one that Python doesn't know (infinity, before Christ)."""

    def load(self, data: Any) -> datetime:  # noqa: ANN401 - bytes, as psycopg has them
        try:
            return super().load(data).astimezone(UTC)
        except (psycopg.DataError, OverflowError):
            return datetime(1, 1, 1, tzinfo=UTC)


def _prepare_connection(dbapi: Any, _record: object) -> None:  # noqa: ANN401
    adapters = getattr(dbapi, "driver_connection", dbapi).adapters
    for name in ("json", "jsonb"):  # as text: what is hashed is what is stored
        adapters.register_loader(name, TextLoader)
    adapters.register_loader("timestamptz", _AnyTimestamptz)


def _trips_of(connection: Connection) -> RoundTrips:
    trips: RoundTrips = connection.info[ROUND_TRIPS]
    return trips


def _begin(connection: Connection) -> None:
    _trips_of(connection).begin()


def _sync(connection: Connection, *_what: object) -> None:
    """Have done what comes before a statement that SQLAlchemy executes, or its commit."""
    _trips_of(connection).sync()


def _drop(connection: Connection) -> None:
    if not connection.invalidated:
        _trips_of(connection).drop()


def _prepare_reader(dbapi: Any, record: object) -> None:  # noqa: ANN401
    _prepare_connection(dbapi, record)
    dbapi.set_read_only(True)
