"""What the tests of engine and crashes share: waiting, looking at a log from outside, children."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.types.string import TextLoader

from perdure import RecordedEvent, Task, WorkerSettings
from perdure.appending import Timing
from perdure.events import Chunk, Running
from perdure.policy import RetryPolicy
from perdure.store.database import Database
from perdure.store.rebuilding import compare
from perdure.store.verification import verify
from perdure.streaming import TextChunk

# The path of a SQLite file, or the URL of a PostgreSQL database.
Database_ = Path | str

HERE: Final = Path(__file__).parent
# Two busy cores: far more than anything takes, and never waited for in vain.
PATIENCE: Final = 60.0
ENDINGS: Final = ("completed", "failed", "cancelled")

# Engines that notice things at once, and write every piece of output as it comes.
FAST: Final = WorkerSettings(
    concurrency=8,
    heartbeat_seconds=0.1,
    lease_seconds=30.0,
    poll_seconds=0.02,
    retry=RetryPolicy(base_seconds=0.01, cap_seconds=0.05),
    timing=Timing(chunk_interval=0.0, usage_interval=0.0, closing_seconds=0.3),
)


async def eventually(
    condition: Callable[[], Any | Awaitable[Any]], limit: float = PATIENCE, what: str = ""
) -> Any:
    """Wait until ``condition`` holds, and return what it returned."""
    latest = time.monotonic() + limit
    while True:
        found = condition()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < latest, f"did not happen within {limit:g} s: {what or condition}"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], Any], limit: float = PATIENCE, what: str = "") -> Any:
    """Wait like `eventually` where there is no event loop."""
    latest = time.monotonic() + limit
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < latest, f"did not happen within {limit:g} s: {what or condition}"
        time.sleep(0.005)


def demo(prompt: str = "Say something.", **fields: Any) -> Task:
    """Return a task for the platform `demo`; what is no field of a task is an option of demo."""
    own = {name: value for name, value in fields.items() if name in Task.model_fields}
    options = {name: value for name, value in fields.items() if name not in Task.model_fields}
    return Task(prompt=prompt, platform="demo", options=options, **own)


# -- what a log says, seen from outside ------------------------------------------------------------


def query(db: Database_, sql: str, *parameters: object) -> list[tuple[Any, ...]]:
    """Return the rows of a query, by a plain driver."""
    if isinstance(db, str):
        with psycopg.connect(db) as server:
            for name in ("json", "jsonb"):
                server.adapters.register_loader(name, TextLoader)
            text = sql.replace("%", "%%").replace("?", "%s").encode()
            rows = server.execute(text, parameters).fetchall()
        return [tuple(v.isoformat() if isinstance(v, datetime) else v for v in r) for r in rows]
    connection = sqlite3.connect(f"{db.as_uri()}?mode=ro", uri=True, timeout=30)
    try:
        return connection.execute(sql, parameters).fetchall()
    except sqlite3.OperationalError as error:
        there = {found.name: found.stat().st_size for found in db.parent.iterdir()}
        error.add_note(f"{error.sqlite_errorname}; beside it: {there}")
        raise
    finally:
        connection.close()


def count_events(path: Database_, type_: str | None = None) -> int:
    """Return how many events there are (of that type)."""
    where = "" if type_ is None else f"WHERE type = '{type_}'"
    return int(query(path, f"SELECT count(*) FROM events {where}")[0][0])


def stored_events(path: Database_, task_id: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the (type, data) of a task's events, read without any of perdure's code."""
    rows = query(
        path,
        "SELECT e.type, e.data FROM events AS e JOIN streams AS s USING (stream_id) "
        "WHERE s.task_id = ? ORDER BY e.version",
        task_id,
    )
    return [(type_, json.loads(data)) for type_, data in rows]


def text_of(events: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """Return the text that counts: what came since the output last began anew."""
    text = ""
    for type_, data in events:
        if type_ == "running" and data["mode"] == "restart":
            text = ""
        elif type_ == "chunk" and data["kind"] == "text":
            assert data["offset"] == len(text), "a chunk is missing or was written twice"
            text += data["text"]
    return text


def status_of(events: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """Return a task's status by the plainest of folds."""
    status = "pending"
    for type_, _ in events:
        if type_ == "running":
            status = "running"
        elif type_ in ("attempt_failed", "interrupted"):
            status = "pending"
        elif type_ in ENDINGS:
            status = type_
    return status


def assert_sound(path: Database_) -> None:
    """Hold a database against everything that must be true of it at any moment."""
    rows = query(
        path,
        "SELECT e.position, s.task_id, e.version, e.type, e.data FROM events AS e "
        "JOIN streams AS s USING (stream_id) ORDER BY e.position",
    )
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1)), "positions have gaps"
    streams: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for _, task_id, version, type_, data in rows:
        stream = streams.setdefault(task_id, [])
        stream.append((type_, json.loads(data)))
        assert version == len(stream), f"{task_id}: versions have gaps"
    stored = query(
        path, "SELECT task_id, status, output, partial_output, attempts, worker FROM tasks"
    )
    assert {row[0] for row in stored} == streams.keys()
    for task_id, status, output, partial, attempts, worker in stored:
        events = streams[task_id]
        types = [type_ for type_, _ in events]
        ends = [type_ for type_ in types if type_ in ENDINGS]
        assert len(ends) <= 1, f"{task_id} ended more than once: {types}"
        assert not ends or types[-1] in ENDINGS, f"{task_id}: something follows its end: {types}"
        assert types[0] == "submitted"
        assert types.count("submitted") == 1
        assert status == status_of(events)
        assert attempts == types.count("running")
        assert (worker is not None) == (status == "running")
        text = text_of(events)
        assert output == (text if status == "completed" else None)
        assert partial == (text if status in ("failed", "cancelled") else None)
        if ends:
            assert events[-1][1]["output_length"] == len(text)
    with Database(path).snapshot() as connection:
        report = verify(connection)
        assert report.ok, report.problems
        assert report.events == len(rows)
        assert compare(connection).differed == 0


def log_text(events: Iterable[RecordedEvent]) -> str:
    """Return the text that counts, from events as the engine gives them."""
    parts: list[str] = []
    for recorded in events:
        match recorded.event:
            case Running(mode="restart"):
                parts.clear()
            case Chunk(kind="text") as chunk:
                parts.append(chunk.text)
            case _:
                pass
    return "".join(parts)


# -- children --------------------------------------------------------------------------------------


class Child:
    """A process that plays a scene of `scenes.py`.

    Attributes:
        pid: Its process id.
        out: What it writes to stdout, at once.
        err: What it writes to stderr.
    """

    def __init__(self, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        self.out = out
        self.err = err
        self.status: int | None = None
        self.ended = threading.Event()

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it as nothing can be prevented or tidied up, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, limit: float = PATIENCE) -> int:
        """Wait for its end and return its status: below 0 the signal that killed it."""
        assert self.ended.wait(limit), f"the child still runs; it said: {self.said()}"
        assert self.status is not None
        return self.status

    async def gone(self, limit: float = PATIENCE) -> int:
        """Wait for its end without blocking the event loop."""
        return await asyncio.to_thread(self.wait, limit)

    def lines(self) -> list[str]:
        """Return the whole lines it has written so far."""
        return whole_lines(self.out)

    def said(self) -> str:
        """Return everything it has written, for messages."""
        written = [file.read_text() for file in (self.out, self.err) if file.exists()]
        return "\n".join(written)

    def has_said(self, begin: str) -> str | None:
        """Return the first line that begins so, once there is one."""
        found = next((line for line in self.lines() if line.startswith(begin)), None)
        assert found is not None or not self.ended.is_set() or self.status == 0, self.said()
        return found


class Nursery:
    """Starts children quickly: one process imports everything, each child is a fork of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "nursery.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._started: list[int] = []
        self._news = threading.Condition()
        self._children: dict[int, Child] = {}
        self._early: dict[int, int] = {}
        self._made = 0
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def start(self, scene: str, **arguments: Any) -> Child:
        """Start a child that plays that scene."""
        self._made += 1
        out, err = (self._folder / f"{self._made}.{kind}" for kind in ("out", "err"))
        order = {"scene": scene, "arguments": arguments, "out": str(out), "err": str(err)}
        stdin = self._process.stdin
        assert stdin is not None
        with self._news:
            stdin.write(json.dumps(order, default=str) + "\n")
            stdin.flush()
            assert self._news.wait_for(lambda: self._started, PATIENCE), "the nursery is gone"
            child = Child(self._started.pop(), out, err)
            self._children[child.pid] = child
            if child.pid in self._early:
                self._end(child, self._early.pop(child.pid))
        return child

    def _listen(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            news = json.loads(line)
            with self._news:
                if "started" in news:
                    self._started.append(news["started"])
                elif news["ended"] in self._children:
                    self._end(self._children[news["ended"]], news["status"])
                else:
                    self._early[news["ended"]] = news["status"]
                self._news.notify_all()

    def _end(self, child: Child, status: int) -> None:
        del self._children[child.pid]
        child.status = status
        child.ended.set()

    def end_all(self) -> None:
        """Kill the children that still run."""
        for child in tuple(self._children.values()):
            child.signal(signal.SIGCONT)
            child.kill()

    def close(self) -> None:
        """Kill the children, and end."""
        self.end_all()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.close()
        self._process.wait(PATIENCE)
        self._thread.join(PATIENCE)
        stdout.close()


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that may still be written to, or not be there yet."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def journal_of(path: Path) -> list[dict[str, Any]]:
    """Return what the platform `demo` noted down."""
    return [json.loads(line) for line in whole_lines(path)]


def chunks_in(path: Path) -> list[TextChunk]:
    """Return what a reader in a child was shown, as it noted it down."""
    found = (json.loads(line) for line in whole_lines(path))
    return [TextChunk(text, offset=offset, version=version) for text, offset, version in found]


def is_writing(db: Database_) -> bool:
    """Return whether somebody holds the locks that a writer takes."""
    if isinstance(db, str):
        with psycopg.connect(db) as server:
            try:
                server.execute("SELECT 1 FROM streams FOR UPDATE NOWAIT")
                server.execute("SELECT 1 FROM log_head FOR UPDATE NOWAIT")
            except psycopg.errors.LockNotAvailable:
                return True
        return False
    connection = sqlite3.connect(db, isolation_level=None, timeout=0)
    try:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return True
    finally:
        connection.close()
    return False
