"""`perdure sql`."""

from __future__ import annotations

import csv
import io
import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from invoking import Perdure
from stories import (
    ESCAPES,
    ONE,
    TWO,
    OnTerminal,
    start,
    submit,
    three_endings,
)

from perdure.cli.records import TASK_COLUMNS
from perdure.cli.tables import cell_width
from perdure.store.schema import VIEWS, metadata


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Three tasks that ended, one way each, and one that waits."""
    database.write_bytes(migrated_file.read_bytes())
    three_endings(database)
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
        process = start("sql", endless, measured=False)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "i\n"
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
        assert (process.returncode, err) == (130, "")

    def test_interrupt_before_the_first_row(self, story: Path) -> None:
        """Also where SQLite hasn't come up with anything yet."""
        endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
        process = start("sql", f"{endless} SELECT count(*) FROM n", measured=False)
        try:
            wait_until_busy(process)
            process.send_signal(signal.SIGINT)
            _out, err = process.communicate(timeout=60)
        finally:
            process.kill()
            process.communicate()
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
    while not any("perdure.db-shm" in target for target in _targets(files)):
        assert time.monotonic() < latest
        time.sleep(0.01)
    before = _processor_time(process)
    while _processor_time(process) < before + 20:  # of a hundred a second: more than opening takes
        assert time.monotonic() < latest
        time.sleep(0.01)


def _targets(folder: Path) -> list[str]:
    found: list[str] = []
    for link in folder.iterdir():
        with suppress(OSError):  # it was closed meanwhile
            found.append(str(link.readlink()))
    return found


def _processor_time(process: subprocess.Popen[str]) -> int:
    return int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11])
