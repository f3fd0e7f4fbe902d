"""A call as a request to `/v1/messages`. Pure: no SDK, no wire."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, cast

from perdure.adapter import Call, LoadedFile
from perdure.errors import InvalidRequest
from perdure.task import Tool
from perdure_adapters._claude_models import ClaudeModel, claude_model
from perdure_adapters._prompt import file_kind, file_text, follow_up, opening

__all__ = ["message_body"]

# What the adapter decides itself; as an option it would break the reading of the answer.
_RESERVED: Final = ("messages", "model", "stream")

_MB: Final = 1024 * 1024
_MAX_REQUEST: Final = 32 * _MB
"""Bytes of a request; what is sent as base64 is a third larger than its file."""
_MAX_IMAGE: Final = 10 * _MB
"""Bytes of one image as base64."""

# What a task's words for effort are in `output_config.effort`, which has nothing below `low`.
_EFFORTS: Final = {"minimal": "low", "low": "low", "medium": "medium", "high": "high"}
# What they are in tokens, for models that are given a budget.
_BUDGETS: Final = {"minimal": 1_024, "low": 2_048, "medium": 8_192, "high": 16_384}
_SMALLEST_BUDGET: Final = 1_024


def message_body(call: Call, model: str, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the whole body of the request.

    Args:
        call: What is asked for.
        model: The model that is asked.
        schema: The task's `output_schema` in the form that the platform takes.

    Raises:
        InvalidRequest: The model can't honour something, a file is too large or of a kind that
            Claude doesn't take, or `options` holds a field that is the adapter's business.
    """
    task = call.task
    options = task.options
    for name in _RESERVED:
        if name in options:
            raise InvalidRequest(f"options.{name}: perdure sets this itself; remove it")
    betas: object = options.get("betas", [])
    if not isinstance(betas, list):
        raise InvalidRequest("options.betas: must be a list of names")
    limits = task.limits
    known = claude_model(model)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": options.get("max_tokens", limits.max_tokens or known.max_tokens),
    }
    if task.system:
        body["system"] = task.system
    if limits.temperature is not None:
        body["temperature"] = _temperature(limits.temperature, model, known)
    if limits.stop_sequences:
        body["stop_sequences"] = list(limits.stop_sequences)
    if limits.reasoning_effort is not None:
        body |= _reasoning(limits.reasoning_effort, model, known, body["max_tokens"])
    if schema is not None:
        form = {"type": "json_schema", "schema": schema}
        body["output_config"] = {**body.get("output_config", {}), "format": form}
    if task.tools:
        body["tools"] = [_tool(tool) for tool in task.tools]
    body = _with_options(body, options)
    body["messages"] = _messages(call, prefill=known.prefill and _plain_text(body))
    return body


def _with_options(body: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``body`` with the task's options; tools join those that are there."""
    merged = {**body, **options}
    for name in ("tools", "output_config"):
        ours, theirs = body.get(name), options.get(name)
        if isinstance(ours, list) and isinstance(theirs, list):
            merged[name] = [*ours, *theirs]
        elif isinstance(ours, dict) and isinstance(theirs, dict):
            merged[name] = {**cast("dict[str, Any]", ours), **cast("dict[str, Any]", theirs)}
    return merged


def _temperature(temperature: float, model: str, known: ClaudeModel) -> float:
    if not known.temperature:
        raise InvalidRequest(
            f"temperature: {model} takes none any more; leave it out, or ask a model of Claude's "
            "generation 4.6 or older"
        )
    if temperature > 1:
        raise InvalidRequest(f"temperature: {temperature:g} is above 1, the most that Claude takes")
    return temperature


def _reasoning(
    effort: Literal["none", "minimal", "low", "medium", "high"],
    model: str,
    known: ClaudeModel,
    max_tokens: object,
) -> dict[str, Any]:
    """Return the fields that say how much to think."""
    if known.thinking == "none":
        if effort == "none":
            return {}
        raise InvalidRequest(f"reasoning_effort: {model} can't reason; leave it out")
    if effort == "none":
        return {"thinking": {"type": "disabled"}}
    if known.thinking == "adaptive":
        # Unless they are asked for, the newest models keep their thoughts to themselves.
        thinking = {"type": "adaptive", "display": "summarized"}
        return {"thinking": thinking, "output_config": {"effort": _EFFORTS[effort]}}
    most = max_tokens if isinstance(max_tokens, int) else known.max_tokens
    if most <= _SMALLEST_BUDGET:
        raise InvalidRequest(
            f"reasoning_effort: {model} thinks within max_tokens, at least {_SMALLEST_BUDGET}: "
            f"raise max_tokens, which is {most}, or leave the effort out"
        )
    budget = max(_SMALLEST_BUDGET, min(_BUDGETS[effort], most // 2))
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}


def _tool(tool: Tool) -> dict[str, Any]:
    named: dict[str, Any] = {"name": tool.name}
    if tool.description:
        named["description"] = tool.description
    return {**named, "input_schema": {"type": "object", **tool.parameters}}


def _plain_text(body: Mapping[str, Any]) -> bool:
    """Whether nothing is asked for that rules out handing back the beginning of an answer."""
    thinking = body.get("thinking")
    thinks = isinstance(thinking, dict) and cast("dict[str, Any]", thinking).get("type") not in (
        "disabled",
        None,
    )
    config = body.get("output_config")
    bound = isinstance(config, dict) and "format" in cast("dict[str, Any]", config)
    return not thinks and not bound


def _messages(call: Call, *, prefill: bool) -> list[dict[str, Any]]:
    """Return the conversation: earlier turns, facts and files with the question, what follows."""
    task = call.task
    messages: list[dict[str, Any]] = [
        {"role": turn.role, "content": turn.content} for turn in task.messages[:-1]
    ]
    texts, others = _sorted_files(call.files)
    question = opening(task, texts) + task.question
    content: str | list[dict[str, Any]] = question
    if others:
        content = [*others, {"type": "text", "text": question}]
    messages.append({"role": "user", "content": content})
    more = follow_up(call)
    if more is None:
        return messages
    said, wanted = more
    messages.append({"role": "assistant", "content": said})
    continues = call.resume is not None and call.resume.mode == "continue"
    # What ends with white space is refused as a beginning, and without it could come twice.
    if not (prefill and continues and said == said.rstrip()):
        messages.append({"role": "user", "content": wanted})
    return messages


def _sorted_files(
    files: Sequence[LoadedFile],
) -> tuple[list[tuple[str, str]], list[dict[str, Any]]]:
    """Return the names and contents of texts, and the blocks for the others."""
    _check_sizes(files)
    texts: list[tuple[str, str]] = []
    blocks: list[dict[str, Any]] = []
    for file in files:
        match file_kind(file.attachment):
            case "text":
                texts.append((file.attachment.name, file_text(file)))
            case "image":
                blocks.append({"type": "image", "source": _source(file)})
            case "pdf":
                named = {"type": "document", "title": file.attachment.name}
                blocks.append({**named, "source": _source(file)})
            case None:
                raise InvalidRequest(
                    f"the file {file.attachment.name!r} is {file.attachment.media_type}; Claude "
                    "takes text, images (PNG, JPEG, GIF, WebP) and PDF: convert it, or leave it out"
                )
    return texts, blocks


def _source(file: LoadedFile) -> dict[str, Any]:
    media_type = file.attachment.media_type.partition(";")[0].strip().lower()
    data = base64.b64encode(file.data).decode()
    return {"type": "base64", "media_type": media_type, "data": data}


def _check_sizes(files: Sequence[LoadedFile]) -> None:
    total = 0
    for file in files:
        kind = file_kind(file.attachment)
        size = len(file.data) if kind == "text" else (len(file.data) + 2) // 3 * 4
        total += size
        if kind == "image" and size > _MAX_IMAGE:
            raise InvalidRequest(
                f"the image {file.attachment.name!r} has {len(file.data) / _MB:.1f} MB; Claude "
                f"takes {_MAX_IMAGE * 3 / 4 / _MB:.1f} MB: scale it down"
            )
    if total > _MAX_REQUEST:
        largest = max(files, key=lambda file: len(file.data))
        raise InvalidRequest(
            f"the files make a request of {total / _MB:.1f} MB; Claude takes "
            f"{_MAX_REQUEST // _MB} MB: leave some out, the largest is "
            f"{largest.attachment.name!r} with {len(largest.data) / _MB:.1f} MB"
        )
