"""Command lines as processes of their own, for tests of signals, pipes and crashes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self

__all__ = ["Program", "query", "until", "write_rows"]

# What is waited for takes a second; a busy machine may take its time.
PATIENCE: Final = 120.0
_PENDING: Final = ("SigPnd", "ShdPnd")


class Program:
    """A running command line. Used as a context manager: none is left behind."""

    def __init__(
        self, *arguments: str | Path, database: Path, stdin: int | None = subprocess.DEVNULL
    ) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # Tests in the background ignore Ctrl-C, and their children would inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "perdure.cli", *map(str, arguments)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PERDURE_DB": str(database), "PYTHONUNBUFFERED": "1"},
            text=True,
            encoding="utf-8",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def send_each(self, *numbers: signal.Signals) -> None:
        """Send signals one by one: two of a kind that wait at once are one to the system."""
        for number in numbers:
            self.send(number)
            until(lambda number=number: not self._waits(number), f"{number.name} to be taken")  # type: ignore[misc]

    def _waits(self, number: signal.Signals) -> bool:
        """Return whether a signal was sent and not taken yet."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        except OSError:
            if not Path("/proc/self/status").exists():  # not Linux
                time.sleep(0.5)
            return False
        pending = (line.split()[1] for line in status.splitlines() if line[:6] in _PENDING)
        return any(int(mask, 16) >> (number - 1) & 1 for mask in pending)

    def ended(self) -> tuple[int, str, str]:
        """Wait for the end; returns the exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


def until(condition: Callable[[], object], what: str) -> None:
    """Wait until ``condition`` holds."""
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, f"waited in vain for {what}"
        time.sleep(0.02)


def query(database: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query; none while there is no database yet."""
    try:
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)
    except sqlite3.OperationalError:
        return []
    try:
        return connection.execute(sql).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or "unable to open" in str(error):
            return []
        raise
    finally:
        connection.close()


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines and return the file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
