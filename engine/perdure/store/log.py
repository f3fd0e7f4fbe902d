"""The only writer of events: one thread, one connection, group commit.

Callers put a piece of work into a queue and await it; the thread takes all that is waiting and does
it in one transaction, so that an fsync is shared by everyone who waits and load makes the
transactions larger, not the latency worse. Work that fails on its own account (a stream that moved,
a transition that isn't allowed) fails alone; the others commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, TypeVar

from sqlalchemy.exc import IntegrityError

from perdure.errors import (
    DatabaseCorrupt,
    DatabaseUnavailable,
    EngineClosed,
    PerdureError,
    StoreError,
)
from perdure.events import AttemptFailed, Event, Interrupted, RecordedEvent, Running, Submitted
from perdure.store.database import Database, Writer
from perdure.store.dialect import News
from perdure.store.feed import Feed
from perdure.store.projection import TaskFold
from perdure.store.transaction import FoldCache, Transaction

__all__ = ["EventLog", "Work"]

T = TypeVar("T")
Work = Callable[[Transaction], T]

# Readers in this process learn of other processes' commits by a look. It costs a hundred
# microseconds of processor time, nearly all of them for waking up.
POLL_SECONDS: Final = 0.008
MAX_BATCH: Final = 1000  # from so many on, the rest is for the next transaction
# A busy writer tells other processes of its commits so often, an idle one at once.
TELL_SECONDS: Final = 0.01
CANCEL_AGAIN_SECONDS: Final = 0.5
# SQLite's busy handler polls: without a gap, a busy process starves the others.
FAIR_PAUSE_SECONDS: Final = 0.003
FAIR_FOR_SECONDS: Final = 1.0


@dataclass(slots=True, eq=False)
class _Request(Generic[T]):
    work: Work[T]
    streams: Sequence[str]
    alone: bool
    future: asyncio.Future[T]


@dataclass(slots=True, eq=False)
class _Append:
    """The work of an append."""

    task_id: str
    events: Sequence[Event]
    expected: int | None

    def __call__(self, transaction: Transaction) -> int:
        return transaction.append(self.task_id, self.events, self.expected)


class _Late:
    """Work that is done after all else that is in the same transaction.

    Attributes:
        head: The log's head after the commit.
    """

    def __init__(self, work: Work[Any]) -> None:
        self._work = work
        self.head = 0

    def __call__(self, transaction: Transaction) -> Any:  # noqa: ANN401 - as the work does
        return self._work(transaction)


_Reply = tuple[_Request[Any], Any, PerdureError | BaseException | None]


class EventLog:
    """The log of one database, as one process writes and follows it.

    Attributes:
        feed: Who follows it on this event loop.
    """

    def __init__(self, database: Database) -> None:
        self.feed = Feed(database)
        self._database = database
        self._queue: queue.SimpleQueue[list[_Request[Any]] | None] = queue.SimpleQueue()
        self._gathered: list[_Request[Any]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._listener = database.dialect.listener(self._hear, lambda: self.feed.active)
        self._listening: asyncio.Task[None] | None = None
        self._on_work: Callable[[], None] = lambda: None
        self._closed = False
        self._hurried = threading.Event()
        self._broken: StoreError | None = None
        self._untold: bool | None = None  # what others are to be told: whether there is work
        self._tell_at = 0.0  # and not before

    async def open(self) -> None:
        """Start the writer thread.

        Raises:
            StoreError: The database can't be opened.
        """
        self._loop = asyncio.get_running_loop()
        self.feed.on_active = self._look_for_others
        started: asyncio.Future[int] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="perdure-writer", daemon=True
        )
        self._thread.start()
        self.feed.start(await started)

    @property
    def hears(self) -> bool:
        """Whether this process is told of others' commits, and need not look for work itself."""
        return self._listener is not None and self._listener.hears

    @property
    def now(self) -> datetime:
        """The time (UTC) by the clock that all workers of this log go by."""
        return self._database.now

    def on_work(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, on the event loop, when other processes have left something to do."""
        self._on_work = callback
        self._look_for_others()

    def _look_for_others(self) -> None:
        """Begin to notice other processes' commits."""
        if self._listener is None:
            self._queue.put([])  # wakes the writer thread, which then looks
        elif self._listening is None and not self._closed:
            self._listening = asyncio.get_running_loop().create_task(self._listener.run())

    def _hear(self, news: News) -> None:
        self.feed.others_committed()
        if news.work:
            self._on_work()

    def append(
        self, task_id: str, events: Sequence[Event], expected: int | None
    ) -> asyncio.Future[int]:
        """Append events to a stream; comes to its new version, once they are committed.

        Args:
            task_id: The stream.
            events: What happened; all of it is written, or nothing.
            expected: The version the stream must be at; 0 for a new one; None for any, as long as
                the events may follow what is there.

        Raises:
            ConcurrencyError: The stream is at another version.
            DuplicateKey: Another task has the new task's key.
            InvalidTransition: The events can't follow.
            StoreError: The database can't do it; nothing was written.
        """
        return self._put(
            _Append(task_id, events, expected), (task_id,) if expected != 0 else (), False
        )

    def write(
        self, work: Work[T], streams: Sequence[str] = (), *, alone: bool = False
    ) -> asyncio.Future[T]:
        """Do ``work`` in the writer's next transaction; comes to its result, after the commit.

        Args:
            work: Called in the writer thread. It may fail with a `PerdureError` as long as it has
                changed nothing by then.
            streams: The streams it will append to that are there already, so that they are looked
                up in one go.
            alone: Give it a transaction of its own, for work that takes long.
        """
        return self._put(work, streams, alone)

    async def write_last(self, work: Work[T]) -> tuple[T, int]:
        """Do as `write`, after all else that is in the same transaction.

        Returns:
            What ``work`` has returned, and the position of the last event in that transaction.
        """
        late = _Late(work)
        return await self._put(late, (), False), late.head

    def _put(self, work: Work[T], streams: Sequence[str], alone: bool) -> asyncio.Future[T]:
        if self._broken is not None:
            raise self._broken
        if self._closed or self._loop is None:
            raise EngineClosed("the engine was closed: open another one")
        future: asyncio.Future[T] = self._loop.create_future()
        if not self._gathered:
            self._loop.call_soon(self._hand_over)
        self._gathered.append(_Request(work, streams, alone, future))
        return future

    def _hand_over(self) -> None:
        """Give the writer thread what has gathered in one turn of the event loop.

        All at once: it would begin with the first that comes, and those who were answered together,
        and go on together, would be parted into more and smaller transactions.
        """
        gathered, self._gathered = self._gathered, []
        for begin in range(0, len(gathered), MAX_BATCH):
            self._queue.put(gathered[begin : begin + MAX_BATCH])

    def hurry(self) -> None:
        """Wait no longer than some seconds for a database that is in trouble, from now on.

        For those who are asked to end and have nothing better to do. Whoever waits for something to
        be written is told that it wasn't, or that it may have been.
        """
        self._hurried.set()
        self._database.hurry()

    async def close(self) -> None:
        """Write what is waiting, then close the connection and end all readers.

        Where the database is in trouble it is waited for no longer than by those who `hurry`.
        """
        if self._closed:
            return
        self._closed = True
        self.hurry()
        await self.feed.catch_up()
        self.feed.close()
        if self._listening is not None:
            await _ended(self._listening)
        self._hand_over()
        self._queue.put(None)
        thread = self._thread
        if thread is not None:
            await asyncio.get_running_loop().run_in_executor(None, thread.join)

    # -- in the writer thread --------------------------------------------------------------------

    def _run(self, started: asyncio.Future[int]) -> None:
        try:
            writer = self._database.writer()
            writer.hurried = self._hurried
        except BaseException as error:  # noqa: BLE001 - whoever opens the log is told
            self._call(_fail, started, error)
            return
        cache = FoldCache()
        try:
            try:
                with writer.transaction() as connection:
                    head, _none = Transaction(connection, cache, writer.now).flush()
            except BaseException as error:  # noqa: BLE001 - whoever opens the log is told
                self._call(_fail, started, error)
                return
            self._call(_succeed, started, head)
            try:
                self._serve(writer, cache)
            except BaseException as error:  # noqa: BLE001 - nobody may wait for a thread that is gone
                self._call(self._break_down, error)
        finally:
            writer.close()

    def _serve(self, writer: Writer, cache: FoldCache) -> None:
        others_until = looked = 0.0
        open_ = True
        while open_:
            batch, open_ = self._next_batch()
            if batch:
                self._commit(writer, cache, batch)
                # A failing checkpoint is tried again; the commit before it is durable all the same.
                with contextlib.suppress(StoreError):
                    writer.checkpoint_if_due()
            if self._untold is not None and (time.monotonic() >= self._tell_at or not open_):
                self._tell(writer)
            now = time.monotonic()
            # Under load not after each commit: it gives the event loop a turn, and waits for its.
            if not batch or now > looked + POLL_SECONDS:
                looked = now
                if writer.others_committed():
                    self._call(self.feed.others_committed)
                    others_until = now + FAIR_FOR_SECONDS
            if batch and now < others_until:
                time.sleep(FAIR_PAUSE_SECONDS)

    def _tell(self, writer: Writer) -> None:
        """Tell other processes what was committed since they were last told."""
        work, self._untold = bool(self._untold), None
        self._tell_at = time.monotonic() + TELL_SECONDS
        # They look for themselves from time to time, and the next transaction mends the connection.
        with contextlib.suppress(StoreError):
            writer.announce(work=work)

    def _next_batch(self) -> tuple[list[_Request[Any]], bool]:
        """Wait for work and take all there is; False with it when the log is being closed.

        Without work it returns when it is time to look for others' commits, or to tell of ours.
        """
        batch: list[_Request[Any]] = []
        look = self._listener is None and self.feed.active
        timeout = POLL_SECONDS if look else None
        if self._untold is not None:
            timeout = max(0.0, self._tell_at - time.monotonic())
        with contextlib.suppress(queue.Empty):
            requests = self._queue.get(timeout=timeout)
            while requests is not None:
                batch += requests
                if len(batch) >= MAX_BATCH:
                    return batch, True
                requests = self._queue.get_nowait()
            return batch, False
        return batch, True

    def _commit(self, writer: Writer, cache: FoldCache, batch: list[_Request[Any]]) -> None:
        alone = [request for request in batch if request.alone]
        together = [request for request in batch if not request.alone] if alone else batch
        if together:
            self._commit_together(writer, cache, together)
        for request in alone:
            self._commit_together(writer, cache, [request])

    def _commit_together(
        self, writer: Writer, cache: FoldCache, batch: list[_Request[Any]]
    ) -> None:
        try:
            done = _carry_out(writer, cache, batch)
        except BaseException as error:  # noqa: BLE001 - every caller is told
            self._give_up(writer, cache, batch, error)
            return
        if done.transaction.erases:
            # What can't be erased now, because somebody still looks at it, goes with later commits.
            with contextlib.suppress(StoreError):
                writer.erase()
        if done.written:
            cache.put_head(done.transaction.new_head)
        ended: dict[str, TaskFold] = {}
        for fold in done.transaction.touched:
            if fold.ended:  # nobody will append to it
                cache.drop((fold.task_id,))
                ended[fold.task_id] = fold
            else:
                cache.put(fold)
        if done.written and writer.tells:
            self._untold = bool(self._untold) or _leaves_work(done.written)
        self._call(self._deliver, done.replies, done.written, ended, done.head)

    def _give_up(
        self, writer: Writer, cache: FoldCache, batch: list[_Request[Any]], error: BaseException
    ) -> None:
        """Tell those whose work could not be done; where one is at fault, only that one."""
        if len(batch) > 1 and not isinstance(error, DatabaseUnavailable):
            # One of them broke the transaction for all, as by a stream that can't be read.
            for request in batch:
                self._commit_together(writer, cache, [request])
            return
        if isinstance(error, IntegrityError):
            said = " ".join(str(error.orig).split())
            error = DatabaseCorrupt(f"the database refused a write ({said}): run `perdure verify`")
        failed: list[_Reply] = [(request, None, error) for request in batch]
        self._call(self._deliver, failed, [], {}, 0)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        """Call ``function`` on the event loop, if that still runs."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(function, *args)

    # -- back on the event loop ------------------------------------------------------------------

    def _break_down(self, error: BaseException) -> None:
        """Tell everyone who waits, or comes later, that the writer thread is gone."""
        if not isinstance(error, StoreError):
            error = StoreError(f"the log's writer failed: {type(error).__name__}: {error}")
        self._broken = error
        self.feed.close(error)
        self._hand_over()
        with contextlib.suppress(queue.Empty):
            while True:
                for request in self._queue.get_nowait() or ():
                    _fail(request.future, error)

    def _deliver(
        self,
        replies: list[_Reply],
        written: list[RecordedEvent],
        ended: Mapping[str, TaskFold],
        head: int,
    ) -> None:
        if written:
            self.feed.publish(written, ended, head)
        for request, result, error in replies:
            if error is not None:
                _fail(request.future, error)
            elif not request.future.done():
                request.future.set_result(result)


@dataclass(slots=True)
class _Done:
    """What came of one transaction."""

    transaction: Transaction
    replies: list[_Reply]
    head: int = 0
    written: list[RecordedEvent] = field(default_factory=list[RecordedEvent])


def _carry_out(writer: Writer, cache: FoldCache, batch: Sequence[_Request[Any]]) -> _Done:
    """Do the work in one transaction; again, as often as the writer thinks that it helps."""
    again = writer.races and len(batch) == 1
    careful = False
    while True:
        done: _Done | None = None
        try:
            with writer.transaction() as connection:
                if not writer.undisturbed():
                    cache.distrust()
                done = _Done(Transaction(connection, cache, writer.now, careful=careful), [])
                done.transaction.prefetch(_all_streams(batch), only=_only_appends(batch))
                late = [work for one in batch if (work := _late_work(one)) is not None]
                if late:
                    batch = sorted(batch, key=lambda one: _late_work(one) is not None)
                done.replies = [_attempt(request, done.transaction) for request in batch]
                done.head, done.written = done.transaction.flush()
                for work in late:
                    work.head = done.head
                return done
        except BaseException as error:  # noqa: BLE001 - every caller is told
            cache.put_head(None)
            if done is not None:
                cache.drop(fold.task_id for fold in done.transaction.touched)
            if isinstance(error, IntegrityError) and (again or not careful):
                # An id is taken that was not looked for; or somebody else took it, or a key, in
                # between: by now it can be seen.
                again, careful = again and not careful, True
                continue
            mark = done.transaction.mark if done is not None else None
            if writer.settle(error, mark) and done is not None:
                return done
            cache.clear()


def _late_work(request: _Request[Any]) -> _Late | None:
    return request.work if isinstance(request.work, _Late) else None


def _attempt(request: _Request[Any], transaction: Transaction) -> _Reply:
    try:
        return request, request.work(transaction), None
    except StoreError:
        raise
    except PerdureError as error:
        return request, None, error


def _only_appends(batch: Iterable[_Request[Any]]) -> bool:
    """Return whether all is appended to streams that are there, by those who asked for no more."""
    return all(isinstance(one.work, _Append) and one.work.expected != 0 for one in batch)


def _all_streams(batch: Iterable[_Request[Any]]) -> list[str]:
    return [task_id for request in batch for task_id in request.streams]


def _succeed(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if isinstance(error, StopIteration):  # a future can't hold that one
        error = RuntimeError("a piece of work raised StopIteration")
    if not future.done():
        future.set_exception(error)


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel ``task``, and wait until it has ended.

    Again where that was in vain: psycopg 3.3.0 waits by `asyncio.wait_for`, which in Python 3.11
    loses a cancellation that comes together with what is waited for.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)


# After these a task may be claimed.
_FOR_WORKERS: Final = (Submitted, Interrupted, AttemptFailed)


def _leaves_work(written: Iterable[RecordedEvent]) -> bool:
    """Return whether there may be something to claim that wasn't claimed in the same commit."""
    left: set[str] = set()
    for recorded in written:
        kind = type(recorded.event)
        if kind in _FOR_WORKERS:
            left.add(recorded.task_id)
        elif kind is Running:
            left.discard(recorded.task_id)
    return bool(left)
