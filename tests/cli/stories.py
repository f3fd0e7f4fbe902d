"""Databases with a history, for tests of commands that look: written as the engine writes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from perdure.events import (
    Accepted,
    AttemptFailed,
    Cancelled,
    Chunk,
    Completed,
    Event,
    Failed,
    Running,
    Submitted,
)
from perdure.store.content import separate
from perdure.store.database import Database
from perdure.store.transaction import FoldCache, Transaction
from perdure.task import Task, Usage

NOON: Final = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
ESCAPES: Final = "\x1b[31mred\x1b]0;title\x07 \x9b1m \u202eback"
USAGE: Final = Usage(input_tokens=10, output_tokens=20)


def tell(path: Path, task_id: str, *events: Event, at: datetime = NOON, blobs: Any = None) -> None:
    """Append events to a task, all of them at one moment."""
    tell_all(path, [(task_id, events, at)], blobs)


def tell_all(
    path: Path, told: Iterable[tuple[str, Sequence[Event], datetime]], blobs: Any = None
) -> None:
    """Append events to tasks, each time in a transaction of its own."""
    writer = Database(path).writer()
    try:
        for task_id, events, at in told:
            with writer.transaction() as connection:
                transaction = Transaction(connection, FoldCache(), lambda at=at: at)
                transaction.put_blobs(blobs or {})
                transaction.append(task_id, events, None)
                transaction.flush()
    finally:
        writer.close()


def asked(prompt: str) -> Submitted:
    """Return the first event of a plain task."""
    return Submitted(task={"prompt": prompt, "platform": "demo"}, platforms=("demo",))


def submit(path: Path, task_id: str, prompt: str, *, at: datetime = NOON, **fields: Any) -> None:
    """Write a pending task down; ``fields`` are those of `Task`."""
    platform = fields.pop("platform", "demo")
    plain, places, content = separate(Task(prompt=prompt, platform=platform, **fields))
    platforms = (platform, *fields.get("fallbacks", ()))
    event = Submitted(task=plain, platforms=platforms, blobs=places)
    tell(path, task_id, event, at=at, blobs=content)


def running(attempt: int = 1, **fields: Any) -> Running:
    """Return the claim of an attempt."""
    return Running(**{"attempt": attempt, "worker": "worker_1", "platform": "demo", **fields})


def complete(
    path: Path, task_id: str, text: str, *, at: datetime = NOON, cost: float | None = None
) -> None:
    """Run a pending task to its end, which takes two seconds."""
    begun = at + timedelta(seconds=1)
    tell(path, task_id, running(model="demo-1"), Accepted(model="demo-1"), at=begun)
    tell(
        path,
        task_id,
        Chunk(text=text),
        Completed(output_length=len(text), usage=USAGE, cost_usd=cost),
        at=begun + timedelta(seconds=2),
    )


def fail(path: Path, task_id: str, message: str = "busy", kind: str = "Overloaded") -> None:
    """Run a pending task until it fails for good, with some output left behind."""
    tell(
        path,
        task_id,
        running(),
        Chunk(text="half an ans"),
        Failed(error_class=kind, message=message, attempts=1, output_length=11, usage=USAGE),
    )


def cancel(path: Path, task_id: str, text: str = "", **claim: Any) -> None:
    """Cancel a task; where there is a text, run it before, to leave that behind."""
    begun: Sequence[Event] = (running(**claim), Chunk(text=text)) if text else ()
    tell(path, task_id, *begun, Cancelled(by="me@here", reason="enough", output_length=len(text)))


def retry_later(attempt: int = 1) -> AttemptFailed:
    """Return the end of an attempt after which another one follows."""
    return AttemptFailed(
        attempt=attempt,
        error_class="Overloaded",
        message="try again",
        retryable=True,
        next="retry",
        retry_at=NOON + timedelta(seconds=30),
        usage=USAGE,
    )


def start(*arguments: str | Path, measured: bool = True, **more: Any) -> subprocess.Popen[str]:
    """Start a command line in a process of its own.

    Args:
        arguments: Of the command line.
        measured: Whether it counts for coverage. Not where Ctrl-C is thrown into whatever it does:
            thrown into what measures, it can leave a lock locked, which is waited for for ever.
        more: For `Popen`.
    """
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if not measured:
        env = {name: value for name, value in env.items() if not name.startswith("COVERAGE_")}
    return subprocess.Popen(
        [sys.executable, "-m", "perdure.cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **more,
    )


ONE: Final = "demo_20261120_aaaa1111"
TWO: Final = "demo_20261120_aaaa2222"
THREE: Final = "other_20261120_bbbb3333"
FOUR: Final = "demo_20261121_cccc4444"
FIVE: Final = "demo_20261121_dddd5555"


def five_tasks(path: Path) -> None:
    """Write five tasks an hour apart, one of each status, the second run again as the fourth."""
    hour = timedelta(hours=1)
    submit(path, ONE, "What is a log?", labels={"team": "red", "size": "1"}, batch="b1")
    complete(path, ONE, "A log is a ledger.", cost=0.25)
    submit(path, TWO, "100% sure?", at=NOON + hour, labels={"team": "blue"}, batch="b1")
    fail(path, TWO, "overloaded, try later")
    submit(path, THREE, "ÜBER Straßen", at=NOON + 2 * hour, platform="other")
    cancel(path, THREE, "Partly Done", platform="other")
    again = {"retry_of": TWO, "labels": {"team": "blue"}}
    submit(path, FOUR, "100% sure?", at=NOON + 3 * hour, **again)
    submit(path, FIVE, "Go on", at=NOON + 4 * hour, labels={"team": "red"})
    tell(path, FIVE, running(), Chunk(text="so "), Chunk(text="far", offset=3))


def three_endings(path: Path) -> None:
    """Write three tasks that ended, one way each, and one that waits."""
    submit(path, ONE, "What is a log?", batch="b1", labels={"team": "red"})
    complete(path, ONE, 'A "ledger",\nof sorts.', cost=0.25)
    submit(path, TWO, "x", batch="b1", at=NOON + timedelta(hours=1))
    fail(path, TWO, "too busy")
    submit(path, THREE, "y", platform="other", at=NOON + timedelta(hours=2))
    cancel(path, THREE, "half", platform="other")
    submit(path, FOUR, "z", batch="b2")


class OnTerminal:
    """Runs command lines whose stdout passes for a terminal."""

    def __init__(self, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self._run = run
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str | Path, width: int = 80, colours: bool = False) -> Any:
        """Run one on a terminal that is so wide, and return how it ended."""
        with self._monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "isatty", lambda: True)
            patch.setenv("COLUMNS", str(width))
            patch.setenv("TERM", "xterm")
            patch.delenv("NO_COLOR", raising=False)
            if not colours:
                patch.setenv("NO_COLOR", "1")
            return self._run(*arguments)
