"""Kill -9, whenever and wherever: nothing is lost, nothing is done twice, nothing is half.

`perdure run` is started on a batch, killed, and started again until it is done. The platform `demo`
keeps a journal of its own of who called it, so the log can be held against what really happened.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from harness import (
    PATIENCE,
    Nursery,
    assert_sound,
    count_events,
    journal_of,
    query,
    stored_events,
    wait_until,
)

from perdure import Call, Chunk, Engine, Task
from perdure_adapters import DemoAdapter

pytestmark = pytest.mark.kill


class Process(Protocol):
    """Something that was started and can be killed."""

    def kill(self) -> None:
        """Kill it and wait until it is gone."""
        ...

    def wait(self, limit: float = PATIENCE) -> int:
        """Wait for its end and return its status."""
        ...


class Batch:
    """A file of tasks, and the ways to run it.

    Attributes:
        file: The rows.
        db: The database.
        journal: What the platform notes down.
        rows: How many rows there are.
    """

    def __init__(self, folder: Path, db: Path, rows: Sequence[dict[str, Any]]) -> None:
        self.db = db
        self.file = folder / "rows.jsonl"
        self.journal = folder / "journal"
        self.rows = len(rows)
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, concurrency: int = 4, *more: str) -> list[str]:
        """Return the command line."""
        platform = ["--platform", "demo", "--option", f"journal={self.journal}"]
        run = ["run", str(self.file), "--db", str(self.db), "--name", "batch"]
        return [*run, "--concurrency", str(concurrency), *platform, *more]

    def done(self) -> int:
        """Return how many rows are done."""
        return count_events(self.db, "completed")

    def assert_done(self) -> None:
        """Hold the log against the rows, and against what the platform saw."""
        assert_sound(self.db)
        rows = query(self.db, "SELECT task_id, status, attempts, output, key FROM tasks")
        assert len(rows) == self.rows
        assert len({key for *_, key in rows}) == self.rows, "a row was submitted twice"
        assert count_events(self.db, "completed") == self.rows
        assert query(self.db, "SELECT count(*) FROM workers") == [(0,)]
        began: dict[str, list[int]] = {}
        for entry in journal_of(self.journal):
            if "call" in entry:
                began.setdefault(entry["call"], []).append(entry["attempt"])
        events: dict[str, list[str]] = {}
        for task_id, type_ in query(
            self.db, "SELECT s.task_id, e.type FROM events AS e JOIN streams AS s USING (stream_id)"
        ):
            events.setdefault(task_id, []).append(type_)
        expected = asyncio.run(_said(self.db, [row[0] for row in rows]))
        for task_id, status, attempts, output, _ in rows:
            assert status == "completed"
            assert output == expected[task_id], f"{task_id} is not what the platform sent"
            types = events[task_id]
            calls = began[task_id]
            # Each call follows a `running` of its own, and no `running` can follow a `completed`:
            # so nobody called the platform twice for one attempt, nor ever after the end.
            assert len(calls) == len(set(calls)), f"{task_id}: an attempt was made twice"
            assert max(calls) == attempts == types.count("running")
            assert types.count("interrupted") == attempts - 1


async def _said(db: Path, task_ids: Sequence[str]) -> dict[str, str]:
    """Return what the platform says to each task when nothing goes wrong."""
    texts: dict[str, str] = {}
    async with Engine.open(db, adapters=[DemoAdapter()], run=False) as engine:
        for task_id in task_ids:
            task: Task = await engine.get_definition(task_id)
            kept = {name: v for name, v in task.options.items() if name in ("words", "chunk_words")}
            call = Call(task=task.model_copy(update={"options": kept}), task_id=task_id)
            events = DemoAdapter().run(call)
            texts[task_id] = "".join([e.text async for e in events if isinstance(e, Chunk)])
    return texts


def rows_of(count: int, **options: Any) -> list[dict[str, Any]]:
    """Return so many rows, each with a question of its own."""
    return [
        {"id": f"row-{n}", "prompt": f"Question {n}: what is {n} times {n}?", "options": options}
        for n in range(count)
    ]


class Program:
    """The installed program `perdure`, in a process of its own."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perdure.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "COLUMNS": "120"},
            )
        self._log = log

    def kill(self) -> None:
        """Kill it as nothing can be prevented or tidied up, and wait until it is gone."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(PATIENCE)

    def wait(self, limit: float = PATIENCE) -> int:
        """Wait for its end and return its exit code."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it still runs: {self._log.read_text()[-2000:]}") from None


def kill_often(
    start: Callable[[], Process], batch: Batch, chance: random.Random, kills: int, longest: float
) -> int:
    """Start and kill again and again, mostly some time after work has begun; returns how often.

    Every fourth time it is killed blindly, which mostly hits it while it starts.
    """
    killed = 0
    for n in range(kills):
        before = count_events(batch.db)
        process = start()
        blindly = n % 4 == 3
        if not blindly:
            wait_until(lambda b=before: count_events(batch.db) > b, what="no work was begun")
        time.sleep(chance.uniform(0, 1.5 * longest if blindly else longest))
        process.kill()
        killed += 1
        print(f"kill {killed}: {batch.done()} of {batch.rows} rows done")
        if batch.done() == batch.rows:
            break
    return killed


# -- the program as it is installed ----------------------------------------------------------------


@pytest.mark.parametrize("round_", range(2))
def test_the_program_killed_at_random(
    db: Path, tmp_path: Path, chance: random.Random, round_: int
) -> None:
    """`perdure run`, killed eight times a round, finishes what is left and nothing else."""
    batch = Batch(tmp_path, db, rows_of(40, words=60, chunk_words=2, delay=0.02))
    log = tmp_path / "log"
    killed = kill_often(
        lambda: Program(batch.arguments(), log), batch, chance, kills=8, longest=0.6
    )
    assert Program(batch.arguments(8), log).wait() == 0, log.read_text()
    batch.assert_done()
    assert count_events(db, "interrupted") > 0, f"{killed} kills hit nothing"
    before = count_events(db)
    assert Program(batch.arguments(), log).wait() == 0
    assert count_events(db) == before, "running what is done wrote something"


# -- the same in forks, which start so fast that it can be done very often -------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"words": 60, "chunk_words": 2, "delay": 0.01},
        {"words": 60, "chunk_words": 2, "delay": 0.01, "reattach": True},
        {"words": 8},
    ],
    ids=["begun anew", "picked up", "short"],
)
def test_killed_dozens_of_times(
    db: Path, tmp_path: Path, nursery: Nursery, chance: random.Random, options: dict[str, Any]
) -> None:
    """Twenty kills; where calls can be picked up, no row is ever generated a second time."""
    batch = Batch(tmp_path, db, rows_of(100 if len(options) > 1 else 500, **options))

    def start() -> Process:
        return nursery.start("command", arguments=batch.arguments(8))

    kill_often(start, batch, chance, kills=20, longest=0.2)
    finishing = nursery.start("command", arguments=batch.arguments(32))
    assert finishing.wait() == 0, finishing.said()
    assert finishing.lines()[-1] == "exit 0", finishing.said()
    batch.assert_done()
    if options.get("reattach"):
        begun = Counter(
            entry["call"] for entry in journal_of(batch.journal) if entry.get("mode") == "restart"
        )
        again = {task_id: count for task_id, count in begun.items() if count > 1}
        # Only a call whose name was not in the log yet can't be picked up.
        for task_id, count in again.items():
            outcomes = [
                data["outcome"]
                for type_, data in stored_events(db, task_id)
                if type_ == "interrupted"
            ]
            assert outcomes.count("unknown") >= count - 1


@pytest.mark.parametrize(
    "point",
    [
        "between claim and call",
        "in the stream",
        "at the platform's end",
        "before the commit",
        "after the commit",
    ],
)
def test_killed_at_an_exact_point(
    db: Path, tmp_path: Path, nursery: Nursery, chance: random.Random, point: str
) -> None:
    """There, the first to so-many-th time it gets there; again and again."""
    batch = Batch(tmp_path, db, rows_of(24, words=24, chunk_words=2, delay=0.002))
    killed = 0
    for at in [1, 1, 2, 3, *(chance.randint(1, 40) for _ in range(8))]:
        child = nursery.start("command", arguments=batch.arguments(), die=point, at=at)
        status = child.wait()
        assert status in (0, -signal.SIGKILL), child.said()
        killed += status != 0
        if batch.done() == batch.rows:
            break
    child = nursery.start("command", arguments=batch.arguments())
    assert child.wait() == 0, child.said()
    batch.assert_done()
    print(f"killed {killed} times {point}")
    assert killed >= 3


# -- two at once -----------------------------------------------------------------------------------


def test_two_processes_run_the_same_batch(db: Path, tmp_path: Path) -> None:
    """Both end well, every row was done once, and both have worked."""
    batch = Batch(tmp_path, db, rows_of(60, words=30, chunk_words=2, delay=0.02))
    log = tmp_path / "log"
    both = [Program(batch.arguments(), log) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], log.read_text()
    batch.assert_done()
    assert count_events(db, "interrupted") == 0
    assert len(query(db, "SELECT DISTINCT data ->> 'worker' FROM events WHERE type='running'")) == 2


def test_two_processes_on_the_same_batch_both_killed(
    db: Path, tmp_path: Path, nursery: Nursery, chance: random.Random
) -> None:
    """Either or both die, over and over, while the other goes on and takes over."""
    options = {"words": 60, "chunk_words": 2, "delay": 0.01}
    batch = Batch(tmp_path, db, rows_of(100, **options))

    def start() -> Any:
        return nursery.start("command", arguments=batch.arguments(6))

    running = [start(), start()]
    for n in range(20):
        wait_until(lambda: count_events(batch.db, "running"))
        time.sleep(chance.uniform(0, 0.3))
        for place in chance.choice([[0], [1], [0, 1]]):
            running[place].kill()
            running[place] = start()
        print(f"round {n}: {batch.done()} of {batch.rows} rows done")
        if batch.done() == batch.rows:
            break
    for process in running:
        assert process.wait() == 0, process.said()
    last = start()
    assert last.wait() == 0, last.said()
    batch.assert_done()
    assert count_events(db, "interrupted") > 0


# -- a killed process and the file system ----------------------------------------------------------


def test_killed_while_the_database_is_made(
    tmp_path: Path, nursery: Nursery, chance: random.Random
) -> None:
    """A process that dies while it creates the database leaves nothing that keeps others out."""
    for n in range(6):
        folder = tmp_path / f"{n}"
        folder.mkdir()
        batch = Batch(folder, folder / "new.db", rows_of(3, words=8))
        children = [nursery.start("command", arguments=batch.arguments()) for _ in range(1 + n % 2)]
        time.sleep(chance.uniform(0, 0.35))
        for child in children:
            child.kill()
        last = nursery.start("command", arguments=batch.arguments())
        assert last.wait() == 0, last.said()
        batch.assert_done()


def test_two_processes_make_the_same_database(tmp_path: Path, nursery: Nursery) -> None:
    """Many that begin at once on a database that isn't there all find one that works."""
    batch = Batch(tmp_path, tmp_path / "new.db", rows_of(20, words=8))
    children = [nursery.start("command", arguments=batch.arguments()) for _ in range(5)]
    for child in children:
        assert child.wait() == 0, child.said()
    batch.assert_done()
