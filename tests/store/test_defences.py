"""What the database itself refuses, to whoever writes to it."""

from __future__ import annotations

import sqlite3

import psycopg
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
    def refused(backend: Backend, url: str, sql: str, *, match: str) -> None:
        """Check that a statement is refused with all defences up."""
        before = backend.query(url, "SELECT * FROM events ORDER BY position")
        with pytest.raises((sqlite3.IntegrityError, psycopg.Error), match=match):
            backend.change(url, sql)
        assert backend.query(url, "SELECT * FROM events ORDER BY position") == before

    @pytest.mark.parametrize("ending", ["completed", "failed", "cancelled"])
    async def test_a_second_ending(self, backend: Backend, ended: str, ending: str) -> None:
        """A second ending of a task is refused by an index, not by our code."""
        self.refused(
            backend,
            ended,
            "INSERT INTO events SELECT position + 1, stream_id, version + 1, "
            f"'{ending}', schema_version, data, recorded_at, digest "
            "FROM events WHERE type = 'completed'",
            match="UNIQUE|events_one_ending",
        )

    @pytest.mark.parametrize(
        "change",
        [
            "position = position + 10", "stream_id = stream_id", "version = version + 10",
            "type = 'chunk'", "schema_version = 2", "data = '{}'", "data = data",
            "recorded_at = '2000-01-01T00:00:00.000000Z'", "digest = x''",
            "data = '{\"redacted\":\"short\"}'",
            "data = json_set(data, '$.redacted', 5)",
            "type = 'x', data = json_object('redacted', hex(zeroblob(32)))",
            "digest = x'', data = json_object('redacted', hex(zeroblob(32)))",
        ],
    )  # fmt: skip
    async def test_edits(self, backend: Backend, ended: str, change: str) -> None:
        """No column of any event can be changed."""
        for version in (1, 2, 3):
            update = f"UPDATE events SET {change} WHERE version = {version}"
            self.refused(backend, ended, update, match="never changed")

    async def test_tombstones_are_final(self, backend: Backend, ended: str) -> None:
        """The one change allowed leaves a tombstone, and a tombstone isn't changed again."""
        bury = "UPDATE events SET data = json_object('redacted', lower(hex(zeroblob(32)))) "
        backend.change(ended, bury + "WHERE version = 1")
        self.refused(backend, ended, bury + "WHERE version = 1", match="never changed")

    @pytest.mark.parametrize("which", ["", "WHERE version = 1", "WHERE version = 3"])
    async def test_deletions(self, backend: Backend, ended: str, which: str) -> None:
        """No event can be deleted."""
        self.refused(backend, ended, f"DELETE FROM events {which}", match="never.* deleted")

    @pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
    async def test_truncation(self, backend: Backend, ended: str) -> None:
        """PostgreSQL's way to delete everything at once is refused as well."""
        self.refused(backend, ended, "TRUNCATE events CASCADE", match="never.* deleted")

    @pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
    @pytest.mark.parametrize("data", ["[]", "5", '{"a":"\\u0000"}', '{"a":1e999999}'])
    async def test_data_that_nobody_could_query(
        self, backend: Backend, ended: str, data: str
    ) -> None:
        """What `jsonb` can't hold would break the views, so it can't be stored."""
        insert = (
            "INSERT INTO events SELECT position + 10, stream_id, version + 10, 'note', "
            f"schema_version, '{data}', recorded_at, digest FROM events WHERE position = 1"
        )
        self.refused(backend, ended, insert, match=".")

    async def test_strangers(self, backend: Backend, ended: str) -> None:
        """The log refuses to go on where the database has what can't be: it doesn't guess."""
        with backend.shell(ended) as shell:
            shell.run("UPDATE streams SET version = 2")
            shell.run("DELETE FROM events WHERE version = 1")
        async with opened(ended) as store:
            with pytest.raises(PerdureError, match="perdure verify"):
                await store.log.append("task", [Cancelled()], None)
            assert await store.submit("another") == 1
