"""One run of benchmarks: how large, how often, where its files are, and databases to work on."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from benchmarks.logs import build_log

if TYPE_CHECKING:
    from benchmarks.server import Server

__all__ = ["Session"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Session:
    """What a case needs to know and to borrow.

    Attributes:
        folder: For databases and whatever else is thrown away afterwards.
        rounds: How often everything is measured.
        small: Only see that everything runs; the numbers mean nothing.
        full: The large sizes too: 10 million events, a batch of a million rows.
        peers: Measure other libraries too.
        say: Tell the person in front how far it is.
    """

    folder: Path
    rounds: int = 5
    small: bool = False
    full: bool = False
    peers: bool = False
    say: Callable[[str], None] = print
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _logs: dict[tuple[int, int], Path] = field(default_factory=dict[tuple[int, int], Path])

    def size(self, usual: int, small: int, full: int | None = None) -> int:
        """Return how many, by how large this run is."""
        if self.small:
            return small
        return full if self.full and full is not None else usual

    @property
    def many_rounds(self) -> int:
        """How often to measure what differs a lot from round to round."""
        return 2 * self.rounds

    # -- files -----------------------------------------------------------------------------------

    def place(self, name: str) -> Path:
        """Return a path that nothing is at."""
        return self.folder / f"{next(self._numbers)}-{name}"

    @cached_property
    def _migrated(self) -> Path:
        from perdure.store.database import Database

        path = self.place("migrated.db")
        Database(path).prepare()
        return path

    def database(self) -> Path:
        """Return a new, empty database of today's schema."""
        return Path(shutil.copy(self._migrated, self.place("perdure.db")))

    @cached_property
    def _server(self) -> Server:
        from benchmarks.server import Server

        self.say("starting a PostgreSQL server ...")
        return Server(self.place("postgresql"))

    def on_server(self, *, bare: bool = False) -> str:
        """Return the URL of a new database of today's schema on PostgreSQL; ``bare``: without."""
        return self._server.database(bare=bare)

    def log_on_server(self, events: int, *, pending: int = 0) -> str:
        """Return a new database on PostgreSQL with so many events of ended tasks."""
        self.say(f"writing a log of {events:,} events on PostgreSQL ...")
        url = self.on_server()
        build_log(url, events, pending=pending)
        return url

    def close(self) -> None:
        """Stop the server, if one was started."""
        if "_server" in self.__dict__:
            self._server.close()

    def log(self, events: int, *, pending: int = 0) -> Path:
        """Return a database with so many events of ended tasks; made once, so only to be read."""
        key = (events, pending)
        if key not in self._logs:
            self.say(f"writing a log of {events:,} events ...")
            path = self.database()
            build_log(path, events, pending=pending)
            self._logs[key] = path
        return self._logs[key]

    def forget(self, path: Path) -> None:
        """Remove a database that nothing needs any more."""
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)

    # -- other processes -------------------------------------------------------------------------

    def run_child(self, module: str, *arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Run a module of ours in a process of its own and return the JSON it prints."""
        done = subprocess.run(
            child_command(module, arguments),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            check=True,
        )
        return json.loads(done.stdout)

    @contextmanager
    def child(self, module: str, *arguments: object) -> Generator[Child, None, None]:
        """Run a module of ours beside this process, and talk with it line by line."""
        process = subprocess.Popen(
            child_command(module, arguments),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Child(process.stdin, process.stdout)
        finally:
            process.stdin.close()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()


def child_command(module: str, arguments: Sequence[object]) -> list[str]:
    """Return the command that runs a module of this folder with this Python."""
    return [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]


@dataclass(frozen=True)
class Child:
    """A process that reads lines and answers with lines of JSON; it ends with its input."""

    stdin: IO[str]
    stdout: IO[str]

    def tell(self, line: str) -> None:
        """Send a line."""
        self.stdin.write(line + "\n")
        self.stdin.flush()

    def hear(self) -> Any:  # noqa: ANN401 - JSON
        """Wait for a line.

        Raises:
            RuntimeError: There is none: the process ended.
        """
        line = self.stdout.readline()
        if not line:
            raise RuntimeError("a child process ended early; its message is above")
        return json.loads(line)
