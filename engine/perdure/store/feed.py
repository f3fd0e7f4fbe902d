"""Following the log: one wake-up source per process, any number of readers.

The writer tells the feed what it committed, and that somebody else has committed. What this process
wrote itself reaches its readers without a query; what others wrote is fetched once for all readers.
Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Container,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from typing import Final

from perdure.errors import EngineClosed, PerdureError, TaskArchived
from perdure.events import Archived, CancelRequested, Interrupted, RecordedEvent
from perdure.store.begun import Begun, Ended
from perdure.store.database import Database
from perdure.store.fetching import EVENTS_OF, Unread, fetch_news, recorded
from perdure.store.projection import TaskFold

__all__ = ["Ending", "Feed"]

Listener = Callable[[RecordedEvent], None]

PAGE: Final = 500
# A reader that is so far behind fetches from the database again instead of being kept events for.
MAILBOX: Final = 2000
# What others write into a running task's stream, and so many of them that its owner may ask for.
_FOR_OWNERS: Final = (CancelRequested, Interrupted)
MOST_FOR_OWNERS: Final = 200
# After a read that has failed in spite of all patience.
AGAIN_SECONDS: Final = 1.0
# For what is being fetched when the log is closed: by a database that is gone, never.
CATCH_UP_SECONDS: Final = 2.0


class Feed:
    """Who wants to know of which stream, and how far this process has seen the log."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._listeners: dict[str, list[Listener]] = {}
        self._seen = 0
        self._begun = Begun()  # as it was at `_seen`
        self._for_owners: deque[RecordedEvent] = deque(maxlen=MOST_FOR_OWNERS)
        self._for_owners_since: int | None = None  # all after that position are there
        self._fetching: asyncio.Task[None] | None = None
        self._stale = False
        self._unheard = False  # others committed something while nobody listened
        self._failed: PerdureError | None = None  # for good
        self._suspended: PerdureError | None = None  # until somebody says otherwise
        self._readers: set[_Reader | Ending] = set()
        self.on_active: Callable[[], None] = lambda: None

    @property
    def active(self) -> bool:
        """Whether anybody listens, so that looking for others' commits is worth it."""
        return bool(self._listeners)

    def start(self, position: int) -> None:
        """Begin after ``position``, the head of the log at this moment."""
        self._seen = position

    def knows_open(self, task_id: str) -> bool:
        """Return whether a stream had not ended as far as was seen; False where that isn't known.

        Who listens already is told of its end, if it has come since. A task's submission and its
        end mostly pass by here, so whoever waits for it need not look it up.
        """
        return task_id in self._begun

    def has_begun(self, task_id: str) -> bool:
        """Return whether a stream was seen to go on after its first event; False if not known."""
        return self._begun.goes_on(task_id)

    # -- listening -------------------------------------------------------------------------------

    def listen(self, task_id: str, listener: Listener, *, since: int | None = None) -> None:
        """Call ``listener`` for the stream's events from now on, until `stop_listening`.

        It may be told of an event twice, and of some that are older than the call. It isn't told of
        those that this perdure can't read, only of what comes after them: whoever goes by the
        stream's version, as its owner, finds out when it appends.

        Args:
            task_id: The stream.
            listener: Called on the event loop.
            since: For the task's owner: the position from which on nothing that others write may
                be missed; default: the present one.
        """
        first = not self._listeners
        listeners = self._listeners.get(task_id)
        if listeners is None:
            self._listeners[task_id] = [listener]
        else:
            listeners.append(listener)
        if first:
            self.on_active()
        if since is not None:
            self._make_up(task_id, listener, since)

    def stop_listening(self, task_id: str, listener: Listener) -> None:
        """Call ``listener`` no more; without effect where it isn't called."""
        listeners = self._listeners.get(task_id, [])
        if listener in listeners:
            listeners.remove(listener)
        if not listeners:
            self._listeners.pop(task_id, None)

    def _make_up(self, task_id: str, listener: Listener, since: int) -> None:
        """Tell the owner of a task what has passed by here since it was claimed."""
        known = self._for_owners_since
        if not self._unheard and (since >= self._seen or (known is not None and since >= known)):
            for event in tuple(self._for_owners):
                if event.task_id == task_id and event.position > since:
                    listener(event)
        else:
            self._seen = min(since, self._seen)
            self._fetch()

    async def follow(
        self,
        task_id: str,
        after: int = 0,
        has_ended: Callable[[], Awaitable[bool]] | None = None,
    ) -> AsyncGenerator[RecordedEvent, None]:
        """Yield the stream's events after version ``after``: first what is there, then what comes.

        Ends after the event that ends the task, also where that is no later one. The stream must
        exist.

        Args:
            task_id: The stream.
            after: A version, which need not be there yet.
            has_ended: Looks up whether the task has ended, for who may ask for what is after that.

        Raises:
            EngineClosed: The engine was closed before the task ended.
            TaskArchived: The events were moved into an archive.
            DatabaseIncompatible: A newer perdure wrote one of them.
            DatabaseCorrupt: One of them can't be what was written.
        """
        reader = _Reader(task_id)
        if (trouble := self._failed or self._suspended) is not None:
            reader.fail(trouble)  # what is there can be read; nothing more will come
        self._readers.add(reader)
        self.listen(task_id, reader.receive)
        begun = self._begun.events(task_id)
        try:
            while True:
                # Before the replay: what is dropped while its last page is read must be noticed,
                # and nothing comes after what it finds where the task has ended.
                reader.behind = False
                ended = has_ended is not None and not self.knows_open(task_id) and await has_ended()
                async for event in self._replay(task_id, after, begun):
                    if isinstance(event.event, Archived):  # nothing of what was asked for is here
                        raise TaskArchived(task_id, event.event.archive)
                    after = event.version
                    yield event
                    if event.event.ends_task:
                        return
                if ended:
                    return
                begun = None
                while not reader.behind:
                    new = await reader.next()
                    if new is None or new.version > after + 1 or isinstance(new.event, Archived):
                        break  # some were not kept: fetch them
                    if new.version <= after:
                        if new.event.ends_task:
                            return
                        continue
                    after = new.version
                    yield new
                    if new.event.ends_task:
                        return
        finally:
            self.stop_listening(task_id, reader.receive)
            self._readers.discard(reader)

    def ending(self, task_id: str) -> Ending:
        """Return what waits for a task to end from now on; look first whether it has ended."""
        ending = Ending(self, task_id, self._seen)
        if (trouble := self._failed or self._suspended) is not None:
            ending.fail(trouble)
        self._readers.add(ending)
        self.listen(task_id, ending.receive)
        return ending

    def forget_ending(self, ending: Ending) -> None:
        """Tell it no more."""
        self.stop_listening(ending.task_id, ending.receive)
        self._readers.discard(ending)

    def ended(self, task_id: str) -> Ended | None:
        """Return what there is to know of a task whose end was published last, if it is kept."""
        return self._begun.ended(task_id)

    async def _replay(
        self, task_id: str, after: int, begun: tuple[RecordedEvent, ...] | None
    ) -> AsyncGenerator[RecordedEvent, None]:
        """Yield what there is after a version: all of it is in ``begun``, if that isn't None."""
        for event in begun or ():
            if event.version > after:
                yield event
        while begun is None:
            page = await self._database.fetch(EVENTS_OF, task_id, after, PAGE)
            for row in page:
                after = row["version"]
                yield recorded(row)
            if len(page) < PAGE:
                return

    # -- being told ------------------------------------------------------------------------------

    def publish(
        self, committed: Sequence[RecordedEvent], ended: Mapping[str, TaskFold], head: int
    ) -> None:
        """Take what this process has committed.

        Args:
            committed: The events, in order, and at least one.
            ended: The tasks that have ended with them.
            head: The position of the last one.
        """
        if self._fetching is None and self._seen == committed[0].position - 1:
            if self._for_owners_since is None:
                self._for_owners_since = self._seen
            self._seen = head
            self._begun.take(committed, ended)
            self._deliver(committed)
        elif not self._listeners:
            self._forget()  # others have written what was not seen
            self._seen = max(self._seen, head)
        else:
            self._fetch()

    def others_committed(self) -> None:
        """Take the news that another process has committed something."""
        self._forget()
        if self._listeners:
            self._fetch()
        else:
            self._unheard = True

    async def catch_up(self) -> None:
        """Wait until what is known to be committed was handed on; not for long."""
        if self._fetching is not None:
            await asyncio.wait({self._fetching}, timeout=CATCH_UP_SECONDS)

    def close(self, error: PerdureError | None = None) -> None:
        """End all readers, and all that will come."""
        self._failed = error or EngineClosed("the engine was closed while a stream was being read")
        self._end_readers(self._failed)
        if self._fetching is not None:
            self._fetching.cancel()

    def suspend(self, error: PerdureError) -> None:
        """End all readers, and those that come until `resume`: what they wait for won't come."""
        self._suspended = error
        self._end_readers(error)

    def resume(self) -> None:
        """Let readers wait again."""
        self._suspended = None

    def fail_readers(self, error: PerdureError, task_ids: Container[str]) -> None:
        """End the readers of some tasks: what they wait for won't come."""
        for reader in tuple(self._readers):
            if reader.task_id in task_ids:
                reader.fail(error)

    def _end_readers(self, error: PerdureError) -> None:
        for reader in self._readers:
            reader.fail(error)

    def _deliver(self, committed: Sequence[RecordedEvent]) -> None:
        for event in committed:
            if type(event.event) in _FOR_OWNERS:
                self._keep_for_owner(event)
            listeners = self._listeners.get(event.task_id)
            if listeners:
                for listener in tuple(listeners):
                    listener(event)

    def _deliver_unread(self, unread: Iterable[Unread]) -> None:
        """Tell the readers of some streams, and nobody else, that they can't be read any further.

        Nothing is asked for again on that account. What others write into these streams, and can be
        read, such as a cancellation, reaches whoever listens to them.
        """
        latest = {one.task_id: one for one in unread}
        if latest:
            for reader in tuple(self._readers):
                if reader.task_id in latest:
                    reader.receive_unread(latest[reader.task_id])

    def _keep_for_owner(self, event: RecordedEvent) -> None:
        if len(self._for_owners) == MOST_FOR_OWNERS and self._for_owners_since is not None:
            gone = self._for_owners[0].position
            self._for_owners_since = max(self._for_owners_since, gone)
        self._for_owners.append(event)

    def _forget(self) -> None:
        """Forget what is known without asking: something was committed that was not seen."""
        self._begun.forget()
        self._for_owners.clear()
        self._for_owners_since = None

    def _fetch(self) -> None:
        self._forget()  # only what somebody listens to is fetched
        self._stale = True
        if self._fetching is None and self._failed is None:
            self._fetching = asyncio.get_running_loop().create_task(self._fetch_all())

    async def _fetch_all(self) -> None:
        late: tuple[str, ...] = ()
        before = 0
        try:
            while self._stale:
                self._stale = self._unheard = False
                wanted = tuple(self._listeners)
                if not wanted:
                    self._unheard = True
                    break
                since = self._seen
                head, fresh = await self._database.read(
                    partial(fetch_news, wanted=wanted, since=since, late=late, before=before)
                )
                if self._seen == since:  # else somebody joined who needs an earlier start
                    self._seen = head
                self._deliver([one for one in fresh if isinstance(one, RecordedEvent)])
                self._deliver_unread(one for one in fresh if isinstance(one, Unread))
                # Streams that somebody joined meanwhile were not looked at: once more for them.
                late, before = tuple(self._listeners.keys() - frozenset(wanted)), since
                self._stale = self._stale or bool(late)
        except PerdureError as error:
            if late:  # what they were to be told of is behind what was seen
                self._seen = min(self._seen, before)
            self._end_readers(error)
            # Owners still have to learn of cancellations, and who comes later may have more luck.
            self._unheard = True
            asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._fetch_again)
        finally:
            self._fetching = None

    def _fetch_again(self) -> None:
        if self._unheard and self._listeners:
            self._fetch()


class Ending:
    """Somebody who wants to know of nothing but the end of a task.

    Attributes:
        task_id: The task.
    """

    __slots__ = ("_feed", "_future", "_since", "task_id")

    def __init__(self, feed: Feed, task_id: str, since: int) -> None:
        self.task_id = task_id
        self._feed = feed
        self._since = since
        self._future: asyncio.Future[Ended | None] = asyncio.get_running_loop().create_future()

    async def wait(self, timeout: float | None) -> Ended | None:
        """Wait for the end; returns all that there is to know, where that is at hand.

        Raises:
            EngineClosed: The engine was closed before.
            DatabaseIncompatible: A newer perdure writes to the stream: that may be an end, too.
            DatabaseCorrupt: What was written to it since can't be read.
            TimeoutError: It hasn't ended in so many seconds.
        """
        if timeout is None:
            return await self._future
        async with asyncio.timeout(timeout):
            return await self._future

    def stop(self) -> None:
        """Don't wait any longer."""
        self._feed.forget_ending(self)
        self._future.cancel()

    def receive(self, event: RecordedEvent) -> None:
        """Take what happened."""
        if event.event.ends_task and not self._future.done():
            self._future.set_result(self._feed.ended(event.task_id))

    def receive_unread(self, unread: Unread) -> None:
        """Take the news of an event that can't be read, unless it is an old one, told once more."""
        if unread.position > self._since:
            self.fail(unread.error)

    def fail(self, error: PerdureError) -> None:
        """Take the news that nothing will be heard any more."""
        if not self._future.done():
            self._future.set_exception(error)
            self._future.exception()  # nobody need be waiting for it


class _Reader:
    """What one reader has been told and not yet taken."""

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self._mailbox: deque[RecordedEvent] = deque()
        self._news = asyncio.Event()
        self._error: PerdureError | None = None
        self.behind = False

    def receive(self, event: RecordedEvent) -> None:
        if self.behind:
            self._news.set()
        elif len(self._mailbox) >= MAILBOX:
            self._mailbox.clear()
            self.behind = True
            self._news.set()
        else:
            self._mailbox.append(event)
            self._news.set()

    def receive_unread(self, _unread: Unread) -> None:
        # It finds out itself, at the right place: when it fetches what it wasn't given.
        self.behind = True
        self._news.set()

    def fail(self, error: PerdureError) -> None:
        self._error = error
        self._news.set()

    async def next(self) -> RecordedEvent | None:
        """Return the next event; None when some were dropped."""
        while not self._mailbox:
            if self.behind:
                return None
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self._mailbox.popleft()
