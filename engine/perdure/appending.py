"""What an attempt appends to its task's stream: gathered, in order, paced, and fenced.

What comes on the way is written by a task of its own where an answer takes its time: the first
piece at once, then at most one chunk per interval, which grows with a long answer; never one row
per token. The ending takes what is left with it, in one append. Every append names the version it
follows, so an attempt that has lost its task finds out, and writes nothing more.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from perdure.errors import ConcurrencyError, InvalidConfig
from perdure.events import ChunkKind, Event, UsageReported
from perdure.gathering import Gathering
from perdure.lifecycle import TaskState
from perdure.stopping import ReasonToEnd, Stop
from perdure.store.claims import Claimed
from perdure.store.log import EventLog
from perdure.store.transaction import Transaction
from perdure.task import TaskStatus, Usage

__all__ = ["Appender", "Timing"]

# So long an answer is written down in the finest pieces.
FINE_SECONDS: Final = 2.0
MOST_STRETCHED: Final = 10.0


@dataclass(frozen=True, slots=True)
class Timing:
    """How an attempt is paced.

    Attributes:
        chunk_interval: Seconds between two chunk events of one task, at least; of an answer that
            takes its time up to ten times as many.
        usage_interval: Seconds between two usage events on the way, at least.
        buffer_characters: How much may gather before the adapter has to wait.
        closing_seconds: How long an adapter may take to close when it is stopped.
    """

    chunk_interval: float = 0.05
    usage_interval: float = 1.0
    buffer_characters: int = 256 * 1024
    closing_seconds: float = 5.0

    def __post_init__(self) -> None:
        """Refuse what would make an attempt hang.

        Raises:
            InvalidConfig: The message names the field.
        """
        for name in ("chunk_interval", "usage_interval", "closing_seconds"):
            seconds = getattr(self, name)
            if not 0 <= seconds < math.inf:
                raise InvalidConfig(f"{name}: {seconds:g} s: give 0 s or more")
        if self.buffer_characters < 1:
            raise InvalidConfig(
                f"buffer_characters: {self.buffer_characters} characters: give 1 or more"
            )

    def pause(self, elapsed: float) -> float:
        """Return the seconds before the next chunk, ``elapsed`` of them after the first text.

        Each event costs ten times as much space as what comes in an interval, so pieces grow with
        the answer: a fortieth of what it has taken, which nobody who follows it will notice.
        """
        return self.chunk_interval * min(max(elapsed / FINE_SECONDS, 1.0), MOST_STRETCHED)


class Appender:
    """Appends to the stream of a claimed task, as long as that is this worker's.

    Args:
        log: The log.
        claimed: The task, as it was claimed.
        gathered: What has come and isn't written yet.
        timing: How it is paced.
        reason: The reason to end; losing the task and a log that breaks are such.

    Attributes:
        state: The task as it was claimed or last read; the version is that of its stream.
        usage: The tokens known so far; where they change on the way, they are written by and by.
        failure: What the log failed with. Nothing more is appended, and the task stays as it is
            there, to be recovered.
    """

    def __init__(
        self,
        log: EventLog,
        claimed: Claimed,
        gathered: Gathering,
        *,
        timing: Timing,
        reason: ReasonToEnd,
    ) -> None:
        self.state = claimed.state
        self.usage: Usage | None = claimed.state.usage
        self.failure: Exception | None = None
        self._task_id = claimed.task_id
        self._log = log
        self._gathered = gathered
        self._timing = timing
        self._reason = reason
        self._loop = asyncio.get_running_loop()
        self._usage_written = self.usage
        self._usage_at = 0.0
        self._appending = asyncio.Lock()
        self._over = False  # nothing more may be written: it was lost, has ended, or the log broke
        self._text_came: float | None = None  # the first of it, by the loop's clock
        self._news = False  # whether something has gathered since it was last looked
        self._news_came: asyncio.Event | None = None
        self._room: asyncio.Event | None = None
        self._writing: asyncio.Task[None] | None = None

    # -- what comes in ---------------------------------------------------------------------------

    def add_piece(self, text: str, kind: ChunkKind, cursor: str | None) -> bool:
        """Take a piece of the output; returns whether it has text."""
        if not self._gathered.add_piece(text, kind, cursor):
            return False
        if self._text_came is None:
            self._text_came = self._loop.time()
        if not self._news:  # mostly that is known, and this is here for every delta
            self._note_news()
        return True

    def add(self, event: Event) -> None:
        """Take what is neither a piece of the output nor usage."""
        self._gathered.add(event)
        self._note_news()

    def add_usage(self, usage: Usage) -> None:
        """Take the tokens known by now."""
        self.usage = usage
        self._note_news()

    async def wait_for_room(self) -> None:
        """Wait until what has gathered is written."""
        self._room = asyncio.Event()
        await self._room.wait()

    def _note_news(self) -> None:
        """See to it that what has gathered is written, unless the end takes it along."""
        if self._news:
            return
        self._news = True
        if self._news_came is not None:
            self._news_came.set()
        else:
            self._loop.call_soon(self._begin_writing)

    def _begin_writing(self) -> None:
        # An answer that was there as a whole goes into the log as a whole, with its ending.
        if not self._reason.given.done():
            self._news_came = asyncio.Event()
            self._writing = self._loop.create_task(self._write_gathered(self._news_came))

    # -- what goes out ---------------------------------------------------------------------------

    async def _write_gathered(self, news_came: asyncio.Event) -> None:
        while True:
            self._news = False
            news_came.clear()
            await self._append_decided(_nothing_more)
            if self.failure is not None:
                self._reason.stop(Stop.BROKEN)
                return
            began = self._text_came
            elapsed = 0.0 if began is None else self._loop.time() - began
            await asyncio.sleep(self._timing.pause(elapsed))
            await news_came.wait()

    async def append_gathered(self) -> None:
        """Append what has gathered, unless the task is no longer ours.

        Raises:
            Exception: It is the `failure`.
        """
        await self._append_decided(_nothing_more)
        if self.failure is not None:
            raise self.failure

    async def append_at_once(self, event: Event) -> None:
        """Append what has gathered, then ``event``, even where the caller is cancelled meanwhile.

        Nothing is appended where the task is no longer ours. The cancellation comes after it.

        Raises:
            Exception: It is the `failure`.
        """
        work = asyncio.ensure_future(self._append_decided(lambda _state: (event,)))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait({work})
            raise
        if self.failure is not None:
            raise self.failure

    async def append_ending(self, decide: Callable[[TaskState], Sequence[Event]]) -> bool:
        """Append what has gathered and the ending that ``decide`` says, and nothing ever after.

        Returns:
            Whether it is written. It isn't where the task is no longer ours, or by the `failure`.
        """
        return await self._append_decided(decide, ending=True)

    async def _append_decided(
        self, decide: Callable[[TaskState], Sequence[Event]], *, ending: bool = False
    ) -> bool:
        """Write what has gathered, then what ``decide`` says, in one append.

        Returns whether it was written: it isn't where the task is no longer ours, or the log fails.
        That is only noted: who waits for it may be cancelled meanwhile, and never be told.

        Where somebody else wrote first, it is decided again on what there is now. Whoever may be
        cancelled meanwhile has to shield it: what was taken must be written, or it would be missing
        in the middle.
        """
        async with self._appending:
            try:
                gathered = self._take(ending)
                while not self._over:
                    events = (*gathered, *decide(self.state))
                    if not events:
                        return True
                    try:
                        version = await self._log.append(self._task_id, events, self.state.version)
                    except ConcurrencyError:
                        await self._look_again()
                        continue
                    self.state = self.state._replace(version=version)
                    self._over = self._over or ending
                    if self._room is not None:
                        self._room.set()
                    return True
            except Exception as error:  # noqa: BLE001 - whoever runs the attempt raises it
                self.failure = self.failure or error
                self._over = True  # what was taken is lost, so nothing may follow it
            return False

    def _take(self, ending: bool) -> list[Event]:
        events = self._gathered.take()
        if self.usage is not None and not ending and self._usage_due():
            events.append(UsageReported(usage=self.usage))
        return events

    def _usage_due(self) -> bool:
        """Return whether it is time to write down the tokens known so far, and note it if so."""
        now = self._loop.time()
        due = (
            self.usage != self._usage_written
            and now - self._usage_at >= self._timing.usage_interval
        )
        if due:
            self._usage_written, self._usage_at = self.usage, now
        return due

    # -- whose the task is -----------------------------------------------------------------------

    def lose(self) -> None:
        """Append nothing more: the task is somebody else's."""
        self._over = True
        self._reason.stop(Stop.LOST)

    async def append_known(self) -> bool:
        """Append all that is known by now; returns whether it was written, see also `failure`.

        Of a call that may be picked up again nothing else says what it has used so far.
        """
        self._usage_at = -math.inf
        return await self._append_decided(_nothing_more)

    async def catch_up(self) -> None:
        """Append all that is known by now, then read what others have written; see also `failure`.

        For who leaves the task to others.
        """
        if await self.append_known():
            async with self._appending:
                try:
                    await self._look_again()
                except Exception as error:  # noqa: BLE001 - as above
                    self.failure = error

    async def _look_again(self) -> None:
        """Find out what came in between: a cancellation is obeyed, another owner ends it all."""

        def look(tx: Transaction) -> TaskState | None:
            fold = tx.fold(self._task_id)
            return None if fold is None else fold.state

        state = await self._log.write(look, (self._task_id,))
        ours = (
            state is not None
            and state.status is TaskStatus.RUNNING
            and state.worker == self.state.worker
            and state.attempt == self.state.attempt
        )
        if not ours or state is None:
            self.lose()
            return
        self.state = state
        if state.cancel is not None:
            self._reason.stop(Stop.CANCEL)

    async def close(self) -> None:
        """End the writing on the way; what is being written is written to its end."""
        writing = self._writing
        if writing is None:
            return
        async with self._appending:
            writing.cancel()
        await asyncio.wait({writing})


def _nothing_more(_state: TaskState) -> Sequence[Event]:
    return ()
