"""Streamed text as readers see it."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.events import Chunk
from perdure.streaming import StreamingResult, TextChunk, collect_stream


async def stream(*chunks: str) -> AsyncGenerator[str, None]:
    """Yield these pieces."""
    for chunk in chunks:
        yield chunk


def piece(text: str, offset: int) -> TextChunk:
    """Return a piece of text at its place."""
    return TextChunk(text, offset=offset, version=1)


def pickled(chunk: TextChunk) -> TextChunk:
    """Return what comes out of another process."""
    back: TextChunk = pickle.loads(pickle.dumps(chunk))  # noqa: S301 - our own
    return back


class TestTextChunk:
    """A piece of text that knows its place."""

    def test_is_text(self) -> None:
        """It is a `str`, and equal to one."""
        chunk = TextChunk("Hel", offset=3, version=7)

        assert chunk == "Hel"
        assert isinstance(chunk, str)
        assert chunk + "lo" == "Hello"
        assert (chunk.offset, chunk.version, chunk.kind) == (3, 7, "text")

    def test_of_an_event(self) -> None:
        """It takes over what the chunk event says."""
        chunk = TextChunk.of(Chunk(text="x", kind="reasoning", offset=5), 9)
        assert (chunk, chunk.offset, chunk.version, chunk.kind) == ("x", 5, 9, "reasoning")

    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
    def test_can_be_copied(self, again: Callable[[TextChunk], TextChunk]) -> None:
        """A copy knows its place too: people put pieces into queues between processes."""
        chunk = again(TextChunk("x", offset=5, version=9, kind="reasoning"))
        assert (chunk, chunk.offset, chunk.version, chunk.kind) == ("x", 5, 9, "reasoning")


class TestStreamingResult:
    """The fold of what a reader has seen."""

    def test_defaults(self) -> None:
        """It begins empty, now, with nothing known about tokens or the end."""
        result = StreamingResult()

        assert result.chunks == []
        assert result.get_content() == ""
        assert result.total_tokens is None
        assert result.completed_at is None
        assert result.started_at.tzinfo is not None

    def test_accumulates(self) -> None:
        """Pieces add up, plain text and pieces with a place alike."""
        result = StreamingResult()
        for chunk in ("Hel", piece("lo", 3)):
            result.add_chunk(chunk)
        result.complete(7)

        assert result.get_content() == "Hello"
        assert result.chunks == ["Hel", "lo"]
        assert result.total_tokens == 7
        assert result.completed_at is not None

    def test_begins_anew(self) -> None:
        """A piece at the beginning, also an empty one, replaces what was there before."""
        result = StreamingResult()
        for chunk in (piece("lost", 0), piece(" text", 4), piece("", 0), piece("new", 0)):
            result.add_chunk(chunk)
        assert result.get_content() == "new"

    @given(st.lists(st.lists(st.text(min_size=1), max_size=5), min_size=1, max_size=4))
    def test_only_the_last_beginning_counts(self, attempts: list[list[str]]) -> None:
        """However often the output begins anew, the content is that of the last attempt."""
        result = StreamingResult()
        for texts in attempts:
            result.add_chunk(piece("", 0))
            offset = 0
            for text in texts:
                result.add_chunk(piece(text, offset))
                offset += len(text)
        assert result.get_content() == "".join(attempts[-1])

    def test_duration(self) -> None:
        """Seconds from the beginning to the end; never below 0, even if the clock goes back."""
        began = datetime(2026, 1, 1, tzinfo=UTC)
        result = StreamingResult(started_at=began, completed_at=began + timedelta(seconds=2))
        assert result.duration_seconds == 2
        assert StreamingResult(started_at=datetime.now(UTC)).duration_seconds >= 0
        back = StreamingResult(started_at=began, completed_at=began - timedelta(seconds=2))
        assert back.duration_seconds == 0


class TestCollectStream:
    """Joining a stream, with a limit."""

    async def test_joins(self) -> None:
        """The text of all pieces."""
        assert await collect_stream(stream("a", "b", "c")) == "abc"
        assert await collect_stream(stream()) == ""
        assert await collect_stream(stream("a"), timeout=None) == "a"

    async def test_begins_anew(self) -> None:
        """What a lost attempt had produced is not in the result."""
        assert await collect_stream(stream(piece("lost", 0), piece("", 0), piece("x", 0))) == "x"

    async def test_too_slow(self) -> None:
        """A stream that takes longer than the limit is a `TimeoutError`, and is closed."""
        closed = asyncio.Event()

        async def stalled() -> AsyncGenerator[str, None]:
            try:
                yield "a"
                await asyncio.Event().wait()
            finally:
                closed.set()

        with pytest.raises(TimeoutError):
            await collect_stream(stalled(), timeout=0.01)
        assert closed.is_set()

    async def test_cancelled(self) -> None:
        """A cancellation passes through as itself, and is no `TimeoutError`."""
        waiting = asyncio.Event()

        async def stalled() -> AsyncGenerator[str, None]:
            waiting.set()
            await asyncio.Event().wait()
            yield "never"

        collecting = asyncio.create_task(collect_stream(stalled(), timeout=60))
        await waiting.wait()
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
        assert collecting.cancelled()

    async def test_errors_pass_through(self) -> None:
        """What the stream raises is what the caller gets; also its own `TimeoutError`."""

        async def broken() -> AsyncGenerator[str, None]:
            yield "a"
            raise ValueError("broken")

        with pytest.raises(ValueError, match="broken"):
            await collect_stream(broken())
