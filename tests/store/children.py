"""Other processes, for tests."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("child.py")


class Child:
    """A process that does one thing of `child.py`, when it is told to."""

    def __init__(self, what: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), what, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Return once it has started."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def go(self) -> None:
        """Tell it to begin."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Return what came of it."""
        out, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0
        return json.loads(out)

    def close(self) -> None:
        """End it, if it hasn't ended."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def children(*commands: tuple[object, ...]) -> Generator[list[Child], None, None]:
    """Start processes, wait until all are ready, and end those that are left at the end."""
    started: list[Child] = []
    try:
        started.extend(Child(str(command[0]), *command[1:]) for command in commands)
        for child in started:
            child.wait_until_ready()
        yield started
    finally:
        for child in started:
            child.close()


def run(*commands: tuple[object, ...]) -> list[Any]:
    """Run processes at the same time and return what came of each."""
    with children(*commands) as started:
        for child in started:
            child.go()
        return [child.result() for child in started]
