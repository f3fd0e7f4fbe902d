"""`perdure verify`, `rebuild`, `redact`, `db …`, `doctor` and `platforms`."""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from stories import (
    NOON,
    OnTerminal,
    asked,
    cancel,
    complete,
    fail,
    running,
    submit,
    tell,
    tell_all,
)

from conftest import Ended, Perdure
from perdure.cli.files import stored_revision
from perdure.events import Chunk
from perdure.store.claims import register_worker
from perdure.store.database import Database
from perdure.store.readonly import APPLICATION_ID, REVISION
from perdure.store.transaction import FoldCache, Transaction

ONE = "demo_20261120_aaaa1111"
TWO = "demo_20261120_bbbb2222"
THREE = "demo_20261120_cccc3333"


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Four tasks, the last one running."""
    database.write_bytes(migrated_file.read_bytes())
    submit(database, ONE, "What is a log?")
    complete(database, ONE, "A ledger.")
    submit(database, TWO, "x")
    fail(database, TWO)
    submit(database, THREE, "y")
    cancel(database, THREE, "half")
    submit(database, "demo_20261120_dddd4444", "z")
    tell(database, "demo_20261120_dddd4444", running(), Chunk(text="so far"))
    return database


def edit(path: Path, *statements: str) -> None:
    """Change a database as one does who knows SQLite and not perdure."""
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER events_no_update")
        connection.execute("DROP TRIGGER events_no_delete")
        for statement in statements:
            connection.execute(statement)
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

    def test_json(self, story: Path, perdure: Perdure) -> None:
        """With --json it is one object, problems or not."""
        found = perdure("verify", "--json").json
        assert found["ok"] is True
        assert found["problems"] == []
        assert found["tasks"] == 4
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
        assert "comparing tasks: 100 % of 4" in err
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
        assert perdure("rebuild", "--json").json == {"tasks": 4, "rows_mended": 0}
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
        assert perdure("output", ONE).out == "A ledger."

    @pytest.mark.parametrize(
        ("answer", "code", "left"), [("y\n", 0, ""), ("n\n", 130, "A ledger.")]
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
        ended = perdure("redact", "dddd4444", "--yes")
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
        assert perdure("output", ONE).out == "A ledger."


class TestBackup:
    """`perdure db backup`."""

    def test_copies(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """The copy is a database as any other, its owner's only, and says where it stands."""
        copy = tmp_path / "copy.db"
        seal = perdure("verify").lines[0]
        ended = perdure("db", "backup", copy, "--json")
        assert ended.code == 0
        found = ended.json
        assert f"{found['position']}:{found['digest']}" == seal
        assert found["bytes"] == copy.stat().st_size
        assert copy.stat().st_mode & 0o777 == 0o600
        assert perdure("verify", "--db", copy).lines == [seal]
        assert perdure("list", "--json", "--db", copy).out == perdure("list", "--json").out
        with sqlite3.connect(copy) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        connection.close()
        assert perdure("redact", ONE, "--yes", "--db", copy).code == 0

    def test_with_what_is_in_the_wal(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """What was committed a moment ago is in it, also while others have the database open."""
        reader = sqlite3.connect(story)
        reader.execute("SELECT * FROM tasks").fetchone()
        submit(story, "demo_1", "the latest")
        copy = tmp_path / "copy.db"
        perdure("db", "backup", copy)
        assert perdure("show", "demo_1", "--db", copy, "--json").json["prompt"] == "the latest"
        reader.close()

    def test_while_others_write(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The copy is one moment's, however much is written while it is made."""
        import perdure.cli.files as room

        tell_all(story, ((f"filler_{n}", (asked("x" * 20_000),), NOON) for n in range(20)))
        monkeypatch.setattr(room, "_PAGES_A_STEP", 1)
        stop = threading.Event()
        written: list[str] = []

        def write() -> None:
            while not stop.is_set():
                written.append(f"more_{len(written)}")
                submit(story, written[-1], "y" * 5000)

        before = perdure("verify", "--json").json["position"]
        writer = threading.Thread(target=write)
        writer.start()
        try:
            copies = [tmp_path / f"copy{n}.db" for n in range(3)]
            for copy in copies:
                assert perdure("db", "backup", copy).code == 0
        finally:
            stop.set()
            writer.join()
        assert len(written) > 3
        positions = [perdure("verify", "--json", "--db", copy).json for copy in copies]
        assert all(found["ok"] for found in positions)
        assert before <= positions[0]["position"] < positions[-1]["position"]

    def test_what_is_there(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """A file that is there is replaced with --force only."""
        copy = tmp_path / "copy.db"
        copy.write_text("precious")
        ended = perdure("db", "backup", copy)
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        assert "--force" in ended.err
        assert copy.read_text() == "precious"
        assert perdure("db", "backup", copy, "--force").code == 0
        assert perdure("verify", "--db", copy).code == 0

    def test_never_over_a_database_in_use(
        self, story: Path, perdure: Perdure, tmp_path: Path, migrated_file: Path
    ) -> None:
        """Not over the database itself, and not over one whose WAL would spoil the copy."""
        assert perdure("db", "backup", story, "--force").code == 1
        link = tmp_path / "link.db"
        link.symlink_to(story)
        assert perdure("db", "backup", link, "--force").code == 1
        other = tmp_path / "other.db"
        other.write_bytes(migrated_file.read_bytes())
        user = sqlite3.connect(other)
        user.execute("UPDATE log_head SET position = 1")
        user.commit()
        ended = perdure("db", "backup", other, "--force")
        assert ended.code == 1
        assert "in use" in ended.err
        user.close()

    @pytest.mark.parametrize("place", [".", "no/such/folder/copy.db"])
    def test_bad_places(self, story: Path, perdure: Perdure, tmp_path: Path, place: str) -> None:
        """A directory, or a folder that isn't there, is one line."""
        ended = perdure("db", "backup", tmp_path / place)
        assert (ended.code, ended.err.count("\n")) == (1, 1)

    def test_leaves_no_draft(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A copy that isn't finished is not left behind."""
        import perdure.cli.files as room

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(room.Reader, "one", interrupted)
        assert perdure("db", "backup", tmp_path / "copy.db").code == 130
        assert not list(tmp_path.glob("*copy.db*"))
        assert not list(tmp_path.glob(".copy*"))


class TestVacuumAndUpgrade:
    """`perdure db vacuum` and `perdure db upgrade`."""

    @pytest.mark.parametrize("full", [[], ["--full"]])
    def test_shrinks(self, story: Path, perdure: Perdure, full: list[str]) -> None:
        """Space that a redaction left is given back, and the sizes are told."""
        submit(story, "demo_1", "x" * 1_000_000)
        cancel(story, "demo_1")
        perdure("redact", "demo_1", "--yes")
        ended = perdure("db", "vacuum", *full, "--json")
        assert ended.code == 0
        found = ended.json
        assert found["bytes_before"] - found["bytes_after"] > 1_000_000
        assert found["bytes_after"] == story.stat().st_size
        assert perdure("verify").code == 0
        assert "before" in perdure("db", "vacuum").err

    def test_while_others_look(self, story: Path, perdure: Perdure) -> None:
        """Somebody who has the database open doesn't keep it from shrinking."""
        submit(story, "demo_1", "x" * 1_000_000)
        cancel(story, "demo_1")
        perdure("redact", "demo_1", "--yes")
        other = sqlite3.connect(story)
        other.execute("SELECT * FROM tasks").fetchall()
        before = story.stat().st_size
        assert perdure("db", "vacuum").code == 0
        assert story.stat().st_size < before - 1_000_000
        other.close()

    def test_up_to_date(self, story: Path, perdure: Perdure) -> None:
        """A database of today's schema is left as it is."""
        assert stored_revision(story) == REVISION
        ended = perdure("db", "upgrade")
        assert (ended.code, ended.out) == (0, "")
        assert "already" in ended.err
        assert perdure("db", "upgrade", "--json").json == {"before": REVISION, "after": REVISION}

    def test_from_nothing(self, database: Path, perdure: Perdure) -> None:
        """An empty file becomes a database."""
        database.touch()
        assert perdure("db", "upgrade", "--json").json == {"before": None, "after": REVISION}
        assert perdure("list").code == 0

    @pytest.mark.parametrize("content", ["", "no database"])
    def test_not_ours(self, database: Path, perdure: Perdure, content: str) -> None:
        """What isn't there, or is no database, is one line."""
        if content:
            database.write_text(content * 1000)
        ended = perdure("db", "upgrade")
        assert (ended.code, ended.err.count("\n")) == (1, 1)


def findings(ended: Ended) -> dict[str, Any]:
    """Return what the doctor found, by name."""
    return {found["name"]: found for found in map(json.loads, ended.lines)}


class TestDoctor:
    """`perdure doctor`."""

    def test_healthy(self, story: Path, perdure: Perdure) -> None:
        """Everything is looked at, and nothing is broken."""
        story.chmod(0o600)
        ended = perdure("doctor", "--json")
        assert ended.code == 0
        found = findings(ended)
        names = "python sqlite database permissions disk schema journal integrity log workers tasks"
        assert {*names.split(), "perdure", "demo", "compatible"} <= {*found}
        assert found["python"]["value"].startswith(sys.version.split()[0])
        assert sqlite3.sqlite_version in found["sqlite"]["value"]
        assert str(story) in found["database"]["value"]
        assert found["permissions"]["state"] == "ok"
        assert found["schema"]["value"] == REVISION
        assert not [one for one in found.values() if one["state"] == "broken"]

    @pytest.mark.parametrize(
        ("version", "state"), [((3, 51, 2), "note"), ((3, 51, 3), "ok"), ((3, 40, 1), "note")]
    )
    def test_wal_reset_race(
        self,
        story: Path,
        perdure: Perdure,
        monkeypatch: pytest.MonkeyPatch,
        version: tuple[int, int, int],
        state: str,
    ) -> None:
        """An SQLite with the WAL-reset race is named, and why perdure stays clear of it."""
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
        found = findings(perdure("doctor", "--json"))["sqlite"]
        assert found["state"] == state
        assert ("write lock" in (found["hint"] or "")) == (state == "note")

    def test_permissions(self, story: Path, perdure: Perdure) -> None:
        """A database that others may read is warned of."""
        story.chmod(0o644)
        ended = perdure("doctor", "--json")
        found = findings(ended)["permissions"]
        assert ended.code == 0
        assert found["state"] == "warning"
        assert "chmod 600" in found["hint"]

    def test_not_there_yet(self, database: Path, perdure: Perdure) -> None:
        """The default database that no task has created yet is nothing broken."""
        ended = perdure("doctor", "--json")
        assert ended.code == 0
        assert findings(ended)["database"]["state"] == "note"
        assert not database.exists()

    def test_named_and_not_there(self, perdure: Perdure, tmp_path: Path) -> None:
        """One that was named has to be there."""
        ended = perdure("doctor", "--json", "--db", tmp_path / "typo.db")
        assert ended.code == 1
        assert findings(ended)["database"]["state"] == "broken"

    @pytest.mark.parametrize("kind", ["directory", "text", "foreign", "newer", "damaged"])
    def test_broken(self, database: Path, migrated_file: Path, perdure: Perdure, kind: str) -> None:
        """What is no usable database is broken: exit code 1, and the rest is still looked at."""
        match kind:
            case "directory":
                database.mkdir()
            case "text":
                database.write_text("Dear diary,\n" * 999)
            case "foreign":
                with sqlite3.connect(database) as connection:
                    connection.execute("CREATE TABLE x (y)")
                connection.close()
            case "newer":
                database.write_bytes(migrated_file.read_bytes())
                with sqlite3.connect(database) as connection:
                    connection.execute("UPDATE alembic_version SET version_num = '9999'")
                connection.close()
            case _:
                database.write_bytes(migrated_file.read_bytes()[:100] + b"\xa5" * 90_000)
        ended = perdure("doctor", "--json")
        assert ended.code == 1
        assert ended.err == ""
        assert [one for one in findings(ended).values() if one["state"] == "broken"]
        assert "demo" in findings(ended)

    def test_damaged_page(self, story: Path, perdure: Perdure) -> None:
        """A page that was overwritten is found by the quick check."""
        tell_all(story, ((f"demo_{n}", (asked("x" * 1000),), NOON) for n in range(200)))
        with sqlite3.connect(story) as connection:
            root = connection.execute(
                "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = 'events'"
            ).fetchone()[0]
            size = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.close()
        with story.open("r+b") as file:
            file.seek((root - 1) * size + 40)
            file.write(b"\xff" * 400)
        ended = perdure("doctor", "--json")
        assert ended.code == 1
        assert findings(ended)["integrity"]["state"] == "broken"

    def test_workers(self, story: Path, perdure: Perdure) -> None:
        """Workers alive and lost, and tasks that nobody runs."""
        found = findings(perdure("doctor", "--json"))
        assert found["workers"]["state"] == "warning"  # of worker_1 there is only a running task
        assert found["tasks"]["value"] == "1 running"
        writer = Database(story).writer()
        with writer.transaction() as connection:
            register_worker(Transaction(connection, FoldCache(), datetime.now(UTC)), "here")
            gone = Transaction(connection, FoldCache(), NOON - timedelta(days=1))
            register_worker(gone, "gone")
        writer.close()
        found = findings(perdure("doctor", "--json"))
        assert found["workers"]["value"] == "1 alive, 2 lost"
        submit(story, "demo_1", "x")
        assert findings(perdure("doctor", "--json"))["tasks"]["value"] == "1 pending, 1 running"

    def test_keys_are_not_shown(
        self, story: Path, perdure: Perdure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever keys are set, none is in what it says."""
        monkeypatch.setenv("PERDURE_COMPATIBLE_BASE_URL", "http://user:hunter2@host:1/v1")
        monkeypatch.setenv("PERDURE_COMPATIBLE_API_KEY", "sk secret")
        for command in ("doctor", "platforms"):
            for form in ([], ["--json"]):
                ended = perdure(command, *form)
                assert "hunter2" not in ended.out
                assert "secret" not in ended.out

    def test_for_people(self, story: Path, perdure: Perdure, on_terminal: OnTerminal) -> None:
        """In a pipe four fields; on a terminal what to do is below."""
        assert {line.count("\t") for line in perdure("doctor").lines} == {3}
        shown = on_terminal("doctor").out
        assert "ok       demo" in shown


class TestPlatforms:
    """`perdure platforms`."""

    def test_what_is_missing(
        self, perdure: Perdure, monkeypatch: pytest.MonkeyPatch, on_terminal: OnTerminal
    ) -> None:
        """A platform that can't be used says what to install or set; no database is needed."""
        for name in ("PERDURE_COMPATIBLE_BASE_URL", "OPENAI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        ended = perdure("platforms", "--json")
        assert ended.code == 0
        found = {one["platform"]: one for one in map(json.loads, ended.lines)}
        assert found["demo"]["usable"] is True
        assert found["demo"]["default_model"] == "demo-1"
        assert "streaming" in found["demo"]["abilities"]
        assert found["compatible"]["usable"] is False
        assert "PERDURE_COMPATIBLE_BASE_URL" in found["compatible"]["problem"]
        assert {line.count("\t") for line in perdure("platforms").lines} == {4}
        assert "compatible: " in on_terminal("platforms").out

    def test_usable(self, perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its address set it can be used."""
        pytest.importorskip("openai")
        monkeypatch.setenv("PERDURE_COMPATIBLE_BASE_URL", "http://127.0.0.1:1/v1")
        lines = perdure("platforms", "--json").lines
        found = {one["platform"]: one for one in map(json.loads, lines)}
        assert found["compatible"] == {**found["compatible"], "usable": True, "problem": None}

    def test_broken_platform(self, perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that can't even be loaded doesn't hide the others."""
        from importlib.metadata import EntryPoint

        from perdure import platforms as room

        points = [
            EntryPoint("broken", "no_such_module:Adapter", room.GROUP),
            EntryPoint("demo", "perdure_adapters.demo:DemoAdapter", room.GROUP),
        ]
        monkeypatch.setattr(room, "entry_points", lambda **_: points)
        found = [json.loads(line) for line in perdure("platforms", "--json").lines]
        assert [one["usable"] for one in found] == [False, True]
        assert "no_such_module" in found[0]["problem"]
