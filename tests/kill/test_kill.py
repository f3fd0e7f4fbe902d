"""`perdure run`, killed again and again until it is done: nothing is lost, nothing done twice.

What the platform did is known from the journal of the demonstration platform, which it writes by
itself, before and after each call. What perdure says is held against that.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perdure.store.database import Database
from perdure.store.maintenance import compare, verify

pytestmark = pytest.mark.kill

PATIENCE = 120.0


class Batch:
    """A batch of the demonstration platform, and everything that is known of it.

    Attributes:
        seed: What chance began with; `PERDURE_TEST_SEED` repeats it.
    """

    def __init__(self, folder: Path, rows: int, **options: Any) -> None:
        self.seed = int(os.environ.get("PERDURE_TEST_SEED") or secrets.randbelow(10**9))
        print(f"PERDURE_TEST_SEED={self.seed}")
        self.chance = random.Random(self.seed)
        self.database = folder / "perdure.db"
        self.journal = folder / "journal.jsonl"
        self.out = folder / "results.jsonl"
        self.file = folder / "rows.jsonl"
        self.rows = [
            {
                "id": f"row-{number}",
                "prompt": f"Tell me about {number}, and take your time.",
                "platform": "demo",
                "options": {
                    "words": self.chance.randrange(5, 40),
                    "delay": 0.005,
                    "journal": str(self.journal),
                    **options,
                },
            }
            for number in range(rows)
        ]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.children: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """Start the batch, or go on with it, in a process group of its own."""
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "perdure.cli", "run", str(self.file)),
                *("--concurrency", "4", "--out", str(self.out)),
            ],
            env={**os.environ, "PERDURE_DB": str(self.database)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.children.append(child)
        return child

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Return what the database says; nothing while there is none."""
        if not self.database.exists():
            return []
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=30)
        try:
            return connection.execute(sql).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise
        finally:
            connection.close()

    def calls(self) -> list[dict[str, Any]]:
        """Return what the platform noted down."""
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def unfinished(self) -> bool:
        """Return whether some row isn't completed."""
        done = self.query("SELECT count(*) FROM tasks WHERE status = 'completed'")
        return not done or done[0][0] < len(self.rows)

    def finish(self) -> None:
        """Run it to its end."""
        child = self.start()
        _out, errors = child.communicate(timeout=PATIENCE)
        assert child.returncode == 0, errors.decode()

    def check(self) -> None:
        """Hold what the log says against what the platform did."""
        assert self.query("SELECT status, count(*) FROM tasks GROUP BY 1") == [
            ("completed", len(self.rows))
        ]
        self._check_order()
        calls = self.calls()
        texts = dict(self.query("SELECT task_id, output FROM tasks"))
        prompts = dict(self.query("SELECT prompt, task_id FROM tasks"))
        assert len(prompts) == len(self.rows), "a row was submitted twice"
        # Each call the platform saw is an attempt in the log, begun before it; none came twice.
        began = Counter((call["call"], call["attempt"]) for call in calls if "call" in call)
        assert set(began.values()) <= {1}
        claimed = set(self.query("SELECT task_id, attempt FROM attempts"))
        assert set(began) <= claimed
        endings = self.query(
            "SELECT task_id, max(attempt) FROM attempts WHERE outcome = 'completed' GROUP BY 1"
        )
        last = dict(endings)
        assert last.keys() == texts.keys()
        assert all(attempt <= last[task_id] for task_id, attempt in began), "run after its end"
        for row in self.rows:
            task_id = prompts[row["prompt"]]
            assert texts[task_id] == expected_text(row, task_id), row["id"]
        results = [json.loads(line) for line in self.out.read_text().splitlines()]
        assert [result["id"] for result in results] == [row["id"] for row in self.rows]
        assert [result["output"] for result in results] == [
            texts[prompts[row["prompt"]]] for row in self.rows
        ]

    def _check_order(self) -> None:
        positions = [row[0] for row in self.query("SELECT position FROM events ORDER BY 1")]
        assert positions == list(range(1, len(positions) + 1))
        versions: Counter[str] = Counter()
        completed: Counter[str] = Counter()
        for task_id, version, type_ in self.query(
            "SELECT task_id, version, type FROM task_events ORDER BY position"
        ):
            versions[task_id] += 1
            assert version == versions[task_id]
            assert not completed[task_id], "something follows the end"
            completed[task_id] += type_ == "completed"
        assert set(completed.values()) == {1}
        with Database(self.database).snapshot() as connection:
            report = verify(connection)
            assert report.ok, report.problems
            assert compare(connection).differed == 0


def expected_text(row: dict[str, Any], task_id: str) -> str:
    """Return what the platform says to a row: the same at every attempt."""
    import asyncio

    from perdure import Call, Chunk, Task
    from perdure_adapters import DemoAdapter

    options = {k: v for k, v in row["options"].items() if k not in ("journal", "delay")}
    task = Task(prompt=row["prompt"], platform="demo", options=options)

    async def say() -> str:
        events = DemoAdapter().run(Call(task=task, task_id=task_id))
        return "".join([event.text async for event in events if isinstance(event, Chunk)])

    return asyncio.run(say())


@pytest.fixture
def children() -> Iterator[list[Batch]]:
    """Batches whose processes end with the test."""
    batches: list[Batch] = []
    yield batches
    for batch in batches:
        for child in batch.children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
            child.communicate()


def kill_somewhere(batch: Batch, child: subprocess.Popen[bytes]) -> bool:
    """Kill the child some time after it has begun to work; returns whether it was still running."""
    before = len(batch.calls())
    latest = time.monotonic() + PATIENCE
    # Most of its life goes to starting up, where there is little to break: wait for the first call,
    # but for every fifth child, which may die before it has done anything.
    if batch.chance.random() < 0.8:
        while len(batch.calls()) == before and child.poll() is None:
            assert time.monotonic() < latest
            time.sleep(0.005)
    time.sleep(batch.chance.random() * 0.3)
    running = child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    return running


def test_batch_survives_being_killed_again_and_again(tmp_path: Path, children: list[Batch]) -> None:
    """Kill -9 at random moments, fifteen times and more: then every row has ended once, as told."""
    batch = Batch(tmp_path, rows=90)
    children.append(batch)
    kills = 0
    while batch.unfinished() and kills < 25:
        kills += kill_somewhere(batch, batch.start())
    batch.finish()
    batch.check()
    assert kills >= 10, f"only {kills} of the children were killed while they worked"


def test_calls_that_can_be_picked_up_are_made_once(tmp_path: Path, children: list[Batch]) -> None:
    """Where the platform lets a call be picked up, a killed run pays for no row twice."""
    batch = Batch(tmp_path, rows=40, reattach=True)
    children.append(batch)
    for _ in range(8):
        if not batch.unfinished():
            break
        kill_somewhere(batch, batch.start())
    batch.finish()
    batch.check()
    generations = Counter(
        call["call"] for call in batch.calls() if "call" in call and call["mode"] != "reattach"
    )
    # A child that died between the platform's first word and its commit leaves a call that nobody
    # knows how to pick up: the log then says that its outcome is unknown.
    unknown = Counter(
        task_id
        for (task_id,) in batch.query(
            "SELECT task_id FROM task_events WHERE type = 'interrupted' "
            "AND json_extract(data, '$.outcome') = 'unknown'"
        )
    )
    assert all(count <= 1 + unknown[task_id] for task_id, count in generations.items())


def test_two_runs_of_one_batch_killed_at_random(tmp_path: Path, children: list[Batch]) -> None:
    """Two processes share a batch; whichever is killed, the other and its successors finish it."""
    batch = Batch(tmp_path, rows=60)
    children.append(batch)
    pair = [batch.start(), batch.start()]
    for _ in range(10):
        if not batch.unfinished():
            break
        victim = batch.chance.randrange(2)
        kill_somewhere(batch, pair[victim])
        pair[victim] = batch.start()
    for child in pair:
        _out, errors = child.communicate(timeout=PATIENCE)
        assert child.returncode == 0, errors.decode()
    batch.finish()
    batch.check()
