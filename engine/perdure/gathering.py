"""What an attempt has produced and the log doesn't have yet; pure, and in order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from perdure.events import Chunk, ChunkKind, Event
from perdure.text import clean_text
from perdure.unchecked import unchecked

__all__ = ["Gathering"]

EVENT_CHARACTERS: Final = 256


@dataclass(slots=True)
class _Run:
    """Pieces of one kind in a row; they become one chunk."""

    kind: ChunkKind
    texts: list[str] = field(default_factory=list[str])


class Gathering:
    """Gathers what an adapter yields, and gives it away as events of the log.

    It knows the whole output by its length and its digest, since outputs can be long.

    Args:
        lengths: Characters that there are, by kind, where the output goes on.
        output: The text that there is.
        keep: Whether the text is needed as a whole.

    Attributes:
        characters: How much has gathered; an event that is no chunk counts for some more than its
            texts, so that without any it counts too.
    """

    def __init__(self, lengths: Mapping[ChunkKind, int], output: str, *, keep: bool) -> None:
        self.characters = 0
        self._parts: list[_Run | Event] = []
        self._run: _Run | None = None  # the last part, where pieces of its kind can be added
        self._cursor: str | None = None
        self._lengths: dict[ChunkKind, int] = dict(lengths)
        self._digest = hashlib.sha256(output.encode())
        self._texts = [output] if keep else None

    def add(self, event: Event) -> None:
        """Take what came next, which is no chunk."""
        self._parts.append(event)
        self._run = None
        texts = [value for value in vars(event).values() if isinstance(value, str)]
        self.characters += EVENT_CHARACTERS + sum(map(len, texts))

    def add_piece(self, text: str, kind: ChunkKind, cursor: str | None) -> bool:
        """Take a chunk; returns whether it has text. One without only moves the cursor on.

        It comes in parts, since each of them takes long to be read from a model.
        """
        if cursor:
            self._cursor = cursor
        if not text:
            return False
        run = self._run
        if run is None or run.kind != kind:
            run = self._run = _Run(kind)
            self._parts.append(run)
        run.texts.append(text)
        self.characters += len(text)
        return True

    def take(self) -> list[Event]:
        """Return what has gathered, and forget it: pieces of one kind in a row as one chunk."""
        parts, cursor = self._parts, self._cursor
        if not parts:
            return []
        self._parts, self._run, self._cursor, self.characters = [], None, None, 0
        # The cursor goes with the last piece of output: after it the platform's stream goes on.
        last = None
        for part in parts:
            if isinstance(part, _Run):
                last = part
        if last is None:
            self._cursor = cursor
        return [
            self._chunk(part, cursor if part is last else None) if isinstance(part, _Run) else part
            for part in parts
        ]

    def _chunk(self, run: _Run, cursor: str | None) -> Chunk:
        text = clean_text("".join(run.texts))
        offset = self.length(run.kind)
        self._lengths[run.kind] = offset + len(text)
        if run.kind == "text":
            self._digest.update(text.encode())
            if self._texts is not None:
                self._texts.append(text)
        values = {
            "text": text,
            "kind": run.kind,
            "offset": offset,
            "cursor": cursor,
            "length": None,
        }
        return unchecked(Chunk, values)

    def length(self, kind: ChunkKind = "text") -> int:
        """Return the characters of that kind, what was not taken left out."""
        return self._lengths.get(kind, 0)

    def digest(self) -> str:
        """Return the SHA-256 of the text in UTF-8, in hexadecimal; as `length`."""
        return self._digest.hexdigest()

    def text(self) -> str:
        """Return the whole text, what was not taken included; only where it is kept."""
        runs = [part for part in self._parts if isinstance(part, _Run) and part.kind == "text"]
        return "".join((*(self._texts or ()), *(clean_text("".join(run.texts)) for run in runs)))
