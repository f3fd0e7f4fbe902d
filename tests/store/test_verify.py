"""Nobody edits history unseen: every kind of tampering on every event of a varied log."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from perdure.errors import DatabaseCorrupt, StoreError
from perdure.events import EVENT_TYPES, chain_digest
from perdure.store.database import Database
from perdure.store.rebuilding import compare, rebuild
from perdure.store.schema import Timestamp, tasks
from perdure.store.verification import VerifyReport, verify
from perdure.store.walking import _Walk
from store.backends import AllBackends, Backend, opened
from store.varied import TASK_IDS, tell

EVENT_COLUMNS = (
    "position", "stream_id", "version", "type", "schema_version", "data", "recorded_at", "digest",
)  # fmt: skip

# So often all events are looked at closely, where the first look passes most of them.
CLOSE_LOOKS = 4


class Refused(Exception):
    """The database doesn't take it."""


class Vandal:
    """Somebody who can change anything, and whose changes are undone after each look."""

    def __init__(self, backend: Backend, connection: Connection) -> None:
        self._backend = backend
        self.connection = connection
        self.untouched = self.state()
        self._looks = itertools.count()

    def run(self, sql: str, *parameters: Any) -> list[Any]:
        """Execute a statement and return its rows."""
        try:
            return self._backend.execute(self.connection, sql, parameters)
        except (DBAPIError, psycopg.Error) as error:
            raise Refused(str(error)) from None

    @contextmanager
    def undone(self) -> Generator[None, None, None]:
        """Undo everything at the end."""
        self.run("SAVEPOINT before")
        try:
            yield
        finally:
            self.run("ROLLBACK TO before")
            self.run("RELEASE before")

    def state(self) -> list[Any]:
        """Return all that `verify` is about, value by value."""
        found: list[Any] = []
        for table, columns in (
            ("events", EVENT_COLUMNS),
            ("streams", ("stream_id", "task_id", "version")),
            ("log_head", ("id", "position", "digest")),
            ("blobs", ("digest", "size", "data")),
        ):
            quoted = ", ".join(f"quote({name})" for name in columns)
            found.append(self.run(f"SELECT {quoted} FROM {table} ORDER BY 1, 2, 3"))
        return found

    def try_(self, *statements: str) -> list[str] | None:
        """Return the problems found after these statements; None where they change nothing."""
        with self.undone():
            try:
                for statement in statements:
                    self.run(statement)
            except Refused:
                return None  # the database itself refuses it
            return self.look() or (None if self.state() == self.untouched else [])

    def look(self) -> list[str]:
        """Return the problems found, and hold them to what a problem has to be."""
        problems = verify(self.connection).problems
        if next(self._looks) % CLOSE_LOOKS == 0:
            with mock.patch.object(_Walk, "pass_plain", lambda _self, _rows, begin: begin):
                assert verify(self.connection).problems == problems  # it finds no more
        assert len(problems) <= 100
        for problem in problems:
            assert problem.isprintable(), problem
        return problems

    def must_find(self, *statements: str) -> None:
        """Check that tampering is found."""
        problems = self.try_(*statements)
        assert problems is not None, f"nothing was changed by {statements}"
        assert problems != [], f"not found: {statements}"

    def samples(self) -> list[int]:
        """Return some positions: the first, the last, and one event of each telling type."""
        rows = self.run(
            "SELECT min(position) FROM events WHERE type IN ('running', 'completed', 'redacted') "
            "GROUP BY type UNION SELECT min(position) FROM events UNION SELECT max(position) "
            "FROM events"
        )
        return [position for (position,) in rows]

    def positions(self) -> range:
        """Return the positions of all events."""
        ((last,),) = self.run("SELECT max(position) FROM events")
        return range(1, last + 1)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The varied log of each kind of database, once it was written."""
    return {}


@pytest.fixture
def story(told: dict[str, str], all_backends: AllBackends, backend: Backend, tmp_path: Path) -> str:
    """The varied log, written once."""
    if backend.dialect not in told:
        told[backend.dialect] = all_backends[backend.dialect].new()
        asyncio.run(tell(told[backend.dialect], tmp_path))
    return told[backend.dialect]


@pytest.fixture
def vandal(
    backend: Backend, story: str, monkeypatch: pytest.MonkeyPatch
) -> Generator[Vandal, None, None]:
    """Somebody at the varied log, its defences dropped; what is done to it is undone."""
    if backend.dialect == "sqlite":  # one kind is walked in many stretches, the other in one
        monkeypatch.setattr("perdure.store.scanning.PAGE", 3)
    with backend.vandalised(story) as connection:
        yield Vandal(backend, connection)


class TestUntouched:
    """What is as it was written is found to be so."""

    def test_story(self, story: str) -> None:
        """The varied log verifies, and has every type of event in it."""
        with Database(story).snapshot() as connection:
            report = verify(connection)
            types = set(connection.exec_driver_sql("SELECT type FROM events").scalars())
        assert report.problems == []
        assert report.ok
        assert types == set(EVENT_TYPES) - {"archived"}
        assert (report.tasks, report.redacted) == (len(TASK_IDS), 4)
        assert report.events == report.position

    def test_empty(self, database_url: str) -> None:
        """A log without events verifies."""
        with Database(database_url).snapshot() as connection:
            report = verify(connection, expect=(0, ""))
        assert report.ok
        assert (report.events, report.tasks, report.position, report.digest) == (0, 0, 0, "")

    def test_progress(self, story: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Progress is told on the way, and paging finds the same as one page."""
        monkeypatch.setattr("perdure.store.scanning.PAGE", 7)
        told: list[tuple[int, int]] = []
        with Database(story).snapshot() as connection:
            report = verify(connection, progress=lambda done, all_: told.append((done, all_)))
        assert report.ok
        assert [done for done, _ in told] == [*range(7, report.events, 7), report.events]
        assert {all_ for _, all_ in told} == {report.events}


# What is done to a column of one event; {n} is its position.
EDITS: dict[str, tuple[str, ...]] = {
    "position": ("position + 1000", "-position", "0", "position + 9000000000000000000"),
    "stream_id": (
        "stream_id + 1000",
        "(SELECT min(stream_id) FROM streams)",
        "(SELECT max(stream_id) FROM streams)",
        "0",
    ),
    "version": ("version + 1", "version - 1", "version + 1000", "-version"),
    "type": ("'chunk'", "'completed'", "'invented'", "upper(type)", "type || ' '", "''"),
    "schema_version": ("2", "0", "-1", "1.5"),
    "data": (
        "replace(data, 'a', 'b')",
        "data || ' '",
        "' ' || data",
        "replace(data, ':', ': ')",
        "json_set(data, '$.note', 'x')",
        "json_set(data, '$.redacted', lower(hex(zeroblob(32))))",
        "json_object('redacted', lower(hex(zeroblob(32))))",
        "'{}'",
        "'[]'",
        "'{'",
        "''",
        "CAST(data AS BLOB)",
    ),
    "recorded_at": (
        "'2000-01-01T00:00:00.000000Z'",
        "replace(recorded_at, 'Z', '+00:00')",
        "replace(recorded_at, 'T', ' ')",
        "substr(recorded_at, 1, 19) || 'Z'",
        "substr(recorded_at, 1, 25) || ((substr(recorded_at, 26, 1) + 1) % 10) || 'Z'",
        "lower(recorded_at)",
        "'yesterday'",
        "''",
    ),
    "digest": (
        "zeroblob(32)",
        "x''",
        "substr(digest, 1, 31)",
        "digest || x'00'",
        "hex(digest)",
        "CAST(digest AS TEXT)",
        "(SELECT e.digest FROM events e WHERE e.position = 1)",
        "(SELECT max(e.digest) FROM events e)",
    ),
}


class TestEdits:
    """A changed value in any column of any event."""

    @pytest.mark.parametrize("column", EVENT_COLUMNS)
    def test_every_event(self, vandal: Vandal, column: str) -> None:
        """Edits of each event are found, and all kinds of edits of one event of each sample."""
        changed = 0
        samples = vandal.samples()
        for position in vandal.positions():
            for value in EDITS[column][: None if position in samples else 3]:
                problems = vandal.try_(
                    f"UPDATE events SET {column} = {value} WHERE position = {position}"
                )
                assert problems != [], (position, value)
                changed += problems is not None
        assert changed >= len(vandal.positions())

    @pytest.mark.parametrize("column", EVENT_COLUMNS)
    def test_juggled_types(self, vandal: Vandal, backend: Backend, column: str) -> None:
        """Values that a column can't hold, in some events, are found and crash nothing."""
        changed = 0
        for position, value in itertools.product(vandal.samples(), backend.juggled):
            problems = vandal.try_(
                f"UPDATE events SET {column} = {value} WHERE position = {position}"
            )
            assert problems != [], (position, value)
            changed += problems is not None
        assert changed > 0

    def test_fields(self, vandal: Vandal) -> None:
        """A changed, added or removed field in the data of any event is found."""
        for position, data in vandal.run("SELECT position, data FROM events"):
            plain = json.loads(data)
            for name, value in plain.items():
                for other in (
                    {**plain, name: [value]},
                    {k: v for k, v in plain.items() if k != name},
                ):
                    with vandal.undone():
                        vandal.run(
                            "UPDATE events SET data = ? WHERE position = ?",
                            json.dumps(other, separators=(",", ":")),
                            position,
                        )
                        assert vandal.look() != [], (position, name)

    def test_one_edit_is_one_problem(self, vandal: Vandal) -> None:
        """A changed text is reported once, with its place, and not at every event that follows."""
        with vandal.undone():
            vandal.run("UPDATE events SET data = replace(data, 'Hé', 'Ho') WHERE type = 'chunk'")
            (problem,) = vandal.look()
        assert "good version" in problem

    def test_no_more_than_a_hundred(self, vandal: Vandal) -> None:
        """A log that is wrong everywhere gives a list that can be read, and the true number."""
        with vandal.undone():
            vandal.run("UPDATE events SET digest = zeroblob(32), version = -version")
            vandal.run("UPDATE streams SET version = -1")
            assert 1 < len(vandal.look()) <= 100


class TestDeletions:
    """Events that are gone."""

    def test_one(self, vandal: Vandal) -> None:
        """Any single event, first and last among them, with all counters put right or not."""
        last = vandal.positions()[-1]
        for position in vandal.positions():
            delete = f"DELETE FROM events WHERE position = {position}"
            recount = (
                "UPDATE streams SET version = (SELECT count(*) FROM events e "
                "WHERE e.stream_id = streams.stream_id)"
            )
            renumber = (
                f"UPDATE events SET position = 1 - position WHERE position > {position}",
                "UPDATE events SET position = -position WHERE position < 0",
            )
            head = f"UPDATE log_head SET position = {last - 1}"
            vandal.must_find(delete)
            vandal.must_find(delete, recount)
            vandal.must_find(delete, recount, head)
            vandal.must_find(delete, recount, head, *renumber)

    def test_the_last_ones_without_the_head(self, vandal: Vandal) -> None:
        """A tail that was cut off is found by the head, as long as that wasn't changed too."""
        for position in vandal.positions():
            vandal.must_find(
                f"DELETE FROM events WHERE position >= {position}",
                "DELETE FROM streams WHERE stream_id NOT IN (SELECT stream_id FROM events)",
                "UPDATE streams SET version = (SELECT count(*) FROM events e "
                "WHERE e.stream_id = streams.stream_id)",
            )

    def test_whole_streams(self, vandal: Vandal) -> None:
        """A task that vanished as a whole, or only its name."""
        for (stream_id,) in vandal.run("SELECT stream_id FROM streams"):
            of = f"WHERE stream_id = {stream_id}"
            vandal.must_find(f"DELETE FROM events {of}")
            vandal.must_find(f"DELETE FROM streams {of}")
            vandal.must_find(
                f"DELETE FROM events {of}", f"DELETE FROM streams {of}", f"DELETE FROM tasks {of}"
            )

    def test_all(self, vandal: Vandal) -> None:
        """Everything."""
        vandal.must_find("DELETE FROM events")
        vandal.must_find("DELETE FROM events", "DELETE FROM streams", "DELETE FROM tasks")
        vandal.must_find(
            "DELETE FROM events", "DELETE FROM streams", "UPDATE log_head SET position = 0"
        )


class TestInsertions:
    """Events that nobody wrote."""

    @pytest.mark.parametrize(
        "place",
        ["{head} + 1", "{head} + 5", "0", "-1", "-9223372036854775808", "9223372036854775807"],
    )
    def test_at_the_ends(self, vandal: Vandal, place: str) -> None:
        """A copy of an event, put before the first or after the last."""
        head = vandal.positions()[-1]
        for position in vandal.samples():
            insert = (
                f"INSERT INTO events SELECT {place.format(head=head)}, stream_id, "
                "(SELECT max(version) + 1 FROM events x WHERE x.stream_id = e.stream_id), "
                "'note', schema_version, data, recorded_at, digest "
                f"FROM events e WHERE position = {position}"
            )
            count = (
                "UPDATE streams SET version = (SELECT count(*) FROM events e "
                "WHERE e.stream_id = streams.stream_id)"
            )
            vandal.must_find(insert)
            vandal.must_find(insert, count)
            vandal.must_find(insert, count, "UPDATE log_head SET position = position + 1")

    def test_in_the_middle(self, vandal: Vandal) -> None:
        """A copy of any event, put after it, all that follows moved on."""
        for position in vandal.positions():
            vandal.must_find(
                f"UPDATE events SET position = -position - 1 WHERE position > {position}",
                "UPDATE events SET position = -position WHERE position < 0",
                f"INSERT INTO events SELECT {position + 1}, stream_id, version + 1000, 'note', "
                "schema_version, data, recorded_at, digest FROM events "
                f"WHERE position = {position}",
                "UPDATE log_head SET position = position + 1",
            )

    @pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
    def test_replaced(self, vandal: Vandal) -> None:
        """`INSERT OR REPLACE`, which gets past the triggers of some SQLites."""
        for position in vandal.positions():
            vandal.must_find(
                "INSERT OR REPLACE INTO events SELECT position, stream_id, version, type, "
                "schema_version, json_set(data, '$.note', 'x'), recorded_at, digest "
                f"FROM events WHERE position = {position}"
            )


class TestSwaps:
    """Events that changed places."""

    @pytest.mark.parametrize(
        "columns",
        [
            ("data",), ("digest",), ("type", "data"), ("recorded_at",),
            ("type", "schema_version", "data", "recorded_at"),
            ("type", "schema_version", "data", "recorded_at", "digest"),
            ("stream_id", "version"), ("stream_id",),
        ],
        ids=",".join,
    )  # fmt: skip
    def test_contents(self, vandal: Vandal, columns: tuple[str, ...]) -> None:
        """Any two events whose contents were exchanged, within a stream and across streams."""
        changed = 0
        found = vandal.run(f"SELECT position, {', '.join(columns)} FROM events")
        rows = {position: values for position, *values in found}
        assign = f"UPDATE events SET {' = ?, '.join(columns)} = ? WHERE position = ?"
        aside = "UPDATE events SET stream_id = -1, version = -1 WHERE position = ?"
        for one, other in itertools.combinations(vandal.positions(), 2):
            if rows[one] == rows[other] or (other - one > 2 and (one + other) % 11):
                continue  # all neighbours, and some of those that are far apart
            with vandal.undone():
                try:
                    if {"version", "stream_id"} & set(columns):  # they are unique
                        vandal.run(aside, other)
                    vandal.run(assign, *rows[other], one)
                    vandal.run(assign, *rows[one], other)
                except Refused:
                    continue
                changed += 1
                assert vandal.look() != [], (one, other)
        assert changed > 0

    def test_positions(self, vandal: Vandal) -> None:
        """Any two neighbours whose positions were exchanged."""
        for one, other in itertools.pairwise(vandal.positions()):
            vandal.must_find(
                f"UPDATE events SET position = -1 WHERE position = {one}",
                f"UPDATE events SET position = {one} WHERE position = {other}",
                f"UPDATE events SET position = {other} WHERE position = -1",
            )

    def test_renumbered(self, vandal: Vandal) -> None:
        """All positions moved by one, or turned round, or spread."""
        for way in ("position + 1", "position * 2", "1000 - position", "-position", "position - 1"):
            vandal.must_find(
                f"UPDATE events SET position = 1000000 + ({way})",
                "UPDATE events SET position = position - 1000000",
            )


class TestStreamsAndHead:
    """What stands beside the events."""

    @pytest.mark.parametrize("column", ["task_id", "version", "stream_id"])
    def test_streams(self, vandal: Vandal, backend: Backend, column: str) -> None:
        """Any stream renamed, moved, or with another version."""
        values = ("version + 1", "version - 1", "task_id || 'x'", "'" + "x" * 300 + "'", "'a/b'")
        changed = 0
        for (stream_id,) in vandal.run("SELECT stream_id FROM streams"):
            for value in (*values, *backend.juggled):
                problems = vandal.try_(
                    f"UPDATE streams SET {column} = {value} WHERE stream_id = {stream_id}"
                )
                assert problems != [], value
                changed += problems is not None
        assert changed > len(TASK_IDS)

    def test_names_exchanged(self, vandal: Vandal) -> None:
        """Two tasks that exchanged names."""
        for one, other in itertools.combinations(TASK_IDS, 2):
            vandal.must_find(
                f"UPDATE streams SET task_id = 'aside' WHERE task_id = '{one}'",
                f"UPDATE streams SET task_id = '{one}' WHERE task_id = '{other}'",
                f"UPDATE streams SET task_id = '{other}' WHERE task_id = 'aside'",
            )

    def test_keys_moved(self, vandal: Vandal) -> None:
        """A stream whose key was changed everywhere."""
        for (stream_id,) in vandal.run("SELECT stream_id FROM streams"):
            for other in (-5, 0, 10**6):
                vandal.must_find(
                    f"UPDATE streams SET stream_id = {other} WHERE stream_id = {stream_id}",
                    f"UPDATE events SET stream_id = {other} WHERE stream_id = {stream_id}",
                )

    def test_streams_without_events(self, vandal: Vandal) -> None:
        """A stream that nobody began."""
        for name, version in (("new", 0), ("new", 1), ("", 0)):
            vandal.must_find(f"INSERT INTO streams VALUES (1000, '{name}', {version})")

    def test_head(self, vandal: Vandal, backend: Backend) -> None:
        """Any change of the head, another head, or none."""
        values = ("position + 1", "position - 1", "digest", "zeroblob(32)", "hex(digest)")
        for column, value in itertools.product(("position", "digest"), (*values, *backend.juggled)):
            assert vandal.try_(f"UPDATE log_head SET {column} = {value}") != [], (column, value)
        vandal.must_find("DELETE FROM log_head")
        vandal.must_find("INSERT INTO log_head VALUES (2, 5, x'00', NULL)")
        vandal.must_find("INSERT INTO log_head SELECT 2, position, digest, NULL FROM log_head")
        vandal.must_find("UPDATE log_head SET id = 2")

    def test_a_strange_head_and_an_expectation(self, vandal: Vandal, backend: Backend) -> None:
        """Nothing in the head makes `verify` with an expectation crash."""
        for value in ("NULL", *backend.juggled):
            with vandal.undone():
                try:
                    vandal.run(f"UPDATE log_head SET position = {value}")
                except Refused:
                    continue
                assert not verify(vandal.connection, expect=(1000, "00")).ok


class TestBlobs:
    """Long texts and files."""

    def test_contents(self, vandal: Vandal, backend: Backend) -> None:
        """Any changed, renamed or missing blob, and a size that isn't its own."""
        rows = vandal.run("SELECT digest FROM blobs")
        assert len(rows) == 3
        for (digest,) in rows:
            of = f"WHERE digest = '{digest}'"
            vandal.must_find(f"DELETE FROM blobs {of}")
            for column, values in (
                ("data", ("data || x'20'", "substr(data, 2)", "CAST(data AS TEXT)", "upper(data)")),
                ("size", ("size + 1", "-size", "0")),
                ("digest", ("upper(digest) || 'x'", "digest || ' '", "''")),
            ):
                for value in (*values, *backend.juggled):
                    problems = vandal.try_(f"UPDATE blobs SET {column} = {value} {of}")
                    assert problems != [], (column, value)

    def test_exchanged(self, vandal: Vandal) -> None:
        """Two blobs that exchanged their contents."""
        (one,), (other,), _ = vandal.run("SELECT digest FROM blobs")
        vandal.must_find(
            f"UPDATE blobs SET digest = 'aside' WHERE digest = '{one}'",
            f"UPDATE blobs SET digest = '{one}' WHERE digest = '{other}'",
            f"UPDATE blobs SET digest = '{other}' WHERE digest = 'aside'",
        )


class TestRedactions:
    """Content may go only by `redact`, and only where it says so."""

    def test_a_forged_tombstone(self, vandal: Vandal) -> None:
        """Content replaced by a tombstone with the true digest, in any event of any task."""
        for position, data in vandal.run("SELECT position, data FROM events"):
            plain = json.loads(data)
            true = plain.get("redacted") or hashlib.sha256(data.encode()).hexdigest()
            for stone in ({"redacted": true}, {**plain, "redacted": true, "note": "x"}):
                forged = json.dumps(stone, separators=(",", ":"), sort_keys=True)
                if forged == data:
                    continue
                with vandal.undone():
                    vandal.run("UPDATE events SET data = ? WHERE position = ?", forged, position)
                    assert vandal.look() != [], (position, stone)

    def test_a_changed_tombstone(self, vandal: Vandal) -> None:
        """What a tombstone kept can't be changed either."""
        stones = vandal.run(
            "SELECT position, data FROM events WHERE json_extract(data, '$.redacted') IS NOT NULL"
        )
        assert len(stones) == 4
        for position, data in stones:
            plain = json.loads(data)
            for name in plain:
                other = {k: v for k, v in plain.items() if k != name}
                with vandal.undone():
                    vandal.run(
                        "UPDATE events SET data = ? WHERE position = ?",
                        json.dumps(other, separators=(",", ":")),
                        position,
                    )
                    assert vandal.look() != [], (position, name)

    def test_content_that_came_back(self, vandal: Vandal, story: str) -> None:
        """What was redacted, put back as it was: true, but not what the log says."""
        with vandal.undone():
            vandal.run(
                "UPDATE events SET data = ? WHERE type = 'chunk' "
                "AND CAST(data AS TEXT) LIKE '%redacted%' "
                "AND CAST(data AS TEXT) LIKE '%\"offset\":0,%'",
                '{"kind":"text","offset":0,"text":"The secret "}',
            )
            assert vandal.look() != []

    def test_the_note_itself(self, vandal: Vandal) -> None:
        """A changed note, with or without its digest."""
        for value in (
            "json_set(data, '$.by', 'nobody')",
            "json_set(data, '$.tombstones', json('{}'))",
            "json_remove(data, '$.reason')",
            "json_set(data, '$.tombstones', 5)",
            "json_set(data, '$.tombstones', json('{\"x\":\"y\"}'))",
            "json_set(data, '$.tombstones', json('[1]'))",
            "'{}'",
            "'5'",
        ):
            vandal.must_find(f"UPDATE events SET data = {value} WHERE type = 'redacted'")


class TestExpect:
    """A head that was noted down elsewhere finds what the chain alone can't."""

    @staticmethod
    def rewrite(vandal: Vandal, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Write the whole log anew, every digest right, after changing events."""
        digest = b""
        rows = vandal.connection.execute(
            sa.text(
                "SELECT e.*, s.task_id FROM events e JOIN streams s ON s.stream_id = e.stream_id "
                "ORDER BY position"
            )
        ).mappings().all()  # fmt: skip
        for row in rows:
            new = change(dict(row))
            data = json.loads(new["data"])
            hashed = (
                bytes.fromhex(data["redacted"])
                if "redacted" in data
                else hashlib.sha256(new["data"].encode()).digest()
            )
            at = Timestamp().process_result_value(new["recorded_at"], None)  # type: ignore[arg-type]
            assert at is not None
            digest = chain_digest(
                digest, new["position"], new["task_id"], new["version"], new["type"],
                new["schema_version"], at, hashed,
            )  # fmt: skip
            vandal.run(
                "UPDATE events SET data = ?, digest = ? WHERE position = ?",
                new["data"], digest, new["position"],
            )  # fmt: skip
        vandal.run("UPDATE log_head SET digest = ?", digest)

    def expectation(self, vandal: Vandal) -> tuple[int, str]:
        """Return the head as it is."""
        report = verify(vandal.connection)
        return report.position, report.digest

    def test_met(self, vandal: Vandal) -> None:
        """The head of now, and any head of before, are still there."""
        assert verify(vandal.connection, expect=self.expectation(vandal)).ok
        for position, digest in vandal.run("SELECT position, lower(hex(digest)) FROM events"):
            assert verify(vandal.connection, expect=(position, digest)).ok
            assert not verify(vandal.connection, expect=(position, "00" * 32)).ok

    def test_a_tail_cut_off(self, vandal: Vandal) -> None:
        """A tail cut off with everything put right is consistent; only the note finds it."""
        expect = self.expectation(vandal)
        for position in vandal.positions():
            with vandal.undone():
                vandal.run(f"DELETE FROM events WHERE position >= {position}")
                vandal.run(
                    "DELETE FROM streams WHERE stream_id NOT IN (SELECT stream_id FROM events)"
                )
                vandal.run(
                    "UPDATE streams SET version = (SELECT max(version) FROM events e "
                    "WHERE e.stream_id = streams.stream_id)"
                )
                vandal.run(
                    "UPDATE log_head SET position = ?, digest = coalesce("
                    "(SELECT digest FROM events WHERE position = ?), x'')",
                    position - 1,
                    position - 1,
                )
                plain = verify(vandal.connection)
                # A redaction that was cut off leaves its tombstones, which is found as well.
                assert not [p for p in plain.problems if "redaction" not in p]
                assert not verify(vandal.connection, expect=expect).ok

    def test_an_event_before_the_first(self, vandal: Vandal) -> None:
        """A task at the end of the log that begins with version 0, every digest right."""
        head = vandal.positions()[-1]
        with vandal.undone():
            vandal.run(f"INSERT INTO streams VALUES ({head + 2}, 'smuggled', 1)")
            for version, type_ in enumerate(("running", "submitted")):
                vandal.run(
                    f"INSERT INTO events SELECT {head + 1 + version}, {head + 2}, {version}, type, "
                    f"schema_version, data, recorded_at, digest FROM events WHERE type = '{type_}' "
                    "ORDER BY position DESC LIMIT 1"
                )
            vandal.run(f"UPDATE log_head SET position = {head + 2}")
            self.rewrite(vandal, lambda row: row)
            for page in range(2, 6):  # wherever the log is divided
                with mock.patch("perdure.store.scanning.PAGE", page):
                    problems = vandal.look()
                assert any(problem.endswith("version 1 was expected") for problem in problems)

    def test_all_written_anew(self, vandal: Vandal) -> None:
        """A log that was rewritten from some event on is consistent; only the note finds it."""
        expect = self.expectation(vandal)

        def change(row: dict[str, Any]) -> dict[str, Any]:
            return {**row, "data": row["data"].replace("wrong prompt", "a good reason")}

        with vandal.undone():
            self.rewrite(vandal, lambda row: row)
            assert self.expectation(vandal) == expect
        with vandal.undone():
            self.rewrite(vandal, change)
            assert verify(vandal.connection).ok
            assert not verify(vandal.connection, expect=expect).ok


class TestCompare:
    """The rows of `tasks`, held against the log."""

    def test_untouched(self, vandal: Vandal) -> None:
        """They are what the log says."""
        report = compare(vandal.connection)
        assert (report.tasks, report.differed) == (len(TASK_IDS), 0)

    @pytest.mark.parametrize("column", [c.name for c in tasks.c])
    def test_edited(self, vandal: Vandal, backend: Backend, column: str) -> None:
        """Any changed value in any column of any row is found, and put right by `rebuild`."""
        everything = "SELECT * FROM tasks ORDER BY stream_id"
        before = vandal.run(everything)
        changed = 0
        for row, (stream_id, *_) in enumerate(before):
            for value in ("'x'", f"{column} || 'x'", *(backend.juggled if row == 0 else ())):
                with vandal.undone():
                    try:
                        vandal.run(
                            f"UPDATE tasks SET {column} = {value} WHERE stream_id = {stream_id}"
                        )
                    except Refused:
                        continue
                    if compare(vandal.connection).differed == 0:
                        assert repr(vandal.run(everything)) == repr(before), (stream_id, value)
                        continue
                    changed += 1
                    if changed == 1:
                        assert rebuild(vandal.connection).differed >= 1
                        assert compare(vandal.connection).differed == 0
                        assert vandal.run(everything) == before
        assert changed > 0

    def test_missing(self, vandal: Vandal) -> None:
        """Missing rows are found."""
        for task_id in TASK_IDS:
            with vandal.undone():
                vandal.run("DELETE FROM tasks WHERE task_id = ?", task_id)
                assert compare(vandal.connection).differed == 1
        with vandal.undone():
            vandal.run("DELETE FROM tasks")
            assert compare(vandal.connection).differed == len(TASK_IDS)

    @pytest.mark.parametrize("stream_id", [-5, 0, 3000, 2**62])
    def test_surplus(self, vandal: Vandal, stream_id: int) -> None:
        """Rows of tasks that never were are found, wherever they stand."""
        columns = [c.name for c in tasks.c if c.name not in ("stream_id", "task_id", "key")]
        with vandal.undone():
            vandal.run(
                f"INSERT INTO tasks (stream_id, task_id, {', '.join(columns)}) "
                f"SELECT {stream_id}, 'new', {', '.join(columns)} FROM tasks LIMIT 1"
            )
            assert compare(vandal.connection).differed == 1

    def test_a_log_that_cannot_be_folded(self, vandal: Vandal, backend: Backend) -> None:
        """Where the log itself is broken, that is said; nothing is rebuilt from it."""
        before = vandal.run("SELECT * FROM tasks")
        for statement in (
            "DELETE FROM events WHERE version = 1",
            "UPDATE events SET data = '{' WHERE type = 'running'",
            "UPDATE events SET type = 'invented' WHERE type = 'running'",
            f"UPDATE events SET recorded_at = {backend.no_moment} WHERE type = 'running'",
            "UPDATE events SET data = CAST(x'ff' AS TEXT) WHERE type = 'running'",
            "UPDATE events SET data = x'ff' WHERE type = 'running'",
            "UPDATE events SET version = 'x' WHERE version = 2",
            "UPDATE events SET version = version + 1 WHERE type = 'cancelled'",
            """UPDATE events SET data = '{"task":{"messages":5},"platforms":["alpha"]}'
            WHERE type = 'submitted'""",
        ):
            with vandal.undone():
                try:
                    vandal.run(statement)
                except Refused:
                    continue
                try:
                    problems = compare(vandal.connection).problems
                except StoreError as error:  # what only a newer perdure knows
                    problems = [str(error)]
                with pytest.raises(StoreError) as broken:
                    rebuild(vandal.connection)
                for problem in (*problems, str(broken.value)):
                    assert len(problem.splitlines()) == 1
                assert problems
                assert vandal.run("SELECT * FROM tasks") == before


async def test_while_others_write(backend: Backend, database_url: str) -> None:
    """`verify` looks at one state of the log, however much is written meanwhile."""
    async with opened(database_url) as store:
        for number in range(20):
            await store.submit(f"t{number}")

        def look() -> VerifyReport:
            with Database(database_url).snapshot() as connection:
                reached.set()
                return verify(connection)

        for round_ in range(5):
            reached = asyncio.Event()
            looking = asyncio.create_task(asyncio.to_thread(look))
            for number in range(20):
                await store.submit(f"t{round_}_{number}")
            assert (await looking).problems == []


def test_corrupt_is_an_error_of_ours() -> None:
    """What `compare` raises can be caught as what it is."""
    assert issubclass(DatabaseCorrupt, StoreError)
