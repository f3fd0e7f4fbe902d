"""The chat-completions format: a call into a request, a stream of chunks into events.

Everything here is pure: it reads whatever JSON a server may send in a chunk, by name and with
suspicion, and knows neither the SDK nor the wire.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

from perdure.adapter import Call, LoadedFile
from perdure.errors import InvalidRequest, Overloaded, StreamTruncated
from perdure.events import Accepted, Chunk, ChunkKind, Completed, Event, UsageReported
from perdure.task import Tool, Usage
from perdure_adapters._prompt import file_kind, file_text, follow_up, opening
from perdure_adapters._reading import count_in, list_in, raw_form, text_in, value_in
from perdure_adapters._sdk import typed_error
from perdure_adapters._tools import ToolCallText

__all__ = ["ChatReader", "chat_messages", "chat_parameters", "chat_usage"]

# What the adapter decides itself; as an option it would break the reading of the answer.
_RESERVED: Final = ("messages", "model", "n", "stream", "stream_options")

_FINISH_REASONS: Final[Mapping[str, str]] = {
    "content_filter": "content_filter",
    "function_call": "tool_calls",
    "length": "length",
    "max_length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "refusal": "content_filter",
    "safety": "content_filter",
    "stop": "stop",
    "tool_calls": "tool_calls",
    "tool_use": "tool_calls",
}
# Reasons by which routers and servers say that they gave up: no answer, whatever came before.
_FAULTS: Final = frozenset(
    {"abort", "cancelled", "error", "insufficient_system_resource", "network_error"}
)


def chat_parameters(call: Call) -> dict[str, Any]:
    """Return the body's fields besides the model and the messages.

    Raises:
        InvalidRequest: `options` holds a field that is the adapter's business.
    """
    options = call.task.options
    for name in _RESERVED:
        if name in options:
            raise InvalidRequest(f"options.{name}: perdure sets this itself; remove it")
    limits = call.task.limits
    parameters: dict[str, Any] = {}
    if limits.max_tokens is not None and "max_completion_tokens" not in options:
        parameters["max_tokens"] = limits.max_tokens
    if limits.temperature is not None:
        parameters["temperature"] = limits.temperature
    if limits.stop_sequences:
        parameters["stop"] = list(limits.stop_sequences)
    if limits.reasoning_effort is not None:
        parameters["reasoning_effort"] = limits.reasoning_effort
    if call.task.output_schema is not None:
        parameters["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "output", "schema": call.task.output_schema},
        }
    if call.task.tools:
        parameters["tools"] = [_tool(tool) for tool in call.task.tools]
    return {**parameters, **options}


def chat_messages(call: Call) -> list[dict[str, Any]]:
    """Return the conversation: system prompt, earlier turns, facts and files with the question.

    Raises:
        InvalidRequest: A file is neither text nor an image.
    """
    task = call.task
    messages: list[dict[str, Any]] = []
    if task.system:
        messages.append({"role": "system", "content": task.system})
    messages += [{"role": turn.role, "content": turn.content} for turn in task.messages[:-1]]
    texts, images = _sorted_files(call.files)
    question = opening(task, texts) + task.question
    content: str | list[dict[str, Any]] = question
    if images:
        content = [{"type": "image_url", "image_url": {"url": _data_url(i)}} for i in images]
        content.append({"type": "text", "text": question})
    messages.append({"role": "user", "content": content})
    more = follow_up(call)
    if more is not None:
        messages.append({"role": "assistant", "content": more[0]})
        messages.append({"role": "user", "content": more[1]})
    return messages


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _sorted_files(files: Sequence[LoadedFile]) -> tuple[list[tuple[str, str]], list[LoadedFile]]:
    texts: list[tuple[str, str]] = []
    images: list[LoadedFile] = []
    for file in files:
        kind = file_kind(file.attachment)
        if kind == "text":
            texts.append((file.attachment.name, file_text(file)))
        elif kind == "image":
            images.append(file)
        else:
            raise InvalidRequest(
                f"the file {file.attachment.name!r} is {file.attachment.media_type}; this platform "
                "takes text and images (PNG, JPEG, GIF, WebP): convert it, or leave it out"
            )
    return texts, images


def _data_url(file: LoadedFile) -> str:
    return f"data:{file.attachment.media_type};base64,{base64.b64encode(file.data).decode()}"


def chat_usage(usage: object) -> Usage:
    """Return the tokens a chat server reports: totals that include the cached and the reasoned."""
    prompt_details = value_in(usage, "prompt_tokens_details")
    output_details = value_in(usage, "completion_tokens_details")
    input_tokens = count_in(usage, "prompt_tokens")
    output_tokens = count_in(usage, "completion_tokens")
    reasoning = count_in(output_details, "reasoning_tokens")
    if reasoning and input_tokens is not None and output_tokens is not None:
        # Some servers leave reasoning out of the output; the total gives it away.
        missing = (count_in(usage, "total_tokens") or 0) - input_tokens - output_tokens
        if missing == reasoning:
            output_tokens += reasoning
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        cache_read_tokens=count_in(prompt_details, "cached_tokens"),
        cache_write_tokens=count_in(prompt_details, "cache_write_tokens"),
        reasoning_tokens=reasoning,
        raw=raw_form(usage),
    )


class ChatReader:
    """Turns the chunks of one stream into events; `finish` decides whether it was an answer.

    Args:
        request_id: The platform's id of the request, from the response's headers.
        note: Something to tell about this attempt.
        secrets: What must not be in the message of an error.
    """

    def __init__(
        self,
        request_id: str | None = None,
        note: str | None = None,
        secrets: Sequence[str | None] = (),
    ) -> None:
        self._request_id = request_id
        self._note = note
        self._secrets = secrets
        self._accepted = False
        self._characters = 0
        self._finish_reason: str | None = None
        self._refused = False
        self._usage: Usage | None = None
        self._tools = _ToolCalls()

    @property
    def ended(self) -> bool:
        """Whether the platform's own end marker has come: the answer is whole."""
        return self._finish_reason is not None

    def feed(self, chunk: object) -> Iterable[Event]:
        """Return what ``chunk`` says.

        Raises:
            PlatformError: It says that the server failed; what it said before that comes first.
        """
        if value_in(chunk, "object") == "error":  # older servers, without an `error` around it
            raise typed_error(
                text_in(chunk, "message") or "the server reported an error",
                names=(str(value_in(chunk, "code")), text_in(chunk, "type")),
                request_id=self._request_id,
                secrets=self._secrets,
            )
        said: list[Event] = []
        if not self._accepted:
            self._accepted = True
            said.append(
                Accepted(
                    response_id=text_in(chunk, "id") or None,
                    request_id=self._request_id,
                    model=text_in(chunk, "model") or None,
                    note=self._note,
                )
            )
        choice = _first_choice(chunk)
        if choice is not None:
            try:
                self._delta(value_in(choice, "delta"), said)
            except StreamTruncated as error:
                return _until(said, error)
            self._finish_reason = text_in(choice, "finish_reason") or self._finish_reason
        usage = value_in(chunk, "usage")
        if usage is not None:
            self._usage = chat_usage(usage)
            if choice is not None:
                said.append(UsageReported(usage=self._usage))
        return said

    def finish(self) -> Iterator[Event]:
        """Yield what is left, `Completed` as the last.

        Raises:
            StreamTruncated: The stream ended without the platform's end marker.
            Overloaded: The platform's end marker says that it gave up.
        """
        reason = self._finish_reason
        if reason is None:
            raise StreamTruncated(
                f"the stream ended without a finish reason, after {self._characters} characters "
                "of text",
                request_id=self._request_id,
            )
        if reason.lower() in _FAULTS:
            raise Overloaded(
                f"the server gave up with the finish reason {reason!r}",
                request_id=self._request_id,
            )
        rest = self._tools.close()
        if rest:
            yield Chunk(text=rest, kind="tool_call")
        normal = "content_filter" if self._refused else _FINISH_REASONS.get(reason.lower(), "stop")
        yield Completed(finish_reason=normal, platform_finish_reason=reason, usage=self._usage)

    def _delta(self, delta: object, said: list[Event]) -> None:
        """Add to ``said`` what there is in a delta; called for each piece of each answer."""
        if delta is None:
            return
        reasoning = text_in(delta, "reasoning_content") or text_in(delta, "reasoning")
        if reasoning:
            said.append(Chunk.piece(reasoning, "reasoning"))
        content = value_in(delta, "content")
        if isinstance(content, str):
            if content:
                self._characters += len(content)
                said.append(Chunk.piece(content))
        elif content is not None:
            for kind, text in _parts(content):
                self._characters += len(text) if kind == "text" else 0
                said.append(Chunk(text=text, kind=kind))
        refusal = text_in(delta, "refusal")
        if refusal:
            self._refused = True
            self._characters += len(refusal)
            said.append(Chunk(text=refusal))
        calls = list_in(delta, "tool_calls")
        called = "".join([self._tools.feed(call) for call in calls]) if calls else ""
        if called:
            said.append(Chunk(text=called, kind="tool_call"))


class _ToolCalls:
    """Puts the pieces of calls together, whose order and numbers servers see differently."""

    def __init__(self) -> None:
        self._index: object = None
        self._id: str = ""
        self._begun: set[tuple[object, str]] = set()
        self._text = ToolCallText()

    def feed(self, call: object) -> str:
        """Return the text that one delta adds.

        Raises:
            StreamTruncated: It is one of a call that was closed when the next one began.
        """
        function = value_in(call, "function")
        index = count_in(call, "index")
        id_ = text_in(call, "id")
        text = ""
        # Some servers number all calls 0 and tell them apart by their id alone.
        if not self._text.open or index != self._index or (id_ and id_ != self._id):
            name = text_in(function, "name")
            nameless = self._text.open and not (id_ or name)
            if nameless or (index, id_) in self._begun:
                raise StreamTruncated("the server sent arguments of a tool call that isn't open")
            self._index, self._id = index, id_
            self._begun.add((index, id_))
            text = self._text.begin(id_, name)
        arguments = value_in(function, "arguments")
        if arguments is not None and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return text + self._text.arguments(arguments or "")

    def close(self) -> str:
        """Return what completes the call that is open; empty where none is."""
        return self._text.close()


def _until(said: Sequence[Event], error: StreamTruncated) -> Iterator[Event]:
    """Yield what was said before ``error``, and raise that."""
    yield from said
    raise error


def _first_choice(chunk: object) -> object | None:
    for choice in list_in(chunk, "choices"):
        if value_in(choice, "index") in (0, None):
            return choice
    return None


def _parts(content: object) -> Iterator[tuple[ChunkKind, str]]:
    """Yield the pieces of a content that some servers send as a list of typed parts."""
    for part in cast("list[object]", content) if isinstance(content, list) else ():
        if isinstance(part, Mapping):
            yield from _part(cast("Mapping[str, object]", part))


def _part(part: Mapping[str, object]) -> Iterator[tuple[ChunkKind, str]]:
    thinking = part.get("thinking")
    said: list[tuple[ChunkKind, object]] = [("reasoning", thinking), ("text", part.get("text"))]
    if isinstance(thinking, list):
        thoughts = cast("list[object]", thinking)
        said.extend(("reasoning", _field(thought, "text")) for thought in thoughts)
    for kind, text in said:
        if isinstance(text, str) and text:
            yield kind, text


def _field(part: object, name: str) -> object:
    return cast("Mapping[str, object]", part).get(name) if isinstance(part, Mapping) else None
