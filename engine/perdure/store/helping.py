"""Reading a log with all processors: other processes take parts of what takes one of them long.

Whatever is read part by part, each part by itself, can be shared. A helper reads what is committed,
on a connection of its own, and sends back what it found; nothing is written by it. Whoever asked
reads as well, so where there are no helpers, or they are lost, all is done all the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure import interpreters
from perdure.errors import InvalidConfig
from perdure.store.database import Database
from perdure.store.dialect import take_time
from perdure.store.schema import log_head

__all__ = ["NO_HELP", "Helpers", "Look", "helpers_for", "serve"]

P = TypeVar("P")
R = TypeVar("R")

# What reads one part. Another process finds it by its name.
Look = Callable[[Connection, P], R]

# Of a shorter log, a helper would hardly have started when all is read.
MANY_EVENTS: Final = 50_000
# On a server each of them takes a connection.
MOST_HELPERS: Final = 7
# So many parts are given to each at a time, so that it need not wait for the next.
AHEAD: Final = 2
# What is found is held until all before it is; so many parts at most.
MOST_BEGUN: Final = 100
# Who takes longer for a part is not waited for any more.
OVERDUE_SECONDS: Final = 120.0
GOODBYE_SECONDS: Final = 0.5
# How many helpers there may be, where that is set; for who has little memory.
VARIABLE: Final = "PERDURE_HELPERS"
LONGEST_NUMBER: Final = 9


class Helpers:
    """Other processes that read the same database.

    Args:
        count: How many.
        address: Names the database.
    """

    def __init__(self, count: int = 0, address: str = "") -> None:
        self._started: list[_Helper] = []
        for _ in range(count):
            # No more processes or threads, or no memory for them.
            with contextlib.suppress(OSError, RuntimeError):
                self._started.append(_Helper(address))

    def close(self) -> None:
        """End them all."""
        for helper in self._started:
            helper.say_no_more()
        for helper in self._started:
            helper.end()

    def each(
        self, connection: Connection, look: Look[P, R], parts: Iterable[P]
    ) -> Iterator[tuple[P, R]]:
        """Yield each part with what ``look`` has found in it, in order.

        Args:
            connection: What this process itself reads on.
            look: Called with this connection or with a helper's, which doesn't see what is written
                in this one's transaction, and sees no earlier state than that of the first call.
            parts: Taken one by one, some of them ahead of what is yielded.

        Raises:
            Exception: What ``look`` has raised, of the first part where it has.
        """
        begun: deque[tuple[P, Future[R]]] = deque()
        for part in parts:
            helper = min(self._able, key=lambda able: able.waiting, default=None)
            if helper is not None and helper.waiting < AHEAD:
                begun.append((part, helper.ask(look, part)))
            else:  # they have enough to do
                begun.append((part, _look(look, connection, part)))
            while begun and (begun[0][1].done() or len(begun) > MOST_BEGUN):
                part_, future = begun.popleft()
                yield part_, self._found(future, connection, look, part_)
        for part, future in begun:
            yield part, self._found(future, connection, look, part)

    @property
    def _able(self) -> list[_Helper]:
        """Those who have begun, and were not lost."""
        return [helper for helper in self._started if helper.able]

    def _found(self, future: Future[R], connection: Connection, look: Look[P, R], part: P) -> R:
        try:
            return future.result(OVERDUE_SECONDS)
        except TimeoutError:
            for helper in self._started:
                helper.end()
        except Exception:  # noqa: BLE001, S110 - looking again tells whose trouble it is
            pass
        return look(connection, part)


NO_HELP: Final = Helpers()


def _look(look: Look[P, R], connection: Connection, part: P) -> Future[R]:
    future: Future[R] = Future()
    try:
        future.set_result(look(connection, part))
    except Exception as error:  # noqa: BLE001 - raised when it is this part's turn
        future.set_exception(error)
    return future


@contextmanager
def helpers_for(database: Database, connection: Connection) -> Generator[Helpers, None, None]:
    """Give as many helpers as there are processors to spare, where the log is worth it.

    They begin to read with the first part that they are given.

    Args:
        database: What is read.
        connection: On which it is asked how long the log is.

    Raises:
        InvalidConfig: The environment allows no number of them.
    """
    count = min(_processors() - 1, _allowed())
    position = connection.scalar(sa.select(log_head.c.position))
    long = isinstance(position, int) and position >= MANY_EVENTS
    if count < 1 or not long or not interpreters.is_there():
        yield NO_HELP
        return
    helpers = Helpers(count, database.address)
    try:
        yield helpers
    finally:
        helpers.close()


def _allowed() -> int:
    said = os.environ.get(VARIABLE, "")
    if not said:
        return MOST_HELPERS
    if not said.isdecimal() or len(said) > LONGEST_NUMBER:
        raise InvalidConfig(f"{VARIABLE}={said!r} is no number of processes: give 0 or more")
    return int(said)


# What a container may use, in microseconds of so many: `150000 100000`, or `max 100000`.
_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def _processors() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        most, of = map(int, _QUOTA.read_text(encoding="ascii").split())
        count = min(count, max(1, most // of))
    return count


# What is loaded, and rows, are many objects without cycles.
_LESS_GC: Final = "import gc; gc.set_threshold(50_000, 20, 20)"


class _Helper:
    """An interpreter of our own, which looks at what it is told to.

    What it is asked waits in a pipe, so that it goes on at once when it has answered. A thread
    takes the answers, whatever the one that asks is doing.

    Args:
        address: Names the database.

    Attributes:
        able: Whether it can be asked.

    Raises:
        OSError: It can't be started.
        RuntimeError: There are no more threads.
    """

    def __init__(self, address: str) -> None:
        command = interpreters.command(__name__, _LESS_GC)
        self._process = subprocess.Popen(command, **interpreters.options())  # noqa: S603 - of nothing that anybody has given us
        assert self._process.stdin is not None  # noqa: S101 - for the type checkers
        assert self._process.stdout is not None  # noqa: S101
        self._to, self._from = self._process.stdin, self._process.stdout
        self.able = False
        self._asked: deque[Future[Any]] = deque()
        self._changing = threading.Lock()
        self._thread = threading.Thread(target=self._listen, args=(address,), daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._process.kill()
            self._process.wait()
            self._to.close()
            self._from.close()
            raise

    @property
    def waiting(self) -> int:
        """How many parts it was asked for and has not answered yet."""
        return len(self._asked)

    def ask(self, look: Look[P, R], part: P) -> Future[R]:
        """Have it look at a part; only from the thread that made it."""
        future: Future[R] = Future()
        with self._changing:
            if not self.able:
                future.set_exception(EOFError("the helper is lost"))
                return future
            self._asked.append(future)
        try:
            self._tell((look, part))
        except BaseException as error:  # whatever it is, it isn't asked again
            self._lose()
            if not isinstance(error, Exception):
                raise
        return future

    def say_no_more(self) -> None:
        """Let it end once it has nothing to do."""
        with contextlib.suppress(OSError, ValueError):  # what it wasn't told yet isn't needed
            self._to.close()

    def end(self) -> None:
        """See to it that it has ended; it holds nothing that could be lost."""
        self.say_no_more()
        try:
            self._process.wait(GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join()
        self._from.close()

    def _tell(self, what: object) -> None:
        pickle.dump(what, self._to, pickle.HIGHEST_PROTOCOL)
        self._to.flush()

    # -- in its thread ---------------------------------------------------------------------------

    def _listen(self, address: str) -> None:
        with contextlib.suppress(Exception):  # whatever it is, mostly that it is gone: it is lost
            self._tell(address)
            pickle.load(self._from)  # noqa: S301 - from our own process
            self.able = True
            while True:
                found: Any = pickle.load(self._from)  # noqa: S301 - as above
                self._asked.popleft().set_result(found)
        self._lose()

    def _lose(self) -> None:
        with self._changing:
            self.able = False
            lost, self._asked = self._asked, deque()
        for future in lost:
            future.set_exception(EOFError("the helper is lost"))


# -- in a helper ---------------------------------------------------------------------------------


def serve() -> None:
    """Look at what comes on standard input, until that ends, as it does when the asker is gone."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        _serve(sys.stdin.buffer, sys.stdout.buffer)
    gc.freeze()  # or the interpreter looks for cycles among all that there is before it ends


def _serve(asking: IO[bytes], answering: IO[bytes]) -> None:
    database = Database(pickle.load(asking))  # noqa: S301 - from the process that started this one
    pickle.dump(None, answering)
    answering.flush()
    look, part = pickle.load(asking)  # noqa: S301
    with database.snapshot() as connection:  # not before: what is to be seen is only now there
        take_time(connection)
        while True:
            pickle.dump(look(connection, part), answering, pickle.HIGHEST_PROTOCOL)
            answering.flush()
            look, part = pickle.load(asking)  # noqa: S301
