"""A batch on a real model, run as people run it: cancelled, killed, and taken up again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from servers.llama import NAME, LlamaServer, llama_server

pytestmark = [
    pytest.mark.model,
    pytest.mark.kill,
    pytest.mark.xdist_group("model"),
    pytest.mark.timeout(900),
]

ROWS = 6


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    """A real model behind llama-server."""
    with llama_server() as server:
        yield server


class Runs:
    """A batch file, its database, and how to run it."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self.database = folder / "perdure.db"
        self.out = folder / "results.jsonl"
        self.batch = folder / "stories.jsonl"
        rows = [
            {
                "id": f"row-{number}",
                "prompt": f"Tell a story about the number {number}.",
                "max_tokens": 60,
                "temperature": 0,
                "options": {"ignore_eos": True, "seed": 1},
            }
            for number in range(ROWS)
        ]
        self.batch.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._environment = {
            **os.environ,
            "PERDURE_DB": str(self.database),
            "PERDURE_COMPATIBLE_BASE_URL": base_url,
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line."""
        return subprocess.Popen(
            [sys.executable, "-m", "perdure.cli", *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self) -> subprocess.Popen[str]:
        """Start the batch, or go on with it."""
        return self.start(
            *("run", str(self.batch), "--platform", "compatible", "--model", NAME),
            *("--concurrency", "2", "--out", str(self.out)),
        )

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Return what the database says; nothing while there is none."""
        try:
            connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)
            with closing(connection):
                return connection.execute(sql).fetchall()
        except sqlite3.OperationalError:
            return []


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for a condition."""
    latest = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < latest, "waited in vain"
        time.sleep(0.02)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and what was said on stderr."""
    _out, errors = process.communicate(timeout=240)
    return process.returncode, errors


def test_batch_is_cancelled_killed_and_resumed(tmp_path: Path, llama: LlamaServer) -> None:
    """Rows finished before a kill -9 stay as they are, the others are finished by the next run.

    One row is cancelled while it streams: its partial output is the beginning of a story, and it is
    counted, not run again.
    """
    runs = Runs(tmp_path, llama.url)
    first = runs.run()
    streaming = "SELECT DISTINCT task_id FROM task_events WHERE type = 'chunk'"
    until(lambda: runs.query(streaming))
    (cancelled,) = runs.query(streaming)[0]
    cancelling = runs.start("cancel", str(cancelled), "--reason", "enough of it")
    code, errors = finished(cancelling)
    assert code == 0, errors
    until(lambda: runs.query("SELECT 1 FROM tasks WHERE status = 'completed'"))
    until(lambda: runs.query("SELECT 1 FROM tasks WHERE status = 'running'"))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = "SELECT task_id, output, ended_at FROM tasks WHERE status = 'completed' ORDER BY 1"
    before = runs.query(done)

    code, errors = finished(runs.run())

    assert code == 3, errors  # one row was cancelled, and stays so
    after = runs.query(done)
    assert len(after) == ROWS - 1
    assert set(before) <= set(after)
    partial = runs.query(f"SELECT status, partial_output FROM tasks WHERE task_id = '{cancelled}'")
    assert partial[0][0] == "cancelled"
    assert partial[0][1]
    chunks = runs.query(
        "SELECT group_concat(json_extract(data, '$.text'), '') FROM (SELECT data FROM task_events "
        f"WHERE task_id = '{cancelled}' AND type = 'chunk' ORDER BY version)"
    )
    assert chunks[0][0] == partial[0][1]
    results = [json.loads(line) for line in runs.out.read_text().splitlines()]
    assert [result["id"] for result in results] == [f"row-{number}" for number in range(ROWS)]
    assert all(result["output"] for result in results if result["status"] == "completed")
    endings = runs.query(
        "SELECT task_id, count(*) FROM task_events "
        "WHERE type IN ('completed', 'failed', 'cancelled') GROUP BY task_id"
    )
    assert sorted(count for _task, count in endings) == [1] * ROWS
    again = runs.query(
        "SELECT count(*) FROM task_events r JOIN task_events c ON c.task_id = r.task_id "
        "WHERE r.type = 'running' AND c.type = 'completed' AND r.version > c.version"
    )
    assert again == [(0,)]
    code, errors = finished(runs.start("verify"))
    assert code == 0, errors
