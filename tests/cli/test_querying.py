"""`perdure sql`, `export` and `stats`."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from stories import (
    ESCAPES,
    NOON,
    OnTerminal,
    asked,
    cancel,
    complete,
    fail,
    running,
    start,
    submit,
    tell_all,
)

from conftest import Perdure
from perdure.cli.records import EVENT_COLUMNS, TASK_COLUMNS
from perdure.cli.tables import cell_width
from perdure.events import Chunk, Completed
from perdure.store.schema import VIEWS, metadata

ONE = "demo_20261120_aaaa1111"
TWO = "demo_20261120_bbbb2222"
THREE = "other_20261120_cccc3333"


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Three tasks that ended, one way each, and one that waits."""
    database.write_bytes(migrated_file.read_bytes())
    submit(database, ONE, "What is a log?", batch="b1", labels={"team": "red"})
    complete(database, ONE, 'A "ledger",\nof sorts.', cost=0.25)
    submit(database, TWO, "x", batch="b1", at=NOON + timedelta(hours=1))
    fail(database, TWO, "too busy")
    submit(database, THREE, "y", platform="other", at=NOON + timedelta(hours=2))
    cancel(database, THREE, "half", platform="other")
    submit(database, "demo_20261121_dddd4444", "z", batch="b2")
    return database


class TestSql:
    """`perdure sql`."""

    def test_in_a_pipe(self, story: Path, perdure: Perdure) -> None:
        """In a pipe: a line of names, then tab-separated values."""
        ended = perdure("sql", "SELECT task_id, status FROM tasks ORDER BY 1 LIMIT 2")
        assert ended.code == 0
        assert ended.lines == ["task_id\tstatus", f"{ONE}\tcompleted", f"{TWO}\tfailed"]

    def test_values_in_a_pipe(self, story: Path, perdure: Perdure) -> None:
        """NULL is visible, and no value breaks its line or its field."""
        ended = perdure("sql", r"SELECT NULL, '', 'a' || char(9, 10, 13) || '\b', x'00ff', 1.5")
        assert ended.lines[1] == "\\N\t\ta\\t\\n\\r\\\\b\t00ff\t1.5"

    def test_csv(self, story: Path, perdure: Perdure) -> None:
        """With --csv any reader of CSV gets the values back; NULL and '' can be told apart."""
        query = "SELECT output AS o, 'a,b' AS c, NULL AS n, '' AS e FROM tasks WHERE task_id = "
        ended = perdure("sql", "--csv", f"{query}'{ONE}'")
        assert list(csv.reader(io.StringIO(ended.out))) == [
            ["o", "c", "n", "e"],
            ['A "ledger",\nof sorts.', "a,b", "", ""],
        ]
        assert ended.out.endswith(',"a,b",,""\n')

    def test_json(self, story: Path, perdure: Perdure) -> None:
        """With --json a row is an object; names that come twice are told apart."""
        query = "SELECT 1 AS a, 2.5 AS a, NULL AS n, x'00ff' AS b, 9e999 AS inf, 'ä' AS t"
        assert perdure("sql", "--json", query).json == {
            "a": 1,
            "a_2": 2.5,
            "n": None,
            "b": "00ff",
            "inf": None,
            "t": "ä",
        }

    def test_from_stdin(
        self, story: Path, perdure: Perdure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A query may come from stdin."""
        monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT count(*) AS n\nFROM tasks;\n"))
        assert perdure("sql", "-").lines == ["n", "4"]

    def test_on_a_terminal(self, story: Path, on_terminal: OnTerminal) -> None:
        """On a terminal it is a table that fits, numbers to the right, NULL visible."""
        submit(story, "demo_1", ESCAPES * 10)
        query = "SELECT task_id, prompt, output, cost_usd, priority FROM tasks"
        ended = on_terminal("sql", query, width=70)
        assert max(cell_width(line) for line in ended.lines) <= 70
        assert "NULL" in ended.out
        assert not {"\x1b", "\x9b", "\x07", "\u202e"} & {*ended.out}
        assert ended.lines[0].split() == ["task_id", "prompt", "output", "cost_usd", "priority"]

    def test_many_columns(self, story: Path, on_terminal: OnTerminal) -> None:
        """A row with more columns than fit is a block of lines."""
        ended = on_terminal("sql", f"SELECT * FROM tasks WHERE task_id = '{ONE}'")
        assert len(ended.lines) == len(TASK_COLUMNS) + 1
        assert max(map(len, ended.lines)) <= 80

    def test_rows_later_on_are_no_wider(self, story: Path, on_terminal: OnTerminal) -> None:
        """The widths are those of the first rows; later values are cut to them."""
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 500)"
        ended = on_terminal("sql", f"{numbers} SELECT iif(i > 300, 'abcdefgh', 'abc') AS x FROM n")
        assert len(ended.lines) == 501
        assert ended.lines[-1] == "ab…"

    def test_no_rows(self, story: Path, perdure: Perdure, on_terminal: OnTerminal) -> None:
        """Without rows there are the names, and on a terminal a word."""
        query = "SELECT task_id FROM tasks WHERE false"
        assert perdure("sql", query).out == "task_id\n"
        assert perdure("sql", "--json", query).out == ""
        assert "no such rows" in on_terminal("sql", query).err

    def test_schema(self, story: Path, perdure: Perdure, on_terminal: OnTerminal) -> None:
        """Without a query: every table and view with its columns."""
        found = [line.split("\t") for line in perdure("sql").lines[1:]]
        kinds = {(name, kind) for name, kind, _column, _type in found}
        assert kinds == {(n, "table") for n in metadata.tables} | {(n, "view") for n in VIEWS}
        columns = {column for name, _kind, column, _type in found if name == "tasks"}
        assert columns == {*metadata.tables["tasks"].columns.keys()}
        shown = on_terminal("sql").out
        assert all(f"{name} ({kind})" in shown for name, kind in kinds)
        assert json.loads(perdure("sql", "--json").lines[0])["kind"] == "table"

    @pytest.mark.parametrize(
        "query",
        [
            "DELETE FROM events",
            "INSERT INTO tasks (task_id) VALUES ('x')",
            "UPDATE tasks SET status = 'completed'",
            "DROP TABLE events",
            "CREATE TABLE mine (x)",
            "CREATE TEMP TABLE mine (x)",
            "ATTACH 'other.db' AS other",
            "VACUUM INTO 'other.db'",
            "VACUUM",
            "PRAGMA journal_mode = DELETE",
            "PRAGMA query_only = OFF",
            "PRAGMA wal_checkpoint(TRUNCATE)",
            "PRAGMA writable_schema = ON",
            "BEGIN IMMEDIATE",
            "REINDEX",
            "ANALYZE",
            "WITH x AS (SELECT 1) DELETE FROM tasks",
            "EXPLAIN DELETE FROM tasks",
        ],
    )
    def test_refuses_to_write(
        self,
        story: Path,
        perdure: Perdure,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        query: str,
    ) -> None:
        """Whatever would change something is refused in one clear line, and changes nothing."""
        folder = tmp_path / "here"
        folder.mkdir()
        monkeypatch.chdir(folder)
        before = story.read_bytes()
        ended = perdure("sql", query)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err == (
            "perdure: `perdure sql` only reads: give a SELECT; nothing was changed\n"
        )
        assert story.read_bytes() == before
        assert not any(folder.iterdir())

    @pytest.mark.parametrize(
        "query",
        [
            "SELECT * FROM pragma_table_info('tasks')",
            "PRAGMA table_info(tasks)",
            "EXPLAIN QUERY PLAN SELECT * FROM tasks",
            "SELECT value FROM json_each('[1, 2]')",
            "VALUES (1), (2)",
            "SELECT count(*) FROM task_events; -- a comment after it",
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n LIMIT 9) SELECT i FROM n",
            "SELECT row_number() OVER (ORDER BY position) FROM events",
        ],
    )
    def test_all_that_reads(self, story: Path, perdure: Perdure, query: str) -> None:
        """Whatever only reads is allowed."""
        ended = perdure("sql", query)
        assert (ended.code, ended.err) == (0, "")
        assert len(ended.lines) > 1

    @pytest.mark.parametrize(
        ("query", "code", "says"),
        [
            ("SELEC 1", 1, "syntax error"),
            ("SELECT * FROM nowhere", 1, "no such table: nowhere"),
            ("SELECT nowhere FROM tasks", 1, "no such column: nowhere"),
            ("SELECT 1; SELECT 2", 1, "one statement"),
            ("SELECT * FROM tasks WHERE task_id = ?", 1, "placeholder"),
            ("SELECT json_extract('{', '$.x')", 1, "malformed JSON"),
            ("SELECT 'no end", 1, "unrecognized token"),
            ("SELECT '\udcff'", 1, "surrogates"),
            ("", 2, "empty"),
            ("  \n", 2, "empty"),
        ],
    )
    def test_errors(self, story: Path, perdure: Perdure, query: str, code: int, says: str) -> None:
        """An error in the SQL is one line, SQLite's own words in it."""
        ended = perdure("sql", query)
        assert (ended.code, ended.out) == (code, "")
        assert ended.err.count("\n") == 1
        assert says in ended.err

    def test_csv_and_json(self, story: Path, perdure: Perdure) -> None:
        """Only one of the two forms can be wanted."""
        for command in (["sql", "SELECT 1"], ["export"]):
            assert perdure(*command, "--csv", "--json").code == 2

    def test_text_that_is_no_utf8(self, story: Path, perdure: Perdure) -> None:
        """Text that somebody has stored in another encoding is shown all the same."""
        with sqlite3.connect(story) as connection:
            connection.execute("UPDATE tasks SET prompt = CAST(x'61ff62' AS TEXT)")
        connection.close()
        for form in ([], ["--csv"], ["--json"]):
            ended = perdure("sql", *form, "SELECT prompt FROM tasks LIMIT 1")
            assert ended.code == 0
            assert "udcff" in ended.out
        json.loads(perdure("sql", "--json", "SELECT prompt FROM tasks LIMIT 1").out)

    def test_interrupt(self, story: Path) -> None:
        """Ctrl-C ends a query that would take for ever: exit code 130."""
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT * FROM n"
        process = start("sql", endless)
        assert process.stdout is not None
        assert process.stdout.readline() == "i\n"
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "")

    def test_interrupt_before_the_first_row(self, story: Path) -> None:
        """Also where SQLite hasn't come up with anything yet."""
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
        process = start("sql", f"{endless} SELECT count(*) FROM n")
        wait_until_busy(process)
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, "")

    def test_closed_pipe(self, story: Path) -> None:
        """`| head` ends an endless result, without a word."""
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT * FROM n"
        with start("sql", endless) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            assert process.wait(timeout=60) == 141
            assert process.stderr.read() == ""


def wait_until_busy(process: subprocess.Popen[str]) -> None:
    """Wait until a process has opened the database, and is counting."""
    files = Path(f"/proc/{process.pid}/fd")
    if not files.exists():
        pytest.skip("there is no /proc to look at")
    latest = time.monotonic() + 60
    while not any("perdure.db-shm" in str(link.readlink()) for link in _links(files)):
        assert time.monotonic() < latest
        time.sleep(0.01)
    before = _processor_time(process)
    while _processor_time(process) < before + 20:  # of a hundred a second: more than opening takes
        assert time.monotonic() < latest
        time.sleep(0.01)


def _links(folder: Path) -> list[Path]:
    return [link for link in folder.iterdir() if link.is_symlink()]


def _processor_time(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11])


class TestExport:
    """`perdure export`."""

    def test_tasks(self, story: Path, perdure: Perdure) -> None:
        """Every task is a line of JSON, the oldest first, with all of its columns."""
        found = [json.loads(line) for line in perdure("export").lines]
        assert [task["task_id"] for task in found][:3] == [ONE, TWO, THREE]
        assert all(tuple(task) == TASK_COLUMNS for task in found)
        assert found[0]["output"] == 'A "ledger",\nof sorts.'
        assert perdure("export", "--json").out == perdure("export").out

    def test_filters(self, story: Path, perdure: Perdure) -> None:
        """The filters are those of `list`."""
        lines = perdure("export", "--batch", "b1", "--status", "failed").lines
        assert [json.loads(line)["task_id"] for line in lines] == [TWO]

    def test_csv(self, story: Path, perdure: Perdure) -> None:
        """As CSV any reader gets the texts back."""
        rows = list(csv.DictReader(io.StringIO(perdure("export", "--csv").out)))
        assert rows[0]["output"] == 'A "ledger",\nof sorts.'
        assert tuple(rows[0]) == TASK_COLUMNS
        assert json.loads(rows[0]["labels"]) == {"team": "red"}

    def test_events(self, story: Path, perdure: Perdure) -> None:
        """With --events it is the log, in its order, gapless."""
        found = [json.loads(line) for line in perdure("export", "--events").lines]
        assert [event["position"] for event in found] == list(range(1, len(found) + 1))
        assert tuple(found[0]) == EVENT_COLUMNS
        one = [event for event in found if event["task_id"] == ONE]
        assert one == [json.loads(line) for line in perdure("log", ONE, "--json").lines]

    def test_events_of_some(self, story: Path, perdure: Perdure) -> None:
        """Filters choose the tasks whose events are written."""
        lines = perdure("export", "--events", "--platform", "other").lines
        assert {json.loads(line)["task_id"] for line in lines} == {THREE}
        rows = perdure("export", "--events", "--csv", "--platform", "other")
        assert len(list(csv.reader(io.StringIO(rows.out)))) == len(lines) + 1

    def test_to_a_file(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """A file has what stdout would have had; it is its owner's only, and CSV by its name."""
        path = tmp_path / "out.jsonl"
        ended = perdure("export", "--out", path)
        assert (ended.code, ended.out) == (0, "")
        assert "4 tasks" in ended.err
        assert path.read_text() == perdure("export").out
        assert path.stat().st_mode & 0o777 == 0o600
        perdure("export", "--out", tmp_path / "out.csv")
        assert (tmp_path / "out.csv").read_text() == perdure("export", "--csv").out
        assert perdure("export", "--out", "-").out == perdure("export").out

    def test_replaces_as_a_whole(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """A file is replaced in the end or not at all, and its link and permissions stay."""
        path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
        path.write_text("old")
        path.chmod(0o640)
        link.symlink_to(path)
        (tmp_path / "perdure.db").rename(tmp_path / "away.db")
        assert perdure("export", "--out", link).code == 1
        assert path.read_text() == "old"
        (tmp_path / "away.db").rename(tmp_path / "perdure.db")
        assert perdure("export", "--out", link).code == 0
        assert link.is_symlink()
        assert path.read_text() == perdure("export").out
        assert path.stat().st_mode & 0o777 == 0o640
        assert not list(tmp_path.glob(".*"))

    def test_leaves_no_draft(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When it fails half way, what was there stays and no draft is left."""
        path = tmp_path / "out.jsonl"
        path.write_text("old")

        def full(_file: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        ended = perdure("export", "--out", path)
        assert ended.code == 1
        assert "No space left" in ended.err
        assert path.read_text() == "old"
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("out", ["", "no/such/folder/out.jsonl"])
    def test_bad_places(self, story: Path, perdure: Perdure, tmp_path: Path, out: str) -> None:
        """A place where no file can be is told before anything is read."""
        ended = perdure("export", "--out", tmp_path / out)
        assert ended.code == 2
        assert ended.err.count("\n") == 1

    def test_to_a_device(self, story: Path, perdure: Perdure) -> None:
        """A device is written to and not replaced."""
        assert perdure("export", "--out", "/dev/null").code == 0
        assert Path("/dev/null").is_char_device()

    def test_more_than_a_page(self, database: Path, migrated_file: Path, perdure: Perdure) -> None:
        """However many rows there are, each comes once and in order."""
        import perdure.cli.exporting as room

        database.write_bytes(migrated_file.read_bytes())
        names = [f"demo_{n:04}" for n in range(25)]
        tell_all(database, ((name, (asked("x" * 100),), NOON) for name in names))
        monkeypatch = pytest.MonkeyPatch()
        with monkeypatch.context() as patch:
            patch.setattr(room, "_PAGE_ROWS", 4)
            assert [json.loads(line)["task_id"] for line in perdure("export").lines] == names
            patch.setattr(room, "_PAGE_CHARACTERS", 150)
            assert [json.loads(line)["task_id"] for line in perdure("export").lines] == names
            lines = perdure("export", "--events").lines
            assert [json.loads(line)["position"] for line in lines] == list(range(1, 26))

    def test_memory(self, database: Path, migrated_file: Path, tmp_path: Path) -> None:
        """Memory doesn't grow with what is exported: 100 MB fit through far less."""
        database.write_bytes(migrated_file.read_bytes())
        long = (asked("x" * 2_000_000),)
        tell_all(database, ((f"demo_{n:04}", long, NOON) for n in range(50)))

        def little() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (200 * 2**20, 200 * 2**20))

        process = start("export", "--out", tmp_path / "out.jsonl", preexec_fn=little)
        _out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert (tmp_path / "out.jsonl").stat().st_size > 100_000_000


class TestStats:
    """`perdure stats`."""

    def test_total(self, story: Path, perdure: Perdure) -> None:
        """Counts, tokens, cost known and unknown, and how long completed tasks ran."""
        total = json.loads(perdure("stats", "--json").lines[0])
        assert total["kind"] == "total"
        assert [total[name] for name in ("tasks", "pending", "completed")] == [4, 1, 1]
        assert [total[name] for name in ("failed", "cancelled", "running")] == [1, 1, 0]
        assert (total["input_tokens"], total["output_tokens"]) == (20, 40)
        assert total["cost_usd"] == 0.25
        assert total["unpriced_tasks"] == 2
        assert total["p50_seconds"] == total["p95_seconds"] == 2.0

    def test_groups(self, story: Path, perdure: Perdure) -> None:
        """By platform and model, by batch, by error."""
        found = [json.loads(line) for line in perdure("stats", "--json").lines]
        models = {(one["platform"], one["model"]): one for one in found if one["kind"] == "model"}
        assert {key: one["tasks"] for key, one in models.items()} == {
            ("demo", None): 2,
            ("demo", "demo-1"): 1,
            ("other", None): 1,
        }
        batches = {one["batch"]: one["tasks"] for one in found if one["kind"] == "batch"}
        assert batches == {"b1": 2, "b2": 1}
        (error,) = (one for one in found if one["kind"] == "error")
        assert error == {
            "kind": "error",
            "platform": "demo",
            "error_class": "Overloaded",
            "tasks": 1,
            "last_task_id": TWO,
            "last_error": "too busy",
        }

    def test_percentiles(self, database: Path, migrated_file: Path, perdure: Perdure) -> None:
        """Half of the tasks took no longer than p50, and 95 of 100 no longer than p95."""
        database.write_bytes(migrated_file.read_bytes())
        begun = (asked("x"), running(), Chunk(text="y"))
        done = (Completed(output_length=1),)
        names = {n: f"demo_{n}" for n in range(1, 101)}
        tell_all(database, ((name, begun, NOON) for name in names.values()))
        tell_all(database, ((names[n], done, NOON + timedelta(seconds=n)) for n in names))
        total = json.loads(perdure("stats", "--json").lines[0])
        assert (total["p50_seconds"], total["p95_seconds"]) == (50.0, 95.0)

    def test_filters(self, story: Path, perdure: Perdure) -> None:
        """The filters are those of `list`."""
        total = json.loads(perdure("stats", "--json", "--batch", "b1").lines[0])
        assert total["tasks"] == 2

    def test_for_people(self, story: Path, perdure: Perdure, on_terminal: OnTerminal) -> None:
        """The same in words and tables, also in a pipe; on a terminal it fits."""
        shown = perdure("stats").out
        for part in ("1 completed, 1 failed, 1 cancelled", "20 in, 40 out", "$0.2500", "too busy"):
            assert part in shown
        assert "unknown for 2" in shown
        assert max(map(len, on_terminal("stats", width=90).lines)) <= 90

    def test_nothing(self, story: Path, perdure: Perdure) -> None:
        """Where there is nothing it says so; programs get zeros."""
        assert "no such tasks" in perdure("stats", "--batch", "none").err
        ended = perdure("stats", "--batch", "none", "--json")
        assert ended.json["tasks"] == 0
        assert ended.json["p50_seconds"] is None
