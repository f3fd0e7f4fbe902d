"""What only SQLite has: files that are full or locked, and a write-ahead log to keep small."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest

from perdure.errors import DatabaseUnavailable
from perdure.store import readonly
from perdure.store import sqlite as sqlite_module
from perdure.store.transaction import Transaction
from perdure.store.verification import verify
from store.backends import Sqlite, Store, opened
from store.checks import assert_sound, gapless
from store.children import run


@pytest.fixture
def database_url(sqlite: Sqlite) -> str:
    """A new, empty SQLite database of today's schema."""
    return sqlite.new()


class TestUnavailable:
    """A database that can't be written to, for a while."""

    async def test_full(self, sqlite: Sqlite, database_url: str) -> None:
        """On a full disk everyone is told in one line; what was acknowledged stays; it recovers."""

        def limit(tx: Transaction, pages: int) -> None:
            used = tx.connection.exec_driver_sql("PRAGMA page_count").scalar()
            tx.connection.exec_driver_sql(f"PRAGMA max_page_count = {(used or 0) + pages}")

        acknowledged: list[str] = []

        async def fill() -> None:
            for number in range(1000):
                await store.submit(f"t{number}", text="x" * 3000)
                acknowledged.append(f"t{number}")

        async with opened(database_url) as store:
            await store.log.write(lambda tx: limit(tx, 20))
            with pytest.raises(DatabaseUnavailable, match="no space left") as full:
                await fill()
            assert len(str(full.value).splitlines()) == 1
            with pytest.raises(DatabaseUnavailable):
                await store.submit("another", text="x" * 9000)

            await store.log.write(lambda tx: limit(tx, 10_000))
            await store.submit(f"t{len(acknowledged)}")
        assert set(gapless(sqlite, database_url)) == {*acknowledged, f"t{len(acknowledged)}"}
        assert acknowledged
        assert_sound(database_url)

    def test_files_that_may_not_grow(self, sqlite: Sqlite, database_url: str) -> None:
        """The same where the operating system says no, in the middle of a write."""
        (found,) = run(("fill_disk", database_url))

        assert len(found["errors"]) == 3
        for error in found["errors"]:
            assert error.startswith("DatabaseUnavailable: ")
            assert len(error.splitlines()) == 1
        assert found["problems"] == []
        assert len(found["acknowledged"]) > 5
        assert set(gapless(sqlite, database_url)) == set(found["acknowledged"])
        assert_sound(database_url)

    async def test_locked(
        self, sqlite: Sqlite, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A lock that is held for too long is one line that says so; nothing is lost."""
        for module in (sqlite_module, readonly):
            monkeypatch.setattr(module, "BUSY_SECONDS", 0.2)
        async with opened(database_url) as store:
            await store.submit("before")
            with sqlite.shell(database_url) as other:
                other.run("BEGIN IMMEDIATE")
                with pytest.raises(DatabaseUnavailable, match="is locked") as locked:
                    await store.submit("during")
                assert len(str(locked.value).splitlines()) == 1
                # Reading goes on.
                assert await store.database.rows(sqlite_module.sa.text("SELECT 1"))
                other.run("ROLLBACK")
            assert await store.submit("during") == 1
        assert_sound(database_url)

    async def test_locked_for_a_moment(self, sqlite: Sqlite, database_url: str) -> None:
        """A lock that is held for a moment is waited for."""
        async with opened(database_url) as store:
            with sqlite.shell(database_url) as other:
                other.run("BEGIN IMMEDIATE")
                waiting = asyncio.create_task(store.submit("task"))
                await asyncio.sleep(0.05)
                assert not waiting.done()
                other.run("COMMIT")
                assert await waiting == 1


class TestWal:
    """The write-ahead log stays small, and nobody can commit while it is copied back."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Check at a quarter of a megabyte instead of four."""
        monkeypatch.setattr(sqlite_module, "CHECKPOINT_BYTES", 2**18)
        monkeypatch.setattr(sqlite_module, "CHECKPOINT_STEP", 2**16)

    @staticmethod
    def wal(url: str) -> int:
        """Return the size of the write-ahead log."""
        path = Sqlite.path(url)
        return path.with_name(path.name + "-wal").stat().st_size

    async def grow(self, store: Store, url: str, name: str, count: int = 60) -> int:
        """Write half a megabyte; returns the largest size there was on the way."""
        largest = 0
        for number in range(count):
            await store.submit(f"{name}{number}", text="x" * 9000)
            largest = max(largest, self.wal(url))
        return largest

    async def test_stays_small(self, sqlite: Sqlite, database_url: str) -> None:
        """However much is written, the file is started anew again and again."""
        async with opened(database_url) as store:
            assert await self.grow(store, database_url, "t", 200) < 2**19
        assert_sound(database_url)

    async def test_a_reader_holds_it_up_only_for_a_while(
        self, sqlite: Sqlite, database_url: str
    ) -> None:
        """As long as somebody looks at an old state it grows; afterwards it is cut again."""
        async with opened(database_url) as store:
            await store.submit("first")
            with store.database.snapshot() as old:
                assert verify(old).position == 1
                held_up = await self.grow(store, database_url, "a")
                assert held_up > 2**19
                assert verify(old).position == 1
            await self.grow(store, database_url, "b", 30)
            assert self.wal(database_url) < 2**19
        assert_sound(database_url)

    async def test_never_without_the_lock(self, sqlite: Sqlite, database_url: str) -> None:
        """While a checkpoint runs nobody else can commit: tried at every one of them."""
        tried: list[str] = []

        def trace(statement: str) -> None:
            if "wal_checkpoint" in statement.lower():
                other = sqlite3.connect(sqlite.path(database_url), timeout=0, isolation_level=None)
                try:
                    other.execute("BEGIN IMMEDIATE")
                    tried.append("got in")
                except sqlite3.OperationalError as error:
                    tried.append(str(error))
                finally:
                    other.close()

        def spy(tx: Transaction) -> None:
            raw: Any = tx.connection.connection.dbapi_connection
            raw.set_trace_callback(trace)

        async with opened(database_url) as store:
            await store.log.write(spy)
            await self.grow(store, database_url, "t", 150)
        assert len(tried) > 2
        assert set(tried) == {"database is locked"}

    async def test_nobody_else_checkpoints(self, sqlite: Sqlite, database_url: str) -> None:
        """Automatic checkpoints are off on every connection of ours."""
        query = "PRAGMA wal_autocheckpoint"
        async with opened(database_url) as store:
            writer = await store.log.write(lambda tx: tx.connection.exec_driver_sql(query).scalar())
            ((reader,),) = [
                tuple(row.values())
                for row in await store.database.rows(sqlite_module.sa.text(query))
            ]
            with store.database.snapshot() as connection:
                snapshot = connection.exec_driver_sql(query).scalar()
            with store.database.migration() as connection:
                migration = connection.exec_driver_sql(query).scalar()
        assert [writer, reader, snapshot, migration] == [0] * 4

    async def test_two_writers(self, sqlite: Sqlite, database_url: str) -> None:
        """Two writers that both check point lose nothing, and the file stays small and sound."""
        async with opened(database_url) as one, opened(database_url) as other:
            largest = await asyncio.gather(
                *(self.grow(store, database_url, f"w{n}_") for n, store in enumerate((one, other)))
            )
            assert max(largest) < 2**20
        assert len(gapless(sqlite, database_url)) == 120
        assert sqlite.query(database_url, "PRAGMA integrity_check") == [("ok",)]
        assert_sound(database_url)

    async def test_a_checkpoint_that_fails_fails_nobody(
        self, sqlite: Sqlite, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The commit before it is durable all the same; it is tried again later."""
        connect: Callable[..., Any] = sqlite3.connect

        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread().name == "perdure-writer":
                raise sqlite3.OperationalError("unable to open database file")
            return connect(*args, **kwargs)

        async with opened(database_url) as store:
            monkeypatch.setattr(sqlite_module.sqlite3, "connect", refuse)
            assert await self.grow(store, database_url, "t") > 2**19
            monkeypatch.undo()
            assert await self.grow(store, database_url, "u") > 0
        assert_sound(database_url)
