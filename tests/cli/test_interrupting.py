"""Commands that run tasks, as processes: Ctrl-C, signals, crashes, pipes, and two at once."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from programs import Program, query, until, write_rows

from perdure import Engine
from perdure.events import Completed

STALLED: dict[str, Any] = {"stall_after": 5}
SLOW: dict[str, Any] = {"words": 40, "delay": 0.1}


@pytest.fixture(autouse=True)
def ready(migrated_file: Path, database: Path) -> None:
    """The database is there already: creating it takes a second."""
    shutil.copy(migrated_file, database)


def batch(folder: Path, number: int, options: dict[str, Any]) -> Path:
    """Return a file of rows for the demonstration platform, which keeps a journal."""
    told = {**options, "journal": str(folder / "calls")}
    rows = ({"id": f"r{n}", "prompt": f"Question {n}", "options": told} for n in range(number))
    return write_rows(folder / "rows.jsonl", rows)


def calls(folder: Path) -> list[dict[str, Any]]:
    """Return the calls that the platform has seen begin."""
    entries = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return [entry for entry in entries if "call" in entry]


def statuses(database: Path) -> dict[str, int]:
    """Return how many tasks stand where."""
    return dict(query(database, "SELECT status, count(*) FROM tasks GROUP BY status"))


def writing(database: Path, number: int) -> Callable[[], bool]:
    """Return whether so many running tasks have written something."""
    sql = "SELECT count(DISTINCT task_id) FROM task_events WHERE type = 'chunk'"
    return lambda: query(database, sql)[:1] >= [(number,)]


def run(file: Path, database: Path, *arguments: str) -> Program:
    """Start a batch."""
    return Program("run", file, "-p", "demo", "--concurrency", "3", *arguments, database=database)


def test_the_first_ctrl_c_lets_what_runs_finish(tmp_path: Path, database: Path) -> None:
    """Nothing new is begun, what runs ends by itself, and stderr says how to go on."""
    file = batch(tmp_path, 9, SLOW)
    out = tmp_path / "out.jsonl"
    with run(file, database, "--out", str(out)) as program:
        until(writing(database, 3), "three tasks that write")
        program.send(signal.SIGINT)
        code, _, err = program.ended()
    found = statuses(database)
    assert code == 130
    assert "Nothing new is begun" in err
    assert found["completed"] >= 3
    assert found.keys() == {"completed", "pending"}
    assert len(calls(tmp_path)) == found["completed"]
    assert "To go on: perdure run" in err
    so_far = [json.loads(line)["status"] for line in out.read_text().splitlines()]
    assert so_far.count("completed") == found["completed"]
    with run(file, database, "--out", str(out)) as program:
        assert program.ended()[0] == 0
    assert statuses(database) == {"completed": 9}
    assert len(calls(tmp_path)) == 9


def test_the_second_ctrl_c_cancels_and_keeps_what_there_is(tmp_path: Path, database: Path) -> None:
    """The cancellation is in the log as a request, and the partial output is all its chunks."""
    file = batch(tmp_path, 9, STALLED)
    with run(file, database) as program:
        until(writing(database, 3), "three tasks that write")
        program.send(signal.SIGINT)
        until(lambda: "Nothing new" in (program.process.stderr or sys.stdin).readline(), "a word")
        program.send(signal.SIGINT)
        code, _, err = program.ended()
    assert code == 130
    assert statuses(database) == {"cancelled": 3, "pending": 6}
    assert "Cancelling 3 tasks" in err
    assert "perdure retry --batch rows --cancelled" in err
    for task_id, partial in query(database, "SELECT task_id, partial_output FROM tasks"):
        events = query(
            database,
            f"SELECT type, data FROM task_events WHERE task_id = '{task_id}' ORDER BY version",
        )
        chunks = [json.loads(data)["text"] for type_, data in events if type_ == "chunk"]
        assert (partial or "") == "".join(chunks)
        if partial is not None:
            assert [type_ for type_, _ in events][-2:] == ["cancel_requested", "cancelled"]
            assert json.loads(events[-1][1])["reason"] == "Ctrl-C"


def test_the_third_ctrl_c_ends_at_once_and_loses_nothing(tmp_path: Path, database: Path) -> None:
    """It is what a crash does: the next run takes over what was running."""
    file = batch(tmp_path, 2, {**STALLED, "fail_attempts": 1})
    with run(file, database) as program:
        until(writing(database, 2), "two tasks that write")
        program.send(signal.SIGINT)
        until(lambda: "Nothing new" in (program.process.stderr or sys.stdin).readline(), "a word")
        program.send(signal.SIGINT)
        program.send(signal.SIGINT)
        # Three signals may be two by the time they are looked at, or the cancelling quicker.
        code, _, _ = program.ended()
    assert code == 130
    with run(file, database) as program:
        code, _, _ = program.ended()
    assert sum(statuses(database).values()) == 2
    assert statuses(database).keys() <= {"completed", "cancelled"}


def test_sigterm_hands_back_and_ends(tmp_path: Path, database: Path) -> None:
    """What ran is pending again, none of it is cancelled, and the next run finishes it."""
    file = batch(tmp_path, 3, {**STALLED, "fail_attempts": 1})
    with run(file, database) as program:
        until(writing(database, 3), "three tasks that write")
        program.send(signal.SIGTERM)
        code, _, err = program.ended()
    assert code == 130
    assert statuses(database) == {"pending": 3}
    assert "To go on: perdure run" in err
    handed_back = "SELECT count(*) FROM task_events WHERE type='interrupted'"
    assert query(database, handed_back + " AND data LIKE '%handed_back%'") == [(3,)]
    assert query(database, "SELECT 1 FROM workers") == []
    with run(file, database) as program:
        assert program.ended()[0] == 0


def test_ctrl_c_cancels_what_was_asked(tmp_path: Path, database: Path) -> None:
    """The partial output is kept, and stderr says how to see it."""
    options = ("--option", "stall_after=5")
    with Program("ask", "Something long", "-p", "demo", *options, database=database) as program:
        until(writing(database, 1), "the beginning of the answer")
        program.send(signal.SIGINT)
        code, out, err = program.ended()
    ((task_id, status, partial),) = query(
        database, "SELECT task_id, status, partial_output FROM tasks"
    )
    assert (code, status) == (130, "cancelled")
    assert partial
    assert out == partial
    assert f"perdure output {task_id}" in err


def test_sigterm_hands_a_question_back(database: Path) -> None:
    """It isn't lost: whoever runs tasks next runs it, and stderr says how."""
    options = ("--option", "stall_after=5")
    with Program("ask", "Something long", "-p", "demo", *options, database=database) as program:
        until(writing(database, 1), "the beginning of the answer")
        program.send(signal.SIGTERM)
        code, _, err = program.ended()
    assert code == 130
    assert statuses(database) == {"pending": 1}
    assert "`perdure resume`" in err


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_worker_ends_when_it_is_told_to(
    number: signal.Signals, expected: int, database: Path
) -> None:
    """Also one that has nothing to do; SIGTERM, as of a service, is no failure."""
    with Program("worker", database=database) as program:
        until(lambda: query(database, "SELECT 1 FROM workers"), "the worker")
        program.send(number)
        code, _, _ = program.ended()
    assert code == expected
    assert query(database, "SELECT 1 FROM workers") == []


def test_a_worker_runs_what_others_submit(tmp_path: Path, database: Path) -> None:
    """While it is there, from another process, and cancelled from another one too."""
    with Program("worker", database=database) as worker:
        until(lambda: query(database, "SELECT 1 FROM workers"), "the worker")
        for options in ("words=5", "stall_after=3"):
            arguments = ("--prompt", "x", "-p", "demo", "--option", options)
            with Program("submit", *arguments, database=database) as program:
                code, out, _ = program.ended()
                assert code == 0
        until(lambda: statuses(database) == {"completed": 1, "running": 1}, "the first task")
        until(writing(database, 2), "the second task's beginning")
        with Program("cancel", out.strip(), database=database) as program:
            code, said, err = program.ended()
        assert (code, said, err) == (0, out, "1 task cancelled.\n")
        assert statuses(database) == {"completed": 1, "cancelled": 1}  # it waits for that
        worker.send(signal.SIGTERM)
        assert worker.ended()[0] == 0


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, database: Path) -> None:
    """Kill -9 in the middle: finished rows are not asked again, the others are done in the end."""
    file = batch(tmp_path, 12, {"words": 40, "delay": 0.02})
    with run(file, database) as program:
        until(lambda: statuses(database).get("completed", 0) >= 4, "some finished rows")
        program.send(signal.SIGKILL)
        program.ended()
    done = {row[0] for row in query(database, "SELECT task_id FROM tasks WHERE status='completed'")}
    before = len(calls(tmp_path))
    out = tmp_path / "out.jsonl"
    with run(file, database, "--out", str(out)) as program:
        assert program.ended()[0] == 0
    assert statuses(database) == {"completed": 12}
    assert {call["call"] for call in calls(tmp_path)[before:]} & done == set()
    assert len(out.read_text().splitlines()) == 12
    with Program("verify", database=database) as program:
        assert program.ended()[0] == 0


def test_cancel_ends_what_a_dead_worker_had(tmp_path: Path, database: Path) -> None:
    """Nobody has to run something first for it to be over."""
    file = batch(tmp_path, 2, STALLED)
    with run(file, database) as program:
        until(writing(database, 2), "two tasks that write")
        program.send(signal.SIGKILL)
        program.ended()
    with Program("cancel", "--batch", "rows", database=database) as program:
        assert program.ended()[0] == 0
    assert statuses(database) == {"cancelled": 2}


@pytest.mark.parametrize("how", [(), ("--json", "--batch", "rows")])
def test_cancel_says_what_came_of_it(tmp_path: Path, database: Path, how: tuple[str, ...]) -> None:
    """What was complete by then is not called cancelled, nor what a worker has yet to stop."""
    file = batch(tmp_path, 2, STALLED)
    with run(file, database) as worker:
        until(writing(database, 2), "two tasks that write")
        worker.send(signal.SIGSTOP)
        complete, stuck = (row[0] for row in query(database, "SELECT task_id FROM tasks"))
        chosen = how if "--batch" in how else (*how, complete, stuck)
        code, out, err = asyncio.run(_cancelled_too_late(database, chosen, complete))
        worker.send(signal.SIGCONT)
        until(lambda: statuses(database) == {"completed": 1, "cancelled": 1}, "the other's end")
        worker.ended()
    assert code == 0
    assert err.endswith("0 tasks cancelled, 1 completed before, 1 asked to stop.\n")
    told = [json.loads(line) for line in out.splitlines()]
    assert sorted(told, key=lambda one: str(one["status"])) == (
        [
            {"task_id": complete, "cancelled": False, "status": "completed"},
            {"task_id": stuck, "cancelled": False, "status": "running"},
        ]
        if "--json" in how
        else []
    )
    assert (f"{complete} completed before it could be cancelled." in err) == (not how)
    assert (f"{stuck} was asked to stop" in err) == (not how)


async def _cancelled_too_late(
    database: Path, chosen: Sequence[str], complete: str
) -> tuple[int, str, str]:
    """Cancel two tasks, and write what the worker of one would; returns as `Program.ended`."""
    requests = "SELECT task_id FROM task_events WHERE type = 'cancel_requested'"
    version = f"SELECT max(version) FROM task_events WHERE task_id = '{complete}'"
    length = f"SELECT length(text) FROM task_output WHERE task_id = '{complete}'"
    async with Engine.open(database, adapters=[]) as engine:
        with Program("cancel", *chosen, database=database) as program:
            until(lambda: len(query(database, requests)) == 2, "two requests")
            end = Completed(output_length=query(database, length)[0][0])
            await engine.log.append(complete, [end], query(database, version)[0][0])
            return program.ended()


def test_cancel_takes_over_from_a_worker_that_dies_meanwhile(
    tmp_path: Path, database: Path
) -> None:
    """Nobody else would end what it had, and all is in one file in the end."""
    file = batch(tmp_path, 2, STALLED)
    requests = "SELECT task_id FROM task_events WHERE type = 'cancel_requested'"
    with run(file, database) as worker:
        until(writing(database, 2), "two tasks that write")
        worker.send(signal.SIGSTOP)
        with Program("cancel", "--batch", "rows", database=database) as program:
            until(lambda: len(query(database, requests)) == 2, "two requests")
            worker.send(signal.SIGKILL)
            worker.ended()
            code, out, err = program.ended()
    assert (code, len(out.splitlines())) == (0, 2)
    assert err.endswith("2 tasks cancelled.\n")
    assert not database.with_name(f"{database.name}-wal").exists()


def test_ctrl_c_while_cancelling_tells_what_was_asked(tmp_path: Path, database: Path) -> None:
    """The wishes are in the log, and hold."""
    file = batch(tmp_path, 1, STALLED)
    requests = "SELECT task_id FROM task_events WHERE type = 'cancel_requested'"
    with run(file, database) as worker:
        until(writing(database, 1), "a task that writes")
        worker.send(signal.SIGSTOP)
        with Program("cancel", "--json", "--batch", "rows", database=database) as program:
            until(lambda: query(database, requests), "the request")
            program.send(signal.SIGINT)
            code, out, err = program.ended()
        worker.send(signal.SIGCONT)
        worker.ended()
    assert code == 130
    assert json.loads(out)["status"] == "running"
    assert "0 tasks cancelled, 1 asked to stop." in err


def test_two_runs_of_one_batch_share_the_work(tmp_path: Path, database: Path) -> None:
    """Every row is asked once, and both end when all of it is done."""
    file = batch(tmp_path, 20, {"words": 20, "delay": 0.05})
    with run(file, database, "--json") as one, run(file, database, "--json") as other:
        ends = [one.ended(), other.ended()]
    assert [code for code, _, _ in ends] == [0, 0]
    assert [json.loads(out)["tasks"]["completed"] for _, out, _ in ends] == [20, 20]
    assert len(calls(tmp_path)) == 20
    assert statuses(database) == {"completed": 20}


def test_rows_from_a_pipe_begin_before_it_ends(tmp_path: Path, database: Path) -> None:
    """A slow producer's rows run as they come; the results have the input's order."""
    with Program(
        *("run", "-", "-p", "demo", "--name", "piped", "--out", "-"),
        database=database,
        stdin=subprocess.PIPE,
    ) as program:
        assert program.process.stdin is not None
        program.process.stdin.write('{"id": "a", "prompt": "x"}\n')
        program.process.stdin.flush()
        until(lambda: statuses(database) == {"completed": 1}, "the first row")
        program.process.stdin.write('{"id": "b", "prompt": "y"}\n')
        code, out, _ = program.ended()
    assert code == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["a", "b"]


def test_ctrl_c_ends_a_run_that_waits_for_its_pipe(database: Path) -> None:
    """Although a thread is reading it and nothing comes."""
    with Program("run", "-", "-p", "demo", database=database, stdin=subprocess.PIPE) as program:
        until(lambda: query(database, "SELECT 1 FROM workers"), "the worker")
        program.send(signal.SIGINT)
        until(lambda: program.process.poll() is not None, "its end")
        assert program.process.returncode == 130
        assert program.process.stderr is not None
        assert "To go on: perdure run -" in program.process.stderr.read()


def test_a_closed_pipe_ends_quietly(database: Path) -> None:
    """`perdure ask … | head`: no traceback; what nobody reads is cancelled, and kept."""
    options = ("--option", "delay=0.05", "--option", "words=2000")
    with Program("ask", "x", "-p", "demo", *options, database=database) as program:
        assert program.process.stdout is not None
        assert program.process.stdout.read(20) == "Demonstration text; "
        program.process.stdout.close()
        until(lambda: program.process.poll() is not None, "its end")
        assert program.process.stderr is not None
        assert "Traceback" not in program.process.stderr.read()
        assert program.process.returncode == 141
        program.process.stdout = None
    assert statuses(database) == {"cancelled": 1}


@pytest.mark.parametrize("redirection", [">", ">>"])
def test_what_was_streamed_to_a_file_is_the_answer(
    redirection: str, tmp_path: Path, database: Path
) -> None:
    """What a lost attempt wrote to it is taken back, and nothing else."""
    file = tmp_path / "answer.txt"
    file.write_text("from before\n")
    options = ("fail=Overloaded", "fail_after=3", "fail_attempts=1", "words=20")
    told = " ".join(f"--option {option}" for option in options)
    done = subprocess.run(
        [
            *("/bin/sh", "-c"),
            f'"{sys.executable}" -m perdure.cli ask x -p demo {told} {redirection} "{file}"',
        ],
        stderr=subprocess.PIPE,
        env={**os.environ, "PERDURE_DB": str(database)},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ((output,),) = query(database, "SELECT output FROM tasks")
    assert file.read_text() == ("from before\n" if redirection == ">>" else "") + output


def test_a_terminal_gets_a_bar(tmp_path: Path, database: Path) -> None:
    """With what is done, running and failed, tokens and cost, on stderr, however narrow it is."""
    file = batch(tmp_path, 3, {"words": 20})
    wide, narrow = r"3/3  0 running  0 failed  \d+ tokens", "3/3, 0 failed"
    for columns, sought in (("120", wide), ("40", narrow)):
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "perdure.cli", "run", str(file), "-p", "demo", "-n", columns],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={
                **{k: v for k, v in os.environ.items() if k != "NO_COLOR"},
                "PERDURE_DB": str(database),
                "COLUMNS": columns,
                "TERM": "xterm",
            },
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # that is how Linux says that the other side is closed
                break
            if not part:
                break
            shown += part
        out, _ = process.communicate(timeout=120)
        os.close(ours)
        assert (process.returncode, out) == (0, b"")
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
        assert re.search(sought, plain), plain
