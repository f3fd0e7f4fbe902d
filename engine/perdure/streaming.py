"""Streamed output as a fold of chunks, for readers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

from perdure.events import Chunk, ChunkKind

__all__ = ["StreamingResult", "TextChunk", "collect_stream"]


class TextChunk(str):
    """A piece of streamed text that knows its place; it is a `str` and can be used as one.

    After a lost attempt that had to begin again the text begins again too, with a chunk whose
    `offset` is 0: what came before it is no longer part of the output. `StreamingResult` and
    `collect_stream` follow that rule by themselves.

    Attributes:
        offset: Characters of this kind before this piece.
        version: The version of the event in the task's stream; go on reading from there.
        kind: `text`, `reasoning` or `tool_call`.
    """

    __slots__ = ("kind", "offset", "version")

    offset: int
    version: int
    kind: ChunkKind

    def __new__(cls, text: str, *, offset: int, version: int, kind: ChunkKind = "text") -> Self:
        """Make a piece of text with its place."""
        chunk = super().__new__(cls, text)
        chunk.offset = offset
        chunk.version = version
        chunk.kind = kind
        return chunk

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:
        """Let pieces be copied, and cross processes."""
        place = {"offset": self.offset, "version": self.version, "kind": self.kind}
        return (str(self),), place

    @classmethod
    def of(cls, event: Chunk, version: int) -> Self:
        """Return the piece that a chunk event at ``version`` holds."""
        return cls(event.text, offset=event.offset, version=version, kind=event.kind)

    @property
    def restarts(self) -> bool:
        """Whether the output begins (again) here."""
        return self.offset == 0


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass
class StreamingResult:
    """What a reader has seen of a task's output so far.

    Attributes:
        chunks: The pieces that count, in order.
        total_tokens: Set by `complete`.
        started_at: When the reader began.
        completed_at: Set by `complete`.
    """

    chunks: list[str] = field(default_factory=list[str])
    total_tokens: int | None = None
    started_at: datetime = field(default_factory=_now)
    completed_at: datetime | None = None

    def add_chunk(self, chunk: str) -> None:
        """Add a piece; a `TextChunk` that begins the output anew replaces what was there."""
        if isinstance(chunk, TextChunk) and chunk.restarts:
            self.chunks.clear()
        self.chunks.append(chunk)

    def get_content(self) -> str:
        """Return the whole text so far."""
        return "".join(self.chunks)

    def complete(self, tokens: int | None = None) -> None:
        """Note the end, and how many tokens were used where that is known."""
        self.total_tokens = tokens
        self.completed_at = _now()

    @property
    def duration_seconds(self) -> float:
        """Seconds from the beginning to the end, or to now; never below 0."""
        return max(0.0, ((self.completed_at or _now()) - self.started_at).total_seconds())


async def collect_stream(stream: AsyncIterator[str], timeout: float | None = 300) -> str:
    """Return the joined text of ``stream``.

    Args:
        stream: What `stream_result` returns, or any iterator of text.
        timeout: Seconds; None waits without limit.

    Raises:
        TimeoutError: The stream took longer.
    """
    collected = StreamingResult()
    async with asyncio.timeout(timeout):
        async for chunk in stream:
            collected.add_chunk(chunk)
    return collected.get_content()
