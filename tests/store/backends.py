"""The databases that the contract suites of the store run on.

A suite asks for the fixture `backend` and uses what every backend has; what only one of them has
asks for `sqlite` or `postgresql`.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

import psycopg
import sqlalchemy as sa
from psycopg.types.string import TextLoader
from sqlalchemy import Connection
from sqlalchemy.engine import make_url
from sqlalchemy.pool import NullPool

from perdure.events import Event, Running, Submitted
from perdure.store.database import Database
from perdure.store.log import EventLog
from perdure.store.postgresql import PostgresqlWriter
from perdure.store.schema import events, log_head, streams
from perdure.store.sqlite import SqliteWriter
from servers.postgresql import Server

Rows = list[tuple[Any, ...]]


@dataclass
class Store:
    """An open log, and the database under it."""

    database: Database
    log: EventLog

    async def submit(self, task_id: str, **task: Any) -> int:
        """Begin a stream."""
        return await self.log.append(task_id, [submitted(**task)], 0)

    async def start(self, task_id: str, **task: Any) -> int:
        """Begin a stream and its first attempt."""
        return await self.log.append(task_id, [submitted(**task), running()], 0)


def submitted(**task: Any) -> Submitted:
    """Return the beginning of a task."""
    return Submitted(task={"prompt": "Hello?", **task}, platforms=("demo",))


def running(attempt: int = 1, **fields: Any) -> Running:
    """Return the beginning of an attempt."""
    return Running(**{"attempt": attempt, "worker": "w", "platform": "demo", **fields})


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncGenerator[Store, None]:
    """Open the log of a database, and close it again."""
    database = Database(url)
    log = EventLog(database)
    await log.open()
    try:
        yield Store(database, log)
    finally:
        await log.close()
        await database.close()


def append_newer(url: str, *task_ids: str, type_: str = "invented") -> None:
    """Append an event that only a newer perdure can append to each stream, as one does."""
    writer = Database(url).writer()
    for task_id in task_ids:
        with writer.transaction() as connection:
            place = connection.scalar(
                sa.update(log_head)
                .values(position=log_head.c.position + 1)
                .returning(log_head.c.position)
            )
            stream_id, version = connection.execute(
                sa.update(streams)
                .where(streams.c.task_id == task_id)
                .values(version=streams.c.version + 1)
                .returning(streams.c.stream_id, streams.c.version)
            ).one()
            connection.execute(
                sa.insert(events).values(
                    position=place,
                    stream_id=stream_id,
                    version=version,
                    type=type_,
                    schema_version=1,
                    data="{}",
                    recorded_at=writer.now(),
                    digest=bytes(32),
                )
            )
    writer.close()


History = tuple[str, list[tuple[Event, ...]]]


async def write(url: str, *histories: History) -> None:
    """Write whole histories into a database that nobody has open."""
    async with opened(url) as store:
        await tell_all(store, *histories)


async def tell_all(store: Store, *histories: History) -> None:
    """Write whole histories, each step in a transaction of its own, taking turns."""
    versions = dict.fromkeys((task_id for task_id, _ in histories), 0)
    for turn in range(max((len(steps) for _, steps in histories), default=0)):
        for task_id, steps in histories:
            if turn < len(steps):
                versions[task_id] = await store.log.append(task_id, steps[turn], versions[task_id])


class SqliteShell:
    """What somebody can do to a file with a plain SQLite shell: everything."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=10)
        for name, on in (("foreign_keys", "OFF"), ("ignore_check_constraints", "ON")):
            self._connection.execute(f"PRAGMA {name} = {on}")

    def drop_defences(self) -> None:
        """Drop the triggers that keep history as it is."""
        for (name,) in self.run("SELECT name FROM sqlite_master WHERE type = 'trigger'"):
            self.run(f'DROP TRIGGER "{name}"')

    def run(self, sql: str, **parameters: Any) -> Rows:
        """Execute a statement and return its rows."""
        return self._connection.execute(sql, parameters).fetchall()

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()


class Sqlite:
    """Databases in files."""

    dialect = "sqlite"
    writer = SqliteWriter
    no_moment = "'yesterday'"
    # Types that are no JSON, no moment, no text: the ways in which a value can be juggled.
    juggled = (
        "5", "-1", "0.5", "NULL", "''", "'x'", "x''", "x'00'", "x'ff'", "CAST(x'ff' AS TEXT)",
        "CAST(x'c3' AS TEXT)", "'a' || char(10) || 'b'", "'[]'", "'null'", "'{}'", "9e999",
        "9223372036854775807", "char(0)", "'2026-02-30T00:00:00.000000Z'",
        "CAST(x'eda080' AS TEXT)",
    )  # fmt: skip

    def __init__(self, directory: Path, empty: Path) -> None:
        self._directory = directory
        self._empty = empty
        self._made = 0

    @staticmethod
    def execute(connection: Connection, sql: str, parameters: Any = ()) -> Rows:
        """Execute a statement of the suites on a connection of ours, and return its rows."""
        result = connection.exec_driver_sql(sql, tuple(parameters))
        return [tuple(row) for row in result.all()] if result.returns_rows else []

    @contextlib.contextmanager
    def vandalised(self, url: str) -> Generator[Connection, None, None]:
        """Give a connection to a copy of a database, its defences dropped."""
        copy = self.copy(url)
        with self.shell(copy):
            pass
        engine = sa.create_engine(copy, poolclass=NullPool)
        sa.event.listen(engine, "connect", _as_we_read)
        sa.event.listen(engine, "begin", lambda begun: begun.exec_driver_sql("BEGIN"))
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
            yield connection

    @staticmethod
    def exact(name: str) -> str:
        """Return how to ask for a column's values to the last bit."""
        return f"typeof({name}), quote({name})"

    @staticmethod
    def viewed(name: str) -> str:
        """Return what a view makes of stored JSON."""
        return name

    def new(self) -> str:
        """Return the URL of a new, empty database of today's schema."""
        self._made += 1
        path = shutil.copy(self._empty, self._directory / f"store{self._made}.db")
        return f"sqlite:///{path}"

    def copy(self, url: str) -> str:
        """Return the URL of a copy of a database that nobody has open."""
        self._made += 1
        path = shutil.copy(self.path(url), self._directory / f"store{self._made}.db")
        return f"sqlite:///{path}"

    @staticmethod
    def path(url: str) -> Path:
        """Return the database's file."""
        return Path(url.removeprefix("sqlite:///"))

    @classmethod
    @contextlib.contextmanager
    def shell(cls, url: str) -> Generator[SqliteShell, None, None]:
        """Give a shell that can do everything, the defences dropped."""
        shell = SqliteShell(cls.path(url))
        try:
            shell.drop_defences()
            yield shell
        finally:
            shell.close()

    @classmethod
    def change(cls, url: str, sql: str) -> None:
        """Execute a statement with all defences up."""
        connection = sqlite3.connect(cls.path(url))
        try:
            with connection:
                connection.execute(sql)
        finally:
            connection.close()

    @classmethod
    def query(cls, url: str, sql: str, **parameters: Any) -> Rows:
        """Return what a query finds, read by nothing of ours."""
        connection = sqlite3.connect(cls.path(url), timeout=10)
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            connection.close()


class PostgresqlShell:
    """What a superuser can do: everything."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = as_suites_speak(connection)
        # No foreign key, no trigger of ours either.
        self._connection.execute("SET session_replication_role = replica")

    def drop_defences(self) -> None:
        """Drop the triggers and the checks that keep history as it is."""
        found = self.run(
            "SELECT DISTINCT trigger_name, event_object_table FROM information_schema.triggers"
        )
        for name, table in found:
            self.run(f'DROP TRIGGER "{name}" ON {table}')
        self.run("DROP TRIGGER IF EXISTS events_not_truncated ON events")
        checks = "SELECT conname, conrelid::regclass::text FROM pg_constraint WHERE contype = 'c'"
        for name, table in self.run(f"{checks} AND conrelid <> 0"):
            if not table.startswith(("pg_", "information_schema")):
                self.run(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"')

    def run(self, sql: str, **parameters: Any) -> Rows:
        """Execute a statement and return its rows."""
        return run_on_postgresql(self._connection, sql, parameters)

    def close(self) -> None:
        """Give the connection back."""
        self._connection.close()


# Functions that SQLite has, so that the suites need only one way to say things.
VOCABULARY = """
CREATE SCHEMA sqlite;
CREATE FUNCTION sqlite.hex(bytea) RETURNS text
    RETURN upper(encode($1, 'hex'));
CREATE FUNCTION sqlite.zeroblob(integer) RETURNS bytea
    RETURN decode(repeat('00', $1), 'hex');
CREATE FUNCTION sqlite.quote(anyelement) RETURNS text LANGUAGE sql AS
    $$ SELECT pg_typeof($1)::text || ' ' || coalesce($1::text, 'NULL') $$;
CREATE FUNCTION sqlite.replace(json, text, text) RETURNS json
    RETURN replace($1::text, $2, $3)::json;
CREATE FUNCTION sqlite.beside(text, json, text) RETURNS json
    RETURN ($1 || $2::text || $3)::json;
CREATE FUNCTION sqlite.json_extract(json, text) RETURNS text
    RETURN $1 #>> string_to_array(substr($2, 3), '.');
CREATE FUNCTION sqlite.json_set(json, text, text) RETURNS json
    RETURN jsonb_set($1::jsonb, string_to_array(substr($2, 3), '.'), to_jsonb($3))::json;
CREATE FUNCTION sqlite.json_set(json, text, json) RETURNS json
    RETURN jsonb_set($1::jsonb, string_to_array(substr($2, 3), '.'), $3::jsonb)::json;
CREATE FUNCTION sqlite.json_set(json, text, integer) RETURNS json
    RETURN jsonb_set($1::jsonb, string_to_array(substr($2, 3), '.'), to_jsonb($3))::json;
CREATE FUNCTION sqlite.json_remove(json, text) RETURNS json
    RETURN ($1::jsonb #- string_to_array(substr($2, 3), '.'))::json;
CREATE FUNCTION sqlite.max(bytea, bytea) RETURNS bytea
    RETURN greatest($1, $2);
CREATE AGGREGATE sqlite.max(bytea) (SFUNC = sqlite.max, STYPE = bytea);
"""
_WORDS = (
    (re.compile(r"\bx'([0-9a-f]*)'"), r"'\\x\1'::bytea"),
    (re.compile(r"\bAS BLOB\b"), "AS bytea"),
    (re.compile(r"\bjson_object\("), "json_build_object("),
    (re.compile(r"%"), "%%"),
    (re.compile(r"\?"), "%s"),
    (re.compile(r"(?<!:):([a-z_]+)"), r"%(\1)s"),
)


def _as_we_read(dbapi: sqlite3.Connection, _record: object) -> None:
    dbapi.isolation_level = None
    dbapi.text_factory = lambda stored: stored.decode(errors="surrogateescape")


def said_to_postgresql(sql: str) -> bytes:
    """Return a statement of the suites, which speak as SQLite does, as PostgreSQL takes it."""
    # What is between quotes stays, but for the blobs.
    parts = re.split(r"(x'[0-9a-f]*'|'(?:[^']|'')*')", sql)
    for index, part in enumerate(parts):
        words = _WORDS if index % 2 == 0 else _WORDS[:1] if part.startswith("x") else _WORDS[3:4]
        for pattern, word in words:
            part = pattern.sub(word, part)
        parts[index] = part
    return "".join(parts).encode()


def run_on_postgresql(
    connection: psycopg.Connection[Any], sql: str, parameters: Any = None
) -> Rows:
    """Execute a statement; moments, days and sums come as SQLite has them."""
    cursor = connection.execute(said_to_postgresql(sql), parameters or ())
    if not cursor.description:
        return []
    return [tuple(_plain(value) for value in row) for row in cursor.fetchall()]


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")[:26] + "Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value == int(value) else float(value)
    return int(value) if isinstance(value, bool) else value


def as_suites_speak(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """Have a connection give JSON as text, and know the vocabulary."""
    for name in ("json", "jsonb"):
        connection.adapters.register_loader(name, TextLoader)
    connection.execute("SET search_path = sqlite, public, pg_catalog")
    return connection


def _raw(connection: Connection) -> psycopg.Connection[Any]:
    found: Any = connection.connection.dbapi_connection
    return found  # type: ignore[no-any-return]


class _Undo(Exception):
    pass


class Postgresql:
    """Databases on a server, each a copy of one that was migrated once."""

    dialect = "postgresql"
    writer = PostgresqlWriter
    no_moment = "'infinity'"
    juggled = (
        "5", "-1", "NULL", "''", "'x'", "'\\x'", "'\\x00'", "'[]'", "'null'", "'{}'",
        "9223372036854775807", "'infinity'", "'-infinity'", "'0044-03-15 00:00:00+00 BC'",
        "'294276-01-01 00:00:00+00'", "chr(10)", "true",
    )  # fmt: skip

    def __init__(self, server: Server, empty: str) -> None:
        self.server = server
        self._empty = empty
        self._made: list[str] = []

    @staticmethod
    def execute(connection: Connection, sql: str, parameters: Any = ()) -> Rows:
        """Execute a statement of the suites on a connection of ours, and return its rows."""
        return run_on_postgresql(_raw(connection), sql, tuple(parameters))

    @contextlib.contextmanager
    def vandalised(self, url: str) -> Generator[Connection, None, None]:
        """Give a connection in a transaction that drops the defences and never commits."""
        with contextlib.suppress(_Undo), Database(url).migration() as connection:
            PostgresqlShell(_raw(connection)).drop_defences()
            yield connection
            raise _Undo

    @staticmethod
    def exact(name: str) -> str:
        """Return how to ask for a column's values to the last bit."""
        return f"CAST({name} AS TEXT)"

    @staticmethod
    def viewed(name: str) -> str:
        """Return what a view makes of stored JSON."""
        return f"{name}::jsonb"

    def new(self) -> str:
        """Return the URL of a new, empty database of today's schema."""
        return self._copy(self._empty)

    def copy(self, url: str) -> str:
        """Return the URL of a copy of a database that nobody has open."""
        return self._copy(self.name(url))

    def bare(self) -> str:
        """Return the URL of a new database with nothing in it."""
        return self._copy("template1")

    def _copy(self, template: str) -> str:
        name = f"store_{secrets.token_hex(6)}"
        self._made.append(name)
        self.server.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return self.server.url(name)

    def drop_all(self) -> None:
        """Drop what was made."""
        for name in self._made:
            self.server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    @staticmethod
    def name(url: str) -> str:
        """Return the database's name."""
        return str(make_url(url).database)

    @contextlib.contextmanager
    def shell(self, url: str) -> Generator[PostgresqlShell, None, None]:
        """Give a shell that can do everything, the defences dropped."""
        shell = PostgresqlShell(self.server.connect(self.name(url)))
        try:
            shell.drop_defences()
            yield shell
        finally:
            shell.close()

    def change(self, url: str, sql: str) -> None:
        """Execute a statement with all defences up."""
        with self.server.connect(self.name(url)) as connection:
            run_on_postgresql(as_suites_speak(connection), sql)

    def query(self, url: str, sql: str, **parameters: Any) -> Rows:
        """Return what a query finds, read by nothing of ours."""
        with self.server.connect(self.name(url)) as connection:
            return run_on_postgresql(as_suites_speak(connection), sql, parameters)


Backend: TypeAlias = Sqlite | Postgresql
AllBackends: TypeAlias = dict[str, Backend]
