"""`perdure verify`, `rebuild` and `redact`."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from invoking import Perdure
from programs import query
from stories import (
    FIVE,
    ONE,
    TWO,
    complete,
    five_tasks,
    submit,
)

from perdure.events import chain_digest


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Five tasks, one of each status, the second run again as the fourth."""
    database.write_bytes(migrated_file.read_bytes())
    five_tasks(database)
    return database


def edit(path: Path, *statements: str) -> None:
    """Change a database as one does who knows SQLite and not perdure."""
    with sqlite3.connect(path) as connection:
        triggers = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"
        ).fetchall()
        for name, _sql in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for _name, sql in triggers:
            connection.execute(sql)
    connection.close()


class TestVerify:
    """`perdure verify`."""

    def test_all_is_well(self, story: Path, perdure: Perdure) -> None:
        """Stdout has the position and digest of the log's end, to note down, and nothing else."""
        ended = perdure("verify")
        assert ended.code == 0
        with sqlite3.connect(story) as connection:
            head = connection.execute("SELECT position, lower(hex(digest)) FROM log_head")
            position, digest = head.fetchone()
        connection.close()
        assert ended.lines == [f"{position}:{digest}"]
        assert "All is well" in ended.err

    def test_expect(self, story: Path, perdure: Perdure) -> None:
        """What was noted down still stands there after more was written."""
        seal = perdure("verify").lines[0]
        submit(story, "demo_1", "more")
        assert perdure("verify", "--expect", seal).code == 0
        assert perdure("verify", "--expect", seal.upper()).code == 0

    def test_cut_off(self, story: Path, perdure: Perdure) -> None:
        """A log that is sound in itself but ends too early is found out by what was noted down."""
        short = perdure("verify").lines[0]
        submit(story, "demo_1", "more")
        long = perdure("verify").lines[0]
        edit(
            story,
            "DELETE FROM tasks WHERE task_id = 'demo_1'",
            "DELETE FROM events WHERE position = (SELECT max(position) FROM events)",
            "DELETE FROM streams WHERE task_id = 'demo_1'",
            f"UPDATE log_head SET position = position - 1, digest = x'{short.partition(':')[2]}'",
        )
        assert perdure("verify").code == 0
        assert perdure("verify", "--expect", short).code == 0
        ended = perdure("verify", "--expect", long)
        assert ended.code == 1
        assert "before the expected" in ended.out

    def test_written_anew(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """Another log in its place is found out, however sound it is."""
        seal = f"3:{'0' * 64}"
        ended = perdure("verify", "--expect", seal)
        assert (ended.code, len(ended.lines)) == (1, 1)
        assert "position 3" in ended.out

    @pytest.mark.parametrize(
        ("statement", "says"),
        [
            ("UPDATE events SET data = replace(data, 'led', 'bad') WHERE position = 4", "4"),
            ("UPDATE events SET type = 'usage' WHERE position = 4", "4"),
            (
                "UPDATE events SET recorded_at = '2026-11-20T12:00:01.000001Z' WHERE position = 2",
                "2",
            ),
            ("UPDATE events SET digest = zeroblob(32) WHERE position = 3", "3"),
            ("DELETE FROM events WHERE position = 3", "position 3 was expected"),
            ("UPDATE log_head SET position = position - 1", "head"),
            ("DELETE FROM log_head", "head row"),
            ("UPDATE streams SET version = 9 WHERE stream_id = 1", "version 9"),
            ("UPDATE events SET data = '{' WHERE position = 3", "3"),
            ("UPDATE tasks SET output = 'A lodger.' WHERE stream_id = 1", "perdure rebuild"),
            ("UPDATE tasks SET cost_usd = 1 WHERE stream_id = 1", "perdure rebuild"),
            ("DELETE FROM tasks WHERE stream_id = 1", "perdure rebuild"),
            ("INSERT INTO blobs VALUES ('0f', 1, x'00')", "blob"),
        ],
    )
    def test_finds(self, story: Path, perdure: Perdure, statement: str, says: str) -> None:
        """An edit made past the triggers is found: its place is named, and the exit code is 1."""
        edit(story, statement)
        ended = perdure("verify")
        assert ended.code == 1
        assert ended.lines
        assert any(says in line for line in ended.lines)
        assert "problem" in ended.err
        assert "1:" not in ended.err

    def test_each_task_that_cannot_be_folded(self, story: Path, perdure: Perdure) -> None:
        """One doesn't hide the others, nor a row that differs; each is named with its place."""
        edit(
            story,
            "UPDATE events SET data = '{}' WHERE type = 'running'",
            "UPDATE events SET recorded_at = 'infinity' WHERE position = 1",
            "UPDATE tasks SET output = 'forged' WHERE status = 'completed'",
        )
        running = query(
            story,
            "SELECT task_id, version FROM task_events WHERE type = 'running' AND position > 1",
        )
        ended = perdure("verify")
        assert ended.code == 1
        assert f"{ONE} version 1 can't be folded (its time is none)" in ended.out
        unreadable = [line for line in ended.lines if "can't be folded (an event" in line]
        assert len(unreadable) >= 2
        for line, (task_id, version) in zip(
            unreadable, [found for found in running if found[0] != ONE], strict=True
        ):
            assert line.startswith(f"{task_id} version {version} can't be folded")
        assert "run `perdure verify`" not in ended.out
        rebuilt = perdure("rebuild")
        assert rebuilt.code == 1
        assert "can't be folded" in rebuilt.err
        assert "run `perdure verify`" in rebuilt.err

    @pytest.mark.parametrize("value", ["2", "'x'", "1.5", "-1"])
    def test_schema_version(self, story: Path, perdure: Perdure, value: str) -> None:
        """A changed schema version is a change like any other, and the walk goes on."""
        edit(
            story,
            f"UPDATE events SET schema_version = {value} WHERE position = 1",
            "UPDATE events SET digest = zeroblob(32) WHERE position = 6",
            "UPDATE streams SET version = 9 WHERE stream_id = 1",
        )
        ended = perdure("verify")
        assert ended.code == 1
        assert f"position 1 ({ONE} version 1): the event, or what stands before it" in ended.out
        assert "position 6" in ended.out
        assert "version 9" in ended.out
        assert "upgrade perdure" not in ended.out + ended.err

    @pytest.mark.parametrize("type_", ["submitted", "invented"])
    def test_written_by_a_newer_perdure(self, story: Path, perdure: Perdure, type_: str) -> None:
        """Of an event that is what was written, and that it can't read, it says what to do."""
        with sqlite3.connect(story) as connection:
            (head,) = connection.execute("SELECT position FROM log_head").fetchone()
            before = connection.execute("SELECT digest FROM log_head").fetchone()[0]
            for place in (head + 1, head + 2):
                at = datetime(2026, 11, 22, tzinfo=UTC)
                data = b'{"new":true}'
                before = chain_digest(
                    before, place, f"new_{place}", 1, type_, 7, at, hashlib.sha256(data).digest()
                )
                connection.execute("INSERT INTO streams VALUES (?, ?, 1)", (place, f"new_{place}"))
                connection.execute(
                    "INSERT INTO events VALUES (?, ?, 1, ?, 7, ?, ?, ?)",
                    (place, place, type_, data.decode(), "2026-11-22T00:00:00.000000Z", before),
                )
            connection.execute("UPDATE log_head SET position = ?, digest = ?", (head + 2, before))
        connection.close()
        ended = perdure("verify")
        assert ended.code == 1
        newer, uncompared = ended.lines
        assert newer == (
            f"position {head + 1} (new_{head + 1} version 1): {type_!r} of schema version 7 was "
            "written by a newer perdure, as 1 more are: upgrade perdure"
        )
        assert uncompared.startswith("`tasks` can't be held against the log")

    def test_defences(self, story: Path, perdure: Perdure) -> None:
        """What was dropped is found, by doctor as well; `db upgrade` puts it back."""
        with sqlite3.connect(story) as connection:
            connection.execute("DROP TRIGGER events_no_update")
            connection.execute("DROP TRIGGER events_no_delete")
            connection.execute("DROP INDEX events_one_ending")
            connection.execute("DROP VIEW batches")
            connection.execute("CREATE VIEW batches AS SELECT 1 AS batch")
        connection.close()
        ended = perdure("verify")
        assert (ended.code, len(ended.lines)) == (1, 4)
        for line in ended.lines:
            assert line.endswith("`perdure db upgrade` puts it back")
        state = {one["name"]: one for one in map(json.loads, perdure("doctor", "--json").lines)}
        assert state["defences"]["state"] == "broken"
        back = perdure("db", "upgrade", "--json").json
        assert (len(back["put_back"]), back["failed"]) == (4, [])
        assert perdure("verify").code == 0
        assert "ok" in next(one for one in perdure("doctor").lines if one.startswith("defences"))

    def test_defences_of_a_newer_schema(self, story: Path, perdure: Perdure) -> None:
        """What a newer release makes isn't judged, and that is said."""
        with sqlite3.connect(story) as connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
            connection.execute("DROP INDEX events_one_ending")
        connection.close()
        ended = perdure("verify")
        assert ended.code == 0
        assert "Not looked at: triggers, unique indexes and views" in ended.err
        assert perdure("verify", "--json").json["unchecked"]

    def test_json(self, story: Path, perdure: Perdure) -> None:
        """With --json it is one object, problems or not."""
        found = perdure("verify", "--json").json
        assert found["ok"] is True
        assert found["problems"] == []
        assert found["tasks"] == 5
        assert found["events"] == found["position"]
        edit(story, "UPDATE tasks SET output = 'x' WHERE stream_id = 1")
        ended = perdure("verify", "--json")
        assert ended.code == 1
        assert ended.json["ok"] is False
        assert ended.json["rows_differing"] == 1
        assert len(ended.json["problems"]) == 1

    def test_empty_log(self, database: Path, migrated_file: Path, perdure: Perdure) -> None:
        """A log without events is sound, and there is nothing to note down."""
        database.write_bytes(migrated_file.read_bytes())
        ended = perdure("verify")
        assert (ended.code, ended.out) == (0, "")

    @pytest.mark.parametrize("seal", ["", "5", "5:xyz", f"x:{'0' * 64}", f"-1:{'0' * 64}", ":"])
    def test_bad_expectation(self, story: Path, perdure: Perdure, seal: str) -> None:
        """What verify can't have printed is a usage error."""
        ended = perdure("verify", "--expect", seal)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.count("\n") == 1

    def test_progress(self, story: Path, perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a terminal it says how far it is, and leaves no trace of that."""
        import perdure.cli.progress as room

        with monkeypatch.context() as patch:
            patch.setattr(sys.stderr, "isatty", lambda: True)
            patch.setattr(room, "_EVERY_SECONDS", 0)
            err = perdure("verify").err
        assert "comparing tasks: 100 % of 5" in err
        assert err.startswith("\r\x1b[K")
        assert "\r\x1b[KAll is well" in err


class TestRebuild:
    """`perdure rebuild`."""

    def test_mends(self, story: Path, perdure: Perdure) -> None:
        """Rows that are wrong, missing or too many are what the log says again."""
        before = perdure("list", "--json").out
        edit(
            story,
            "UPDATE tasks SET output = 'x', prompt = NULL WHERE stream_id = 1",
            f"DELETE FROM tasks WHERE task_id = '{TWO}'",
        )
        ended = perdure("rebuild")
        assert (ended.code, ended.out) == (0, "")
        assert "2 differences" in ended.err
        assert perdure("list", "--json").out == before
        assert perdure("verify").code == 0

    def test_all_was_right(self, story: Path, perdure: Perdure) -> None:
        """Where nothing was wrong it says so, and changes nothing."""
        before = perdure("list", "--json").out
        assert "all was right" in perdure("rebuild").err
        assert perdure("rebuild", "--json").json == {"tasks": 5, "rows_mended": 0}
        assert perdure("list", "--json").out == before

    def test_unreadable_log(self, story: Path, perdure: Perdure) -> None:
        """From a log that can't be folded nothing is made: the rows stay as they are."""
        before = perdure("list", "--json").out
        edit(story, "UPDATE events SET data = '{' WHERE position = 3")
        ended = perdure("rebuild")
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        assert "perdure verify" in ended.err
        assert perdure("list", "--json").out == before


class TestRedact:
    """`perdure redact`."""

    def test_removes(self, story: Path, perdure: Perdure) -> None:
        """The words are gone from every file; what happened, and the chain, stay."""
        word = "XYZZY"
        submit(story, "demo_1", f"{word} " * 999, labels={"l": word}, system=f"{word} " * 999)
        complete(story, "demo_1", f"{word} " * 2000)
        assert word.encode() in story.read_bytes()
        ended = perdure("redact", "demo_1", "--yes", "--reason", "asked to")
        assert (ended.code, ended.out) == (0, "")
        for file in story.parent.glob(f"{story.name}*"):
            assert word.encode() not in file.read_bytes()
        assert perdure("verify").code == 0
        assert perdure("show", "demo_1", "--json").json["input_tokens"] == 10
        assert "asked to" in perdure("log", "demo_1").lines[-1]

    def test_nobody_to_ask(
        self, story: Path, perdure: Perdure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without --yes and without a terminal it does nothing and says what to say."""
        monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: PTH123, SIM115
        ended = perdure("redact", ONE)
        sys.stdin.close()
        assert ended.code == 2
        assert "--yes" in ended.err
        assert perdure("output", ONE).out == "A log is a ledger."

    @pytest.mark.parametrize(
        ("answer", "code", "left"), [("y\n", 0, ""), ("n\n", 130, "A log is a ledger.")]
    )
    def test_asks(
        self,
        story: Path,
        perdure: Perdure,
        monkeypatch: pytest.MonkeyPatch,
        answer: str,
        code: int,
        left: str,
    ) -> None:
        """On a terminal it shows what it is about to remove, and asks."""
        import io

        stdin = io.StringIO(answer)
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", stdin)
        ended = perdure("redact", ONE)
        assert ended.code == code
        assert ended.out == ""
        assert f"{ONE}  completed  What is a log?" in ended.err
        assert perdure("output", ONE).out == left

    def test_not_ended(self, story: Path, perdure: Perdure) -> None:
        """A task that hasn't ended is refused."""
        ended = perdure("redact", FIVE, "--yes")
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        assert "cancel it" in ended.err

    def test_several_and_again(self, story: Path, perdure: Perdure) -> None:
        """Several at once; what was removed before is no error."""
        lines = perdure("redact", ONE, TWO, "--yes", "--json").lines
        assert [json.loads(line)["events_redacted"] for line in lines] == [2, 3]
        assert perdure("redact", ONE, "--yes", "--json").json["events_redacted"] == 0
        assert perdure("verify").code == 0

    def test_unknown_among_several(self, story: Path, perdure: Perdure) -> None:
        """Where one of several isn't there, none is touched."""
        assert perdure("redact", ONE, "nothing", "--yes").code == 1
        assert perdure("output", ONE).out == "A log is a ledger."
