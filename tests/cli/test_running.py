"""Commands that run tasks, each run to its end in this process."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invoking import Ended, Perdure
from programs import Program, query, write_rows

from perdure.batch import Tally
from perdure.cli.asking import Streamed
from perdure.cli.finding import Status
from perdure.cli.redoing import _of_batch
from perdure.cli.session import Session
from perdure.cli.summary import cost
from perdure.cli.watching import _Lines

SHORT = {"words": 20}


@pytest.fixture(autouse=True)
def ready(migrated_file: Path, database: Path) -> None:
    """The database is there already: creating it takes a second."""
    shutil.copy(migrated_file, database)


def journal(path: Path) -> list[dict[str, Any]]:
    """Return the calls that the demonstration platform has seen begin."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if "call" in entry]


def ask(perdure: Perdure, *arguments: str | Path) -> Ended:
    """Ask the demonstration platform something."""
    return perdure("ask", "What is it?", "--platform", "demo", *arguments)


def complaints(ended: Ended) -> list[str]:
    """Return the lines with which the command has complained."""
    return [line for line in ended.err.splitlines() if line.startswith("perdure: ")]


# ask


def test_ask_shows_the_answer_and_nothing_else_on_stdout(perdure: Perdure, database: Path) -> None:
    """The text goes to stdout to the last byte; id, tokens and cost to stderr."""
    ended = ask(perdure, "--label", "team=docs", "--option", "words=20")
    ((output, labels),) = query(database, "SELECT output, labels FROM tasks")
    assert (ended.code, ended.out) == (0, output)
    assert json.loads(labels) == {"team": "docs"}
    assert "tokens, cost unknown" in ended.err


def test_ask_gives_the_result_as_json(perdure: Perdure) -> None:
    """One object at the end, and stderr as ever."""
    result = ask(perdure, "--json", "--max-tokens", "5", "--model", "m").json
    assert (result["status"], result["finish_reason"], result["model"]) == (
        "completed",
        "length",
        "m",
    )
    assert result["usage"]["output_tokens"] == 5
    assert result["cost"] is None


def test_ask_passes_all_options_on(perdure: Perdure, database: Path, tmp_path: Path) -> None:
    """System prompt, files and constraints are part of the task."""
    file = tmp_path / "notes.txt"
    file.write_text("some notes")
    ended = ask(
        perdure,
        *("--system", "be brief", "--file", file, "--temperature", "0.5", "--timeout", "9"),
        *("--max-attempts", "2", "--recovery", "fail"),
    )
    assert ended.code == 0
    ((data,),) = query(database, "SELECT data FROM task_events WHERE type = 'submitted'")
    task = json.loads(data)["task"]
    assert task["system"] == "be brief"
    assert task["files"][0]["name"] == "notes.txt"
    assert task["constraints"] == {
        "temperature": 0.5,
        "timeout_seconds": 9.0,
        "max_attempts": 2,
        "recovery": "fail",
    }


def test_a_failed_task_is_exit_code_3(perdure: Perdure) -> None:
    """The reason is on stderr, and how to see the partial output."""
    ended = ask(perdure, "--option", "fail=ContentRefused", "--option", "fail_after=3")
    assert ended.code == 3
    (said,) = complaints(ended)
    assert "failed: ContentRefused: " in said
    assert "are kept: `perdure output demo_" in said
    assert ended.out.startswith("Demonstration text")


def test_a_new_beginning_is_announced(perdure: Perdure) -> None:
    """After a lost attempt the text begins again, and stderr says so."""
    options = ("--option", "fail=Overloaded", "--option", "fail_after=2")
    ended = ask(perdure, *options, "--option", "fail_attempts=1")
    assert ended.code == 0
    assert ["it tries again" in line for line in complaints(ended)] == [True, False]
    assert "it begins again" in complaints(ended)[1]
    first, _, second = ended.out.partition("\n")
    assert second.startswith(first)


def test_ask_works_on_its_own_task_only(perdure: Perdure, database: Path) -> None:
    """What others have submitted waits for those who run it."""
    assert perdure("submit", "--prompt", "wait", "--platform", "demo").code == 0
    assert ask(perdure).code == 0
    assert query(database, "SELECT status FROM tasks ORDER BY stream_id") == [
        ("pending",),
        ("completed",),
    ]


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("ask", "", "-p", "demo"), "prompt: must not be empty"),
    (("ask", "x"), "platform: name one of"),
    (("ask", "x", "-p", "dmo"), "there is no platform 'dmo'; did you mean 'demo'?"),
    (("ask", "x", "-p", "demo", "--max-tokens", "-1"), "max_tokens: "),
    (("ask", "x", "-p", "demo", "--max-tokens", "many"), "--max-tokens"),
    (("ask", "x", "-p", "demo", "--temperature", "nan"), "temperature: "),
    (("ask", "x", "-p", "demo", "--timeout", "0"), "timeout_seconds: "),
    (("ask", "x", "-p", "demo", "--recovery", "hope"), "recovery: "),
    (("ask", "x", "-p", "demo", "--file", "missing.txt"), "can't read missing.txt"),
    (("ask", "x", "-p", "demo", "--option", "words"), "'words' is no NAME=VALUE"),
    (("ask", "x", "-p", "demo", "--label", "=x"), "'=x' is no NAME=VALUE"),
    (("ask", "bad \udcff bytes", "-p", "demo"), "prompt: contains a lone surrogate"),
    (("ask", "x", "-p", "demo", "--db", " "), "--db: "),
    (("run", "missing.jsonl"), "can't read missing.jsonl: No such file"),
    (("run", "."), "can't read .: Is a directory"),
    (("run", "-", "--name", "a:b"), "--name: "),
    (("run", "-", "-p", "dmo"), "did you mean 'demo'?"),
    (("run", "-", "--concurrency", "0"), "--concurrency"),
    (("run", "-", "--format", "xml"), "--format"),
    (("run", "-", "--out", "missing/out.jsonl"), "--out: there is no folder"),
    (("submit",), "give either a file or a prompt"),
    (("worker", "--platforms", "demo,dmo"), "did you mean 'demo'?"),
    (("cancel",), "give either ids or a batch"),
    (("cancel", "a", "--batch", "b"), "give either ids or a batch"),
    (("retry", "a", "--failed"), "goes with --batch"),
    (("rnu",), "No such command 'rnu'"),
    (("run", "-", "--outt", "x"), "--out"),
]


@pytest.mark.parametrize(("arguments", "problem"), WRONG)
def test_a_wrong_command_line_is_exit_code_2(
    perdure: Perdure,
    arguments: tuple[str, ...],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One clear line, nothing on stdout, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    ended = perdure(*arguments)
    assert (ended.code, ended.out) == (2, "")
    (said,) = ended.err.splitlines()
    assert said.startswith("perdure: ")
    assert problem in said


@pytest.mark.parametrize("command", [("cancel", "nope"), ("retry", "nope"), ("retry", "-b", "no")])
def test_what_is_not_there_is_exit_code_1(perdure: Perdure, command: tuple[str, ...]) -> None:
    """An unknown task or batch is one line on stderr."""
    ended = perdure(*command)
    assert (ended.code, ended.out) == (1, "")
    assert len(ended.err.splitlines()) == 1


def test_databases_that_can_not_be_used(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory, another program's file, a damaged one: one line, and it is left as it was."""
    foreign = tmp_path / "foreign.db"
    foreign.write_text("this is no database, but it is somebody's file")
    for place, problem in ((tmp_path, "is a directory"), (foreign, "is not a database")):
        ended = ask(perdure, "--db", place)
        assert (ended.code, ended.out) == (1, "")
        (said,) = ended.err.splitlines()
        assert problem in said
    assert foreign.read_text().startswith("this is no database")
    monkeypatch.setenv("PERDURE_DEBUG", "1")
    assert "Traceback" in ask(perdure, "--db", foreign).err


# run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Five rows; the demonstration platform keeps a journal of its calls."""
    calls = str(tmp_path / "calls")
    return write_rows(
        tmp_path / "rows.jsonl",
        (
            {"id": f"r{n}", "prompt": f"Question {n}", "options": {**SHORT, "journal": calls}}
            for n in range(5)
        ),
    )


def test_run_writes_results_in_the_order_of_the_input(
    perdure: Perdure, rows: Path, tmp_path: Path
) -> None:
    """Every row has its line, and the summary says where they are and what to try."""
    out = tmp_path / "results.jsonl"
    ended = perdure("run", rows, "-p", "demo", "--out", out)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert (ended.code, ended.out) == (0, "")
    assert [(one["id"], one["status"]) for one in results] == [
        (f"r{n}", "completed") for n in range(5)
    ]
    assert all(one["usage"]["output_tokens"] == 20 for one in results)
    assert "rows: 5 completed, 0 failed, 0 cancelled" in ended.err
    assert f"Results: {out}" in ended.err
    assert 'perdure sql "SELECT status' in ended.err


def test_running_it_again_does_only_what_is_not_done(
    perdure: Perdure, rows: Path, tmp_path: Path
) -> None:
    """Finished rows are not asked again, new ones are."""
    perdure("run", rows, "-p", "demo")
    with rows.open("a") as file:
        file.write('{"id": "new", "prompt": "One more"}\n')
    ended = perdure("run", rows, "-p", "demo", "--json")
    assert len(journal(tmp_path / "calls")) == 5
    assert ended.json["tasks"]["completed"] == 6
    assert (ended.json["rows"]["new"], ended.json["rows"]["known"]) == (1, 5)


def test_bad_rows_are_named_and_the_others_run(perdure: Perdure, tmp_path: Path) -> None:
    """Each bad row is one line with its number; the exit code says that there were some."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"prompt": "a"}\r\n\nnot json\n{"prompt": ""}\n{"prompt": "\xff"}\n'
        b'{"promt": "b"}\n{"prompt": "c", "max_token": 5}\n{"prompt": "d", "files": ["no"]}\n'
        b'{"prompt": "e"}'
    )
    ended = perdure("run", file, "-p", "demo", "--out", "-")
    assert ended.code == 3
    said = complaints(ended)
    assert [line.split(": ")[1] for line in said] == [f"line {n}" for n in (3, 4, 5, 6, 7, 8)]
    statuses = [json.loads(line)["status"] for line in ended.lines]
    assert statuses == ["completed", *["invalid"] * 6, "completed"]
    assert "6 rows could not be run" in ended.err


def test_a_csv_file_is_a_batch_too(perdure: Perdure, tmp_path: Path, database: Path) -> None:
    """Columns that aren't ours are labels."""
    file = tmp_path / "rows.csv"
    file.write_text('id,prompt,max_tokens,team\n1,"two\nlines",5,docs\n2,b,,\n')
    assert perdure("run", file, "-p", "demo").code == 0
    found = query(database, "SELECT key, labels, output_tokens FROM tasks ORDER BY key")
    assert found == [("rows:1", '{"team":"docs"}', 5), ("rows:2", "{}", 80)]


def test_failed_rows_stay_failed_until_they_are_retried(
    perdure: Perdure, tmp_path: Path, database: Path
) -> None:
    """They are counted; --retry-failed runs them as the row is now, and keeps the old error."""
    options = {"fail": "ContentRefused"}
    file = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x", "options": options}])
    first = perdure("run", file, "-p", "demo")
    assert first.code == 3
    assert "0 completed, 1 failed" in first.err
    assert "perdure retry --batch rows --failed" in first.err
    assert perdure("run", file, "-p", "demo").code == 3
    assert len(query(database, "SELECT 1 FROM tasks")) == 1
    write_rows(file, [{"id": "a", "prompt": "better"}])
    changed = perdure("run", file, "-p", "demo")
    assert "other content" in changed.err
    again = perdure("run", file, "-p", "demo", "--retry-failed")
    assert again.code == 0
    assert "1 completed, 0 failed" in again.err
    assert query(
        database, "SELECT status, error_class, retry_of IS NULL FROM tasks ORDER BY stream_id"
    ) == [("failed", "ContentRefused", 1), ("completed", None, 0)]
    assert perdure("run", file, "-p", "demo").code == 0


def test_other_options_do_not_run_rows_again(perdure: Perdure, rows: Path, tmp_path: Path) -> None:
    """Rows keep what they were submitted with; the summary says so, and how to have both."""
    perdure("run", rows, "-p", "demo")
    ended = perdure("run", rows, "-p", "demo", "--model", "other")
    assert ended.code == 0
    assert "5 rows had been submitted with other options" in ended.err
    assert len(journal(tmp_path / "calls")) == 5


@pytest.mark.parametrize("kind", ["itself", "a link", "its WAL", "another", "one to come"])
def test_results_never_replace_a_database(
    perdure: Perdure, rows: Path, database: Path, tmp_path: Path, kind: str
) -> None:
    """Neither ours, nor a part of it, nor anybody else's; `export` refuses them alike."""
    out = tmp_path / "out"
    named: list[str | Path] = []
    match kind:
        case "a link":
            out.symlink_to(database)
        case "its WAL":
            out = database.with_name(f"{database.name}-wal")
        case "another":
            shutil.copy(database, out)
        case "one to come":
            named = ["--db", out]
        case _:
            out = database
    before = database.read_bytes()
    ended = perdure("run", rows, "-p", "demo", "--out", out, *named)
    assert (ended.code, ended.out) == (2, "")
    assert len(complaints(ended)) == 1
    assert "is a database" in ended.err
    if not named:
        assert perdure("export", "--out", out).code == 2
    assert database.read_bytes() == before
    assert query(database, "SELECT 1 FROM tasks") == []


def test_results_into_a_pipe_by_its_name(rows: Path, database: Path) -> None:
    """`/dev/stdout` is a link that leads nowhere in the file system."""
    for command in (("run", rows, "-p", "demo"), ("export",)):
        with Program(*command, "--out", "/dev/stdout", database=database) as program:
            code, out, err = program.ended()
        assert (code, len(out.splitlines())) == (0, 5), err


def test_the_end_says_what_failed(perdure: Perdure, tmp_path: Path) -> None:
    """Each class of error once, the most frequent first, with a message as an example."""
    rows = [{"id": "odd", "prompt": "x", "options": {"fail": "ContentRefused"}}]
    rows += [{"id": f"r{n}", "prompt": f"{n}", "options": {"words": "abc"}} for n in range(3)]
    ended = perdure("run", write_rows(tmp_path / "rows.jsonl", rows), "-p", "demo")
    assert ended.code == 3
    first, second = (line for line in ended.err.splitlines() if " failed with " in line)
    assert first.startswith("3 failed with InvalidRequest, such as: demo: words: ")
    assert second.startswith("1 failed with ContentRefused: ")
    again = perdure("run", tmp_path / "rows.jsonl", "-p", "demo", "--json").json
    assert [(one["error_class"], one["tasks"]) for one in again["failures"]] == [
        ("InvalidRequest", 3),
        ("ContentRefused", 1),
    ]


@pytest.mark.parametrize("spelling", ["home", "stdin"])
def test_results_are_never_written_over_their_own_input(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    """However it is spelt, and where the shell has opened it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "x"}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    if spelling == "home":
        ended = perdure("run", rows, "-p", "demo", "--out=~/rows.jsonl")
    else:
        command = [sys.executable, "-c", "from perdure.cli.entry import main; main()", "run", "-"]
        with rows.open() as given:
            done = subprocess.run(
                [*command, "-p", "demo", "--out", str(rows)],
                stdin=given,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
        ended = Ended(done.returncode, done.stdout, done.stderr)
    assert ended.code == 2, ended
    assert "is the input" in ended.err
    assert rows.read_text() == '{"prompt": "x"}\n'


def test_the_results_file_is_never_half_there(
    perdure: Perdure, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the results can't be written, what was there stays; the input is never overwritten."""
    ended = perdure("run", rows, "-p", "demo", "--out", rows)
    assert ended.code == 2
    assert "is the input" in ended.err
    out = tmp_path / "out.jsonl"
    out.write_text("from before")

    def full(*_given: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("perdure.batch.result_line", full)
    ended = perdure("run", rows, "-p", "demo", "--out", out)
    assert ended.code == 1
    assert complaints(ended) == ["perdure: No space left on device"]
    assert out.read_text() == "from before"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_empty_file_is_an_empty_batch(perdure: Perdure, tmp_path: Path) -> None:
    """Nothing to do is no error."""
    file = write_rows(tmp_path / "none.jsonl", [])
    ended = perdure("run", file, "-p", "demo", "--json")
    assert ended.code == 0
    assert ended.json["rows"]["rows"] == 0
    assert complaints(ended) == [f"perdure: {file}: there are no rows in it"]


# submit, worker, resume


def test_submitted_tasks_wait_for_a_worker(perdure: Perdure, rows: Path, database: Path) -> None:
    """Submit prints the ids, one a row; a worker runs them to the end."""
    ended = perdure("submit", rows, "-p", "demo")
    ids = [row[0] for row in query(database, "SELECT task_id FROM tasks ORDER BY key")]
    assert (ended.code, ended.lines) == (0, ids)
    assert query(database, "SELECT DISTINCT status FROM tasks") == [("pending",)]
    assert perdure("submit", rows, "-p", "demo").lines == ids
    done = perdure("worker", "--until-done", "--json")
    assert (done.code, done.json["tasks"]["completed"]) == (0, 5)
    assert query(database, "SELECT DISTINCT status FROM tasks") == [("completed",)]


def test_submit_json_has_a_line_for_every_row(perdure: Perdure, tmp_path: Path) -> None:
    """Good and bad rows alike, in order."""
    file = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x"}, {"prompt": ""}])
    ended = perdure("submit", file, "-p", "demo", "--json")
    assert ended.code == 3
    first, second = map(json.loads, ended.lines)
    assert (first["id"], first["status"]) == ("a", "pending")
    assert (second["line"], second["task_id"], second["status"]) == (2, None, "invalid")


def test_a_worker_keeps_to_its_platforms(perdure: Perdure, database: Path) -> None:
    """Tasks of other platforms are left for others."""
    perdure("submit", "--prompt", "x", "-p", "compatible")
    perdure("submit", "--prompt", "x", "-p", "demo")
    assert perdure("worker", "--platforms", "demo", "--until-done").code == 0
    assert query(database, "SELECT platform, status FROM tasks ORDER BY stream_id") == [
        ("compatible", "pending"),
        ("demo", "completed"),
    ]


def test_resume_runs_everything_that_is_left(perdure: Perdure, database: Path) -> None:
    """Whatever was pending is done in the end; failures are exit code 3."""
    perdure("submit", "--prompt", "x", "-p", "demo")
    perdure("submit", "--prompt", "x", "-p", "demo", "--option", "fail=ContentRefused")
    ended = perdure("resume", "--json")
    assert ended.code == 3
    assert ended.json["tasks"] == {
        "pending": 0,
        "running": 0,
        "completed": 1,
        "failed": 1,
        "cancelled": 0,
    }
    assert perdure("resume").code == 0


@pytest.mark.parametrize("command", ["resume", "run", "worker"])
def test_what_can_not_be_read_is_not_done(
    perdure: Perdure, rows: Path, database: Path, tmp_path: Path, command: str
) -> None:
    """A newer perdure wrote it: the others run, stderr says which did not and why, exit code 3."""
    submitted = perdure("submit", rows, "--platform", "demo", "--option", "words=5").lines
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE log_head SET position = position + 1")
        connection.execute("UPDATE streams SET version = 2 WHERE task_id = ?", (submitted[0],))
        connection.execute(
            "INSERT INTO events SELECT position, stream_id, version, 'invented', 1, '{}', "
            "'2026-11-22T00:00:00.000000Z', digest FROM log_head, streams WHERE version = 2"
        )
    connection.close()
    out = tmp_path / "results.jsonl"
    arguments = {
        "resume": ["resume"],
        "worker": ["worker", "--until-done"],
        "run": ["run", rows, "--platform", "demo", "--option", "words=5", "--out", out],
    }
    ended = perdure(*arguments[command])
    assert ended.code == 3
    once, at_the_end = complaints(ended)
    assert once.startswith(f"perdure: {submitted[0]} is left alone: ")
    assert f"{submitted[0]} was left alone, all else is done" in at_the_end
    assert at_the_end.endswith("upgrade perdure")
    assert f"{len(submitted) - 1} completed, 0 failed, 0 cancelled, 1 not done" in ended.err
    if command == "run":
        results = [json.loads(line) for line in out.read_text().splitlines()]
        assert sum(result["status"] == "completed" for result in results) == len(submitted) - 1


@pytest.mark.parametrize("command", ["resume", "cancel", "retry"])
def test_commands_that_go_on_create_no_database(
    perdure: Perdure, tmp_path: Path, command: str
) -> None:
    """There is nothing to go on with in a database that isn't there."""
    missing = tmp_path / "missing.db"
    arguments = [] if command == "resume" else ["some_id"]
    ended = perdure(command, *arguments, "--db", missing)
    assert ended.code == 1
    assert "there is no database" in ended.err
    assert not missing.exists()


def test_a_worker_leaves_what_it_can_not_run(
    perdure: Perdure, rows: Path, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of a platform without a key here are somebody else's; asked for it, it refuses."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-nobody")
    perdure("submit", "--prompt", "x", "-p", "claude")
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    perdure("submit", rows, "-p", "demo")
    done = perdure("worker", "--until-done")
    assert done.code == 0
    runs, left = done.err.splitlines()[:2]
    assert "demo" in runs
    assert "claude," not in runs
    assert "claude," in left
    assert query(database, "SELECT status, count(*) FROM tasks GROUP BY status ORDER BY 1") == [
        ("completed", 5),
        ("pending", 1),
    ]
    refused = perdure("worker", "--platforms", "demo,claude")
    assert refused.code == 1
    assert complaints(refused)[0].count("ANTHROPIC_API_KEY") == 1


# cancel, retry


def test_cancel_ends_pending_tasks_at_once(perdure: Perdure, rows: Path, database: Path) -> None:
    """By id or by batch; what had ended already is left alone."""
    ids = perdure("submit", rows, "-p", "demo").lines
    first = perdure("cancel", ids[0], "--reason", "too dear")
    assert (first.code, first.lines) == (0, [ids[0]])
    again = perdure("cancel", ids[0])
    assert (again.code, again.out) == (0, "")
    assert "already" in again.err
    assert sorted(perdure("cancel", "--batch", "rows").lines) == sorted(ids[1:])
    assert query(database, "SELECT DISTINCT status FROM tasks") == [("cancelled",)]
    (said,) = query(database, "SELECT data FROM task_events WHERE type='cancelled' LIMIT 1")
    assert json.loads(said[0])["reason"] == "too dear"


def test_retry_runs_ended_tasks_as_new_ones(perdure: Perdure, rows: Path, database: Path) -> None:
    """Of a batch or by id, following what was run again before; the old tasks stay."""
    ids = perdure("submit", rows, "-p", "demo").lines
    perdure("cancel", "--batch", "rows")
    only = perdure("retry", ids[0], "--no-run")
    assert query(database, "SELECT task_id, retry_of FROM tasks WHERE status='pending'") == [
        (only.out.strip(), ids[0])
    ]
    assert perdure("retry", ids[0], "--no-run").out == only.out
    nothing = perdure("retry", "--batch", "rows", "--failed")
    assert (nothing.code, nothing.out) == (0, "")
    ended = perdure("retry", "--batch", "rows", "--cancelled")
    assert (ended.code, len(ended.lines)) == (0, 4)
    assert "rows: 5 completed, 0 failed, 0 cancelled" in ended.err
    finished = perdure("retry", ids[0])
    assert finished.code == 1
    assert "is completed" in finished.err
    assert len(query(database, "SELECT 1 FROM tasks")) == 10


def test_retry_goes_on_from_the_latest_run(perdure: Perdure, database: Path) -> None:
    """A task whose retry failed too is retried from there."""
    failing = ("--option", "fail=ContentRefused", "--json")
    first = ask(perdure, *failing).json["task_id"]
    second = perdure("retry", first).lines[0]
    third = perdure("retry", first).lines[0]
    assert query(database, "SELECT task_id, retry_of FROM tasks ORDER BY stream_id") == [
        (first, None),
        (second, first),
        (third, second),
    ]


def test_retry_of_a_batch_is_of_what_there_was(
    perdure: Perdure, database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in it meanwhile, as the very tasks that run others again, isn't meant."""
    monkeypatch.setattr("perdure.cli.redoing._TOGETHER", 2)

    def failing(*numbers: int) -> None:
        rows = [{"prompt": f"{n}", "options": {"fail": "ContentRefused"}} for n in numbers]
        perdure("run", write_rows(tmp_path / "rows.jsonl", rows), "-p", "demo", "--name", "b")

    failing(1, 2, 3)
    there = [task_id for (task_id,) in query(database, "SELECT task_id FROM tasks")]
    pages = _of_batch(Session(db=str(database)), "b", [Status.FAILED])
    found = next(pages)
    failing(4, 5)
    for page in pages:
        found += page
    assert sorted(found) == sorted(there)


# how it looks


def test_help_and_version_need_nothing_heavy() -> None:
    """No database, no models, no event loop, nothing that draws: the help is there at once."""
    code = (
        "import sys\n"
        "from perdure.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'sqlalchemy', 'pydantic', 'rich', 'asyncio', 'alembic', 'openai', 'ssl'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Running:" in done.stdout


def test_every_command_takes_the_database_and_json(perdure: Perdure) -> None:
    """Before the command's name or after it; the latter counts."""
    lines = [line for line in perdure("--help").lines if line.startswith("  ")]
    commands = [line.split()[0] for line in lines if line[2] != " "]
    known = {"ask", "run", "submit", "worker", "resume", "cancel", "retry", "list", "verify"}
    assert known <= set(commands)
    for command in known:
        shown = perdure(command, "--help").out
        assert "--db" in shown
        assert "--json" in shown


def test_terminal_escapes_are_shown_and_not_obeyed(
    perdure: Perdure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal they are visible text; in a pipe the bytes are what the model sent."""
    text = "\x1b[31mred\x07"
    assert ask(perdure, "--option", f"text={text}").out == text
    monkeypatch.setattr("perdure.cli.asking.is_terminal", lambda: True)
    assert ask(perdure, "--option", f"text={text}").out == "\\x1b[31mred\\x07\n"


def test_a_line_end_split_in_two_is_no_escape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A carriage return waits for what comes after it."""
    monkeypatch.setattr("perdure.cli.asking.is_terminal", lambda: True)
    streamed = Streamed()
    for text in ("one\r", "\ntwo\r", "three"):
        streamed.add(text)
    streamed.end()
    assert capsys.readouterr().out == "one\ntwo\\x0dthree\n"


def test_a_log_file_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    """Not more than one in ten seconds, with what is done, left, used and how long it takes."""
    now = 100.0
    lines = _Lines("rows", clock=lambda: now)
    for _ in range(60):
        now += 1.0
        done = int(now - 100)
        lines.update(Tally(pending=100 - done, completed=done, tokens=done * 10, priced=done))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    assert said[1] == (
        "rows: 20 of 100 done, 0 running, 0 failed, 200 tokens, $0.00, about 1 min 24 s left"
    )


@pytest.mark.parametrize(
    ("tally", "words"),
    [
        (Tally(cost_usd=1.5, priced=2), "$1.50"),
        (Tally(unpriced=2), "cost unknown"),
        (Tally(cost_usd=1.5, priced=2, unpriced=3), "$1.50 and 3 of unknown cost"),
        (Tally(), "$0.00"),
    ],
)
def test_an_unknown_cost_is_never_shown_as_nothing(tally: Tally, words: str) -> None:
    """What is known is shown, and that something isn't."""
    assert cost(tally) == words


def test_an_unexpected_error_is_one_line(perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> None:
    """With how to see more; PERDURE_DEBUG=1 shows it."""

    def broken(*_given: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("perdure.cli.asking._make_task", broken)
    ended = ask(perdure)
    assert ended.code == 1
    assert ended.err == "perdure: unexpected RuntimeError: a bug; PERDURE_DEBUG=1 shows where\n"
    monkeypatch.setenv("PERDURE_DEBUG", "1")
    assert "Traceback" in ask(perdure).err


def test_without_stdout_a_batch_is_run_all_the_same(
    perdure: Perdure, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may be started without it, as by `>&-`."""
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr("sys.stdout", None)
    ended = perdure("run", rows, "-p", "demo", "--out", out)
    sys.stdout.close()
    assert (ended.code, ended.out) == (0, "")
    assert out.read_text(encoding="utf-8").count("completed") > 0


def test_ctrl_c_while_the_commands_load_is_quiet() -> None:
    """No traceback, and the exit code of what was interrupted."""
    code = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'perdure.cli.querying': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from perdure.cli.entry import main\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that Linux has")
def test_a_file_that_can_not_be_written_is_named(perdure: Perdure, rows: Path) -> None:
    """Where the disk is full, the system's error doesn't say which file it was."""
    ended = perdure("run", rows, "-p", "demo", "--out", "/dev/full")
    assert ended.code == 1
    assert complaints(ended) == ["perdure: /dev/full: No space left on device"]
