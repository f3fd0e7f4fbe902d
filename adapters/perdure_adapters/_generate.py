"""Gemini's generateContent: a call into a request, a stream of chunks into events. All pure.

The reader takes whatever object may be in the stream, by name and with suspicion, and knows neither
the SDK nor the wire.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from perdure.adapter import Call, LoadedFile
from perdure.errors import (
    AuthenticationFailed,
    ContentRefused,
    InvalidRequest,
    Overloaded,
    PlatformError,
    StreamTruncated,
)
from perdure.events import Accepted, Chunk, Completed, Event, UsageReported
from perdure.task import Usage
from perdure_adapters._gemini_call import Turn, checked_options, conversation
from perdure_adapters._reading import count_in, list_in, raw_form, text_in, value_in
from perdure_adapters._tools import ToolCallText

__all__ = [
    "FINISH_REASONS",
    "GenerateReader",
    "generate_config",
    "generate_contents",
    "generate_options",
    "generate_usage",
]

_RESERVED: Final = ("contents", "model", "stream")

FINISH_REASONS: Final[Mapping[str, str | type[PlatformError]]] = {
    "STOP": "stop",
    "MAX_TOKENS": "length",
    # As many tokens as one request may have; to go on would be another request.
    "CONTINUATION": "length",
    # The platform called its own tools until it had enough of it, before the answer was there.
    "TOO_MANY_TOOL_CALLS": "length",
    # What was said, or was about to be, is held back.
    "BLOCKLIST": "content_filter",
    "ESCALATION": "content_filter",
    "IMAGE_PROHIBITED_CONTENT": "content_filter",
    "IMAGE_RECITATION": "content_filter",
    "IMAGE_SAFETY": "content_filter",
    "LANGUAGE": "content_filter",
    "MODEL_ARMOR": "content_filter",
    "PROHIBITED_CONTENT": "content_filter",
    "RECITATION": "content_filter",
    "SAFETY": "content_filter",
    "SPII": "content_filter",
    # The model or the platform got stuck: no answer, and the next attempt may give one.
    "FINISH_REASON_UNSPECIFIED": StreamTruncated,
    "IMAGE_OTHER": Overloaded,
    "MALFORMED_FUNCTION_CALL": Overloaded,
    "MALFORMED_RESPONSE": Overloaded,
    "NO_IMAGE": Overloaded,
    "OTHER": Overloaded,
    "UNEXPECTED_TOOL_CALL": Overloaded,
    # The same request would only end the same way.
    "MISSING_THOUGHT_SIGNATURE": InvalidRequest,
    "PUP_LIMITED_DISABLED": AuthenticationFailed,
}
"""Each of the platform's finish reasons as the common word, or as the error that it is."""

# Parts of words that say what a reason newer than this table is about.
_SUSPICIONS: Final = (
    ("content_filter", ("SAFETY", "PROHIBITED", "BLOCK", "FILTER", "RECITATION", "POLICY")),
    ("length", ("MAX_", "LIMIT", "LENGTH")),
)


def generate_contents(call: Call) -> list[dict[str, Any]]:
    """Return the conversation.

    Raises:
        InvalidRequest: A file is of a kind Gemini doesn't take, or they are too large together.
    """
    return [_content(turn) for turn in conversation(call)]


def _content(turn: Turn) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"inline_data": _blob(file)} for file in turn.files]
    return {"role": turn.role, "parts": [*parts, {"text": turn.text}]}


def _blob(file: LoadedFile) -> dict[str, Any]:
    return {
        "mime_type": file.attachment.media_type,
        "data": base64.urlsafe_b64encode(file.data).decode(),
    }


def generate_config(call: Call, *, thoughts: bool) -> dict[str, Any]:
    """Return the SDK's `GenerateContentConfig` as a mapping.

    Args:
        call: The call.
        thoughts: Whether to ask for what the model thinks.
    """
    task, limits = call.task, call.task.limits
    config: dict[str, Any] = {
        "system_instruction": task.system or None,
        "max_output_tokens": limits.max_tokens,
        "temperature": limits.temperature,
        "stop_sequences": list(limits.stop_sequences) or None,
        "thinking_config": _thinking(limits.reasoning_effort, thoughts),
        # Each request belongs in the log: the SDK neither goes on by itself nor calls functions.
        "automatic_continuation": False,
        "automatic_function_calling": {"disable": True},
    }
    if task.output_schema is not None:
        config["response_mime_type"] = "application/json"
        config["response_json_schema"] = task.output_schema
    if task.tools:
        config["tools"] = [
            {
                "function_declarations": [
                    {
                        "name": tool.name,
                        "description": tool.description or None,
                        "parameters_json_schema": tool.parameters,
                    }
                    for tool in task.tools
                ]
            }
        ]
    return {name: value for name, value in config.items() if value is not None}


def _thinking(effort: str | None, thoughts: bool) -> dict[str, Any] | None:
    if effort == "none":
        return {"thinking_budget": 0}
    config: dict[str, Any] = {"include_thoughts": True} if thoughts else {}
    if effort is not None:
        config["thinking_level"] = effort.upper()
    return config or None


def generate_options(call: Call) -> dict[str, Any]:
    """Return the task's options: what is put into the request's body, in the API's own names.

    Raises:
        InvalidRequest: One of them is the adapter's business.
    """
    return checked_options(call, _RESERVED)


def generate_usage(usage: object) -> Usage:
    """Return the tokens of an answer: input with what tools used, output with thoughts."""
    known_input = count_in(usage, "prompt_token_count")
    output = count_in(usage, "candidates_token_count")
    thoughts = count_in(usage, "thoughts_token_count")
    if known_input is not None:
        known_input += count_in(usage, "tool_use_prompt_token_count") or 0
    if output is not None or thoughts is not None:
        output = (output or 0) + (thoughts or 0)
    elif known_input is not None and known_input == count_in(usage, "total_token_count"):
        output = 0  # which isn't sent, as of an answer that was refused
    return Usage(
        input_tokens=known_input,
        output_tokens=output,
        cache_read_tokens=count_in(usage, "cached_content_token_count"),
        reasoning_tokens=thoughts,
        raw=raw_form(usage),
    )


class GenerateReader:
    """Turns the chunks of one stream into events; `finish` decides whether it was an answer."""

    def __init__(self) -> None:
        self._accepted = False
        self._called = False
        self._characters = 0
        self._finish_reason = ""
        self._finish_message = ""
        self._blocked = ""
        self._usage: Usage | None = None
        self._tools = ToolCallText()

    @property
    def ended(self) -> bool:
        """Whether the platform's own end marker has come: the answer is whole."""
        return bool(self._finish_reason or self._blocked)

    def feed(self, chunk: object) -> Iterator[Event]:
        """Yield what ``chunk`` says."""
        if not self._accepted:
            self._accepted = True
            yield Accepted(
                response_id=text_in(chunk, "response_id") or None,
                model=text_in(chunk, "model_version") or None,
            )
        feedback = value_in(chunk, "prompt_feedback")
        self._blocked = _word(feedback, "block_reason") or self._blocked
        candidate = _first_candidate(chunk)
        if candidate is not None:
            for part in list_in(value_in(candidate, "content"), "parts"):
                yield from self._part(part)
            self._finish_reason = _word(candidate, "finish_reason") or self._finish_reason
            self._finish_message = text_in(candidate, "finish_message") or self._finish_message
        usage = value_in(chunk, "usage_metadata")
        if usage is not None:
            yield from self._used(generate_usage(usage))

    def finish(self) -> Iterator[Event]:
        """Yield how it ended.

        Raises:
            ContentRefused: The prompt was blocked.
            StreamTruncated: The stream merely stopped.
            PlatformError: The platform's reason for the end is a fault.
        """
        reason = self._finish_reason
        if not reason and self._blocked:
            raise ContentRefused(f"Gemini blocked the prompt: {self._blocked}")
        if not reason:
            raise StreamTruncated(
                f"the stream ended without a finish reason, after {self._characters} characters "
                "of text"
            )
        normal = FINISH_REASONS.get(reason.upper()) or _suspected(reason.upper())
        if not isinstance(normal, str):
            why = f": {self._finish_message}" if self._finish_message else ""
            raise normal(f"Gemini gave up with the finish reason {reason}{why}")
        if normal == "stop" and self._called:
            normal = "tool_calls"
        yield Completed(finish_reason=normal, platform_finish_reason=reason, usage=self._usage)

    def _part(self, part: object) -> Iterator[Event]:
        text = text_in(part, "text")
        if text and value_in(part, "thought") is True:
            yield Chunk(text=text, kind="reasoning")
        elif text:
            self._characters += len(text)
            yield Chunk(text=text)
        call = value_in(part, "function_call")
        if call is not None:
            yield Chunk(text=self._call(call), kind="tool_call")

    def _call(self, call: object) -> str:
        self._called = True
        arguments: object = value_in(call, "args")
        text = self._tools.begin(text_in(call, "id"), text_in(call, "name"))
        text += self._tools.arguments(json.dumps(arguments or {}, ensure_ascii=False, default=str))
        return text + self._tools.close()

    def _used(self, usage: Usage) -> Iterator[Event]:
        before = self._usage
        if before is None or (usage.output_tokens or 0) >= (before.output_tokens or 0):
            self._usage = usage
            yield UsageReported(usage=usage)


def _suspected(reason: str) -> str | type[PlatformError]:
    """Return what a reason that nobody here has heard of is taken for: never for success."""
    for normal, words in _SUSPICIONS:
        if any(word in reason for word in words):
            return normal
    return Overloaded


def _first_candidate(chunk: object) -> object | None:
    for candidate in list_in(chunk, "candidates"):
        if value_in(candidate, "index") in (0, None):
            return candidate
    return None


def _word(holder: object, name: str) -> str:
    """Return a word of a vocabulary; empty where it is none. The SDK makes enums of most."""
    value = value_in(holder, name)
    value = getattr(value, "value", value)
    return value if isinstance(value, str) else ""
