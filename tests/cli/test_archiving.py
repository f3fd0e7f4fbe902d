"""`perdure archive`, and what the other commands say of what was archived."""

from __future__ import annotations

import json
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from invoking import Perdure
from programs import Program, until, write_rows
from stories import FIVE, FOUR, NOON, ONE, THREE, TWO, asked, five_tasks, submit

from perdure.cli.main import run
from perdure.events import Cancelled
from perdure.store.database import Database
from perdure.store.transaction import FoldCache, Transaction


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, database: Path, migrated_file: Path) -> str:
    """An empty log on each database; commands name it with --db."""
    if request.param == "sqlite":
        database.write_bytes(migrated_file.read_bytes())
        return str(database)
    make: Callable[[], str] = request.getfixturevalue("make_server_database")
    return make()


@pytest.fixture
def batch(url: str, perdure: Perdure, tmp_path: Path) -> list[str]:
    """The command line of a batch of three rows that was run."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": n, "prompt": f"p{n}"} for n in range(3)])
    command = ["--db", url, "run", str(rows), "-p", "demo", "--out", str(tmp_path / "out.jsonl")]
    assert perdure(*command).code == 0
    return command


def ids(perdure: Perdure, url: str) -> list[str]:
    """Return the ids of all tasks."""
    return [line.split("\t")[0] for line in perdure("--db", url, "list").lines]


class TestArchive:
    """The command itself, on both databases."""

    def test_a_batch(self, url: str, batch: list[str], perdure: Perdure, tmp_path: Path) -> None:
        """Old tasks go into a file, sums stay, and nothing is run again."""
        file = tmp_path / "old.db"
        dry = perdure("--db", url, "archive", "--before", "now", "--dry-run", "--json")
        stats = perdure("--db", url, "stats", "--json").out
        texts = {one: perdure("--db", url, "output", one).out for one in ids(perdure, url)}
        done = perdure("--db", url, "archive", "--before", "now", "--to", str(file), "--json")
        assert done.code == 0, done.err
        assert done.json["tasks"] == dry.json["tasks"] == 3
        assert done.json["events"] == dry.json["events"] > 9
        assert dry.json["bytes"] > 500
        assert (done.json["file"], done.json["bytes"]) == (str(file), file.stat().st_size)
        assert (done.json["changed"], done.json["blobs"]) == (0, 0)

        assert perdure("--db", url, "stats", "--json").out == stats
        (_, summed) = perdure(
            "--db", url, "sql", "SELECT completed FROM batches"
        ).lines  # fmt: skip
        assert summed == "3"
        again = perdure(*batch)
        assert again.code == 0, again.err
        assert len(ids(perdure, url)) == 3
        lines = (tmp_path / "out.jsonl").read_text().splitlines()
        results = [json.loads(line) for line in lines]
        assert {(one["status"], one["output"], one["archived"]) for one in results} == {
            ("completed", None, "old.db")
        }
        for one, text in texts.items():
            assert perdure("--db", file, "output", one).out == text
            assert perdure("--db", file, "show", one).code == 0
            assert len(perdure("--db", file, "log", one).lines) > 3
        assert len(perdure("--db", file, "list").lines) == 3
        assert perdure("--db", file, "rebuild").code == 0
        inside = perdure("--db", file, "verify")
        assert inside.code == 0
        assert "It is an archive" in inside.err

        nothing = perdure("--db", url, "archive", "--before", "now", "--to", tmp_path / "b.db")
        assert (nothing.code, "nothing to archive" in nothing.err) == (0, True)

    def test_verify(self, url: str, batch: list[str], perdure: Perdure, tmp_path: Path) -> None:
        """The log says how much it couldn't look at; with the archives named it does."""
        file = tmp_path / "old.db"
        (seal,) = perdure("--db", url, "verify").lines
        assert perdure("--db", url, "archive", "--before", "now", "--to", file).code == 0
        plain = perdure("--db", url, "verify")
        assert plain.code == 0
        assert "in archives not looked at" in plain.err
        whole = perdure("--db", url, "verify", "--archive", file, "--json").json
        assert (whole["ok"], whole["archived"], whole["archives"][0]["tasks"]) == (True, 0, 3)
        told = perdure("--db", url, "verify", "--archive", file).err
        away = whole["archives"][0]["events"]
        assert f"old.db: {away} events of 3 tasks, and they are what was archived" in told
        assert "not looked at" not in told
        early = f"3:{'0' * 64}"
        hidden = perdure("--db", url, "verify", "--expect", early)
        assert (hidden.code, "position 3 is in an archive" in hidden.out) == (1, True)
        with closing(sqlite3.connect(file)) as inside:
            ((digest,),) = inside.execute("SELECT hex(digest) FROM events WHERE position = 3")
        right = f"3:{digest}"
        assert perdure("--db", url, "verify", "--expect", right, "--archive", file).code == 0
        wrong = perdure("--db", url, "verify", "--expect", early, "--archive", file)
        assert (wrong.code, "not the one expected" in wrong.out) == (1, True)
        assert perdure("--db", url, "verify", "--expect", seal).code == 0  # it ends a gap

    def test_doctor(self, url: str, batch: list[str], perdure: Perdure, tmp_path: Path) -> None:
        """What is in archives isn't counted as events of the log."""

        def log_of(db: str | Path) -> str:
            found = map(json.loads, perdure("--db", db, "doctor", "--json").lines)
            return str({one["name"]: one["value"] for one in found}["log"])

        before = int(log_of(url).split()[0])
        file = tmp_path / "old.db"
        moved = perdure("--db", url, "archive", "--before", "now", "--to", file, "--json").json
        left = before - moved["events"] + moved["tasks"]
        assert log_of(url) == f"{left} events, and {moved['events']} more in archives"
        assert log_of(file) == f"{moved['events']} events"

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            ("UPDATE events SET data = replace(data, 'p1', 'p9')", "was changed"),
            ("UPDATE events SET digest = zeroblob(32)", "not what the log says"),
            ("DELETE FROM events WHERE version = 2", "was expected"),
            ("UPDATE tasks SET output = 'other'", "differs from its events"),
            ("UPDATE log_head SET archive_of = NULL", "no archive"),
            ("DROP VIEW batches", "the trigger events_no_delete on events is missing"),
            ("DROP VIEW attempts", "the view attempts is missing"),
            ("UPDATE streams SET task_id = task_id || 'x'", "doesn't know it"),
        ],
    )  # fmt: skip
    def test_an_edited_archive(
        self, url: str, batch: list[str], perdure: Perdure, tmp_path: Path, damage: str, says: str
    ) -> None:
        """Whatever was done to an archive is found, by the log at the latest."""
        file = tmp_path / "old.db"
        assert perdure("--db", url, "archive", "--before", "now", "--to", file).code == 0
        with closing(sqlite3.connect(file)) as inside, inside:
            for (name,) in inside.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall():
                inside.execute(f"DROP TRIGGER {name}")
            inside.execute(damage)
        found = perdure("--db", url, "verify", "--archive", file)
        assert (found.code, says in found.out) == (1, True), found.out

    def test_a_task_taken_out_of_an_archive(
        self, url: str, batch: list[str], perdure: Perdure, tmp_path: Path
    ) -> None:
        """An archive that was made to fit without a task verifies alone, and not with its log."""
        file = tmp_path / "old.db"
        assert perdure("--db", url, "archive", "--before", "now", "--to", file).code == 0
        with closing(sqlite3.connect(file)) as inside, inside:
            for (name,) in inside.execute(
                "SELECT name FROM sqlite_master WHERE type = 'trigger'"
            ).fetchall():
                inside.execute(f"DROP TRIGGER {name}")
            ((last,),) = inside.execute("SELECT max(stream_id) FROM streams").fetchall()
            inside.execute(
                "INSERT INTO gaps SELECT position, position, digest FROM events "
                "WHERE stream_id = ?", (last,)
            )  # fmt: skip
            for table in ("events", "tasks", "streams"):
                inside.execute(f"DELETE FROM {table} WHERE stream_id = ?", (last,))
        found = perdure("--db", url, "verify", "--archive", file)
        assert found.code == 1
        assert "tasks that the log says are in it are not: 1" in found.out

    def test_another_log_s_archive(
        self, url: str, batch: list[str], perdure: Perdure, tmp_path: Path
    ) -> None:
        """An archive that the log knows nothing of is not its archive."""
        other = tmp_path / "other.db"
        submit_ended(other, perdure)
        assert (
            perdure("--db", other, "archive", "--before", "now", "--to", tmp_path / "x.db").code
            == 0
        )
        found = perdure("--db", url, "verify", "--archive", tmp_path / "x.db")
        assert (found.code, "no archive of the name x.db" in found.out) == (1, True)


def submit_ended(path: Path, perdure: Perdure) -> None:
    """Make a database with one task that has ended."""
    done = perdure("--db", path, "ask", "Hello", "-p", "demo")
    assert done.code == 0, done.err


@pytest.fixture
def story(database: Path, migrated_file: Path, perdure: Perdure, tmp_path: Path) -> Path:
    """Five tasks, three of them in the archive `a.db`."""
    database.write_bytes(migrated_file.read_bytes())
    five_tasks(database)
    assert perdure("archive", "--before", "now", "--to", tmp_path / "a.db").code == 0
    return database


class TestAsking:
    """What other commands say of archived tasks."""

    @pytest.mark.parametrize("command", ["output", "log", "tail", "redact", "retry"])
    def test_refused(self, story: Path, perdure: Perdure, command: str) -> None:
        """One line, exit code 1, and the command that shows it."""
        more = {"redact": ["--yes"], "retry": ["--no-run"]}.get(command, [])
        ended = perdure(command, *more, ONE)
        assert (ended.code, ended.out) == (1, "")
        asked = "output" if command == "retry" else command
        assert f"`perdure {asked} {ONE} --db a.db`" in ended.err
        assert "in the archive a.db" in ended.err.splitlines()[0]

    def test_what_is_said_works(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The command that is named, in the archive's folder, shows the text."""
        monkeypatch.chdir(tmp_path)
        said = perdure("output", ONE).err.split("`")[1].split()
        assert perdure(*said[1:]).out == "A log is a ledger."

    def test_continuing(self, story: Path, perdure: Perdure) -> None:
        """A conversation can't go on from what isn't here."""
        ended = perdure("ask", "And?", "--continue", ONE, "-p", "demo")
        assert (ended.code, "in the archive a.db" in ended.err) == (1, True)

    def test_show_and_list(self, story: Path, perdure: Perdure) -> None:
        """The row is still there; where the content is, is said."""
        shown = perdure("show", ONE)
        assert (shown.code, shown.lines[0]) == (0, f"{ONE}  completed")
        assert "in the archive a.db: `perdure show" in shown.out
        assert "$0.25" in shown.out
        known = perdure("show", ONE, "--json").json
        assert (known["archived"], known["redacted"], known["prompt"]) == ("a.db", False, None)
        assert known["labels"] == {"team": "red", "size": "1"}
        listed = {line.split("\t")[0] for line in perdure("list").lines}
        assert listed == {ONE, TWO, THREE, FOUR, FIVE}
        assert perdure("list", "--label", "team=red", "--status", "completed").lines != []

    def test_what_an_unfinished_task_needs(self, story: Path, perdure: Perdure) -> None:
        """Tasks that still run are as they were."""
        assert perdure("output", FIVE).out == "so far"

    def test_export(self, story: Path, perdure: Perdure) -> None:
        """Rows are exported with the name of the archive, events as what is left of them."""
        rows = [json.loads(line) for line in perdure("export").lines]
        assert {row["task_id"]: row["archived"] for row in rows} == {
            ONE: "a.db", TWO: "a.db", THREE: "a.db", FOUR: None, FIVE: None,
        }  # fmt: skip
        events = [json.loads(line) for line in perdure("export", "--events").lines]
        assert [one["type"] for one in events if one["task_id"] == ONE] == ["archived"]

    def test_retrying_what_failed(self, story: Path, perdure: Perdure) -> None:
        """A batch's retry says of each archived task where it is."""
        ended = perdure("retry", "--batch", "b1", "--no-run")
        assert ended.code in (0, 1)  # TWO was run again as FOUR, which waits
        assert ended.lines == [] or ended.lines == [FOUR]

    def test_in_words(self, story: Path) -> None:
        """The event is told in words."""
        from perdure.cli.telling import tell_stored

        with closing(sqlite3.connect(story)) as connection:
            (row,) = connection.execute(
                "SELECT type, schema_version, data FROM events WHERE type = 'archived' LIMIT 1"
            ).fetchall()
        said = tell_stored(*row)
        assert "to a.db by " in said


class TestCommandLine:
    """What can be wrong with it."""

    @pytest.mark.parametrize(
        ("arguments", "code", "says"),
        [
            (("--before", "soonish", "--to", "x.db"), 2, "is no time"),
            (("--before", "now"), 2, "name the file"),
            (("--to", "x.db"), 2, "--before"),
            (("--before", "now", "--to", "/nowhere/x.db"), 1, "no folder"),
        ],
    )
    def test_refused(
        self, story: Path, perdure: Perdure, arguments: tuple[str, ...], code: int, says: str
    ) -> None:
        """One line says what is wrong."""
        ended = perdure("archive", *arguments)
        assert (ended.code, ended.out, len(ended.err.splitlines())) == (code, "", 1)
        assert says in ended.err

    def test_a_dry_run_in_words(self, story: Path, perdure: Perdure) -> None:
        """Nothing is left to archive, and nothing is made."""
        assert "0 tasks with 0 events" in perdure("archive", "--before", "now", "--dry-run").err

    def test_an_older_database_is_upgraded(self, perdure: Perdure, database: Path) -> None:
        """There is nothing to archive where there is no database."""
        ended = perdure("archive", "--before", "now", "--to", database.with_name("x.db"))
        assert (ended.code, "no database" in ended.err) == (1, True)

    @pytest.mark.kill
    def test_interrupted(self, database: Path, migrated_file: Path, tmp_path: Path) -> None:
        """Ctrl-C while it copies leaves nothing behind and says so."""
        database.write_bytes(migrated_file.read_bytes())
        write_many(database)
        to = tmp_path / "a.db"
        with Program("archive", "--before", "now", "--to", to, database=database) as program:
            until(lambda: list(tmp_path.glob(".a.db*")), "the draft")
            program.send(signal.SIGINT)
            code, _, err = program.ended()
        assert code == 130
        assert "nterrupted" in err
        assert list(tmp_path.glob(".a.db*")) == []
        assert run(["--db", str(database), "verify"]) == 0


def write_many(path: Path) -> None:
    """Write enough that archiving takes a moment."""
    writer = Database(path).writer()
    try:
        with writer.transaction() as connection:
            transaction = Transaction(connection, FoldCache(), lambda: NOON)
            for n in range(3000):
                transaction.append(f"demo_{n}", (asked("x" * 100), Cancelled(by="me")), 0)
            transaction.flush()
    finally:
        writer.close()
    submit(path, "waits", "x")
