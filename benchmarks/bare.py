"""The least that a durable append can be: one thread, a plain driver, group commit, one INSERT.

No chain, no projection, no checks, no JSON, no SQLAlchemy. What is inserted was made before the
clock started. Whoever appends awaits the commit, as with us.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from pathlib import Path
from typing import Any, Final, Self

import psycopg

__all__ = ["INSERT", "BareLog", "BareServerLog", "connect", "event_row"]

INSERT: Final = "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_MOST: Final = 1000

EventRow = tuple[int, int, str, int, str, str, bytes]
_Request = tuple[EventRow, asyncio.Future[None]]


def event_row(stream: int, version: int, data: str, type_: str = "chunk") -> EventRow:
    """Return a row of `events` without its position."""
    return (stream, version, type_, 1, data, "2026-01-01T00:00:00.000000Z", bytes(32))


def connect(path: Path) -> sqlite3.Connection:
    """Open a database with the same durability as ours."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


class BareLog:
    """An asynchronous context manager with an `append` that is done when the row is committed."""

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> Self:
        """Start the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Commit what is waiting, and end the thread."""
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)

    async def append(self, row: EventRow) -> None:
        """Insert a row; returns once it is committed."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._queue.put((row, future))
        await future

    def _run(self) -> None:
        connection = self._connect()
        position = 0
        open_ = True
        while open_:
            batch, open_ = self._next_batch()
            if not batch:
                continue
            rows: list[Any] = []
            for row, _future in batch:
                position += 1
                rows.append((position, *row))
            self._insert(connection, rows)
            self._loop.call_soon_threadsafe(_deliver, batch)
        connection.close()

    def _connect(self) -> Any:  # noqa: ANN401 - a driver's connection
        return connect(Path(self._path))

    def _insert(self, connection: Any, rows: list[Any]) -> None:  # noqa: ANN401
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(INSERT, rows)
        connection.execute("COMMIT")

    def _next_batch(self) -> tuple[list[_Request], bool]:
        batch: list[_Request] = []
        try:
            request = self._queue.get()
            while request is not None:
                batch.append(request)
                if len(batch) == _MOST:
                    return batch, True
                request = self._queue.get_nowait()
        except queue.Empty:
            return batch, True
        return batch, False


class BareServerLog(BareLog):
    """The same on PostgreSQL, with psycopg alone. The database has to be empty."""

    def _connect(self) -> Any:  # noqa: ANN401 - a driver's connection
        connection = psycopg.connect(str(self._path), autocommit=True)
        connection.execute(_TABLE)
        return connection

    def _insert(self, connection: Any, rows: list[Any]) -> None:  # noqa: ANN401
        with connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(_SERVER_INSERT, rows)


_TABLE: Final = b"""
    CREATE TABLE IF NOT EXISTS events (
        position bigint PRIMARY KEY, stream_id bigint NOT NULL, version integer NOT NULL,
        type text NOT NULL, schema_version integer NOT NULL, data json NOT NULL,
        recorded_at timestamptz NOT NULL, digest bytea NOT NULL, UNIQUE (stream_id, version))
"""
_SERVER_INSERT: Final = "INSERT INTO events VALUES (%s, %s, %s, %s, %s, %s, %s, %s)"


def _deliver(batch: list[_Request]) -> None:
    for _row, future in batch:
        if not future.done():
            future.set_result(None)
