"""One attempt at one task: what the adapter yields goes into the log, until one thing ends it.

A task of its own reads the adapter (`_read`). What has come is written meanwhile by the `Appender`,
which also finds out when the task is lost; what the ending says is decided here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from datetime import UTC, datetime
from typing import Final

from perdure.adapter import Adapter, Call
from perdure.appending import Appender, Timing
from perdure.checking import Checker, Unchecked
from perdure.containment import CHUNK_KINDS, AdapterFault, admit, admit_error, contained, described
from perdure.errors import OutputInvalid, PlatformError, StreamTruncated, TimeLimitExceeded
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
from perdure.stopping import ReasonToEnd, Stop
from perdure.store.claims import Claimed
from perdure.store.log import EventLog
from perdure.structured import check_briefly
from perdure.unchecked import unchecked

__all__ = ["Attempt"]

_log = logging.getLogger("perdure")

# An adapter that yields this many events on the way, and never waits, lets others have a turn.
EVENTS_IN_A_TURN: Final = 16


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
        self._started_at = datetime.now(UTC)
        self._gathered = Gathering(
            claimed.state.lengths,
            claimed.output if claimed.state.length() else "",
            keep=call.task.output_schema is not None,
        )
        self._reason = ReasonToEnd()
        self._appender = Appender(log, claimed, self._gathered, timing=timing, reason=self._reason)
        self._accepted = claimed.state.accepted
        self._reading: asyncio.Task[None] | None = None
        self._asked = False  # whether the platform may have been
        self._end_event: Completed | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._since_turn = 0  # events on the way, since the loop last had a turn for them

    def stop(self, why: Stop) -> None:
        """Ask the attempt to end; the first reason counts."""
        self._reason.stop(why)

    async def run(self) -> None:
        """Carry the attempt through to the event that ends it.

        Raises:
            StoreError: The log can't be written; the task stays as it is there, to be recovered.
        """
        self._log.feed.listen(self.task_id, self._notice, since=self._since)
        limit = self._call.task.limits.timeout_seconds
        loop = asyncio.get_running_loop()
        timer = loop.call_later(limit, self.stop, Stop.TIME_LIMIT)
        if not self._reason.given.done():  # else the platform isn't even asked
            self._reading = loop.create_task(self._read())
        try:
            try:
                await self._reason.given
            finally:
                timer.cancel()  # it is the platform's time
            await self._finish()
        finally:
            self._log.feed.stop_listening(self.task_id, self._notice)
            await self._close_quietly()
            await self._appender.close()
        if self._appender.failure is not None:
            raise self._appender.failure

    # -- what comes in ---------------------------------------------------------------------------

    def _notice(self, recorded: RecordedEvent) -> None:
        if isinstance(recorded.event, CancelRequested):
            self.stop(Stop.CANCEL)
        elif (
            isinstance(recorded.event, Interrupted)
            and recorded.event.attempt == self._appender.state.attempt
        ):  # else it is an older one, told once more
            self._appender.lose()

    async def _read(self) -> None:
        """Read the adapter's stream to its end, and close it; what it came to is noted."""
        stream: AsyncGenerator[Event, None] | None = None
        try:
            self._asked = True
            stream = self._adapter.run(self._call)
            self._end_event = await self._read_events(stream)
        except (KeyboardInterrupt, SystemExit):
            raise  # they end the event loop
        except BaseException as error:  # noqa: BLE001 - `_finish` sorts them
            self._error = error
        finally:
            self._reason.give()
            if stream is not None:
                with contextlib.suppress(Exception):
                    await stream.aclose()

    async def _read_events(self, stream: AsyncGenerator[Event, None]) -> Completed:
        gathered, most = self._gathered, self._timing.buffer_characters
        add_piece = self._appender.add_piece
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
                has_text = add_piece(text, kind, cursor)
            else:
                admitted = admit(event)
                if isinstance(admitted, Completed):
                    return admitted
                if isinstance(admitted, Chunk):
                    has_text = add_piece(admitted.text, admitted.kind, admitted.cursor)
                else:
                    await self._take_in(admitted)
                    has_text = False
            if not has_text:
                await self._give_turn()
            if gathered.characters > most:
                await self._appender.wait_for_room()
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
            self._appender.add_usage(event.usage)
            return
        if isinstance(event, Accepted):
            self._accepted = event
            if event.reattachable:  # what a crash must not lose is written before going on
                await self._appender.append_at_once(event)
                return
        self._appender.add(event)

    # -- the ending ------------------------------------------------------------------------------

    async def _finish(self) -> None:
        if not self._concluded:  # else the platform was first: whatever comes now is too late
            await self._close_quietly()
        if self._concluded:
            await self._conclude()
        else:
            await self._break_off()

    async def _break_off(self) -> None:
        match self._reason.stopped.result():
            case Stop.TIME_LIMIT:
                limit = self._call.task.limits.timeout_seconds
                message = (
                    f"the time limit of an attempt, {limit:g} s, was reached: raise timeout_seconds"
                )
                await self._fail(TimeLimitExceeded(message))
            case Stop.CANCEL:
                await self._stop_platform()
                await self._appender.append_ending(
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
        ended = False

        def back(state: TaskState) -> Sequence[Event]:
            nonlocal ended
            following = after_interruption(
                state,
                constraints,
                policy=self._retry,
                handed_back=True,
                asked=self._asked,
                spent=spent,
            )
            ended = following[-1].ends_task
            return following

        await self._appender.catch_up()  # it is decided by what there is to go on from
        if await self._appender.append_ending(back) and ended:  # as its cancellation was asked for
            await self._stop_platform()

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
                self._appender.usage = end.usage or self._appender.usage
                await self._break_off()
            except PlatformError as invalid:
                self._appender.usage = end.usage or self._appender.usage
                invalid.response_over = True  # the platform is done with it
                await self._fail(invalid)
            else:
                await self._complete(end)
        elif isinstance(error, PlatformError):
            await self._fail(admit_error(error))
        elif error is self._appender.failure:
            pass  # the log's own; of the same type an adapter can raise what another engine told it
        elif error is not None:
            _log.error("the adapter %r failed", self._appender.state.platform, exc_info=error)
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
            await self._appender.append_gathered()  # it is paid for, and the check may take a while
            await self._checker.check_until(
                text, schema, self._reason.stopped, patience=self._timing.closing_seconds
            )

    async def _complete(self, end: Completed) -> None:
        self._appender.usage = end.usage or self._appender.usage
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

        await self._appender.append_ending(completed)

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

        accepted = self._accepted
        if accepted is not None and accepted.reattachable and not error.response_over:
            await self._appender.append_known()  # it may be picked up
        written = await self._appender.append_ending(failed)
        # Nobody will ever ask for what it goes on with, unless the task has another owner now.
        if written and not picked_up and not error.response_over:
            await self._stop_platform()

    def _spent(self) -> Spent:
        named = self._accepted.model if self._accepted is not None else None
        model = named or self._appender.state.model
        cost, version = price(self._provider(), model, self._appender.usage, self._started_at)
        return Spent(self._appender.usage, cost, version)

    def _provider(self) -> str | None:
        """Return the provider's name in the price table; None where the adapter has no such."""
        try:
            provider: object = self._adapter.prices
        except Exception as error:  # noqa: BLE001 - the answer is there, only its price isn't known
            _log.error(
                "the adapter %r has no prices: %s", self._appender.state.platform, described(error)
            )
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
            _log.error("the adapter %r does not %s", self._appender.state.platform, what)
            reading.cancel()


def _is_plain(cursor: object) -> bool:
    return type(cursor) is str and cursor.isascii() and "\0" not in cursor
