"""Reading a log with all processors: other processes take parts of what takes one of them long.

Whatever is read part by part, each part by itself, can be shared. A helper reads what is committed,
on a connection of its own, and sends back what it found; nothing is written by it. Whoever asked
reads as well, so where there are no helpers, or they are lost, all is done all the same.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, Final, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.engine import URL

from perdure.store.database import Database
from perdure.store.dialect import take_time
from perdure.store.schema import log_head

__all__ = ["NO_HELP", "Helpers", "Look", "helpers_for"]

P = TypeVar("P")
R = TypeVar("R")

# What reads one part. Another process finds it by its name.
Look = Callable[[Connection, P], R]

# Of a shorter log, a helper would hardly have started when all is read.
MANY_EVENTS: Final = 50_000
# On a server each of them takes a connection.
MOST_HELPERS: Final = 7
# So many parts are given to each, so that it need not wait for the next.
AHEAD: Final = 2


class Helpers:
    """Other processes that read the same database.

    Args:
        pool: Where they are.
        count: How many.
    """

    def __init__(self, pool: ProcessPoolExecutor | None = None, count: int = 0) -> None:
        self._pool = pool
        self._most_given = count * AHEAD

    def each(
        self, connection: Connection, look: Look[P, R], parts: Iterable[P]
    ) -> Iterator[tuple[P, R]]:
        """Yield each part with what ``look`` has found in it, in order.

        Args:
            connection: What this process itself reads on.
            look: Called with this connection or with a helper's, which doesn't see what is written
                in this one's transaction.
            parts: Taken one by one, some of them ahead of what is yielded.

        Raises:
            Exception: What ``look`` has raised, of the first part where it has.
        """
        coming = iter(parts)
        begun: deque[tuple[P, Future[R]]] = deque()
        for part in coming:
            given = sum(not future.done() for _part, future in begun)
            if given < self._most_given:
                begun.append((part, self._give(look, part)))
            else:  # they have enough to do
                begun.append((part, _look(look, connection, part)))
            while begun and begun[0][1].done():
                part_, future = begun.popleft()
                yield part_, self._found(future, connection, look, part_)
        for part, future in begun:
            yield part, self._found(future, connection, look, part)

    def _give(self, look: Look[P, R], part: P) -> Future[R]:
        assert self._pool is not None  # noqa: S101 - or nothing is given
        try:
            return self._pool.submit(_help, look, part)
        except BrokenProcessPool as error:
            lost: Future[R] = Future()
            lost.set_exception(error)
            return lost

    def _found(self, future: Future[R], connection: Connection, look: Look[P, R], part: P) -> R:
        try:
            return future.result()
        except BrokenProcessPool:  # no connection for it, or the system took it away
            self._most_given = 0
            return look(connection, part)


def _look(look: Look[P, R], connection: Connection, part: P) -> Future[R]:
    future: Future[R] = Future()
    try:
        future.set_result(look(connection, part))
    except Exception as error:  # noqa: BLE001 - raised when it is this part's turn
        future.set_exception(error)
    return future


NO_HELP: Final = Helpers()


@contextmanager
def helpers_for(database: Database, connection: Connection) -> Generator[Helpers, None, None]:
    """Give as many helpers as there are processors to spare, where the log is worth it.

    Args:
        database: What is read.
        connection: On which it is asked how long the log is.
    """
    position = connection.scalar(sa.select(log_head.c.position))
    count = min(_processors() - 1, MOST_HELPERS)
    if count < 1 or not isinstance(position, int) or position < MANY_EVENTS:
        yield NO_HELP
        return
    # Not forked: this process has connections and threads that a copy of it would break.
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin, (database.url,))
    try:
        yield Helpers(pool, count)
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -- in a helper ---------------------------------------------------------------------------------

_open: Final = ExitStack()
_reading: list[tuple[Database, Connection]] = []


def _begin(url: URL) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asked, who then ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.set_threshold(50_000, 20, 20)  # rows are many objects without cycles
    database = Database(url)
    connection = _open.enter_context(database.snapshot())
    take_time(connection)
    _reading.append((database, connection))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # else it would wait for parts for ever


def _help(look: Look[Any, R], part: object) -> R:
    ((database, connection),) = _reading
    with database.dialect.translate():
        return look(connection, part)
