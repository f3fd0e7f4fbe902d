"""The databases that the contract suites of the store run on.

A suite asks for the fixture `backend` and uses what every backend has. PostgreSQL becomes a second
class here and a second parameter in `conftest.py`; what only SQLite has asks for `sqlite`.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.events import Event, Running, Submitted
from perdure.store.database import Database
from perdure.store.log import EventLog

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
    def query(cls, url: str, sql: str, **parameters: Any) -> Rows:
        """Return what a query finds, read by nothing of ours."""
        connection = sqlite3.connect(cls.path(url), timeout=10)
        try:
            return connection.execute(sql, parameters).fetchall()
        finally:
            connection.close()


Backend = Sqlite
