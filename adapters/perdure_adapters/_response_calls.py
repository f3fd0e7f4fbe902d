"""The tool calls in a stream of OpenAI's Responses API, as the text that perdure keeps; pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

from perdure_adapters._reading import count_in, text_in, value_in
from perdure_adapters._tools import CallState, ToolCallText

__all__ = ["CallPlace", "ResponseCalls", "call_text", "is_call"]

_CALLS: Final = frozenset({"function_call", "custom_tool_call"})


class CallPlace(NamedTuple):
    """How far the tool calls of a response were read.

    Attributes:
        written: Characters of their text so far.
        item: The place, in the response's output, of the call that is open.
        state: How far that one is.
    """

    written: int = 0
    item: int | None = None
    state: CallState = "closed"


class ResponseCalls:
    """Puts the pieces of calls together, from where they were read up to.

    A call's pieces are written as they come. Should a platform send two calls at once, the second
    one and those after it are left for the end, where the response holds them all: each keeps its
    line.
    """

    def __init__(self, place: CallPlace) -> None:
        self._written = place.written
        self._item = place.item
        self._text = ToolCallText(place.state)
        self._said: list[str] = []
        self._deferred = False

    @property
    def place(self) -> CallPlace:
        """How far it is."""
        state = self._text.state
        return CallPlace(self._written, None if state == "closed" else self._item, state)

    def feed(self, kind: str, event: object) -> str:
        """Return the text that one event of the stream adds; empty where it tells of no call."""
        item = value_in(event, "item")
        place = count_in(event, "output_index")
        text = ""
        match kind:
            case "response.output_item.added" if _is_function(item):
                if self._text.open:
                    self._deferred = True
                elif not self._deferred:
                    self._item = place
                    text = self._text.begin(text_in(item, "call_id"), text_in(item, "name"))
            case "response.function_call_arguments.delta" if self._is_open(place):
                text = self._text.arguments(text_in(event, "delta"))
            case "response.function_call_arguments.done" if self._is_open(place):
                text = self._rest(text_in(event, "arguments"))
            case "response.output_item.done" if is_call(item):
                if self._is_open(place):
                    text = self._rest(text_in(item, "arguments")) + self._text.close()
                elif not self._deferred and not self._text.open:
                    text = _line(item)
            case _:
                pass
        self._written += len(text)
        self._said.append(text)
        return text

    def close(self, whole: str) -> str:
        """Return what completes the calls at the end of the stream.

        Args:
            whole: The text of all calls, as the response has it at its end.
        """
        said = "".join(self._said)
        here = self._written
        if len(whole) >= here and whole[here - len(said) : here] == said:
            text = whole[here:]
        else:  # it is told in other words there
            text = self._text.close()
        self._text = ToolCallText()
        self._written += len(text)
        return text

    def _is_open(self, place: int | None) -> bool:
        return self._text.open and place == self._item

    def _rest(self, arguments: str) -> str:
        """Return the arguments of the open call, where they did not come in pieces."""
        return self._text.arguments(arguments) if self._text.state == "begun" else ""


def is_call(item: object) -> bool:
    """Return whether an item of a response's output asks for a tool of the task's."""
    return text_in(item, "type") in _CALLS


def call_text(items: Sequence[object]) -> str:
    """Return the text of all calls in a response's output."""
    return "".join(_line(item) for item in items if is_call(item))


def _is_function(item: object) -> bool:
    return text_in(item, "type") == "function_call"


def _line(item: object) -> str:
    writing = ToolCallText()
    arguments = text_in(item, "arguments")
    if not _is_function(item):  # a custom tool takes text, which is no JSON
        arguments = json.dumps(text_in(item, "input"), ensure_ascii=False)
    begun = writing.begin(text_in(item, "call_id"), text_in(item, "name"))
    return begun + writing.arguments(arguments) + writing.close()
