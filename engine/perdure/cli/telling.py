"""Events in words, one line each, for `perdure log` and for the notices of `perdure tail`."""

from __future__ import annotations

from typing import Any, Final

from perdure.cli.figures import count, dollars, size, things
from perdure.cli.moments import clock
from perdure.cli.terminal import one_line
from perdure.errors import PerdureError
from perdure.events import (
    Accepted,
    Archived,
    AttemptFailed,
    Cancelled,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    Failed,
    FileCreated,
    Interrupted,
    Redacted,
    Running,
    Submitted,
    UsageReported,
    decode,
    is_redacted,
)
from perdure.task import Usage

__all__ = ["tell", "tell_stored", "tell_usage"]

_QUOTED: Final = 60

_GOES_ON: Final = {
    "restart": "it begins again",
    "continue": "it goes on from its partial output",
    "reattach": "the same call is picked up",
    "fail": "it fails",
    "cancel": "it is cancelled",
}


def tell_stored(type_: str, schema_version: int, data: str, quoted: int = _QUOTED) -> str:
    """Return a stored event in words, also one that can't be read or whose content is gone.

    Args:
        type_: Its type.
        schema_version: The version of its form.
        data: Its JSON.
        quoted: Most characters of prompts and chunks to show.
    """
    try:
        event = decode(type_, schema_version, data)
    except PerdureError as error:
        return one_line(str(error))
    gone = "(content redacted) " if type_ != Redacted.type and is_redacted(data) else ""
    return gone + tell(event, quoted)


def tell(event: Event, quoted: int = _QUOTED) -> str:
    """Return an event in words, with at most so many characters of prompts and chunks."""
    match event:
        case Submitted() | Running() | Accepted():
            return _tell_start(event, quoted)
        case Chunk():
            kind = "" if event.kind == "text" else f"{event.kind} "
            if event.length is not None:
                return f"{kind}at {event.offset}, {things(event.length, 'character')}"
            return f"{kind}at {event.offset}: {one_line(event.text, quoted)!r}"
        case UsageReported():
            return tell_usage(event.usage)
        case FileCreated():
            return event.path + ("" if event.size is None else f", {size(event.size)}")
        case AttemptFailed() | Interrupted() | CancelRequested():
            return _tell_trouble(event)
        case Completed() | Failed() | Cancelled():
            return _tell_end(event)
        case Redacted():
            return _list(f"{things(len(event.tombstones), 'event')} by {event.by}", event.reason)
        case Archived():
            return f"{things(event.events, 'event')} to {event.archive} by {event.by}"
        case _:
            return one_line(event.model_dump_json(exclude_none=True), _QUOTED)


def _tell_start(event: Submitted | Running | Accepted, quoted: int) -> str:
    match event:
        case Submitted():
            turns: list[dict[str, Any]] = event.task.get("messages") or [{}]
            prompt = event.task.get("prompt") or turns[-1].get("content") or ""
            return _list(
                f"for {' or '.join(event.platforms)}",
                f"batch {event.task['batch']}" if event.task.get("batch") else None,
                f"again, after {event.task['retry_of']}" if event.task.get("retry_of") else None,
                repr(one_line(prompt, quoted)) if prompt else None,
            )
        case Running():
            on = event.platform + (f" ({event.model})" if event.model else "")
            how = "" if event.mode == "restart" else f", {_GOES_ON[event.mode]}"
            return f"attempt {event.attempt} on {on} by {event.worker}{how}"
        case Accepted():
            return _list(
                event.model,
                f"response {event.response_id}" if event.response_id else None,
                f"request {event.request_id}" if event.request_id else None,
                "can be picked up" if event.reattachable else None,
                event.note,
            )


_FOLLOWS: Final = {
    "retry": "the next attempt",
    "fallback": "the next platform",
    "reattach": "the same call is picked up",
    "repair": "the answer is handed back",
}


def _tell_trouble(event: AttemptFailed | Interrupted | CancelRequested) -> str:
    match event:
        case AttemptFailed():
            follows = _FOLLOWS[event.next]
            at = clock(event.retry_at.isoformat())
            return _list(
                f"attempt {event.attempt}: {event.error_class}: {one_line(event.message)}",
                _spent(event.usage, event.cost_usd),
                f"{follows} at {at}",
            )
        case Interrupted():
            why = "was lost" if event.reason == "worker_lost" else "handed it back"
            known = "what became of the call is unknown; " if event.outcome == "unknown" else ""
            return _list(
                f"attempt {event.attempt}: {event.worker} {why}; {known}{_GOES_ON[event.next]}",
                _spent(event.usage, event.cost_usd),
            )
        case CancelRequested():
            return _list(f"by {event.by}", event.reason)


def _tell_end(event: Completed | Failed | Cancelled) -> str:
    spent = _spent(event.usage, event.cost_usd)
    length = things(event.output_length, "character")
    match event:
        case Completed():
            return _list(event.finish_reason, length, spent)
        case Failed():
            return _list(
                f"{event.error_class}: {one_line(event.message)}",
                f"after {event.attempts} attempts" if event.attempts > 1 else None,
                f"partial output of {length}" if event.output_length else None,
                spent,
            )
        case Cancelled():
            return _list(
                f"by {event.by}" if event.by else None,
                event.reason,
                f"partial output of {length}" if event.output_length else None,
                spent,
            )


def _spent(usage: Usage | None, cost: float | None) -> str | None:
    parts = [
        tell_usage(usage) if usage is not None and usage.total_tokens is not None else None,
        dollars(cost) if cost is not None else None,
    ]
    return _list(*parts) or None


def tell_usage(usage: Usage) -> str:
    """Return token counts in words, what is unknown left out."""
    detail = _list(
        f"{count(usage.cache_read_tokens)} read from cache" if usage.cache_read_tokens else None,
        f"{count(usage.cache_write_tokens)} written to cache" if usage.cache_write_tokens else None,
    )
    thought = f" ({count(usage.reasoning_tokens)} reasoning)" if usage.reasoning_tokens else ""
    return _list(
        f"{count(usage.input_tokens)} tokens in" + (f" ({detail})" if detail else "")
        if usage.input_tokens is not None
        else None,
        f"{count(usage.output_tokens)} out{thought}" if usage.output_tokens is not None else None,
    )


def _list(*parts: str | None) -> str:
    return ", ".join(part for part in parts if part)
