"""The command line on a PostgreSQL database: the same commands, and what is said of the others."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from invoking import Perdure

from perdure.cli.session import Session
from servers.postgresql import Server

Lines = Callable[..., list[str]]
Refused = Callable[..., str]


@pytest.fixture
def url(perdure: Perdure, make_server_database: Callable[[], str], tmp_path: Path) -> str:
    """A database with a batch of three tasks that have ended."""
    url = make_server_database()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt":"Öne"}\n{"prompt":"two 100%","labels":{"a":"b c"}}\n{"prompt":"x"}\n'
    )
    done = perdure("--db", url, "run", str(rows), "-p", "demo", "--name", "b1")
    assert done.code == 0, done.err
    return url


@pytest.fixture
def lines(perdure: Perdure) -> Lines:
    """A function that returns what a command writes to stdout."""

    def call(url: str, *arguments: str) -> list[str]:
        done = perdure("--db", url, *arguments)
        assert done.code == 0, done.err
        return done.lines

    return call


@pytest.fixture
def refused(perdure: Perdure) -> Refused:
    """A function that returns the one line that a command fails with."""

    def call(url: str, *arguments: str) -> str:
        done = perdure("--db", url, *arguments)
        assert done.code == 1
        assert len(done.err.splitlines()) == 1
        return done.err

    return call


def test_looking(url: str, lines: Lines) -> None:
    """list, show, log, tail, output, stats, export: as on a file."""
    assert len(lines(url, "list", "--status", "completed", "--batch", "b1", "--since", "1h")) == 3
    (found,) = lines(url, "list", "--search", "TWO 100%", "--label", "a=b c")
    task_id = found.split("\t")[0]
    assert lines(url, "list", "--search", "100_") == []
    assert lines(url, "show", task_id[-8:])[0] == f"{task_id}  completed"
    assert lines(url, "log", task_id)[0].split("\t")[2] == "submitted"
    assert lines(url, "tail", task_id) == lines(url, "output", task_id) != []
    whole, *others = map(json.loads, lines(url, "stats", "--json"))
    assert (whole["tasks"], whole["completed"], {one["kind"] for one in others}) == (
        3, 3, {"model", "batch"},
    )  # fmt: skip
    assert len(lines(url, "export", "--batch", "b1")) == 3
    event = json.loads(lines(url, "log", task_id, "--json")[0])
    assert event["data"]["task"]["labels"] == {"a": "b c"}
    assert len(event["digest"]) == 64


def test_looking_after_it(url: str, lines: Lines) -> None:
    """verify, redact, rebuild, retry, vacuum, doctor: as on a file."""
    (seal,) = lines(url, "verify")
    task_id = lines(url, "list")[0].split("\t")[0]
    lines(url, "redact", "--yes", task_id)
    lines(url, "rebuild")
    lines(url, "verify", "--expect", seal)
    lines(url, "db", "vacuum")
    lines(url, "retry", lines(url, "list")[1].split("\t")[0])
    lines(url, "worker", "--until-done")
    states = {line.split("\t")[0]: line.split("\t")[1] for line in lines(url, "doctor")}
    assert states["schema"] == states["log"] == states["server"] == "ok"
    assert states.keys() > {"chatgpt", "claude", "demo"}


def test_setting_up(postgresql_server: Server, lines: Lines, perdure: Perdure) -> None:
    """On an empty database every command says what to do; that command does it, also twice."""
    postgresql_server.execute("DROP DATABASE IF EXISTS setting_up")
    postgresql_server.execute("CREATE DATABASE setting_up")
    url = postgresql_server.url("setting_up")
    for command in (("list",), ("verify",), ("stats",), ("doctor",)):
        done = perdure("--db", url, *command)
        assert done.code == 1
        assert "perdure db upgrade" in done.out + done.err
    lines(url, "db", "upgrade")
    lines(url, "db", "upgrade")
    assert lines(url, "list") == []


def test_backup_says_what_to_use(url: str, tmp_path: Path, refused: Refused) -> None:
    """A server's database isn't copied into a file by perdure."""
    assert "pg_dump" in refused(url, "db", "backup", str(tmp_path / "copy"))


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM tasks",
        "WITH gone AS (DELETE FROM tasks RETURNING 1) SELECT * FROM gone",
        "SELECT 1; DELETE FROM tasks",
        "SELECT 1; COMMIT; DELETE FROM tasks",
        "/* SELECT */ DELETE FROM tasks",
        "SET TRANSACTION READ WRITE",
        "SET default_transaction_read_only = off",
        "BEGIN READ WRITE",
        "COMMIT",
        "COPY tasks TO PROGRAM 'cat'",
        "COPY (SELECT 1) TO '/dev/null'",
        "DO $$ BEGIN DELETE FROM tasks; END $$",
        "EXPLAIN ANALYZE DELETE FROM tasks",
        "SELECT 1 INTO stolen",
        "SELECT * FROM tasks FOR UPDATE",
        "SELECT nextval('x')",
        "CREATE TABLE x (y integer)",
        "TRUNCATE tasks",
        "SELECT set_config('transaction_read_only', 'off', false)",
        "VACUUM",
        "nonsense",
        "SELECT $1",
    ],
)
def test_sql_only_reads(url: str, query: str, lines: Lines, refused: Refused) -> None:
    """Whatever is tried with `perdure sql`, nothing is changed, and one line says why."""
    refused(url, "sql", query)
    assert len(lines(url, "list")) == 3


def test_sql(url: str, lines: Lines) -> None:
    """Queries work with all that PostgreSQL has; without one the columns are shown."""
    assert lines(url, "sql", "SELECT labels ->> 'a' AS a FROM tasks WHERE labels ? 'a'") == [
        "a", "b c",
    ]  # fmt: skip
    assert lines(url, "sql", "TABLE batches")[1].startswith("b1\t3\t")
    (row,) = lines(url, "sql", "--json", "SELECT sum(1.5) AS s, true AS t, now() AS n, NULL AS u")
    assert json.loads(row) | {"n": ""} == {"s": 1.5, "t": True, "n": "", "u": None}
    assert "task_events\tview\tdata\tjsonb" in lines(url, "sql")


def test_a_vacuum_without_rights(postgresql_server: Server, url: str, refused: Refused) -> None:
    """A role that may only look is told in one line that nothing was vacuumed."""
    name = url.partition("?")[0].rpartition("/")[2]
    postgresql_server.execute(
        "CREATE ROLE looker LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker", name
    )
    try:
        said = refused(url.replace("perdure@", "looker@"), "db", "vacuum")
    finally:
        postgresql_server.execute("DROP OWNED BY looker; DROP ROLE looker", name)
    assert "was not vacuumed" in said


def test_passwords_are_not_shown(url: str, perdure: Perdure, refused: Refused) -> None:
    """A URL with a password comes back without it."""
    secret = url.replace("perdure@", "perdure:sesame@")
    for command in (
        ("list",),
        ("doctor",),
        ("stats",),
        ("retry", "--batch", "b1"),
        ("verify",),
        ("worker", "--until-done"),
    ):
        done = perdure("--db", secret, *command)
        assert "sesame" not in done.out + done.err
    done = perdure("--db", secret, "worker", "--until-done", "--json")
    assert ":***@" in done.json["database"]
    assert "sesame" not in done.out + done.err
    hidden = f"{url}{'&' if '?' in url else '?'}password=sesame"
    for command in (("submit", "--prompt", "x", "-p", "demo"), ("verify",), ("list",)):
        done = perdure("--db", hidden, *command)
        assert done.code == 0
        assert "sesame" not in done.out + done.err
    away = "postgresql://me:sesame@127.0.0.1:1/x"
    assert "sesame" not in refused(away, "list")


def test_the_command_to_go_on_with_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that is ended says how to go on, in what is kept of its words."""
    named = "postgresql://me:sesame@127.0.0.1/x"
    for given in (("--db", named, "worker"), ("worker", f"--db={named}")):
        monkeypatch.setattr(sys, "argv", ["perdure", *given])
        words = shlex.split(Session(db=named).same_command)
        assert words == [
            "perdure",
            *(one.replace("sesame", "***") for one in given),
        ]


_WITHOUT_A_DRIVER = """
import sys
sys.modules["psycopg"] = None
from perdure.cli.main import run
for command in ("list", "sql", "sql SELECT", "show x", "tail x", "stats", "verify", "cancel x"):
    print(run([*command.split(), "--db", "postgresql://me@127.0.0.1:1/x"]))
"""


def test_no_driver() -> None:
    """Where the driver isn't installed, each command says so, and how to get it."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_A_DRIVER],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    codes, said = done.stdout.splitlines(), done.stderr.splitlines()
    hint = "perdure: for PostgreSQL a driver is missing: pip install 'perdure[postgres]'"
    assert said == [hint] * len(codes)
    assert codes == ["1"] * 8
