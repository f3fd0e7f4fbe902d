"""The Messages format: a stream of its events into ours, and a paused turn into its next request.

Everything here is pure: it reads the JSON of a server's events, by name and with suspicion, and
knows neither the SDK nor the wire.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast

from perdure.errors import StreamTruncated
from perdure.events import Accepted, Chunk, Completed, Event, UsageReported
from perdure.task import Usage
from perdure.text import check_json
from perdure_adapters._reading import count_in, list_in, text_in
from perdure_adapters._tools import ToolCallText

__all__ = ["MessagesReader", "messages_usage"]

_FINISH_REASONS: Final[Mapping[str, str]] = {
    "end_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    # It was sent again as often as it is: what there is stops short.
    "pause_turn": "length",
    "refusal": "content_filter",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
}
_PAUSED: Final = "pause_turn"


def messages_usage(usage: Mapping[str, Any], *, settled: bool = True) -> Usage:
    """Return the tokens of one response, of which Anthropic counts the cached ones apart.

    Args:
        usage: What the platform said last.
        settled: Whether it has counted its answer. Before that it says a number, mostly 1, which is
            none of the answer's tokens, though those are being paid for.
    """
    plain = count_in(usage, "input_tokens")
    read = count_in(usage, "cache_read_input_tokens")
    written = count_in(usage, "cache_creation_input_tokens")
    details = usage.get("output_tokens_details")
    return Usage(
        input_tokens=None if plain is None else plain + (read or 0) + (written or 0),
        output_tokens=count_in(usage, "output_tokens") if settled else None,
        cache_read_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=count_in(details, "thinking_tokens") if settled else None,
        raw=_storable(usage),
    )


class MessagesReader:
    """Turns the events of one response into ours; `finish` decides whether it was an answer.

    Args:
        request_id: The platform's id of the request, from the response's headers.
        before: The reader of the response that this one goes on with, after a pause.
    """

    def __init__(
        self,
        request_id: str | None = None,
        before: MessagesReader | None = None,
    ) -> None:
        self._request_id = request_id
        self._spent = before.usage if before is not None else None
        self._again = before is not None
        self._usage: dict[str, Any] = {}
        self._settled = False
        self._stop_reason: str | None = None
        self._container: str | None = None
        self._blocks: dict[int, _Block] = {}
        self._tools = ToolCallText()
        self._calling: int | None = None
        self.stopped = False
        """Whether the platform's end marker has come."""

    @property
    def paused(self) -> bool:
        """Whether the platform has stopped in the middle and wants to be sent what it said."""
        return self.stopped and self._stop_reason == _PAUSED

    @property
    def usage(self) -> Usage | None:
        """The tokens so far, those of the responses before this one included."""
        if not self._usage:
            return self._spent
        here = messages_usage(self._usage, settled=self._settled or self.stopped)
        if self._spent is None:
            return here
        raws = [*_raws(self._spent.raw), *_raws(here.raw)]
        return (self._spent + here).model_copy(update={"raw": {"responses": raws}})

    def feed(self, event: Mapping[str, Any]) -> Sequence[Event]:
        """Return what ``event``, which is none of an error, says.

        Raises:
            StreamTruncated: It can't follow what came before.
        """
        type_ = event.get("type")
        if type_ == "content_block_delta":  # as most of all events are
            return self._delta(_index(event), event.get("delta"))
        match type_:
            case "message_start":
                return tuple(self._start(event.get("message")))
            case "content_block_start":
                return tuple(self._open(_index(event), event.get("content_block")))
            case "content_block_stop":
                return tuple(self._close(_index(event)))
            case "message_delta":
                return tuple(self._message_delta(event))
            case "message_stop":
                self.stopped = True
            case _:  # a ping, or what is yet to be invented
                pass
        return ()

    def finish(self) -> Iterator[Event]:
        """Yield what is left, `Completed` as the last.

        Raises:
            StreamTruncated: The stream ended without the platform's end marker.
        """
        if not self.stopped:
            raise StreamTruncated(
                f"the stream ended without a message_stop, after {self._characters()} characters "
                "of text",
                request_id=self._request_id,
            )
        rest = self._tools.close()
        if rest:
            yield Chunk(text=rest, kind="tool_call")
        reason = self._stop_reason
        yield Completed(
            finish_reason=_FINISH_REASONS.get(reason or "", "stop"),
            platform_finish_reason=reason,
            usage=self.usage,
        )

    def resumed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request that lets a paused turn go on: the same, and what was said, as it is.

        Args:
            body: The request that was paused.
        """
        blocks = [block for _, block in sorted(self._blocks.items())]
        # A text without text is refused, though the platform may have begun one.
        said = [one.whole() for one in blocks if one.type != "text" or one.text("text").strip()]
        turn = [{"role": "assistant", "content": said}] if said else []
        messages = [*body["messages"], *turn]
        more: dict[str, Any] = {"container": self._container} if self._container else {}
        return {**body, **more, "messages": messages}

    def _start(self, message: object) -> Iterator[Event]:
        begun = _object(message)
        yield Accepted(
            response_id=text_in(begun, "id") or None,
            request_id=self._request_id,
            model=text_in(begun, "model") or None,
            note="the platform paused, and was sent what it had said to go on" * self._again
            or None,
        )
        yield from self._count(begun.get("usage"))

    def _open(self, index: int, content: object) -> Iterator[Event]:
        block = self._blocks[index] = _Block(dict(_object(content)))
        if block.type == "tool_use":
            self._calling = index
            call = self._tools.begin(block.text("id"), block.text("name"))
            yield Chunk(text=call, kind="tool_call")
        begun = block.text(block.type)
        if begun and block.type == "text":
            yield Chunk(text=begun)
        elif begun and block.type == "thinking":
            yield Chunk(text=begun, kind="reasoning")

    def _delta(self, index: int, delta: object) -> Sequence[Event]:
        block = self._blocks.get(index)
        if block is None:
            block = self._blocks[index] = _Block({"type": "text", "text": ""})
        said = _object(delta)
        match said.get("type"):
            case "text_delta":
                piece = text_in(said, "text")
                block.added["text"].append(piece)
                return (Chunk.piece(piece),) if piece else ()
            case "thinking_delta":
                piece = text_in(said, "thinking")
                block.added["thinking"].append(piece)
                return (Chunk.piece(piece, "reasoning"),) if piece else ()
            case "signature_delta":
                block.added["signature"].append(text_in(said, "signature"))
            case "citations_delta":
                block.cite(dict(_object(said.get("citation"))))
            case "input_json_delta":
                piece = text_in(said, "partial_json")
                block.input += piece
                if block.type == "tool_use":
                    return tuple(self._arguments(index, piece))
            case _:
                pass
        return ()

    def _close(self, index: int) -> Iterator[Event]:
        block = self._blocks.get(index)
        if block is None or index != self._calling:
            return
        given = block.plain.get("input")
        if given and not block.input.strip():  # a server that sends the arguments in one piece
            yield from self._arguments(index, json.dumps(given, ensure_ascii=False))
        self._calling = None
        yield Chunk(text=self._tools.close(), kind="tool_call")

    def _arguments(self, index: int, piece: str) -> Iterator[Event]:
        if index != self._calling:
            raise StreamTruncated(
                "the platform sent arguments of a tool call that isn't open",
                request_id=self._request_id,
            )
        text = self._tools.arguments(piece)
        if text:
            yield Chunk(text=text, kind="tool_call")

    def _message_delta(self, event: Mapping[str, Any]) -> Iterator[Event]:
        delta = _object(event.get("delta"))
        self._stop_reason = text_in(delta, "stop_reason") or self._stop_reason
        self._container = text_in(_object(delta.get("container")), "id") or self._container
        usage = event.get("usage")
        self._settled = self._settled or _object(usage).get("output_tokens") is not None
        yield from self._count(usage)

    def _count(self, usage: object) -> Iterator[Event]:
        """Take in what is said of tokens; counts are for the whole response so far."""
        said = {name: value for name, value in _object(usage).items() if value is not None}
        if not said:
            return
        self._usage |= said
        total = self.usage
        if total is not None:
            yield UsageReported(usage=total)

    def _characters(self) -> int:
        return sum(len(block.text("text")) for block in self._blocks.values())


class _Block:
    """A block of content, as it comes and as it is sent back."""

    def __init__(self, plain: dict[str, Any]) -> None:
        self.plain = plain
        self.input = ""
        # What deltas have added to its texts, in pieces.
        self.added: defaultdict[str, list[str]] = defaultdict(list)

    @property
    def type(self) -> str:
        return self.text("type")

    def text(self, name: str) -> str:
        value = self.plain.get(name)
        begun = value if isinstance(value, str) else ""
        return begun + "".join(self.added.get(name, ()))

    def cite(self, citation: dict[str, Any]) -> None:
        self.plain["citations"] = [*list_in(self.plain, "citations"), citation]

    def whole(self) -> dict[str, Any]:
        """Return the block with its arguments in place.

        Raises:
            StreamTruncated: They are no JSON.
        """
        plain = {**self.plain, **{name: self.text(name) for name in self.added}}
        if not self.input.strip():
            return plain
        try:
            return {**plain, "input": json.loads(self.input)}
        except ValueError as error:
            raise StreamTruncated("the platform sent arguments that are no JSON") from error


def _object(value: object) -> Mapping[str, Any]:
    """Return a JSON object; an empty one where it is something else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _storable(usage: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        return cast("dict[str, Any]", check_json(dict(usage)))
    except ValueError:  # a number no database takes: the counts are what matters
        return None


def _raws(raw: dict[str, Any] | None) -> list[Any]:
    return [] if raw is None else list(raw.get("responses", [raw]))


def _index(event: Mapping[str, Any]) -> int:
    index = event.get("index", 0)
    return index if isinstance(index, int) else 0
