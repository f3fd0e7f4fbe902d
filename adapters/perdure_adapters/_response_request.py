"""A call as a request to OpenAI's Responses API; pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from perdure.adapter import Call, LoadedFile
from perdure.errors import InvalidRequest
from perdure.task import Task, Tool
from perdure_adapters._prompt import file_kind, file_text, follow_up, opening
from perdure_adapters._strict import is_strict

__all__ = ["check_sizes", "response_input", "response_parameters", "wants_background"]

# What the adapter decides itself; as an option it would break the reading of the answer.
_RESERVED: Final = ("input", "model", "stream")
_MERGED: Final = ("reasoning", "text")
_MOST_BYTES: Final = 50 * 1024 * 1024
"""Of all images and documents of one request, as OpenAI documents it."""


def wants_background(call: Call, otherwise: bool) -> bool:
    """Return whether the call is to go on at the platform without us.

    Args:
        call: Its options `background` and `store` say so first; what isn't stored there can't go
            on there.
        otherwise: What holds where they say nothing.

    Raises:
        InvalidRequest: One of the options is neither true nor false.
    """
    chosen = {name: call.task.options.get(name) for name in ("background", "store")}
    for name, value in chosen.items():
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(f"options.{name}: must be true or false")
    if chosen["background"] is not None:
        if chosen["background"] and chosen["store"] is False:
            raise InvalidRequest(
                "options.background: what runs in the background has to be stored; "
                "remove options.store, or the background"
            )
        return bool(chosen["background"])
    return otherwise and chosen["store"] is not False


def response_parameters(call: Call) -> dict[str, Any]:
    """Return the body's fields besides model, input, `stream`, `background` and `store`.

    Raises:
        InvalidRequest: The task asks for something that this API doesn't have, or `options` holds
            a field that is the adapter's business.
    """
    task, limits = call.task, call.task.limits
    options = dict(task.options)
    for name in _RESERVED:
        if name in options:
            raise InvalidRequest(f"options.{name}: perdure sets this itself; remove it")
    if limits.stop_sequences:
        raise InvalidRequest(
            "stop_sequences: the Responses API has none; remove them, or use chat completions: "
            'ChatGPTAdapter(api="chat"), or api = "chat" under [platforms.chatgpt] in perdure.toml'
        )
    options.pop("background", None)
    parameters: dict[str, Any] = {}
    if task.system:
        parameters["instructions"] = task.system
    if limits.max_tokens is not None:
        parameters["max_output_tokens"] = limits.max_tokens
    if limits.temperature is not None:
        parameters["temperature"] = limits.temperature
    if limits.reasoning_effort is not None:
        parameters["reasoning"] = {"effort": limits.reasoning_effort}
    if task.output_schema is not None:
        parameters["text"] = {"format": _format(task.output_schema)}
    if task.tools:
        parameters["tools"] = [*map(_tool, task.tools), *_own_tools(options)]
    for name in _MERGED:
        given = options.get(name)
        if name in parameters and isinstance(given, Mapping):
            options[name] = {**parameters[name], **cast("Mapping[str, Any]", given)}
    return {**parameters, **options}


def _own_tools(options: dict[str, Any]) -> list[object]:
    """Take the platform's own tools out of the options: they go beside the task's."""
    own: object = options.pop("tools", [])
    if not isinstance(own, list):
        raise InvalidRequest("options.tools: must be a list")
    return cast("list[object]", own)


def _format(schema: Mapping[str, Any]) -> dict[str, Any]:
    title = schema.get("title")
    name = re.sub("[^a-zA-Z0-9_-]", "_", title)[:64] if isinstance(title, str) else ""
    return {
        "type": "json_schema",
        "name": name or "output",
        "schema": schema,
        "strict": is_strict(schema),
    }


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {
        "type": "function",
        "name": tool.name,
        "parameters": tool.parameters,
        "strict": is_strict(tool.parameters),  # without a word it would be strict, and refused
    }
    if tool.description:
        function["description"] = tool.description
    return function


def response_input(call: Call) -> list[dict[str, Any]]:
    """Return the conversation: earlier turns, facts and files with the question, what follows.

    Raises:
        InvalidRequest: A file is of a kind the platform doesn't take, or all are too large.
    """
    task = call.task
    items = [_turn(turn.role, turn.content) for turn in task.messages[:-1]]
    items.append({"role": "user", "content": _question(task, call.files)})
    more = follow_up(call)
    if more is not None:
        items += [_turn("assistant", more[0]), _turn("user", more[1])]
    return items


def _turn(role: str, text: str) -> dict[str, Any]:
    if role == "user":
        return {"role": role, "content": text}
    # Servers other than OpenAI's take an earlier answer in this form only.
    content = [{"type": "output_text", "text": text}]
    return {"type": "message", "role": role, "content": content}


def _question(task: Task, files: Sequence[LoadedFile]) -> Any:  # noqa: ANN401 - text, or parts
    check_sizes(files)
    texts: list[tuple[str, str]] = []
    parts: list[dict[str, Any]] = []
    for file in files:
        match file_kind(file.attachment):
            case "text":
                texts.append((file.attachment.name, file_text(file)))
            case "image":
                parts.append({"type": "input_image", "image_url": _data_url(file)})
            case "pdf":
                name = file.attachment.name
                parts.append({"type": "input_file", "filename": name, "file_data": _data_url(file)})
            case None:
                raise InvalidRequest(
                    f"the file {file.attachment.name!r} is {file.attachment.media_type}; this "
                    "platform takes text, images (PNG, JPEG, GIF, WebP) and PDF: convert it, or "
                    "leave it out"
                )
    question = opening(task, texts) + task.question
    return [*parts, {"type": "input_text", "text": question}] if parts else question


def check_sizes(files: Sequence[LoadedFile]) -> None:
    """Raise `InvalidRequest` where images and documents are more than the platform takes."""
    sizes = {f.attachment.name: len(f.data) for f in files if file_kind(f.attachment) != "text"}
    if sum(sizes.values()) > _MOST_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        raise InvalidRequest(
            f"the files are {sum(sizes.values()) / 1e6:.1f} MB together, {largest!r} being the "
            f"largest; the platform takes {_MOST_BYTES / 1e6:.1f} MB: leave some out, or make "
            "them smaller"
        )


def _data_url(file: LoadedFile) -> str:
    media_type = file.attachment.media_type.partition(";")[0].strip().lower()
    return f"data:{media_type};base64,{base64.b64encode(file.data).decode()}"
