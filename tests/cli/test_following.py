"""`perdure tail`: replay, then live, to the end."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoking import Perdure
from stories import (
    ESCAPES,
    OnTerminal,
    cancel,
    complete,
    fail,
    retry_later,
    running,
    start,
    submit,
    tell,
)

from perdure.events import CancelRequested, Chunk, Completed, Interrupted

TASK = "demo_20261120_aaaa1111"


@pytest.fixture
def pending(database: Path, migrated_file: Path) -> Path:
    """A database with one pending task."""
    database.write_bytes(migrated_file.read_bytes())
    submit(database, TASK, "What is a log?")
    return database


@pytest.fixture
def tail(pending: Path) -> Iterator[subprocess.Popen[str]]:
    """`perdure tail` of that task in a process of its own, which has caught up."""
    process = start("tail", TASK, measured=False)
    assert process.stderr is not None
    assert "no worker" in process.stderr.readline()  # said once it has replayed what is there
    with process:
        yield process
        process.kill()


def read(process: subprocess.Popen[str], length: int) -> str:
    """Read so many characters of a process's stdout, as they come."""
    assert process.stdout is not None
    return "".join(process.stdout.read(1) for _ in range(length))


class TestReplay:
    """Of tasks that have ended."""

    def test_completed(self, pending: Path, perdure: Perdure) -> None:
        """The text comes as it is, and nothing else: exit code 0."""
        complete(pending, TASK, f"A ledger. {ESCAPES}")
        ended = perdure("tail", TASK)
        assert (ended.code, ended.out, ended.err) == (0, f"A ledger. {ESCAPES}", "")

    def test_failed(self, pending: Path, perdure: Perdure) -> None:
        """The partial text comes, the reason on stderr: exit code 3."""
        fail(pending, TASK, "too busy")
        ended = perdure("tail", TASK)
        assert (ended.code, ended.out) == (3, "half an ans")
        assert ended.err.count("\n") == 1
        assert "too busy" in ended.err

    def test_cancelled(self, pending: Path, perdure: Perdure) -> None:
        """A cancelled task is no success either: exit code 3."""
        cancel(pending, TASK, "half")
        ended = perdure("tail", TASK)
        assert (ended.code, ended.out) == (3, "half")
        assert "enough" in ended.err

    def test_only_text(self, pending: Path, perdure: Perdure) -> None:
        """Reasoning and tool calls are no part of it; `log` shows them."""
        thought, call = Chunk(text="hm", kind="reasoning"), Chunk(text="{}", kind="tool_call")
        tell(pending, TASK, running(), thought, Chunk(text="yes"), call)
        tell(pending, TASK, Completed(output_length=3))
        assert perdure("tail", TASK).out == "yes"

    def test_json(self, pending: Path, perdure: Perdure) -> None:
        """With --json it is the events, as `log --json` has them."""
        complete(pending, TASK, "A ledger.")
        assert perdure("tail", TASK, "--json").out == perdure("log", TASK, "--json").out

    def test_escapes(self, pending: Path, on_terminal: OnTerminal) -> None:
        """On a terminal escapes are neutralised, and the last line is closed."""
        complete(pending, TASK, ESCAPES)
        assert on_terminal("tail", TASK).out == (
            "\\x1b[31mred\\x1b]0;title\\x07 \\x9b1m \\u202eback\n"
        )

    def test_notices_get_their_own_line(self, pending: Path, on_terminal: OnTerminal) -> None:
        """A notice in the middle of a line begins a new one first."""
        tell(pending, TASK, running(), Chunk(text="one\ntw"), retry_later())
        tell(pending, TASK, running(2), Chunk(text="three\n"), Completed(output_length=6))
        assert on_terminal("tail", TASK).out == "one\ntw\nthree\n"

    def test_unknown(self, pending: Path, perdure: Perdure) -> None:
        """An id that isn't there is one line."""
        ended = perdure("tail", "nothing")
        assert (ended.code, ended.out, ended.err.count("\n")) == (1, "", 1)


class TestLive:
    """Of tasks that run, in another process."""

    def test_to_the_end(self, pending: Path, tail: subprocess.Popen[str]) -> None:
        """Text comes as soon as it is committed, and the end ends it."""
        tell(pending, TASK, running(), Chunk(text="A led"))
        assert read(tail, 5) == "A led"
        tell(pending, TASK, Chunk(text="ger.", offset=5))
        assert read(tail, 4) == "ger."
        tell(pending, TASK, Completed(output_length=9))
        out, err = tail.communicate(timeout=60)
        assert (tail.returncode, out, err) == (0, "", "")

    def test_restart(self, pending: Path, tail: subprocess.Popen[str]) -> None:
        """Where the output begins anew, stderr says so before the new text comes."""
        tell(pending, TASK, running(), Chunk(text="lost"))
        assert read(tail, 4) == "lost"
        lost = Interrupted(
            worker="worker_1", attempt=1, reason="worker_lost", outcome="unknown", next="restart"
        )
        tell(pending, TASK, lost, running(2), Chunk(text="kept"), Completed(output_length=4))
        out, err = tail.communicate(timeout=60)
        assert (tail.returncode, out) == (0, "kept")
        first, second = err.splitlines()
        assert "worker_1 was lost" in first
        assert "Attempt 2 begins again" in second

    def test_goes_on(self, pending: Path, tail: subprocess.Popen[str]) -> None:
        """An attempt that goes on where the text was is no new beginning."""
        lost = Interrupted(
            worker="worker_1", attempt=1, reason="worker_lost", outcome="unknown", next="continue"
        )
        tell(pending, TASK, running(), Chunk(text="half "), lost)
        tell(pending, TASK, running(2, mode="continue"), Chunk(text="whole", offset=5))
        tell(pending, TASK, Completed(output_length=10))
        out, err = tail.communicate(timeout=60)
        assert (tail.returncode, out) == (0, "half whole")
        assert "begins again" not in err.splitlines()[-1].replace("it begins again", "")

    def test_cancelled(self, pending: Path, tail: subprocess.Popen[str]) -> None:
        """A cancellation is said when it is asked for, and when it has happened."""
        tell(pending, TASK, running(), Chunk(text="half"), CancelRequested(by="me@here"))
        assert read(tail, 4) == "half"
        from perdure.events import Cancelled

        tell(pending, TASK, Cancelled(by="me@here", output_length=4))
        _out, err = tail.communicate(timeout=60)
        assert tail.returncode == 3
        assert [line.split(":")[0] for line in err.splitlines()] == [
            "Cancellation requested",
            "The task was cancelled",
        ]

    def test_json(self, pending: Path) -> None:
        """With --json events come one by one."""
        process = start("tail", TASK, "--json")
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["type"] == "submitted"
        tell(pending, TASK, running(), Chunk(text="x"))
        assert json.loads(process.stdout.readline())["type"] == "running"
        assert json.loads(process.stdout.readline())["data"]["text"] == "x"
        tell(pending, TASK, Completed(output_length=1))
        out, _err = process.communicate(timeout=60)
        assert json.loads(out)["type"] == "completed"
        assert process.returncode == 0

    def test_interrupted(self, pending: Path, tail: subprocess.Popen[str]) -> None:
        """Ctrl-C stops looking, says that the task goes on, and changes nothing: 130."""
        tail.send_signal(signal.SIGINT)
        out, err = tail.communicate(timeout=60)
        assert (tail.returncode, out) == (130, "")
        assert err.count("\n") == 1
        assert f"perdure tail {TASK}" in err

    def test_closed_pipe(self, pending: Path, tail: subprocess.Popen[str]) -> None:
        """A reader that goes away ends it, without a traceback."""
        assert tail.stdout is not None
        tail.stdout.close()
        tell(pending, TASK, running(), Chunk(text="x"))
        assert tail.stderr is not None
        assert tail.wait(timeout=60) == 141
        assert tail.stderr.read() == ""
