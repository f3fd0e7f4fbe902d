"""The streams of OpenAI's Responses API: their events into perdure's; pure.

It reads whatever object a server may send, by name and with suspicion, and knows neither the SDK
nor the wire.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from perdure.adapter import Resume
from perdure.errors import InvalidRequest, PlatformError, StreamTruncated
from perdure.events import Accepted, Chunk, ChunkKind, Completed, Event, UsageReported
from perdure.task import Usage
from perdure.text import clean_text
from perdure_adapters._reading import count_in, list_in, raw_form, text_in, value_in
from perdure_adapters._response_calls import CallPlace, ResponseCalls, call_text, is_call
from perdure_adapters._sdk import typed_error
from perdure_adapters._tools import CallState

__all__ = ["Cursor", "ResponseReader", "response_usage"]

_ENDS: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
_DELTAS: Final[Mapping[str, ChunkKind]] = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "text",
    "response.reasoning_summary_text.delta": "reasoning",
    "response.reasoning_text.delta": "reasoning",
}
_CURSOR: Final = re.compile(r"(\d+)(?:;(\d+)(?:;(\d+|None);(begun|arguments))?)?", re.ASCII)
# An answer that was ended for any other reason was cut off too: it is no `stop`.
_INCOMPLETE: Final[Mapping[str, str]] = {"content_filter": "content_filter"}


class Cursor(NamedTuple):
    """How far a stream was read: the number of its last event, and where the tool calls are.

    As text it is `17`, or `17;120` after 120 characters of tool calls, or `17;120;2;arguments`
    within the arguments of the response's item 2.
    """

    sequence: int
    calls: CallPlace = CallPlace()

    def __str__(self) -> str:
        place = self.calls
        if place.state != "closed":
            return f"{self.sequence};{place.written};{place.item};{place.state}"
        return f"{self.sequence};{place.written}" if place.written else str(self.sequence)

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """Return what a cursor's text says.

        Raises:
            InvalidRequest: It is none of this platform's.
        """
        found = _CURSOR.fullmatch(text or "")
        if found is None:
            raise InvalidRequest(f"{text!r} is no cursor of this platform")
        sequence, written, item, state = found.groups()
        if state is None:
            return cls(int(sequence), CallPlace(int(written or 0)))
        place = None if item == "None" else int(item)
        return cls(int(sequence), CallPlace(int(written), place, cast("CallState", state)))


def response_usage(usage: object) -> Usage:
    """Return the tokens a response used: totals that include the cached and the reasoned."""
    into = value_in(usage, "input_tokens_details")
    out = value_in(usage, "output_tokens_details")
    return Usage(
        input_tokens=count_in(usage, "input_tokens"),
        output_tokens=count_in(usage, "output_tokens"),
        cache_read_tokens=count_in(into, "cached_tokens"),
        cache_write_tokens=count_in(into, "cache_write_tokens"),
        reasoning_tokens=count_in(out, "reasoning_tokens"),
        raw=raw_form(usage),
    )


@dataclass(frozen=True, slots=True)
class _End:
    reason: str
    platforms_own: str


class ResponseReader:
    """Turns the events of one stream into perdure's; `finish` decides whether it was an answer.

    Args:
        request_id: The platform's id of the request, from the response's headers.
        note: Something to tell about this attempt.
        background: Whether it was asked to go on without us.
        resume: What was read before, where a response is picked up.
        secrets: What must not be in the message of an error.

    Attributes:
        response_id: The platform's name of the response; None as long as it isn't known.
        reattachable: Whether it can be picked up.
    """

    def __init__(
        self,
        request_id: str | None = None,
        note: str | None = None,
        *,
        background: bool = False,
        resume: Resume | None = None,
        secrets: Sequence[str | None] = (),
    ) -> None:
        self._secrets = secrets
        self._request_id = request_id
        self._note = note
        self._background = background
        self._end: _End | None = None
        self._usage: Usage | None = None
        self._refused = False
        self._called = False
        self._texts: list[str] = []
        self._from: int | None = None
        self._gap = False
        self._accepted = resume is not None
        self.response_id = None if resume is None else resume.response_id
        self.reattachable = resume is not None
        place = CallPlace()
        if resume is not None:
            self._from, place = Cursor.parse(resume.cursor)
            self._texts.append(resume.output)
        self._sequence = self._from
        self._calls = ResponseCalls(place)

    @property
    def ended(self) -> bool:
        """Whether the platform's own end marker has come: the answer is whole."""
        return self._end is not None

    def feed(self, event: object) -> Iterator[Event]:
        """Yield what ``event`` says.

        Raises:
            PlatformError: It says that the platform failed.
        """
        kind = text_in(event, "type")
        if self._is_known(event):
            return
        response = value_in(event, "response")
        if not self._accepted and kind != "error":
            self._accepted = True
            yield self._accept(response)
        usage = value_in(response, "usage")
        if usage is not None:
            self._usage = response_usage(usage)
        name = kind.removeprefix("response.")
        if name in _ENDS:
            yield from self.settle(response, name)
        elif kind == "error":
            raise self._fault(event)
        else:
            if usage is not None and self._usage is not None:
                yield UsageReported(usage=self._usage)
            yield from self._piece(kind, event)

    def settle(self, response: object, status: str | None = None) -> Iterator[Event]:
        """Yield what a response that has ended holds beyond what was read of it.

        Raises:
            PlatformError: It has ended without an answer.
        """
        own = text_in(response, "status")
        status = own if own in _ENDS else status
        usage = value_in(response, "usage")
        if usage is not None:
            self._usage = response_usage(usage)
        if status in ("failed", "cancelled"):
            if self._usage is not None:
                yield UsageReported(usage=self._usage)
            raise self._over(response, status)
        yield from self._missing(response)
        if status == "incomplete":
            reason = text_in(value_in(response, "incomplete_details"), "reason")
            self._end = _End(_INCOMPLETE.get(reason, "length"), reason or status)
        elif self._refused:
            self._end = _End("content_filter", "refusal")
        else:
            self._end = _End("tool_calls" if self._called else "stop", "completed")

    def catch_up(self, response: object) -> Iterator[Event]:
        """Yield what is missing of a response whose stream can't be had; nothing unless it ended.

        Raises:
            PlatformError: It has ended without an answer.
            StreamTruncated: What was read of it isn't its beginning.
        """
        if text_in(response, "status") in _ENDS:
            self._gap = True
            yield from self.settle(response)

    def finish(self) -> Completed:
        """Return the last event.

        Raises:
            StreamTruncated: The stream ended without the platform's end marker.
        """
        if self._end is None:
            characters = sum(map(len, self._texts))
            raise StreamTruncated(
                "the stream ended without response.completed, response.incomplete or "
                f"response.failed, after {characters} characters of text",
                request_id=self._request_id,
            )
        return Completed(
            finish_reason=self._end.reason,
            platform_finish_reason=self._end.platforms_own,
            usage=self._usage,
        )

    def _is_known(self, event: object) -> bool:
        """Note the event's number; return whether it was read before the response was picked up."""
        number = count_in(event, "sequence_number")
        if number is None:
            return False
        if self._from is not None and number <= self._from:
            return True
        # What a platform no longer has of a response that is picked up is in the whole, at the end.
        self._gap = self._gap or (
            self._from is not None and self._sequence is not None and number > self._sequence + 1
        )
        self._sequence = number
        return False

    def _accept(self, response: object) -> Accepted:
        self.response_id = text_in(response, "id") or None
        self.reattachable = (
            self._background
            and self.response_id is not None
            and value_in(response, "background") is True
            and self._sequence is not None
        )
        note = self._note
        if self._background and not self.reattachable:
            note = "the platform did not take this into the background: it can't be picked up"
        return Accepted(
            response_id=self.response_id,
            request_id=self._request_id,
            model=text_in(response, "model") or None,
            reattachable=self.reattachable,
            cursor=self._cursor(),
            note=note,
        )

    def _cursor(self) -> str | None:
        if not self.reattachable or self._sequence is None or self._gap:
            return None
        return str(Cursor(self._sequence, self._calls.place))

    def _piece(self, kind: str, event: object) -> Iterator[Event]:
        text = ""
        chunk: ChunkKind = _DELTAS.get(kind, "tool_call")
        if kind in _DELTAS:
            text = text_in(event, "delta")
            self._refused = self._refused or kind == "response.refusal.delta"
        elif kind == "response.reasoning_summary_part.added":
            chunk, text = "reasoning", "\n\n" if count_in(event, "summary_index") else ""
        else:
            text = "" if self._gap else self._calls.feed(kind, event)
            self._called = self._called or is_call(value_in(event, "item"))
        if not text or self._gap:
            return
        if chunk == "text":
            self._texts.append(text)
        yield Chunk(text=text, kind=chunk, cursor=self._cursor())

    def _missing(self, response: object) -> Iterator[Event]:
        """Yield what the whole response holds and its stream did not bring.

        Raises:
            StreamTruncated: A stream with a gap doesn't fit the whole.
        """
        items = list_in(response, "output")
        texts: list[str] = []
        for part in (part for item in items for part in list_in(item, "content")):
            refusal = text_in(part, "refusal")
            if text_in(part, "type") in ("output_text", "refusal"):
                texts.append(refusal or text_in(part, "text"))
            self._refused = self._refused or bool(refusal)
        self._called = self._called or any(is_call(item) for item in items)
        seen, whole = clean_text("".join(self._texts)), clean_text("".join(texts))
        if whole.startswith(seen) and len(whole) > len(seen):
            self._texts.append(whole[len(seen) :])
            yield Chunk(text=self._texts[-1], cursor=self._cursor())
        elif self._gap and whole != seen:
            raise StreamTruncated(
                "the response's text does not go on where it was read up to",
                request_id=self._request_id,
                response_over=True,
            )
        calls = self._calls.close(call_text(items))
        if calls:
            yield Chunk(text=calls, kind="tool_call", cursor=self._cursor())

    def _fault(self, event: object) -> PlatformError:
        """Return the typed form of an `error` event."""
        inner = value_in(event, "error") or event  # some servers put a frame around it
        code = text_in(inner, "code") or str(value_in(inner, "code") or "")
        kind = text_in(inner, "type")
        return typed_error(
            f"the platform reported: {text_in(inner, 'message') or code or 'an error'}",
            names=(code or None, kind if kind != "error" else None),
            request_id=self._request_id,
            secrets=self._secrets,
        )

    def _over(self, response: object, status: str) -> PlatformError:
        """Return the error of a response that has ended without an answer."""
        fault = value_in(response, "error")
        if status == "cancelled" and fault is None:
            error: PlatformError = StreamTruncated(
                "the response was cancelled at the platform, by somebody else",
                request_id=self._request_id,
            )
        else:
            code = text_in(fault, "code")
            error = typed_error(
                f"the response failed: {text_in(fault, 'message') or code or 'no explanation'}",
                names=(code or None, text_in(fault, "type") or None),
                request_id=self._request_id,
                secrets=self._secrets,
            )
        error.response_over = True
        return error
