"""Tool calls as text: chunks of the kind `tool_call`, one JSON object a line."""

from __future__ import annotations

import json
from typing import Literal, TypeAlias

__all__ = ["CallState", "ToolCallText"]

CallState: TypeAlias = Literal["closed", "begun", "arguments"]
"""How far the last call is: whole, without arguments so far, in its arguments."""


class ToolCallText:
    """Writes calls down as they come: `{"id": …, "name": …, "arguments": …}`.

    A line is whole as soon as the next call begins or the last one is closed.

    Args:
        state: How far it was, where a stream is picked up in the middle.
    """

    def __init__(self, state: CallState = "closed") -> None:
        self._open = state != "closed"
        self._arguments = state == "arguments"

    @property
    def state(self) -> CallState:
        """How far the last call is."""
        if not self._open:
            return "closed"
        return "arguments" if self._arguments else "begun"

    @property
    def open(self) -> bool:
        """Whether a call has begun that isn't closed."""
        return self._open

    def begin(self, id_: str, name: str) -> str:
        """Return the text with which a call begins, the one before closed."""
        before = self.close()
        self._open, self._arguments = True, False
        return f'{before}{{"id":{_quoted(id_)},"name":{_quoted(name)},"arguments":'

    def arguments(self, piece: str) -> str:
        """Return the text that a piece of the call's arguments, which are JSON, adds."""
        # A line ends a call, and JSON needs none: within text it is written as an escape.
        piece = piece.replace("\r", " ").replace("\n", " ")
        if not self._arguments:  # a server may begin with white space, or with an empty piece
            piece = piece.lstrip()
        self._arguments = self._arguments or bool(piece)
        return piece

    def close(self) -> str:
        """Return what completes the call that is open; empty where none is."""
        if not self._open:
            return ""
        self._open = False
        return "}\n" if self._arguments else "{}}\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
