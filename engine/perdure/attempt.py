"""One attempt at one task: what the adapter yields goes into the log, until one thing ends it.

A task of its own reads the adapter (`_read`), another writes what has gathered (`_write_gathered`):
the first piece at once, then at most one chunk per interval, never one row per token. The ending
takes what is left with it, in one append. Every append names the version it follows, so an attempt
that has lost its task finds out, and writes nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from perdure.adapter import Adapter, Call
from perdure.errors import (
    ConcurrencyError,
    EngineClosed,
    FinalError,
    PlatformError,
    StoreError,
    StreamTruncated,
    TimeLimitExceeded,
)
from perdure.events import (
    Accepted,
    CancelRequested,
    Chunk,
    ChunkKind,
    Completed,
    Event,
    FileCreated,
    Interrupted,
    RecordedEvent,
    UsageReported,
    encode,
)
from perdure.lifecycle import TaskState
from perdure.policy import RetryPolicy, Spent, after_failure, after_interruption, cancelled
from perdure.pricing import price
from perdure.store.claims import Claimed
from perdure.store.log import EventLog
from perdure.store.transaction import Transaction
from perdure.task import TaskStatus, Usage
from perdure.text import check_json, clean_text

__all__ = ["Attempt", "Stop", "Timing"]

_log = logging.getLogger("perdure")


class Stop(Enum):
    """Why an attempt ends before the platform does."""

    CANCEL = "cancelled"
    LOST = "lost to another worker"
    HAND_BACK = "handed back"
    BROKEN = "the log can't be written"


@dataclass(frozen=True, slots=True)
class Timing:
    """How an attempt is paced.

    Attributes:
        chunk_interval: Seconds between two chunk events of one task, at least.
        usage_interval: Seconds between two usage events on the way, at least.
        buffer_characters: How much may gather before the adapter has to wait.
        closing_seconds: How long an adapter may take to close when it is stopped.
    """

    chunk_interval: float = 0.05
    usage_interval: float = 1.0
    buffer_characters: int = 256 * 1024
    closing_seconds: float = 5.0


@dataclass(slots=True)
class _Run:
    kind: ChunkKind
    texts: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class _Gathered:
    """What isn't in the log yet, in order; pieces of one kind in a row become one chunk."""

    parts: list[_Run | Event] = field(default_factory=list["_Run | Event"])
    cursor: str | None = None
    characters: int = 0

    def add(self, chunk: Chunk) -> None:
        last = self.parts[-1] if self.parts else None
        if not isinstance(last, _Run) or last.kind != chunk.kind:
            last = _Run(chunk.kind)
            self.parts.append(last)
        last.texts.append(chunk.text)
        self.characters += len(chunk.text)
        self.cursor = chunk.cursor or self.cursor


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
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.task_id = claimed.task_id
        self._log = log
        self._adapter = adapter
        self._call = call
        self._retry = retry
        self._timing = timing
        self._chance = chance
        self._since = since
        self._state = claimed.state
        self._started_at = datetime.now(UTC)
        self._lengths: dict[ChunkKind, int] = dict(claimed.state.lengths)
        self._output_hash = hashlib.sha256(claimed.output.encode())
        self._gathered = _Gathered()
        self._usage: Usage | None = claimed.state.usage
        self._usage_written = claimed.state.usage
        self._usage_at = 0.0
        self._appending = asyncio.Lock()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._stream: AsyncGenerator[Event, None] | None = None
        self._stop: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        self._over = False  # nothing more may be written: it was lost, has ended, or the log broke
        self._closing = False
        self._accepted = claimed.state.accepted
        self._failure: Exception | None = None

    def stop(self, why: Stop) -> None:
        """Ask the attempt to end; the first reason counts."""
        if not self._stop.done():
            self._stop.set_result(why)

    async def run(self) -> None:
        """Carry the attempt through to the event that ends it.

        Raises:
            StoreError: The log can't be written; the task stays as it is there, to be recovered.
        """
        deaf = self._log.feed.listen(self.task_id, self._notice, since=self._since)
        reading = asyncio.create_task(self._read())
        if self._stop.done():
            reading.cancel()  # before it began: the platform isn't even asked
        writing = asyncio.create_task(self._write_gathered())
        try:
            await asyncio.wait(
                (reading, self._stop),
                timeout=self._call.task.limits.timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
            await self._finish(reading)
        finally:
            deaf()
            await self._close_quietly(reading)
            await self._stop_writing(writing)
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

    async def _read(self) -> Completed:
        self._stream = self._adapter.run(self._call)
        async for event in self._stream:
            if self._closing and not isinstance(event, Completed):
                raise asyncio.CancelledError  # the adapter swallowed the one before
            _check_storable(event)
            match event:
                case Chunk():
                    if not event.text:
                        self._gathered.cursor = event.cursor or self._gathered.cursor
                        continue
                    self._gathered.add(event)
                    self._news.set()
                    if self._gathered.characters > self._timing.buffer_characters:
                        self._room.clear()
                        await self._room.wait()
                case UsageReported():
                    self._usage = event.usage
                    self._news.set()
                case Accepted():
                    self._accepted = event
                    if event.reattachable:  # what a crash must not lose is written before going on
                        await self._append(event)
                    else:
                        self._gathered.parts.append(event)
                        self._news.set()
                case FileCreated():
                    self._gathered.parts.append(event)
                    self._news.set()
                case Completed():
                    return event
                case _:
                    raise FinalError(
                        f"the adapter yielded {event.type!r}, which is not its to write"
                    )
        raise StreamTruncated("the stream ended without the platform's end marker")

    # -- what goes out ---------------------------------------------------------------------------

    async def _write_gathered(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            try:
                await self._append()
            except Exception as error:  # noqa: BLE001 - `run` raises it
                self._failure = error
                self.stop(Stop.BROKEN)
                return
            await asyncio.sleep(self._timing.chunk_interval)

    async def _append(self, *events: Event) -> None:
        """Write what has gathered, then ``events``, unless the task is no longer ours."""
        await self._append_decided(lambda _state: events)

    async def _append_decided(
        self, decide: Callable[[TaskState], Sequence[Event]], *, ending: bool = False
    ) -> None:
        """Write what has gathered, then what ``decide`` says, in one append.

        Where somebody else wrote first, it is decided again on what there is now. Not interrupted
        by a cancellation: what was taken is written, or it would be missing in the middle.
        """
        await _uninterrupted(asyncio.ensure_future(self._append_now(decide, ending)))

    async def _append_now(
        self, decide: Callable[[TaskState], Sequence[Event]], ending: bool
    ) -> None:
        async with self._appending:
            gathered = self._take(ending)
            try:
                while not self._over:
                    events = (*gathered, *decide(self._state))
                    if not events:
                        return
                    try:
                        version = await self._log.append(self.task_id, events, self._state.version)
                    except ConcurrencyError:
                        await self._look_again()
                        continue
                    self._state = self._state._replace(version=version)
                    self._over = self._over or ending
                    self._room.set()
                    return
            except (StoreError, EngineClosed):
                self._over = True  # what was taken is lost, so nothing may follow it
                raise

    def _take(self, ending: bool) -> list[Event]:
        gathered, self._gathered = self._gathered, _Gathered()
        events: list[Event] = []
        # The cursor goes with the last piece of output: after it the platform's stream goes on.
        last = next((part for part in reversed(gathered.parts) if isinstance(part, _Run)), None)
        for part in gathered.parts:
            if isinstance(part, Event):
                events.append(part)
                continue
            text = clean_text("".join(part.texts))
            offset = self._lengths.get(part.kind, 0)
            self._lengths[part.kind] = offset + len(text)
            if part.kind == "text":
                self._output_hash.update(text.encode())
            cursor = gathered.cursor if part is last else None
            events.append(Chunk(text=text, kind=part.kind, offset=offset, cursor=cursor))
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

    async def _finish(self, reading: asyncio.Task[Completed]) -> None:
        why = self._stop.result() if self._stop.done() else None
        if reading.done() and (why is None or not reading.cancelled()):
            # The platform's end was there first: a cancellation that comes now is too late.
            await self._conclude(reading)
            return
        await self._close_quietly(reading)
        if reading.done() and not reading.cancelled() and reading.exception() is None:
            await self._conclude(reading)  # it ended while it was being closed
        elif why is None:
            await self._stop_platform()
            limit = self._call.task.limits.timeout_seconds
            await self._fail(TimeLimitExceeded(f"the time limit of {limit:g} s was reached"))
        elif why is Stop.CANCEL:
            await self._stop_platform()
            await self._end(lambda state: (cancelled(state, self._spent(), self._length()),))
        elif why is Stop.HAND_BACK:
            await self._hand_back()

    async def _hand_back(self) -> None:
        constraints = self._call.task.limits.model_dump(mode="json")

        def back(state: TaskState) -> Sequence[Event]:
            return after_interruption(state, constraints, policy=self._retry, handed_back=True)

        async def now() -> None:
            await self._append()
            async with self._appending:
                await self._look_again()  # for what there is to go on from

        await self._guard(now())
        await self._end(back)

    async def _stop_platform(self) -> None:
        """Stop work that goes on at the platform without us, where it has such."""
        accepted = self._accepted
        if accepted is None or not accepted.reattachable or accepted.response_id is None:
            return
        try:
            async with asyncio.timeout(self._timing.closing_seconds):
                await self._adapter.stop(accepted.response_id)
        except Exception as error:  # noqa: BLE001 - whatever it is, the task ends all the same
            _log.warning(
                "%s: %r could not be stopped: %s", self.task_id, accepted.response_id, error
            )

    async def _conclude(self, reading: asyncio.Task[Completed]) -> None:
        error = asyncio.CancelledError() if reading.cancelled() else reading.exception()
        if error is None:
            await self._complete(reading.result())
        elif isinstance(error, PlatformError):
            await self._fail(error)
        elif isinstance(error, (StoreError, EngineClosed)):
            self._failure = error
        else:
            _log.error("the adapter %r failed", self._adapter.platform, exc_info=error)
            await self._fail(_AdapterFault(error))

    async def _complete(self, end: Completed) -> None:
        self._usage = end.usage or self._usage
        spent = self._spent()

        def completed(_state: TaskState) -> Sequence[Event]:
            return (
                end.model_copy(
                    update={
                        "usage": spent.usage,
                        "cost_usd": spent.cost_usd,
                        "price_version": spent.price_version,
                        "output_length": self._length(),
                        "output_digest": self._output_hash.hexdigest(),
                    }
                ),
            )

        await self._end(completed)

    async def _fail(self, error: PlatformError) -> None:
        spent = self._spent()

        def failed(state: TaskState) -> Sequence[Event]:
            if state.cancel is not None:  # what was asked for is the end, and here it is
                return (cancelled(state, spent, self._length()),)
            return (
                after_failure(
                    state,
                    error,
                    max_attempts=self._call.task.limits.max_attempts,
                    policy=self._retry,
                    now=datetime.now(UTC),
                    chance=self._chance,
                    spent=spent,
                    output_length=self._length(),
                ),
            )

        await self._end(failed)

    async def _end(self, decide: Callable[[TaskState], Sequence[Event]]) -> None:
        await self._guard(self._append_decided(decide, ending=True))

    async def _guard(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            await writing
        except (StoreError, EngineClosed) as error:
            self._failure = error

    def _length(self) -> int:
        return self._lengths.get("text", 0)

    def _spent(self) -> Spent:
        named = self._accepted.model if self._accepted is not None else None
        model = named or self._state.model
        cost, version = price(self._adapter.prices, model, self._usage, self._started_at)
        return Spent(self._usage, cost, version)

    # -- closing ---------------------------------------------------------------------------------

    async def _close_quietly(self, reading: asyncio.Task[Completed]) -> None:
        """Stop reading and close the stream; an adapter that won't is left behind, and named."""
        if not reading.done():
            self._closing = True
            reading.cancel()
            done, _pending = await asyncio.wait({reading}, timeout=self._timing.closing_seconds)
            if not done:
                _log.error("the adapter %r does not let itself be stopped", self._adapter.platform)
                return
        if self._stream is not None:
            closing = asyncio.create_task(_aclose(self._stream))
            await asyncio.wait({closing}, timeout=self._timing.closing_seconds)
            if not closing.done():
                _log.error("the adapter %r does not end its stream", self._adapter.platform)
                closing.cancel()

    async def _stop_writing(self, writing: asyncio.Task[None]) -> None:
        async with self._appending:  # what is being written is written to its end
            writing.cancel()
        await asyncio.wait({writing})


def _check_storable(event: Event) -> None:
    """Raise unless the log can hold what an adapter yielded; a chunk's text is mended later."""
    if isinstance(event, Chunk) and (event.cursor is None or event.cursor.isascii()):
        return
    try:
        encode(event.model_copy(update={"text": ""}) if isinstance(event, Chunk) else event)
        if isinstance(event, (UsageReported, Completed)) and event.usage is not None:
            check_json(event.usage.model_dump(exclude={"raw"}))  # columns hold 63 bits
    except (TypeError, ValueError) as error:
        raise FinalError(
            f"the adapter yielded {event.type!r} with something that can't be stored: {error}"
        ) from None


class _AdapterFault(FinalError):
    """An adapter raised something that is no `PlatformError`: a fault of the adapter's."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the adapter failed: {type(error).__name__}: {error}")


_AdapterFault.__name__ = "AdapterFault"


async def _aclose(stream: AsyncGenerator[Event, None]) -> None:
    with contextlib.suppress(Exception):
        await stream.aclose()


async def _uninterrupted(work: asyncio.Future[Any]) -> Any:  # noqa: ANN401
    """Await ``work`` to its end even when cancelled meanwhile; the cancellation comes after."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        if not work.done():
            await asyncio.wait({work})
        raise
