"""The least that a durable append can be: one sqlite3 thread, group commit, one INSERT, no more.

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

__all__ = ["INSERT", "BareLog", "connect", "event_row"]

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

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> Self:
        """Start the thread."""
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
        connection = connect(self._path)
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
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(INSERT, rows)
            connection.execute("COMMIT")
            self._loop.call_soon_threadsafe(_deliver, batch)
        connection.close()

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


def _deliver(batch: list[_Request]) -> None:
    for _row, future in batch:
        if not future.done():
            future.set_result(None)
