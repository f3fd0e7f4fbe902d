"""Gemini's Interactions: a call into a request, a stream of events into ours. All pure.

The reader takes events as the JSON they came as, by name and with suspicion, and knows neither the
SDK nor the wire.

A cursor is the id of the platform's last event, and after it what whoever picks the stream up there
has to know of what came before: `<event id> called` where functions were called, `<event id> <step>
<0 or 1>` while a call is open, 1 where its arguments have begun.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from perdure.adapter import Call, LoadedFile
from perdure.errors import InvalidRequest, PlatformError, StreamTruncated
from perdure.events import Accepted, Chunk, ChunkKind, Completed, Event, UsageReported
from perdure.task import Usage
from perdure_adapters._gemini import fault_error
from perdure_adapters._gemini_call import Turn, checked_options, conversation, merged
from perdure_adapters._prompt import file_kind
from perdure_adapters._reading import count_in, list_in, raw_form, text_in, value_in
from perdure_adapters._tools import ToolCallText

__all__ = ["InteractionReader", "cursor_event", "interaction_body", "interaction_usage"]

# What the adapter decides itself; as an option it would break the reading of the answer.
_RESERVED: Final = ("input", "model", "stream", "agent")

# How an interaction has ended -> the word all platforms share.
_ENDS: Final[Mapping[str, str]] = {
    "completed": "stop",
    "requires_action": "tool_calls",
    "incomplete": "length",
    "budget_exceeded": "length",
    # As many tokens as one request may have. In the background the platform goes on by itself.
    "requires_continuation": "length",
}
_FAILURES: Final = frozenset({"failed", "cancelled"})


def interaction_body(call: Call, *, thoughts: bool) -> dict[str, Any]:
    """Return the request's body, without model, `stream`, `background` and `store`.

    Args:
        call: The call.
        thoughts: Whether to ask for what the model thinks.

    Raises:
        InvalidRequest: It asks for what Interactions can't do.
    """
    task, limits = call.task, call.task.limits
    options = checked_options(call, _RESERVED)
    if limits.reasoning_effort == "none":
        raise InvalidRequest(
            "reasoning_effort: Gemini's Interactions can't switch thinking off; take 'minimal', or "
            'GeminiAdapter(api="generate")'
        )
    generation: dict[str, Any] = {
        "max_output_tokens": limits.max_tokens,
        "temperature": limits.temperature,
        "stop_sequences": list(limits.stop_sequences) or None,
        "thinking_level": limits.reasoning_effort,
        "thinking_summaries": "auto" if thoughts else None,
    }
    generation = {name: value for name, value in generation.items() if value is not None}
    body: dict[str, Any] = {"input": [_step(turn) for turn in conversation(call)]}
    if task.system:
        body["system_instruction"] = task.system
    if generation:
        body["generation_config"] = generation
    if task.output_schema is not None:
        body["response_format"] = {
            "type": "text",
            "mime_type": "application/json",
            "schema": task.output_schema,
        }
    if task.tools:
        body["tools"] = [
            {
                "type": "function",
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "parameters": tool.parameters,
            }
            for tool in task.tools
        ]
    return merged(body, options)


def _step(turn: Turn) -> dict[str, Any]:
    content = [_file_content(file) for file in turn.files]
    content.append({"type": "text", "text": turn.text})
    return {"type": "user_input" if turn.role == "user" else "model_output", "content": content}


def _file_content(file: LoadedFile) -> dict[str, Any]:
    return {
        "type": "document" if file_kind(file.attachment) == "pdf" else "image",
        "mime_type": file.attachment.media_type,
        "data": base64.b64encode(file.data).decode(),
    }


def interaction_usage(usage: object) -> Usage:
    """Return the tokens of an interaction: input with what tools used, output with thoughts."""
    known_input = count_in(usage, "total_input_tokens")
    tool_use = count_in(usage, "total_tool_use_tokens") or 0
    output = count_in(usage, "total_output_tokens")
    thoughts = count_in(usage, "total_thought_tokens")
    total = count_in(usage, "total_tokens")
    with_thoughts = output
    if output is not None and thoughts:
        parts = (known_input or 0) + tool_use + output
        # The total says whether the output has the thoughts in it already.
        with_thoughts = output if total == parts else output + thoughts
    return Usage(
        input_tokens=None if known_input is None else known_input + tool_use,
        output_tokens=with_thoughts,
        cache_read_tokens=count_in(usage, "total_cached_tokens"),
        reasoning_tokens=thoughts,
        raw=raw_form(usage),
    )


@dataclass(frozen=True, slots=True)
class _Cursor:
    """Where a stream goes on, and the function call that is open there."""

    event_id: str
    called: bool = False
    step: int | None = None
    arguments: bool = False

    @classmethod
    def parse(cls, text: str) -> _Cursor:
        event_id, _, state = text.partition(" ")
        step, _, arguments = state.partition(" ")
        return cls(event_id, bool(state), int(step) if step.isdecimal() else None, arguments == "1")

    def __str__(self) -> str:
        if self.step is not None:
            return f"{self.event_id} {self.step} {int(self.arguments)}"
        return f"{self.event_id} called" if self.called else self.event_id


def cursor_event(cursor: str | None) -> str | None:
    """Return the id of the event after which a stream goes on; None for its beginning."""
    return (_Cursor.parse(cursor).event_id or None) if cursor else None


class InteractionReader:
    """Turns the events of one stream into ours; `finish` decides whether it was an answer.

    Args:
        background: Whether the interaction goes on without us.
        cursor: Where the stream was picked up; None for one that begins.
        note: Something to tell about this attempt.
        where: What the platform is called in errors.
        secrets: What must not be in them.

    Attributes:
        response_id: The interaction's id, as soon as it is known.
        reported: Whether an error event has come: the interaction may be over, or only the stream.
    """

    def __init__(
        self,
        *,
        background: bool,
        cursor: str | None = None,
        note: str | None = None,
        where: str = "Gemini",
        secrets: tuple[str | None, ...] = (),
    ) -> None:
        self.response_id: str | None = None
        self.reported = False
        self._background = background
        self._note = note
        self._where = where
        self._secrets = secrets
        self._status = ""
        self._ended = False
        self._usage: Usage | None = None
        self._problem: Mapping[str, Any] = {}
        self._event_id = ""
        self._tools = ToolCallText()
        self._step: int | None = None
        self._begun = False
        self._whole_call: tuple[str, str, str] | None = None
        self._called = False
        self._after: str | None = None
        self._held: list[object] | None = None
        self._picked_up = cursor is not None
        if cursor is not None:
            self._take_up(_Cursor.parse(cursor))

    @property
    def ended(self) -> bool:
        """Whether the platform's own end marker has come: there is nothing more to read."""
        return self._ended

    def _take_up(self, cursor: _Cursor) -> None:
        self._event_id, self._called = cursor.event_id, cursor.called
        self._after = cursor.event_id or None
        if cursor.step is None:
            return
        self._step, self._begun = cursor.step, cursor.arguments
        self._tools.begin("", "")  # written down before: only its end is missing
        if cursor.arguments:
            self._tools.arguments("{")

    def feed(self, event: object) -> Iterator[Event]:
        """Yield what ``event`` says.

        Raises:
            PlatformError: It is an error, or contradicts what came before.
        """
        kind = text_in(event, "event_type")
        if not kind or kind == "error":  # a gateway's errors have no kind
            fault = _fault(event)
            if fault is not None:
                raise self._error(fault)
            raise StreamTruncated(f"{self._where} sent something unreadable into the stream")
        event_id = text_in(event, "event_id")
        if event_id and event_id == self._after:  # what was read last: all before it was read, too
            self._after = self._held = None
            return
        if self._after is not None and kind == "interaction.created":
            self._held = []
        if self._held is not None and kind != "interaction.completed":
            # It begins again: whether what follows was read before is known as soon as that comes.
            self._held.append(event)
            return
        held, self._held = self._held or [], None
        for one in (*held, event):
            yield from self._said(one)

    def _said(self, event: object) -> Iterator[Event]:
        event_id = text_in(event, "event_id")
        if event_id and " " not in event_id:
            self._event_id = event_id
        match text_in(event, "event_type"):
            case "interaction.created":
                yield from self._created(value_in(event, "interaction"))
            case "interaction.status_update":
                self._status = text_in(event, "status") or self._status
                yield from self._used(event)
            case "step.start":
                yield from self._start(event)
            case "step.delta":
                yield from self._delta(event)
            case "step.stop":
                yield from self._stop(event)
                yield from self._used(event)
            case "interaction.completed":
                self._completed(value_in(event, "interaction"))
            case _:  # what a newer API may add
                pass

    def finish(self) -> Iterator[Event]:
        """Yield how it ended.

        Raises:
            StreamTruncated: The stream merely stopped.
            PlatformError: The interaction failed.
        """
        if self._status in _FAILURES:
            raise self._failed()
        normal = _ENDS.get(self._status) if self._ended else None
        if normal is None:
            status = f"in the state {self._status!r}" if self._status else "without a state"
            raise StreamTruncated(f"the stream of the interaction ended {status}")
        if self._problem:
            raise self._failed()
        rest = self._close_call()
        if rest:
            yield self._chunk(rest, "tool_call")
        if normal == "stop" and self._called:
            normal = "tool_calls"
        yield Completed(
            finish_reason=normal, platform_finish_reason=self._status, usage=self._usage
        )

    # -- the interaction -------------------------------------------------------------------------

    def _created(self, interaction: object) -> Iterator[Event]:
        self.response_id = text_in(interaction, "id") or self.response_id
        self._status = text_in(interaction, "status") or self._status
        if self._picked_up:  # it is in the log
            return
        alive = self._background and self.response_id is not None
        yield Accepted(
            response_id=self.response_id,
            model=text_in(interaction, "model") or None,
            reattachable=alive,
            cursor=self._cursor() if alive else None,
            note=self._note,
        )

    def _completed(self, interaction: object) -> None:
        self._ended = True
        self._status = text_in(interaction, "status") or self._status
        usage = value_in(interaction, "usage")
        if usage is not None:
            self._usage = interaction_usage(usage)
        for step in list_in(interaction, "steps"):
            self._note_problem(step)

    def _used(self, event: object) -> Iterator[Event]:
        usage = value_in(event, "usage")
        if usage is None:
            return
        found = interaction_usage(usage)
        before = self._usage
        if before is None or (found.output_tokens or 0) >= (before.output_tokens or 0):
            self._usage = found
            yield UsageReported(usage=found)

    def _error(self, fault: Mapping[str, Any]) -> PlatformError:
        self.reported = True
        message = fault.get("message") or fault.get("code") or "an error without a message"
        return fault_error(
            f"{self._where} reported: {message}",
            fault,
            secrets=self._secrets,
            response_over=not self._background,
        )

    def _failed(self) -> PlatformError:
        problem = self._problem
        if not problem and self._status == "cancelled":
            return InvalidRequest(
                "the interaction was cancelled at the platform, not by perdure: run the task again",
                response_over=True,
            )
        message = problem.get("message") or "the platform gives no reason"
        return fault_error(
            f"{self._where}: the interaction ended as {self._status!r}: {message}",
            problem,
            secrets=self._secrets,
            response_over=True,
        )

    def _note_problem(self, step: object) -> None:
        fault = _fault(step) or {}
        if any(fault.get(name) for name in ("code", "message", "details", "status")):
            self._problem = fault

    # -- its steps -------------------------------------------------------------------------------

    def _start(self, event: object) -> Iterator[Event]:
        step = value_in(event, "step")
        match text_in(step, "type"):
            case "function_call":
                yield from self._begin_call(_index(event), step)
            case "model_output":
                self._note_problem(step)
                yield from self._texts(list_in(step, "content"), "text")
            case "thought":
                yield from self._texts(list_in(step, "summary"), "reasoning")
            case _:
                pass

    def _texts(self, contents: list[object], kind: ChunkKind) -> Iterator[Event]:
        for content in contents:
            if not isinstance(value_in(content, "text"), str | None):
                raise StreamTruncated(f"{self._where} sent a text that is none")
        text = "".join(text_in(content, "text") for content in contents)
        if text and self._whole_call is not None:  # the cursor goes past it: it is written before
            yield self._chunk(self._close_call(), "tool_call")
        if text:
            yield self._chunk(text, kind)

    def _begin_call(self, index: int, step: object) -> Iterator[Event]:
        id_, name = text_in(step, "id"), text_in(step, "name")
        arguments = value_in(step, "arguments")
        before = self._close_call()
        self._step, self._begun, self._called = index, False, True
        if arguments:
            # Whether they are all there is only known at the step's end: nothing is written before.
            self._whole_call = (id_, name, json.dumps(arguments, ensure_ascii=False, default=str))
        else:
            before += self._tools.begin(id_, name)
        if before:
            yield self._chunk(before, "tool_call")

    def _delta(self, event: object) -> Iterator[Event]:
        delta = value_in(event, "delta")
        kind = text_in(delta, "type")
        if not kind and value_in(delta, "arguments") is not None:
            kind = "arguments_delta"  # the SDK takes it for that, too
        match kind:
            case "text":
                yield from self._texts([delta], "text")
            case "thought_summary":
                yield from self._texts([value_in(delta, "content")], "reasoning")
            case "arguments_delta":
                yield from self._arguments(_index(event), text_in(delta, "arguments"))
            case _:
                pass

    def _arguments(self, index: int, piece: str) -> Iterator[Event]:
        if not piece:
            return
        if index != self._step or not (self._tools.open or self._whole_call):
            raise StreamTruncated(
                f"{self._where} sent arguments of a function call that is not open (step {index})"
            )
        text = ""
        if self._whole_call is not None:  # they come in pieces after all
            text = self._tools.begin(*self._whole_call[:2])
            self._whole_call = None
        more = self._tools.arguments(piece)
        self._begun = self._begun or bool(more)
        if text or more:
            yield self._chunk(text + more, "tool_call")

    def _stop(self, event: object) -> Iterator[Event]:
        if self._step is None or _index(event) != self._step:
            return
        text = self._close_call()
        self._step = None
        if text:
            yield self._chunk(text, "tool_call")

    def _close_call(self) -> str:
        """Return what completes the call that is open; empty where none is."""
        text = ""
        if self._whole_call is not None:
            id_, name, arguments = self._whole_call
            text = self._tools.begin(id_, name) + self._tools.arguments(arguments)
            self._whole_call = None
        return text + self._tools.close()

    def _chunk(self, text: str, kind: ChunkKind) -> Chunk:
        return Chunk(text=text, kind=kind, cursor=self._cursor() if self._background else None)

    def _cursor(self) -> str | None:
        if not self._event_id:
            return None
        open_step = self._step if self._tools.open else None
        return str(_Cursor(self._event_id, self._called, open_step, self._begun))


def _index(event: object) -> int:
    return count_in(event, "index") or 0


def _fault(holder: object) -> dict[str, Any] | None:
    """Return the error that an event or a step tells of; None where it tells of none."""
    fault = value_in(holder, "error")
    if isinstance(fault, str):
        return {"message": fault}
    return cast("dict[str, Any]", fault) if isinstance(fault, dict) else None
