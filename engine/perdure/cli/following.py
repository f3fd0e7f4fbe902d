"""`perdure tail`: a task's output as it comes, from whatever process."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from perdure.cli.exits import ExitCode
from perdure.cli.finding import IdArgument, resolve
from perdure.cli.records import (
    ENDED,
    event_record,
    event_rows,
    find_task_row,
    refuse_archived,
)
from perdure.cli.session import Session
from perdure.cli.terminal import is_terminal, say, show, show_json
from perdure.store.readonly import Reader, lease_of

if TYPE_CHECKING:
    from perdure.events import Chunk

__all__ = ["follow", "tail"]

# Often enough that nobody sees the difference, and a look takes microseconds.
_LOOK_SECONDS: Final = 0.01
# As long as a worker may be silent before it has lost its tasks, where it doesn't say.
_SILENCE: Final = timedelta(seconds=30)


def tail(session: Session, task_id: IdArgument) -> int:
    """Show a task's output, first what is there, then live from whatever process, to its end.

    Exit code 3 where the task fails or is cancelled. With --json its events, one a line.
    """
    with Reader.open(session.url) as reader:
        known = resolve(reader, task_id)
        follower = Follower(as_json=session.json)
        try:
            for row in follow(reader, known, lambda: _say_who_runs(session, reader, known)):
                follower.take(row)
        except KeyboardInterrupt:
            follower.end_line()
            say(f"The task goes on; `{session.command_line('tail', known)}` shows it again.")
            raise
        finally:
            follower.end_line()
    return ExitCode.OK if follower.last == "completed" else ExitCode.SOME_FAILED


def follow(
    reader: Reader, task_id: str, caught_up: Callable[[], None] | None = None
) -> Iterator[sqlite3.Row]:
    """Yield a task's events, then those to come, up to the one that ends it.

    Args:
        reader: Where to read.
        task_id: The task.
        caught_up: Called once, where the task hasn't ended by then.
    """
    version = 0
    while True:
        for row in event_rows(reader, task_id, version):
            version = row["version"]
            if row["type"] == "archived":  # nothing of what was asked for is here any more
                refuse_archived(find_task_row(reader, task_id), "tail")
            yield row
            if row["type"] in ENDED:
                return
        if caught_up is not None:
            caught_up()
            caught_up = None
        while not reader.changed():
            time.sleep(_LOOK_SECONDS)


class Follower:
    """Shows events as they come: the text on stdout, what else happens on stderr.

    Attributes:
        last: The type of the last event.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.last = ""
        self._as_json = as_json
        self._shown = False
        self._redacted = False
        self._line_is_open = False

    def take(self, row: sqlite3.Row) -> None:
        """Show one event."""
        from perdure.events import Chunk, Running, decode

        self.last = row["type"]
        if self._as_json:
            show_json(event_record(row))
            sys.stdout.flush()
            return
        event = decode(row["type"], row["schema_version"], row["data"])
        if isinstance(event, Chunk):
            self._take_chunk(event)
        elif isinstance(event, Running) and event.mode == "restart" and self._shown:
            self._notice(
                f"Attempt {event.attempt} begins again: what was shown so far is not part of the "
                "output any more."
            )
            self._shown = False
        elif row["type"] in _NOTICED:
            self._notice(f"{_NOTICED[row['type']]} {_told(row)}")

    def _take_chunk(self, chunk: Chunk) -> None:
        if chunk.length is not None and not self._redacted:
            self._redacted = True
            self._notice("Its content was redacted.")
        if chunk.kind == "text" and chunk.text:
            show(chunk.text)
            sys.stdout.flush()
            self._shown = True
            self._line_is_open = not chunk.text.endswith("\n")

    def _notice(self, text: str) -> None:
        self.end_line()
        say(text)

    def end_line(self) -> None:
        """Begin a new line on the terminal, where the text has left one open."""
        if self._line_is_open and is_terminal():
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._line_is_open = False


_NOTICED: Final = {
    "attempt_failed": "Failed:",
    "interrupted": "Interrupted:",
    "cancel_requested": "Cancellation requested:",
    "failed": "The task failed:",
    "cancelled": "The task was cancelled:",
}


def _told(row: sqlite3.Row) -> str:
    from perdure.cli.telling import tell_stored

    return tell_stored(row["type"], row["schema_version"], row["data"])


def _holds(worker: sqlite3.Row) -> bool:
    """Return whether a worker's last sign of life still holds."""
    lease = lease_of(worker["lease_seconds"], _SILENCE)
    return datetime.fromisoformat(worker["heartbeat_at"]) + lease > datetime.now(UTC)


def _say_who_runs(session: Session, reader: Reader, task_id: str) -> None:
    """Say so where a task waits and nobody is there to run it."""
    workers = reader.rows("SELECT heartbeat_at, lease_seconds FROM workers")
    if not any(_holds(worker) for worker in workers):
        status = find_task_row(reader, task_id)["status"]
        say(
            f"{task_id} is {status} and no worker is running: "
            f"`{session.command_line('worker')}` runs it."
        )
