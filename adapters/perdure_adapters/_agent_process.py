"""The processes of agents: which one it was, and ending one that nobody listens to any more.

An agent that works on files outlives the process that started it by a moment, or by long where it
hangs. Before its session is taken up again it has to be gone: two of them would work on the same
files.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self, cast

from perdure.task import Usage

__all__ = ["Bookmark", "end_leftover", "end_session", "process_started"]

_TERMINATED: Final = 3.0
"""Seconds a process has for ending by itself, before it is killed."""
_COUNTS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
)


@dataclass(frozen=True, slots=True)
class Bookmark:
    """What has to be known to go on with a session; the cursor of its events.

    Attributes:
        since: When the work on the directory began, in nanoseconds since 1970.
        host: Where the agent runs.
        pid: Its process; None before it is there.
        started: When that process began, in the system's words: ids of processes come again.
        spent: Tokens of the processes before it, and of its own as far as they are known.
    """

    since: int
    host: str = ""
    pid: int | None = None
    started: str | None = None
    spent: Usage | None = None

    def written(self) -> str:
        """Return it as text."""
        fields = {**asdict(replace(self, spent=None)), "spent": _counts(self.spent)}
        return json.dumps({k: v for k, v in fields.items() if v}, separators=(",", ":"))

    @classmethod
    def read(cls, text: str | None) -> Self | None:
        """Return what `written` wrote; None where it is none of it."""
        try:
            fields: object = json.loads(text or "")
        except ValueError:
            return None
        if not isinstance(fields, Mapping):
            return None
        known = cast("Mapping[str, Any]", fields)
        since, pid, started = known.get("since"), known.get("pid"), known.get("started")
        if not isinstance(since, int):
            return None
        spent = known.get("spent")
        return cls(
            since=since,
            host=str(known.get("host") or ""),
            pid=pid if isinstance(pid, int) and pid > 1 else None,
            started=started if isinstance(started, str) else None,
            spent=_usage(cast("Mapping[str, Any]", spent)) if isinstance(spent, Mapping) else None,
        )

    def of_process(self, pid: int | None) -> Bookmark:
        """Return it for a process on this machine."""
        started = None if pid is None else process_started(pid)
        return replace(self, host=socket.gethostname(), pid=pid, started=started)


def _counts(usage: Usage | None) -> dict[str, int]:
    if usage is None:
        return {}
    return {name: count for name in _COUNTS if (count := getattr(usage, name)) is not None}


def _usage(counts: Mapping[str, Any]) -> Usage | None:
    known = {n: c for n in _COUNTS if isinstance(c := counts.get(n), int)}
    return Usage.model_validate(known) if known else None


def process_started(pid: int) -> str | None:
    """Return when the process began, in the system's words; None where there is none of that id."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        if Path("/proc/self/stat").exists():
            # Its name, in brackets, may hold anything; the state comes next, `Z` being a dead one.
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
        return _ps("-o", "lstart=", "-p", str(pid)).strip() or None
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def end_leftover(bookmark: Bookmark) -> bool:
    """End the agent that a lost process left behind on this machine; blocks until it is gone.

    Returns:
        Whether there was one.
    """
    pid, started = bookmark.pid, bookmark.started
    if pid is None or started is None or bookmark.host != socket.gethostname():
        return False
    if process_started(pid) != started:
        return False
    _end(pid, started)
    return True


def end_session(session: str) -> bool:
    """End the agents on this machine that work on a session; blocks until they are gone.

    Returns:
        Whether there was one.
    """
    found = [(pid, process_started(pid)) for pid in _processes_of(session)]
    alive = [(pid, started) for pid, started in found if started is not None]
    for pid, started in alive:
        _end(pid, started)
    return bool(alive)


def _processes_of(session: str) -> list[int]:
    """Return the processes that were called with this session's id."""
    marks = {f"--session-id={session}", f"--resume={session}"}
    mine = os.getpid()
    return [pid for pid, words in _commands() if pid != mine and marks & set(words)]


def _commands() -> Iterator[tuple[int, list[str]]]:
    """Yield every process's id and the words it was called with."""
    if not Path("/proc/self/cmdline").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            for line in _ps("-axo", "pid=,command=").splitlines():
                pid, *words = line.split()
                yield int(pid), words
        return
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                yield int(folder.name), words


def _ps(*arguments: str) -> str:
    """Return what `ps` says of processes, where there is no /proc."""
    done = subprocess.run(  # noqa: S603 - names of columns and a number
        ["/bin/ps", *arguments], capture_output=True, text=True, timeout=5, check=False
    )
    return done.stdout


def _end(pid: int, started: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(pid, number)
        latest = time.monotonic() + _TERMINATED
        while process_started(pid) == started:
            if time.monotonic() >= latest:
                break
            time.sleep(0.02)
        else:
            return
