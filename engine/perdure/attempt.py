"""One attempt at one task: what the adapter yields goes into the log, until one thing ends it.

A task of its own reads the adapter (`_read`); where an answer takes its time, another writes what
has gathered (`_write_gathered`): the first piece at once, then at most one chunk per interval,
which grows with a long answer; never one row per token. The ending takes what is left with it, in
one append. Every append names the version it follows, so an attempt that has lost its task finds
out, and writes nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Final

from perdure.adapter import Adapter, Call
from perdure.checking import Checker, Unchecked
from perdure.containment import (
    CHUNK_KINDS,
    AdapterFault,
    admit,
    admit_error,
    contained,
    described,
)
from perdure.errors import (
    ConcurrencyError,
    InvalidConfig,
    OutputInvalid,
    PlatformError,
    StreamTruncated,
    TimeLimitExceeded,
)
from perdure.events import (
    Accepted,
    AttemptFailed,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    Interrupted,
    RecordedEvent,
    UsageReported,
)
from perdure.gathering import Gathering
from perdure.lifecycle import TaskState
from perdure.policy import RetryPolicy, Spent, after_failure, after_interruption, cancelled
from perdure.pricing import price
from perdure.store.claims import Claimed
from perdure.store.log import EventLog
from perdure.store.transaction import Transaction
from perdure.structured import check_briefly
from perdure.task import TaskStatus, Usage
from perdure.unchecked import unchecked

__all__ = ["Attempt", "Stop", "Timing"]

_log = logging.getLogger("perdure")


class Stop(Enum):
    """Why an attempt ends before the platform does."""

    CANCEL = "cancelled"
    LOST = "lost to another worker"
    HAND_BACK = "handed back"
    TIME_LIMIT = "the time limit was reached"
    BROKEN = "the log can't be written"


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


# An adapter that yields this many events on the way, and never waits, lets others have a turn.
EVENTS_IN_A_TURN: Final = 16
# So long an answer is written down in the finest pieces.
FINE_SECONDS: Final = 2.0
MOST_STRETCHED: Final = 10.0


class Attempt:
    """One attempt at a claimed task.

    Args:
        log: Where it is written down.
        adapter: The platform.
        call: What the adapter gets.
        claimed: The task, as it was claimed.
        since: The log's head at the claim; no cancellation after it is missed.
        retry: What happens after an error.
        timing: How it is paced.
        checker: Checks answers that take it long to check.
        chance: Random numbers from 0 to 1, for the waits between attempts.
    """

    def __init__(
        self,
        log: EventLog,
        adapter: Adapter,
        call: Call,
        claimed: Claimed,
        *,
        since: int,
        retry: RetryPolicy,
        timing: Timing,
        checker: Checker,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.task_id = claimed.task_id
        self._log = log
        self._adapter = adapter
        self._call = call
        self._retry = retry
        self._timing = timing
        self._checker = checker
        self._chance = chance
        self._since = since
        self._state = claimed.state
        self._started_at = datetime.now(UTC)
        self._gathered = Gathering(
            claimed.state.lengths,
            claimed.output if claimed.state.length() else "",
            keep=call.task.output_schema is not None,
        )
        self._usage: Usage | None = claimed.state.usage
        self._usage_written = claimed.state.usage
        self._usage_at = 0.0
        self._appending = asyncio.Lock()
        self._text_came: float | None = None  # the first of it, by the loop's clock
        self._news = False  # whether something has gathered
        self._news_came: asyncio.Event | None = None
        self._room: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()
        # Done as soon as there is a reason to end: the platform's end or error, a stop, the time.
        self._turn: asyncio.Future[None] = self._loop.create_future()
        self._stopped: asyncio.Future[Stop] = self._loop.create_future()
        self._end_event: Completed | None = None
        self._error: BaseException | None = None
        self._reading: asyncio.Task[None] | None = None
        self._writing: asyncio.Task[None] | None = None
        self._over = False  # nothing more may be written: it was lost, has ended, or the log broke
        self._closing = False
        self._accepted = claimed.state.accepted
        self._since_turn = 0  # events on the way, since the loop last had a turn for them
        self._failure: Exception | None = None  # the log's, which `run` raises

    def stop(self, why: Stop) -> None:
        """Ask the attempt to end; the first reason counts."""
        if not self._stopped.done():
            self._stopped.set_result(why)
        self._turn_to_the_end()

    def _turn_to_the_end(self) -> None:
        if not self._turn.done():
            self._turn.set_result(None)

    async def run(self) -> None:
        """Carry the attempt through to the event that ends it.

        Raises:
            StoreError: The log can't be written; the task stays as it is there, to be recovered.
        """
        self._log.feed.listen(self.task_id, self._notice, since=self._since)
        limit = self._call.task.limits.timeout_seconds
        timer = self._loop.call_later(limit, self.stop, Stop.TIME_LIMIT)
        if not self._turn.done():  # else it ends before it began: the platform isn't even asked
            self._reading = self._loop.create_task(self._read())
        try:
            try:
                await self._turn
            finally:
                timer.cancel()  # it is the platform's time
            await self._finish()
        finally:
            self._log.feed.stop_listening(self.task_id, self._notice)
            await self._close_quietly()
            await self._stop_writing()
        if self._failure is not None:
            raise self._failure

    # -- what comes in ---------------------------------------------------------------------------

    def _notice(self, recorded: RecordedEvent) -> None:
        if isinstance(recorded.event, CancelRequested):
            self.stop(Stop.CANCEL)
        elif isinstance(recorded.event, Interrupted):
            self._lost_to(recorded.event.attempt)

    def _lost_to(self, attempt: int) -> None:
        if attempt == self._state.attempt:  # else it is an older one, told once more
            self._over = True
            self.stop(Stop.LOST)

    async def _read(self) -> None:
        """Read the adapter's stream to its end, and close it; what it came to is noted."""
        stream: AsyncGenerator[Event, None] | None = None
        try:
            stream = self._adapter.run(self._call)
            self._end_event = await self._read_events(stream)
        except (KeyboardInterrupt, SystemExit):
            raise  # they end the event loop
        except BaseException as error:  # noqa: BLE001 - `_finish` sorts them
            self._error = error
        finally:
            self._turn_to_the_end()
            if stream is not None:
                with contextlib.suppress(Exception):
                    await stream.aclose()

    async def _read_events(self, stream: AsyncGenerator[Event, None]) -> Completed:
        gathered, most = self._gathered, self._timing.buffer_characters
        async for event in stream:
            if self._closing and not isinstance(event, Completed):
                raise asyncio.CancelledError  # the adapter swallowed the one before
            # Here for every delta of every answer: those that can only be right are taken as they
            # are. `isinstance` would let a derived class pass, which the log can't give back.
            if (
                type(event) is Chunk
                and type(text := event.text) is str
                and (kind := event.kind) in CHUNK_KINDS
                and ((cursor := event.cursor) is None or _is_plain(cursor))
            ):
                has_text = gathered.add_piece(text, kind, cursor)
            else:
                admitted = admit(event)
                if isinstance(admitted, Completed):
                    return admitted
                if isinstance(admitted, Chunk):
                    has_text = gathered.add_piece(admitted.text, admitted.kind, admitted.cursor)
                else:
                    await self._take_in(admitted)
                    has_text = False
            if has_text:
                if self._text_came is None:
                    self._text_came = self._loop.time()
                self._note_news()
            else:
                await self._give_turn()
            if gathered.characters > most:
                self._room = asyncio.Event()
                await self._room.wait()
        raise StreamTruncated("the stream ended without the platform's end marker")

    async def _give_turn(self) -> None:
        """Let others go on now and then: an adapter that never waits would hold them all up."""
        self._since_turn += 1
        if self._since_turn >= EVENTS_IN_A_TURN:
            self._since_turn = 0
            await asyncio.sleep(0)

    async def _take_in(self, event: Event) -> None:
        """Take what is neither a piece of the output nor the end."""
        if isinstance(event, UsageReported):
            self._usage = event.usage
            self._note_news()
            return
        if isinstance(event, Accepted):
            self._accepted = event
            if event.reattachable:  # what a crash must not lose is written before going on
                await _uninterrupted(asyncio.ensure_future(self._append(event)))
                return
        self._gathered.add(event)
        self._note_news()

    def _note_news(self) -> None:
        """See to it that what has gathered is written, unless the end takes it along."""
        if self._news_came is not None:
            self._news_came.set()
        elif not self._news:
            self._news = True
            self._loop.call_soon(self._begin_writing)

    def _begin_writing(self) -> None:
        # An answer that was there as a whole goes into the log as a whole, with its ending.
        if self._writing is None and not self._turn.done():
            self._news_came = asyncio.Event()
            self._writing = self._loop.create_task(self._write_gathered(self._news_came))

    # -- what goes out ---------------------------------------------------------------------------

    async def _write_gathered(self, news: asyncio.Event) -> None:
        while True:
            news.clear()
            try:
                await self._append()
            except Exception:  # noqa: BLE001 - it is noted, and `run` raises it
                self.stop(Stop.BROKEN)
                return
            began = self._text_came
            elapsed = 0.0 if began is None else self._loop.time() - began
            await asyncio.sleep(self._timing.pause(elapsed))
            await news.wait()

    async def _append(self, *events: Event) -> None:
        """Write what has gathered, then ``events``, unless the task is no longer ours."""
        await self._append_decided(lambda _state: events)

    async def _append_decided(
        self, decide: Callable[[TaskState], Sequence[Event]], *, ending: bool = False
    ) -> bool:
        """Write what has gathered, then what ``decide`` says, in one append.

        Returns whether it was written: it isn't where the task is no longer ours.

        Where somebody else wrote first, it is decided again on what there is now. Whoever may be
        cancelled meanwhile has to shield it: what was taken must be written, or it would be missing
        in the middle.
        """
        async with self._appending:
            gathered = self._take(ending)
            try:
                while not self._over:
                    events = (*gathered, *decide(self._state))
                    if not events:
                        return True
                    try:
                        version = await self._log.append(self.task_id, events, self._state.version)
                    except ConcurrencyError:
                        await self._look_again()
                        continue
                    self._state = self._state._replace(version=version)
                    self._over = self._over or ending
                    if self._room is not None:
                        self._room.set()
                    return True
            except Exception as error:
                # Noted here, whoever waits: where that is cut short, the error gets nowhere else.
                self._failure = self._failure or error
                self._over = True  # what was taken is lost, so nothing may follow it
                raise
            return False

    def _take(self, ending: bool) -> list[Event]:
        events = self._gathered.take()
        if self._usage is not None and not ending and self._usage_due():
            events.append(UsageReported(usage=self._usage))
        return events

    def _usage_due(self) -> bool:
        """Return whether it is time to write down the tokens known so far, and note it if so."""
        now = asyncio.get_running_loop().time()
        due = (
            self._usage != self._usage_written
            and now - self._usage_at >= self._timing.usage_interval
        )
        if due:
            self._usage_written, self._usage_at = self._usage, now
        return due

    async def _look_again(self) -> None:
        """Find out what came in between: a cancellation is obeyed, another owner ends it all."""

        def look(tx: Transaction) -> TaskState | None:
            fold = tx.fold(self.task_id)
            return None if fold is None else fold.state

        state = await self._log.write(look, (self.task_id,))
        ours = (
            state is not None
            and state.status is TaskStatus.RUNNING
            and state.worker == self._state.worker
            and state.attempt == self._state.attempt
        )
        if not ours or state is None:
            self._over = True
            self.stop(Stop.LOST)
            return
        self._state = state
        if state.cancel is not None:
            self.stop(Stop.CANCEL)

    # -- the ending ------------------------------------------------------------------------------

    async def _finish(self) -> None:
        if not self._concluded:  # else the platform was first: whatever comes now is too late
            await self._close_quietly()
        if self._concluded:
            await self._conclude()
        else:
            await self._break_off()

    async def _break_off(self) -> None:
        match self._stopped.result():
            case Stop.TIME_LIMIT:
                limit = self._call.task.limits.timeout_seconds
                message = (
                    f"the time limit of an attempt, {limit:g} s, was reached: raise timeout_seconds"
                )
                await self._fail(TimeLimitExceeded(message))
            case Stop.CANCEL:
                await self._stop_platform()
                await self._end(
                    lambda state: (cancelled(state, self._spent(), self._gathered.length()),)
                )
            case Stop.HAND_BACK:
                await self._hand_back()
            case Stop.LOST | Stop.BROKEN:
                pass  # there is nothing left that could be written

    @property
    def _concluded(self) -> bool:
        """Whether the platform has come to an end by itself, also while it was being closed."""
        if self._end_event is not None:
            return True
        return self._error is not None and not self._closing

    async def _hand_back(self) -> None:
        constraints = self._call.task.limits.model_dump(mode="json")
        spent = self._spent()

        def back(state: TaskState) -> Sequence[Event]:
            return after_interruption(
                state, constraints, policy=self._retry, handed_back=True, spent=spent
            )

        # Of a call that is picked up again nothing else says what it has used so far.
        self._usage_at = -math.inf
        try:
            await self._append()
            async with self._appending:
                await self._look_again()  # for what there is to go on from
        except Exception as error:  # noqa: BLE001 - `run` raises it
            self._failure = self._failure or error
        await self._end(back)

    async def _stop_platform(self) -> None:
        """Stop work that goes on at the platform without us, where it has such."""
        accepted = self._accepted
        if accepted is None or not accepted.reattachable or accepted.response_id is None:
            return
        if self._end_event is not None:  # it has ended by itself
            return
        response_id = accepted.response_id
        error = await contained(
            lambda: self._adapter.stop(response_id), self._timing.closing_seconds
        )
        if error is not None:  # whatever it is, the task ends all the same
            _log.warning(
                "%s: %r could not be stopped: %s", self.task_id, response_id, described(error)
            )

    async def _conclude(self) -> None:
        end, error = self._end_event, self._error
        if end is not None:
            try:
                await self._check_answer(end)
            except Unchecked:
                self._usage = end.usage or self._usage
                await self._break_off()
            except PlatformError as invalid:
                self._usage = end.usage or self._usage
                invalid.response_over = True  # the platform is done with it
                await self._fail(invalid)
            else:
                await self._complete(end)
        elif isinstance(error, PlatformError):
            await self._fail(admit_error(error))
        elif error is self._failure:
            pass  # the log's own; of the same type an adapter can raise what another engine told it
        elif error is not None:
            _log.error("the adapter %r failed", self._state.platform, exc_info=error)
            await self._fail(AdapterFault(f"the adapter failed: {described(error)}"))

    async def _check_answer(self, end: Completed) -> None:
        """Return if the answer satisfies the task's schema, where that has one.

        What ended for another reason than being done is no answer to be checked, but for one that
        was cut off: it is never valid, though it may be JSON by accident.

        Raises:
            OutputInvalid: It doesn't.
            Unchecked: There was no time left to find out.
            StoreError: The log can't be written.
        """
        schema = self._call.task.output_schema
        if schema is None:
            return
        if end.finish_reason == "length":
            raise OutputInvalid(
                "the output was cut off at the most tokens allowed: raise max_tokens"
            )
        if end.finish_reason == "stop":
            text = self._gathered.text()
            if check_briefly(text, schema):
                return
            await self._append()  # it is paid for, and the check may take a while
            await self._checker.check_until(
                text, schema, self._stopped, patience=self._timing.closing_seconds
            )

    async def _complete(self, end: Completed) -> None:
        self._usage = end.usage or self._usage
        spent = self._spent()

        def completed(_state: TaskState) -> Sequence[Event]:
            return (
                unchecked(
                    Completed,
                    {
                        **vars(end),
                        "usage": spent.usage,
                        "cost_usd": spent.cost_usd,
                        "price_version": spent.price_version,
                        "output_length": self._gathered.length(),
                        "output_digest": self._gathered.digest(),
                    },
                ),
            )

        await self._end(completed)

    async def _fail(self, error: PlatformError) -> None:
        spent = self._spent()
        picked_up = False

        def failed(state: TaskState) -> Sequence[Event]:
            nonlocal picked_up
            if state.cancel is not None:  # what was asked for is the end, and here it is
                return (cancelled(state, spent, self._gathered.length()),)
            event = after_failure(
                state._replace(accepted=self._accepted),
                error,
                max_attempts=self._call.task.limits.max_attempts,
                policy=self._retry,
                now=self._log.now,
                chance=self._chance,
                spent=spent,
                output_length=self._gathered.length(),
            )
            picked_up = isinstance(event, AttemptFailed) and event.next == "reattach"
            return (event,)

        written = await self._end(failed)
        # Nobody will ever ask for what it goes on with, unless the task has another owner now.
        if written and not picked_up and not error.response_over:
            await self._stop_platform()

    async def _end(self, decide: Callable[[TaskState], Sequence[Event]]) -> bool:
        try:
            return await self._append_decided(decide, ending=True)
        except Exception:  # noqa: BLE001 - it is noted, and `run` raises it
            return False

    def _spent(self) -> Spent:
        named = self._accepted.model if self._accepted is not None else None
        model = named or self._state.model
        cost, version = price(self._provider(), model, self._usage, self._started_at)
        return Spent(self._usage, cost, version)

    def _provider(self) -> str | None:
        """Return the provider's name in the price table; None where the adapter has no such."""
        try:
            provider: object = self._adapter.prices
        except Exception as error:  # noqa: BLE001 - the answer is there, only its price isn't known
            _log.error("the adapter %r has no prices: %s", self._state.platform, described(error))
            return None
        return provider if isinstance(provider, str) else None

    # -- closing ---------------------------------------------------------------------------------

    async def _close_quietly(self) -> None:
        """Stop reading and close the stream; an adapter that won't is left behind, and named."""
        reading = self._reading
        if reading is None or reading.done():
            return
        over = self._end_event is not None or self._error is not None
        if not over:
            self._closing = True
            reading.cancel()
        done, _pending = await asyncio.wait({reading}, timeout=self._timing.closing_seconds)
        if not done:
            what = "end its stream" if over else "let itself be stopped"
            _log.error("the adapter %r does not %s", self._state.platform, what)
            reading.cancel()

    async def _stop_writing(self) -> None:
        writing = self._writing
        if writing is None:
            return
        async with self._appending:  # what is being written is written to its end
            writing.cancel()
        await asyncio.wait({writing})


def _is_plain(cursor: object) -> bool:
    return type(cursor) is str and cursor.isascii() and "\0" not in cursor


async def _uninterrupted(work: asyncio.Future[Any]) -> Any:  # noqa: ANN401
    """Await ``work`` to its end even when cancelled meanwhile; the cancellation comes after."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        if not work.cancelled():
            work.exception()  # it was seen to where it was raised
        raise
