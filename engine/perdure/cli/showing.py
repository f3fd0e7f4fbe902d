"""Everything that is known of one task: gathered, and laid out for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from perdure.cli.figures import count, dollars, seconds, size
from perdure.cli.moments import clock, day_and_clock, duration, how_long_ago
from perdure.cli.records import ENDED, find_task_row, first_event_row, record_of, text_so_far
from perdure.cli.tables import paint
from perdure.cli.terminal import is_terminal, json_text, one_line
from perdure.store.readonly import Reader
from perdure.text import printable

__all__ = ["gather", "lay_out"]

Known = dict[str, Any]

_MOST_CHARACTERS: Final = 2000
_MOST_LINES: Final = 30
_LABEL_WIDTH: Final = 12

_ATTEMPTS: Final = """
    SELECT attempt, platform, model, worker, mode, started_at, ended_at, outcome, error_class,
           error, cost_usd
    FROM attempts WHERE task_id = ? ORDER BY attempt
"""


def gather(reader: Reader, task_id: str) -> Known:
    """Return all that is known of a task: its row, and what stands elsewhere.

    Raises:
        PerdureError: It has no row; that is what `perdure rebuild` mends.
    """
    known = record_of(find_task_row(reader, task_id))
    if known["status"] not in ENDED:
        known["partial_output"] = text_so_far(reader, task_id)
    known["duration_seconds"] = duration(known["started_at"], known["ended_at"])
    known["definition"] = _definition(reader, task_id)
    known["redacted"] = known["definition"] is None and known["archived"] is None
    known["runs"] = [dict(attempt) for attempt in reader.rows(_ATTEMPTS, (task_id,))]
    again = reader.one("SELECT task_id FROM tasks WHERE retry_of = ?", (task_id,))
    known["retried_as"] = None if again is None else again["task_id"]
    return known


def _definition(reader: Reader, task_id: str) -> Known | None:
    """Return the task as it was submitted, its long texts in place; None once it is gone."""
    from perdure.events import Submitted, decode, is_redacted
    from perdure.store.content import restore

    first = first_event_row(reader, task_id)
    if first is None or is_redacted(first["data"]):
        return None
    event = decode(first["type"], first["schema_version"], first["data"])
    if not isinstance(event, Submitted):
        return None
    content = {
        digest: bytes(blob["data"])
        for digest in set(event.blobs.values())
        if (blob := reader.one("SELECT data FROM blobs WHERE digest = ?", (digest,)))
    }
    task = restore(event.task, event.blobs, content)
    return {
        **task.model_dump(mode="json", exclude_defaults=True, exclude={"task_id"}),
        "platforms": list(event.platforms),
    }


def lay_out(known: Known, *, full: bool) -> Iterator[str]:
    """Yield the lines that show a task to people.

    Args:
        known: What `gather` returned.
        full: Show long texts whole.
    """
    status = known["status"]
    cancelling = " (cancellation requested)" if known["cancel_requested"] else ""
    yield paint(_text(known["task_id"]), "bold") + "  " + paint(status, status) + cancelling
    for label, value in _facts(known):
        if value:
            yield f"  {label:<{_LABEL_WIDTH}}{_text(value)}"
    for attempt in known["runs"]:
        yield f"  {'attempt':<{_LABEL_WIDTH}}{_text(_attempt(attempt))}"
    for heading, text in _texts(known):
        yield ""
        yield paint(_text(heading), "dim")
        yield from _shortened(text, full=full)


def _facts(known: Known) -> Iterator[tuple[str, str | None]]:
    definition: Known = known["definition"] or {}
    tried = definition.get("platforms") or [known["platform"]]
    yield "platform", _joined(known["platform"], known["model"])
    if len(tried) > 1:
        yield "platforms", f"{', then '.join(tried)}"
    yield "submitted", _when(known["submitted_at"])
    if known["status"] == "pending":
        yield "due", _when(known["available_at"])
    waited = duration(known["submitted_at"], known["started_at"])
    if known["started_at"]:
        yield "started", f"{_when(known['started_at'])}, waited {seconds(waited)}"
    if known["ended_at"]:
        ran = known["duration_seconds"]
        took = f", ran {seconds(ran)}" if ran is not None else ""
        yield "ended", f"{_when(known['ended_at'])}{took}"
    yield "worker", known["worker"] if known["status"] == "running" else None
    yield "type", known["type"]
    yield "priority", str(known["priority"]) if known["priority"] != 5 else None
    yield "batch", known["batch"]
    yield "key", known["key"]
    yield "labels", _pairs(known["labels"])
    yield "parents", ", ".join(definition.get("parents") or filter(None, [known["parent"]]))
    yield "again", f"of {known['retry_of']}" if known["retry_of"] else None
    yield "run again", f"as {known['retried_as']}" if known["retried_as"] else None
    yield "constraints", _pairs(definition.get("constraints") or {})
    yield "options", _pairs(definition.get("options") or {})
    yield "metadata", _pairs(definition.get("metadata") or {})
    yield "files", ", ".join(_file(file) for file in definition.get("files") or ())
    yield "continues", definition.get("continue_from")
    yield "tools", ", ".join(tool["name"] for tool in definition.get("tools") or ())
    yield "schema", "yes" if definition.get("output_schema") is not None else None
    yield "created", ", ".join(known["files_created"])
    yield "called", "; ".join(_call(call) for call in known["tool_calls"])
    yield "usage", _usage(known)
    if known["cost_usd"] is not None:
        yield "cost", dollars(known["cost_usd"])
    elif known["attempts"]:
        yield "cost", "unknown"
    yield "finish", known["finish_reason"]
    if known["error_class"]:
        yield "error", f"{known['error_class']}: {one_line(known['error'] or '')}"
    if known["redacted"]:
        yield "content", "redacted"
    if known["archived"] is not None:
        asked = shlex.join(("perdure", "show", known["task_id"], "--db", known["archived"]))
        yield "content", f"in the archive {known['archived']}: `{asked}`"


def _texts(known: Known) -> Iterator[tuple[str, str]]:
    definition: Known = known["definition"] or {}
    if definition.get("system"):
        yield "system", definition["system"]
    context: Known = definition.get("context") or {}
    for name, value in context.items():
        yield f"context: {name}", value if isinstance(value, str) else json_text(value)
    for turn in (definition.get("messages") or ())[:-1]:
        yield turn["role"], turn["content"]
    if known["prompt"] is not None:
        yield "prompt", known["prompt"]
    if known["output"] is not None:
        yield "output", known["output"]
    elif known["partial_output"]:
        so_far = known["status"] not in ENDED
        yield "output so far" if so_far else "partial output", known["partial_output"]


def _shortened(text: str, *, full: bool) -> Iterator[str]:
    shown = text
    if not full:
        shown = "\n".join(shown.split("\n")[:_MOST_LINES])[:_MOST_CHARACTERS]
    yield from _text(shown).split("\n")
    if len(shown) < len(text):
        yield paint(f"… {len(text) - len(shown):,} more characters; --full shows them", "dim")


def _attempt(attempt: Mapping[str, Any]) -> str:
    ended = attempt["ended_at"]
    took = seconds(duration(attempt["started_at"], ended)) if ended else "under way"
    error = one_line(attempt["error"] or "", 200)
    what = ": ".join(part for part in (attempt["error_class"], error) if part)
    return ", ".join(
        part
        for part in (
            f"{attempt['attempt']} on {_joined(attempt['platform'], attempt['model'])}",
            f"{clock(attempt['started_at'])}, {took}",
            attempt["outcome"] if ended else None,
            what or None,
        )
        if part
    )


def _usage(known: Known) -> str | None:
    if known["input_tokens"] is None and known["output_tokens"] is None:
        return "unknown" if known["attempts"] else None
    parts = [f"{count(known['input_tokens'])} tokens in", f"{count(known['output_tokens'])} out"]
    for name, words in (
        ("cache_read_tokens", "read from cache"),
        ("cache_write_tokens", "written to cache"),
        ("reasoning_tokens", "reasoning"),
    ):
        if known[name]:
            parts.append(f"{count(known[name])} {words}")
    return ", ".join(parts)


def _when(moment: str) -> str:
    return f"{day_and_clock(moment)} ({how_long_ago(moment)})"


def _joined(platform: str, model: str | None) -> str:
    return f"{platform} ({model})" if model else platform


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _call(call: Any) -> str:  # noqa: ANN401 - what the model made of it
    """Return a tool call as one would write it; one that the model garbled as it is."""
    match call:
        case {"name": str(name), "arguments": arguments}:
            return f"{name}({json.dumps(arguments, ensure_ascii=False)})"
        case _:
            return str(call)


def _file(file: object) -> str:
    match file:
        case {"name": str(name), "media_type": str(kind), "size": int(octets)}:
            return f"{name} ({kind}, {size(octets)})"
        case _:
            return str(file)


def _text(text: str) -> str:
    """Return text as it may be shown; the colours around it are put there after this."""
    return printable(text) if is_terminal() else text
