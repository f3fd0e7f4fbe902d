"""Statements straight on the driver's connection: the same rows, however they are fetched."""

from __future__ import annotations

import contextlib
import enum
import math
import re
import sqlite3
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from perdure.errors import StoreError
from perdure.events import Completed
from perdure.store import bulk, direct
from perdure.store.bulk import Bulk
from perdure.store.database import Database
from perdure.store.direct import Statement, has_one_of, is_among
from perdure.store.records import Records
from perdure.store.schema import blobs, events, streams, tasks
from perdure.task import TaskStatus
from store.backends import Store, opened

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
_STREAMS = Statement(
    sa.select(streams.c.stream_id, streams.c.task_id)
    .where(is_among(streams.c.task_id, "names"), streams.c.version > 0)
    .order_by(streams.c.task_id.desc()),
    ("names",),
)
_MOVE = Statement(
    sa.update(streams)
    .where(is_among(streams.c.stream_id, "keys"))
    .values(version=streams.c.version + sa.bindparam("by")),
    ("by", "keys"),
)
_ALL = Statement(sa.select(streams))
_ROWS = Bulk(streams, ("stream_id", "task_id", "version"))


@pytest.fixture
def connection(database_url: str) -> Generator[Connection, None, None]:
    """A connection in a transaction, with a thousand streams."""
    database = Database(database_url)
    database.prepare()
    writer = database.writer()
    try:
        with writer.transaction() as connection:
            _ROWS.execute(connection, [(n, f"täsk_{n:04}", 1) for n in range(1000)])
            yield connection
    finally:
        writer.close()


def test_rows_in_order(connection: Connection) -> None:
    """Any number of values, none too, is one parameter; rows come in the order asked for."""
    wanted = [f"täsk_{n:04}" for n in (3, 999, 500, 5000)]
    assert [tuple(row) for row in _STREAMS.rows(connection, wanted)] == [
        (999, "täsk_0999"),
        (500, "täsk_0500"),
        (3, "täsk_0003"),
    ]
    assert not _STREAMS.rows(connection, [])
    assert len(_STREAMS.rows(connection, [f"täsk_{n:04}" for n in range(1000)])) == 1000


def test_any_number_of_values(connection: Connection) -> None:
    """As many as no statement could have parameters; another column and other values are others."""
    many = [f"täsk_{n:04}" for n in range(260_000)]
    count = sa.select(sa.func.count()).select_from(streams)
    odd = ['a "quoted" one', "a\\b", "{a,b}", "NULL", ""]
    for values, found in ((many, 1000), (many[:7], 7), (odd, 0), ([], 0)):
        named = has_one_of(streams.c.task_id, values)
        assert connection.scalar(count.where(named)) == found
        assert connection.scalar(count.where(sa.not_(named))) == 1000 - found
    assert connection.scalar(count.where(has_one_of(streams.c.stream_id, range(3)))) == 3
    assert connection.scalar(count.where(has_one_of(streams.c.version, [1]))) == 1000


def test_changes_are_counted(connection: Connection) -> None:
    """What changes rows says how many."""
    assert _MOVE.change(connection, 4, [1, 2, 1001]) == 2
    found = connection.scalars(sa.select(streams.c.stream_id).where(streams.c.version == 5))
    assert sorted(found) == [1, 2]


@pytest.mark.parametrize("count", [0, 1, 7, 999])
def test_many_rows_are_changed(connection: Connection, count: int) -> None:
    """Rows are found by their key and changed, the others stay."""
    changing = Bulk(streams, ("version", "stream_id"), key="stream_id")
    changing.execute(connection, [(n + 10, n) for n in range(count)])
    found = connection.execute(sa.select(streams.c.stream_id, streams.c.version))
    versions = {row.stream_id: row.version for row in found}
    assert versions == {n: n + 10 if n < count else 1 for n in range(1000)}


def test_much_text_is_sent_in_parts(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No statement grows without limit, for reading it takes a server ever longer."""
    sizes: list[int] = []

    def defer(connection: Connection, sql: str, parameters: Any) -> None:
        values = parameters.values() if isinstance(parameters, dict) else parameters
        sizes.append(sum(len(value) for value in values if isinstance(value, str)))
        direct.defer(connection, sql, parameters)

    monkeypatch.setattr(bulk, "defer", defer)
    rows = [(f"digest_{n}", size, bytes(size)) for n, size in enumerate([10**6, 3 * 10**6] * 4)]
    Bulk(blobs, ("digest", "size", "data")).execute(connection, rows)
    assert max(sizes) < 7 * 10**6  # one alone, at two letters a byte
    found = connection.execute(sa.select(blobs).order_by(blobs.c.digest)).all()
    assert [(row.digest, row.size, bytes(row.data)) for row in found] == rows


_COLUMNS = ("stream_id", "model", "input_tokens", "cost_usd", "cancel_requested", "labels")
_ALIKE = (None, 7, 0.5, True, '{"a":"b"}')
_SOME: list[tuple[Any, ...]] = [
    ('gemini \\" é', None, 1e-7, False, '{"a":[1,null]}'),
    (None, 2**40, None, True, "{}"),
    ("", 0, 0.0, False, '{"a":"b"}'),
]


@pytest.mark.parametrize("values", [[_ALIKE], [_ALIKE] * 5, _SOME, [*_SOME, _ALIKE], _SOME[:1]])
def test_values_alike_and_not(connection: Connection, values: list[tuple[Any, ...]]) -> None:
    """Rows are changed to what they are given, whether columns hold the same or nothing."""
    at = {"submitted_at": NOON, "available_at": NOON}
    plain = {"status": "pending", "platform": "demo", "priority": 0, "attempts": 0, **at}
    before = {"model": "old", "input_tokens": 1, "cost_usd": 1.0, "cancel_requested": False}
    names = ("stream_id", "task_id", *plain, *before, "labels")
    rows = [(n, f"task_{n}", *plain.values(), *before.values(), "{}") for n in range(7)]
    Bulk(tasks, names).execute(connection, rows)
    changed = [(n, *given) for n, given in enumerate(values, 1)]
    Bulk(tasks, _COLUMNS, key="stream_id").execute(connection, changed)
    columns = [tasks.c[name] for name in _COLUMNS]
    found = connection.execute(sa.select(*columns).order_by(tasks.c.stream_id)).all()
    unchanged = [(n, *before.values(), "{}") for n in range(7)]
    unchanged[1 : 1 + len(changed)] = changed
    assert [tuple(row) for row in found] == unchanged
    assert set(connection.scalars(sa.select(tasks.c.submitted_at))) == {NOON}


def test_zeros_keep_their_sign(connection: Connection) -> None:
    """What is equal but for its sign isn't alike. SQLite knows one zero only."""
    rows = [(sign * 0.0, sign) for sign in (1, -1)]
    connection.execute(sa.text("CREATE TEMPORARY TABLE zeros (zero double precision, sign int)"))
    zeros = sa.Table(
        "zeros", sa.MetaData(), sa.Column("zero", sa.Double), sa.Column("sign", sa.Integer)
    )
    Bulk(zeros, ("zero", "sign")).execute(connection, rows)
    found = connection.execute(sa.select(zeros).order_by(zeros.c.sign.desc())).all()
    kept = -1 if connection.dialect.name == "postgresql" else 1
    assert [math.copysign(1, row.zero) for row in found] == [1, kept]


def test_the_same_row_twice(connection: Connection) -> None:
    """All rows that are given are written, or refused, even where nothing tells them apart."""
    with pytest.raises(IntegrityError), connection.begin_nested():
        _ROWS.execute(connection, [(2000, "täsk_2000", 1)] * 2)


def test_what_the_database_refuses(connection: Connection) -> None:
    """A broken rule is SQLAlchemy's error, as from its own execution, and quotes no values."""
    with pytest.raises(IntegrityError) as refused, connection.begin_nested():
        _ROWS.execute(connection, [(2000, "täsk_0001", 1)])
    assert refused.value.orig is not None
    assert refused.value.params is None


def test_more_than_a_text_may_hold(tmp_path: Path) -> None:
    """What doesn't fit into one text is fetched row by row."""
    database = Database(tmp_path / "log.db")
    database.prepare()
    writer = database.writer()
    try:
        with writer.transaction() as connection:
            _ROWS.execute(connection, [(n, f"task_{n:04}", 1) for n in range(1000)])
            raw: Any = connection.connection.dbapi_connection
            before = raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 20_000)
            names = [f"task_{n:04}" for n in range(999, -1, -1)]
            with pytest.raises(sqlite3.DataError):
                raw.execute("SELECT json_group_array(task_id || task_id) FROM streams")
            found = _STREAMS.rows(connection, names)
            raw.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, before)
        assert [row[1] for row in found] == names
    finally:
        writer.close()


@pytest.mark.parametrize(
    "stored", ["task_id = X'00ff'", "version = 9e999", "task_id = CAST(X'62ff' AS TEXT)"]
)
def test_what_json_has_no_word_for(tmp_path: Path, stored: str) -> None:
    """What only somebody else can have stored comes, or is refused, as if read row by row."""
    database = Database(tmp_path / "log.db")
    database.prepare()
    writer = database.writer()
    try:
        with writer.transaction() as connection:
            raw: Any = connection.connection.dbapi_connection
            raw.execute("INSERT INTO streams VALUES (1, 'task_1', 1)")
            raw.execute(f"UPDATE streams SET {stored}")
            try:
                expected = raw.execute("SELECT * FROM streams").fetchall()
            except sqlite3.OperationalError as error:
                with pytest.raises(sqlite3.OperationalError, match=re.escape(str(error))):
                    _ALL.rows(connection)
            else:
                assert _ALL.rows(connection) == expected
    finally:
        writer.close()


def test_a_name_that_the_statement_does_not_have() -> None:
    """A statement that is given something it doesn't ask for is a mistake of ours."""
    wrong = Statement(sa.select(streams.c.task_id), ("missing",))
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(ValueError, match="missing"):
        wrong.rows(connection, 1)
    engine.dispose()


async def test_rows_by_name_are_what_core_gives(store: Store) -> None:
    """Over a connection that reads, each value is of its column's type."""
    version = await store.start("täsk", labels={"ö": "1"}, prompt="Grüße")
    await store.log.append("täsk", [Completed(cost_usd=0.25)], version)
    await store.submit("other")
    for asked in (
        sa.select(tasks).order_by(tasks.c.stream_id),
        sa.select(events).order_by(events.c.position),
    ):
        found = await store.database.fetch(Statement(asked))
        core = [dict(row) for row in await store.database.rows(asked)]
        assert found == core
        assert [[type(value) for value in row.values()] for row in found] == [
            [type(value) for value in row.values()] for row in core
        ]
        assert len(found) > 1


async def test_a_fetch_goes_to_the_reading_thread_once(
    make_database: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way there and back costs the reader two switches of threads."""
    database = Database(make_database())
    ways = 0
    execute = aiosqlite.Connection._execute

    async def counted(self: aiosqlite.Connection, *arguments: Any, **named: Any) -> Any:
        nonlocal ways
        ways += 1
        return await execute(self, *arguments, **named)

    try:
        assert await database.fetch(_STREAMS, ["a task"]) == []  # opens the connection
        monkeypatch.setattr(aiosqlite.Connection, "_execute", counted)
        assert await database.fetch(_STREAMS, ["a task"]) == []
        assert ways == 1
    finally:
        await database.close()


async def test_a_read_that_fails_holds_no_state_of_the_database(
    make_database: Callable[[], Path],
) -> None:
    """Who keeps its error keeps neither later reads in the past, nor what was erased on disk."""
    path = make_database()
    async with opened(str(path)) as store:
        await store.start("good")
        await store.submit("bad")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE tasks SET prompt = CAST(x'ff' AS TEXT) WHERE task_id = 'bad'")
            asked = Statement(sa.select(tasks.c.status, tasks.c.prompt))
            with pytest.raises(StoreError) as kept:
                await store.database.fetch(asked)
            await store.log.append("good", [Completed()], 2)
            status = Statement(sa.select(tasks.c.status).where(tasks.c.task_id == "good"))
            assert await store.database.fetch(status) == [{"status": "completed"}]
            with pytest.raises(StoreError):
                await store.database.fetch(asked)
            busy, *_ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            assert not busy
            assert kept.value.__cause__ is not None


async def test_names_of_a_kind_of_their_own(store: Store) -> None:
    """A text is what it is, also where it shows itself as something else."""

    class Name(str, enum.Enum):  # noqa: UP042 - StrEnum shows itself as its text
        A = "a task"

    await store.submit("a task")
    assert await Records(store.database).status(Name.A) is TaskStatus.PENDING
