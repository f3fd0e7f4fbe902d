"""The rules for adapters as a suite of tests that every adapter inherits."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

from perdure.adapter import Adapter, Call, Capabilities, Resume
from perdure.errors import PlatformError, StreamTruncated
from perdure.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    FileCreated,
    UsageReported,
    decode,
    encode,
)
from perdure.task import Task

__all__ = ["AdapterContract"]

T = TypeVar("T")

_PLATFORM: Final = re.compile("[a-z][a-z0-9_]*")
_WRITTEN_BY_ADAPTERS: Final = (Accepted, Chunk, UsageReported, FileCreated, Completed)
_FINISH_REASONS: Final = frozenset({"stop", "length", "tool_calls", "content_filter"})


class AdapterContract:
    """The rules of `perdure.adapter` as tests. Inherit it and say how to make the adapter.

    Override `make_adapter`, `success` and `endless`; `failures`, `truncated`, `open_calls` and
    `secrets` where the other side can be made to show them.

    Attributes:
        patience: Seconds after which something that should happen at once has not happened.
        at_once: How many calls run at the same time in the test of that.
    """

    patience: float = 10.0
    at_once: int = 25

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        raise NotImplementedError("return the adapter to be tested")

    def success(self) -> Call:
        """Return a call that succeeds, with a text of several chunks."""
        return Call(task=Task(prompt="Say hello."), task_id="contract_success")

    def text(self) -> str | None:
        """Return the text of `success`; None where it isn't known."""
        return None

    def endless(self) -> Call:
        """Return a call that yields a chunk and does not end within `patience`."""
        raise NotImplementedError("return a call that begins to answer and goes on for long")

    def failures(self) -> Sequence[tuple[type[PlatformError], Call]]:
        """Return calls that fail, with the error that each of them is."""
        return ()

    def truncated(self) -> Sequence[Call]:
        """Return calls whose stream ends, here or there, without the platform's end marker."""
        return ()

    def open_calls(self) -> int | None:
        """Return how many calls the platform's side has open; None where it can't be known."""
        return None

    def secrets(self) -> Sequence[str]:
        """Return keys that the adapter was made with, which it must show nowhere."""
        return ()

    # -- what it is ------------------------------------------------------------------------------

    def test_it_is_an_adapter(self) -> None:
        """It has the attributes and methods of `perdure.adapter.Adapter`."""
        adapter = self.make_adapter()
        _hold(_is(adapter, Adapter), f"{adapter!r} is no perdure.adapter.Adapter")
        _hold(_is(adapter.capabilities, Capabilities), "`capabilities` is no `Capabilities`")
        _hold(bool(_PLATFORM.fullmatch(adapter.platform)), f"platform {adapter.platform!r}")

    def test_its_repr_shows_no_secret(self) -> None:
        """Keys are neither in `repr` nor in `str`."""
        adapter = self.make_adapter()
        self._no_secret(f"{adapter!r} {adapter}")

    # -- success ---------------------------------------------------------------------------------

    def test_a_success_ends_with_one_completed(self) -> None:
        """`Completed` comes once, as the last; before it only what adapters may write."""
        events = self._run(lambda adapter: _collect(adapter, self.success()))
        _hold(bool(events) and isinstance(events[-1], Completed), "the last is no `Completed`")
        early = [event.type for event in events[:-1] if isinstance(event, Completed)]
        _hold(not early, "there is more than one `Completed`")
        strange = [e.type for e in events if not isinstance(e, _WRITTEN_BY_ADAPTERS)]
        _hold(not strange, f"{strange} are not an adapter's to write")

    def test_a_success_streams_its_text(self) -> None:
        """The chunks, joined, are the text, and there are several of them."""
        events = self._run(lambda adapter: _collect(adapter, self.success()))
        _hold(len([e for e in events if isinstance(e, Chunk)]) > 1, "all came as one chunk")
        text = _text(events)
        _hold(bool(text), "there is no text")
        _hold(self.text() in (None, text), f"{text!r} is not {self.text()!r}")

    def test_the_engines_fields_are_left_alone(self) -> None:
        """Offsets, costs, lengths and digests are filled in by the engine."""
        events = self._run(lambda adapter: _collect(adapter, self.success()))
        _hold(all(e.offset == 0 for e in events if isinstance(e, Chunk)), "an offset was set")
        end = events[-1]
        touched = isinstance(end, Completed) and (
            end.cost_usd,
            end.price_version,
            end.output_length,
            end.output_digest,
        ) != (None, None, 0, None)
        _hold(not touched, "`Completed` holds what the engine fills in")

    def test_finish_reasons_are_the_common_words(self) -> None:
        """`finish_reason` is one of the words all platforms share."""
        end = self._run(lambda adapter: _collect(adapter, self.success()))[-1]
        _hold(isinstance(end, Completed) and end.finish_reason in _FINISH_REASONS, f"{end!r}")

    def test_usage_only_grows(self) -> None:
        """Counts of tokens are for the whole attempt so far, the last one for all of it."""
        events = self._run(lambda adapter: _collect(adapter, self.success()))
        counts = [
            e.usage.output_tokens or 0
            for e in events
            if isinstance(e, UsageReported | Completed) and e.usage is not None
        ]
        _hold(counts == sorted(counts), f"output tokens went down: {counts}")

    def test_events_can_be_stored(self) -> None:
        """Every event comes back from its stored form as it was."""
        for event in self._run(lambda adapter: _collect(adapter, self.success())):
            _hold(decode(*encode(event)) == event, f"{event!r} does not come back")

    def test_a_call_can_continue_from_partial_output(self) -> None:
        """With the partial output handed back, the call ends like any other."""
        call = replace(self.success(), attempt=2, resume=Resume("continue", output="Hel"))
        events = self._run(lambda adapter: _collect(adapter, call))
        _hold(isinstance(events[-1], Completed), "the last is no `Completed`")

    def test_an_interrupted_call_is_picked_up(self) -> None:
        """Where `accepted` says so, the same response goes on after the cursor."""
        call = self.success()
        whole = self._run(lambda adapter: _collect(adapter, call))
        accepted = next((e for e in whole if isinstance(e, Accepted)), None)
        if accepted is None or not accepted.reattachable:
            return
        first = self._run(lambda adapter: _first_text(adapter, call))
        cursors = [e.cursor for e in first if isinstance(e, Chunk) and e.cursor]
        named = next((e.response_id for e in first if isinstance(e, Accepted)), None)
        again = replace(
            call,
            attempt=call.attempt + 1,
            resume=Resume("reattach", _text(first), named, [accepted.cursor, *cursors][-1]),
        )
        rest = self._run(lambda adapter: _collect(adapter, again))
        _hold(_text(first) + _text(rest) == _text(whole), "the parts are not the whole")

    # -- failure ---------------------------------------------------------------------------------

    def test_failures_are_typed_errors(self) -> None:
        """Errors are raised as a `PlatformError` of the right class, on one line, without keys."""
        for kind, call in self.failures():
            error = self._run(partial(_failure, call=call))
            _hold(type(error) is kind, f"{error!r} is no {kind.__name__}")
            _hold(bool(error.message) and "\n" not in error.message, "an error without its line")
            self._no_secret(f"{error!r} {error}")

    def test_a_truncated_stream_is_no_success(self) -> None:
        """A stream that merely stops is `StreamTruncated`, wherever it stops."""
        for call in self.truncated():
            error = self._run(partial(_failure, call=call))
            _hold(isinstance(error, StreamTruncated), f"{error!r} is no StreamTruncated")

    # -- being stopped ---------------------------------------------------------------------------

    def test_cancelling_before_the_first_event_is_prompt(self) -> None:
        """A call that was only just begun lets itself be cancelled."""
        self._run(lambda adapter: self._cancelled(adapter, after=0))

    def test_cancelling_on_the_way_is_prompt(self) -> None:
        """Cancelling the reading task passes through, ends the stream and closes the call."""
        self._run(lambda adapter: self._cancelled(adapter, after=1))

    def test_closing_the_stream_on_the_way_is_prompt(self) -> None:
        """A reader that leaves and closes the stream closes the call."""

        async def leave(adapter: Adapter) -> None:
            stream = adapter.run(self.endless())
            async with asyncio.timeout(self.patience):
                async for event in stream:
                    if isinstance(event, Chunk):
                        break
                await stream.aclose()
            await self._all_closed()

        self._run(leave)

    def test_it_serves_on_after_a_cancellation(self) -> None:
        """One cancelled call does not spoil the next."""

        async def both(adapter: Adapter) -> list[Event]:
            await self._cancelled(adapter, after=1)
            return await _collect(adapter, self.success())

        _hold(isinstance(self._run(both)[-1], Completed), "the call after it did not succeed")

    # -- many, and more than once ----------------------------------------------------------------

    def test_many_calls_at_once(self) -> None:
        """Calls on one adapter don't get into each other's way, nor do failing ones."""

        async def all_of_them(adapter: Adapter) -> list[list[Event]]:
            failing = [asyncio.create_task(_failure(adapter, call)) for _, call in self.failures()]
            calls = [_collect(adapter, self.success()) for _ in range(self.at_once)]
            async with asyncio.timeout(6 * self.patience):
                collected = await asyncio.gather(*calls)
                await asyncio.gather(*failing)
            return collected

        texts = {_text(events) for events in self._run(all_of_them)}
        if self.text() is not None:
            _hold(texts == {self.text()}, f"{len(texts)} different texts came out")
        _hold(all(texts), "a text is missing")

    def test_closing_twice_and_using_it_again(self) -> None:
        """`close` may be called when nothing is open, twice, and before another use."""
        adapter = self.make_adapter()

        async def use() -> list[Event]:
            await adapter.close()
            events = await _collect(adapter, self.success())
            await adapter.close()
            await adapter.close()
            return events

        for _ in range(2):  # each time on an event loop of its own
            _hold(isinstance(asyncio.run(use())[-1], Completed), "it did not succeed")

    # -- how -------------------------------------------------------------------------------------

    def _run(self, what: Callable[[Adapter], Coroutine[Any, Any, T]]) -> T:
        """Return what ``what`` makes of a new adapter; nothing of it may be left running."""

        async def run() -> T:
            adapter = self.make_adapter()
            try:
                return await what(adapter)
            finally:
                await adapter.close()
                await _nothing_left()

        return asyncio.run(run())

    async def _cancelled(self, adapter: Adapter, after: int) -> None:
        seen = asyncio.Event()

        async def read() -> None:
            chunks = 0
            async for event in adapter.run(self.endless()):
                chunks += isinstance(event, Chunk)
                if chunks >= after:
                    seen.set()

        reading = asyncio.create_task(read())
        if after:
            async with asyncio.timeout(self.patience):
                await seen.wait()
        else:
            await asyncio.sleep(0)
        reading.cancel()
        done, _ = await asyncio.wait({reading}, timeout=self.patience)
        _hold(bool(done), f"the call still runs {self.patience:g} s after it was cancelled")
        _hold(reading.cancelled(), "the cancellation was swallowed")
        await self._all_closed()

    async def _all_closed(self) -> None:
        latest = time.monotonic() + self.patience
        while self.open_calls():
            _hold(time.monotonic() < latest, f"{self.open_calls()} calls are still open there")
            await asyncio.sleep(0.01)

    def _no_secret(self, shown: str) -> None:
        for secret in self.secrets():
            _hold(secret not in shown, "a key can be read in what is shown")


def _hold(condition: bool, message: str) -> None:
    """Raise `AssertionError`; `assert` would be rewritten only in files that pytest knows."""
    if not condition:
        raise AssertionError(message)


def _is(value: object, kind: type) -> bool:
    return isinstance(value, kind)


async def _nothing_left() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:  # generators that were let go of are closed by the loop, in tasks of its own
        _, left = await asyncio.wait(left, timeout=1)
    _hold(not left, f"tasks were left behind: {left}")


async def _collect(adapter: Adapter, call: Call) -> list[Event]:
    return [event async for event in adapter.run(call)]


async def _first_text(adapter: Adapter, call: Call) -> list[Event]:
    events: list[Event] = []
    stream = adapter.run(call)
    async for event in stream:
        events.append(event)
        if isinstance(event, Chunk) and event.kind == "text":
            break
    await stream.aclose()
    return events


async def _failure(adapter: Adapter, call: Call) -> PlatformError:
    completed = False
    try:
        async for event in adapter.run(call):
            completed = completed or isinstance(event, Completed)
    except PlatformError as error:
        _hold(not completed, "it failed after `Completed`")
        return error
    raise AssertionError("it did not fail")


def _text(events: Iterable[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Chunk) and e.kind == "text")
