"""What the database itself refuses, to whoever writes to it."""

from __future__ import annotations

import sqlite3

import pytest

from perdure.errors import PerdureError
from perdure.events import Cancelled, Completed
from store.backends import Backend, opened, running, submitted, write


class TestDefences:
    """What the database itself refuses, to whoever writes to it."""

    @pytest.fixture
    async def ended(self, database_url: str) -> str:
        """A database with a task that has ended."""
        await write(database_url, ("task", [(submitted(), running()), (Completed(),)]))
        return database_url

    @staticmethod
    def plain(backend: Backend, url: str, sql: str) -> None:
        """Execute a statement with all defences up."""
        connection = sqlite3.connect(backend.path(url))
        try:
            with connection:
                connection.execute(sql)
        finally:
            connection.close()

    @pytest.mark.parametrize("ending", ["completed", "failed", "cancelled"])
    async def test_a_second_ending(self, backend: Backend, ended: str, ending: str) -> None:
        """A second ending of a task is refused by an index, not by our code."""
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            self.plain(
                backend,
                ended,
                "INSERT INTO events SELECT position + 1, stream_id, version + 1, "
                f"'{ending}', schema_version, data, recorded_at, digest "
                "FROM events WHERE type = 'completed'",
            )

    @pytest.mark.parametrize(
        "change",
        [
            "position = position + 10", "stream_id = stream_id", "version = version + 10",
            "type = 'chunk'", "schema_version = 2", "data = '{}'", "data = data",
            "recorded_at = ''", "digest = x''", "data = '{\"redacted\":\"short\"}'",
            "data = json_set(data, '$.redacted', 5)",
            "type = 'x', data = json_object('redacted', hex(zeroblob(32)))",
            "digest = x'', data = json_object('redacted', hex(zeroblob(32)))",
        ],
    )  # fmt: skip
    async def test_edits(self, backend: Backend, ended: str, change: str) -> None:
        """No column of any event can be changed."""
        for version in (1, 2, 3):
            with pytest.raises(sqlite3.IntegrityError, match="never changed"):
                self.plain(backend, ended, f"UPDATE events SET {change} WHERE version = {version}")

    async def test_tombstones_are_final(self, backend: Backend, ended: str) -> None:
        """The one change allowed leaves a tombstone, and a tombstone isn't changed again."""
        bury = "UPDATE events SET data = json_object('redacted', lower(hex(zeroblob(32)))) "
        self.plain(backend, ended, bury + "WHERE version = 1")
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            self.plain(backend, ended, bury + "WHERE version = 1")

    @pytest.mark.parametrize("which", ["", "WHERE version = 1", "WHERE version = 3"])
    async def test_deletions(self, backend: Backend, ended: str, which: str) -> None:
        """No event can be deleted."""
        with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
            self.plain(backend, ended, f"DELETE FROM events {which}")

    async def test_strangers(self, backend: Backend, ended: str) -> None:
        """The log refuses to go on where the database has what can't be: it doesn't guess."""
        with backend.shell(ended) as shell:
            shell.run("UPDATE streams SET version = 2")
            shell.run("DELETE FROM events WHERE version = 1")
        async with opened(ended) as store:
            with pytest.raises(PerdureError, match="perdure verify"):
                await store.log.append("task", [Cancelled()], None)
            assert await store.submit("another") == 1
