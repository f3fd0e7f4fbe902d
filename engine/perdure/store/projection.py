"""From events to rows of `tasks`: one fold, used live by the writer and again by `rebuild`.

A row is a function of the task's events and of nothing else, so it can be thrown away at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import orjson

from perdure.events import (
    Archived,
    ArchivedRow,
    Chunk,
    Event,
    Redacted,
    Running,
    Submitted,
    canonical,
)
from perdure.lifecycle import TaskState, evolve, extend
from perdure.task import TaskStatus
from perdure.text import check_json

__all__ = ["REDACTED_COLUMNS", "TaskFold"]

Row = dict[str, Any]


class TaskFold:
    """A task's events, folded so far.

    Attributes:
        task_id: The stream.
        stream_id: Its key; 0 until the stream is stored.
    """

    __slots__ = ("_calls", "_fixed", "_state", "_text", "stream_id", "task_id")

    def __init__(self, task_id: str, stream_id: int = 0) -> None:
        self.task_id = task_id
        self.stream_id = stream_id
        self._state: TaskState | None = None
        self._text: list[str] = []
        self._calls: list[str] = []
        self._fixed: Row | None = None

    @property
    def version(self) -> int:
        """The version folded so far; 0 for none."""
        return 0 if self._state is None else self._state.version

    @property
    def state(self) -> TaskState:
        """Where the task stands; there must have been a first event."""
        if self._state is None:
            raise LookupError(f"nothing of {self.task_id} was folded yet")
        return self._state

    @property
    def text(self) -> str:
        """The output so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return self._text[0] if self._text else ""

    @property
    def tool_calls(self) -> str | None:
        """The calls that the model asked for, as a JSON array; None where there are none."""
        return _tool_calls("".join(self._calls)) if self._calls else None

    def apply(self, events: Iterable[Event], at: datetime) -> None:
        """Fold in what was recorded at ``at``, all of it or, on an error, nothing.

        Raises:
            InvalidTransition: One of the events can't follow.
        """
        events = tuple(events)
        state = self._state
        for event in events:
            state = evolve(state, event, at)
        self._state = state
        for event in events:
            self._keep(event)

    def apply_text(self, pieces: Sequence[tuple[int, str]]) -> None:
        """Fold in chunks of text, offset and text of each: all of them or, on an error, nothing.

        Raises:
            InvalidTransition: One of them can't follow.
        """
        self._state = extend(self.state, pieces)
        self._text.append("".join([text for _offset, text in pieces]))

    def apply_one(self, event: Event, at: datetime) -> None:
        """Fold in one event that was recorded at ``at``.

        Raises:
            InvalidTransition: It can't follow.
        """
        self._state = evolve(self._state, event, at)
        self._keep(event)

    def _keep(self, event: Event) -> None:
        # Not by `isinstance`, which for pydantic's models is a call in Python wherever it says no.
        if type(event) is Chunk:
            if event.kind == "text":
                self._text.append(event.text)
            elif event.kind == "tool_call":
                self._calls.append(event.text)
        elif type(event) is Running:
            if event.mode == "restart":
                self._text.clear()
                self._calls.clear()
        elif type(event) is Submitted:
            self._fixed = _fixed_columns(event)
        elif type(event) is Redacted or type(event) is Archived:
            self._text.clear()
            self._calls.clear()
            if type(event) is Archived:
                self._fixed = _fixed_columns_left(event.row)

    def new_row(self) -> Row:
        """Return all columns, for a task that has no row yet.

        Only where the fold began with the first event that there is; the fixed part is given away
        once, so that a cache of folds doesn't keep every prompt.
        """
        if self._fixed is None:
            raise ValueError(f"{self.task_id}: the fixed columns are known only to the first row")
        row = {"task_id": self.task_id, **self._fixed, **self.changing_columns()}
        self._fixed = None
        if self.state.redacted:
            row.update(REDACTED_COLUMNS)
        return row

    def content_columns(self) -> Row | None:
        """Return what is left of a row's content once that is gone; None while it is there."""
        if self.state.archive is not None and self._fixed is not None:
            return {name: self._fixed[name] for name in REDACTED_COLUMNS}
        return REDACTED_COLUMNS if self.state.redacted else None

    def changing_columns(self) -> Row:
        """Return the columns that events after the first change."""
        state = self.state
        usage = state.total_usage
        text = None if state.redacted or state.archive is not None else self.text
        unsuccessful = state.status in (TaskStatus.FAILED, TaskStatus.CANCELLED)
        return {
            "stream_id": self.stream_id,
            "status": state.status.value,
            "platform": state.platform,
            "model": state.model,
            "attempts": state.attempt,
            "worker": state.worker,
            "available_at": state.available_at,
            "cancel_requested": state.cancel is not None,
            "output": text if state.status is TaskStatus.COMPLETED else None,
            "partial_output": text if unsuccessful else None,
            "finish_reason": state.finish_reason,
            "error_class": state.error_class,
            "error": state.error,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "cache_read_tokens": usage.cache_read_tokens,
            "cache_write_tokens": usage.cache_write_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "cost_usd": state.total_cost,
            "submitted_at": state.submitted_at,
            "started_at": state.started_at,
            "ended_at": state.ended_at,
            "files_created": canonical(list(state.files)).decode() if state.files else None,
            "tool_calls": self.tool_calls if state.status.ended else None,
            "archived": state.archive,
        }


def _tool_calls(lines: str) -> str | None:
    """Return the calls as a JSON array; None where there are none.

    Args:
        lines: One JSON object a line. Arguments that are no JSON, as models write them at times,
            make a line of their own kind: it stays as text.
    """
    calls = [_tool_call(line) for line in lines.split("\n") if line]
    return canonical(calls).decode() if calls else None


def _tool_call(line: str) -> Any:  # noqa: ANN401 - what the model made of it
    try:
        return check_json(orjson.loads(line))
    except ValueError:
        return line


# What a redaction takes out of a row, beside the output.
REDACTED_COLUMNS: Row = {"prompt": None, "labels": "{}"}


def _fixed_columns(event: Submitted) -> Row:
    task = event.task
    parents: Sequence[str] = task.get("parents") or ()
    messages = task.get("messages")
    return {
        "type": task.get("type"),
        "priority": task.get("priority", 5),
        "prompt": messages[-1].get("content") if messages else task.get("prompt"),
        "batch": task.get("batch"),
        "key": task.get("key"),
        "fingerprint": task.get("fingerprint"),
        "parent": parents[0] if parents else None,
        "retry_of": task.get("retry_of"),
        "labels": orjson.dumps(task.get("labels") or {}, option=orjson.OPT_SORT_KEYS).decode(),
    }


def _fixed_columns_left(row: ArchivedRow) -> Row:
    return {
        "type": row.type,
        "priority": row.priority,
        "prompt": None,
        "batch": row.batch,
        "key": row.key,
        "fingerprint": row.fingerprint,
        "parent": row.parent,
        "retry_of": row.retry_of,
        "labels": canonical(row.labels).decode(),
    }
