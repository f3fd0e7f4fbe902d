"""From events to rows of `tasks`: one fold, used live by the writer and again by `rebuild`.

A row is a function of the task's events and of nothing else, so it can be thrown away at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

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

__all__ = ["ChangingColumns", "TaskFold", "TaskRow"]


# So many pieces of text are kept one by one.
MOST_PIECES: Final = 1000


class TaskRow(NamedTuple):
    """A row of `tasks`: what its columns hold, in their order, but for the time as a moment."""

    stream_id: int
    task_id: str
    status: str
    platform: str
    model: str | None
    type: str | None
    priority: int
    attempts: int
    worker: str | None
    available_at: datetime
    cancel_requested: bool
    prompt: str | None
    output: str | None
    partial_output: str | None
    finish_reason: str | None
    error_class: str | None
    error: str | None
    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    submitted_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    batch: str | None
    key: str | None
    fingerprint: str | None
    parent: str | None
    retry_of: str | None
    labels: str
    files_created: str | None
    tool_calls: str | None
    archived: str | None


class ChangingColumns(NamedTuple):
    """The key of a row of `tasks`, and the columns that events after the first change."""

    stream_id: int
    status: str
    platform: str
    model: str | None
    attempts: int
    worker: str | None
    available_at: datetime
    cancel_requested: bool
    output: str | None
    partial_output: str | None
    finish_reason: str | None
    error_class: str | None
    error: str | None
    input_tokens: int | None
    output_tokens: int | None
    cache_read_tokens: int | None
    cache_write_tokens: int | None
    reasoning_tokens: int | None
    cost_usd: float | None
    started_at: datetime | None
    ended_at: datetime | None
    files_created: str | None
    tool_calls: str | None
    archived: str | None


class Content(NamedTuple):
    """What a row holds of what was asked."""

    prompt: str | None
    labels: str


class _FixedColumns(NamedTuple):
    type: str | None
    priority: int
    prompt: str | None
    batch: str | None
    key: str | None
    fingerprint: str | None
    parent: str | None
    retry_of: str | None
    labels: str


class TaskFold:
    """A task's events, folded so far.

    Attributes:
        task_id: The stream.
        stream_id: Its key; 0 until the stream is stored.
        asked: Its first event, where somebody thought that worth keeping.
    """

    __slots__ = (
        *("_calls", "_chunks", "_fixed", "_joined", "_length", "_state", "_text"),
        *("asked", "stream_id", "task_id"),
    )

    def __init__(self, task_id: str, stream_id: int = 0) -> None:
        self.task_id = task_id
        self.stream_id = stream_id
        self.asked: Submitted | None = None
        self._state: TaskState | None = None
        # Chunks of text that the state doesn't have yet, and the length of the output with them:
        # most of all events are such, and a state is a large thing to make anew for each.
        self._chunks = 0
        self._length = 0
        self._text: list[str] = []
        self._joined = 0  # so many of them are no single pieces any more, which take memory
        self._calls: list[str] = []
        self._fixed: _FixedColumns | None = None

    @property
    def version(self) -> int:
        """The version folded so far; 0 for none."""
        return 0 if self._state is None else self._state.version + self._chunks

    @property
    def ended(self) -> bool:
        """Whether the task has ended; there must have been a first event."""
        return self._state is not None and self._state.status.ended

    @property
    def state(self) -> TaskState:
        """Where the task stands; there must have been a first event."""
        if self._state is None:
            raise LookupError(f"nothing of {self.task_id} was folded yet")
        if self._chunks:
            self._state = extend(self._state, self._chunks, self._length)
            self._chunks = 0
        return self._state

    @property
    def text(self) -> str:
        """The output so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
            self._joined = 1
        return self._text[0] if self._text else ""

    @property
    def tool_calls(self) -> str | None:
        """The calls that the model asked for, as a JSON array; None where there are none."""
        return _tool_calls("".join(self._calls)) if self._calls else None

    def apply(self, events: Sequence[Event], at: datetime) -> None:
        """Fold in what was recorded at ``at``, all of it or, on an error, nothing.

        Raises:
            InvalidTransition: One of the events can't follow.
        """
        if len(events) == 1:
            self.apply_one(events[0], at)
            return
        state = None if self._state is None else self.state
        for event in events:
            state = evolve(state, event, at)
        self._state = state
        for event in events:
            self._keep(event)

    def apply_one(self, event: Event, at: datetime) -> None:
        """Fold in one event that was recorded at ``at``.

        Raises:
            InvalidTransition: It can't follow.
        """
        if (
            type(event) is Chunk
            and event.kind == "text"
            and event.cursor is None
            and event.length is None
            and self.apply_text(event.offset, event.text)
        ):
            return
        self._state = evolve(None if self._state is None else self.state, event, at)
        self._keep(event)

    def apply_text(self, offset: int, text: str) -> bool:
        """Fold in a chunk that is text and no more; returns whether it could follow."""
        state = self._state
        if state is None or state.status is not TaskStatus.RUNNING:
            return False
        length = self._length if self._chunks else state.length()
        if offset != length:
            return False
        self._length = length + len(text)
        self._chunks += 1
        self._add_text(text)
        return True

    def _add_text(self, text: str) -> None:
        self._text.append(text)
        if len(self._text) - self._joined > MOST_PIECES:
            self._text[self._joined :] = ["".join(self._text[self._joined :])]
            self._joined += 1

    def _forget_text(self) -> None:
        self._text.clear()
        self._joined = 0

    def _keep(self, event: Event) -> None:
        # Not by `isinstance`, which for pydantic's models is a call in Python wherever it says no.
        if type(event) is Chunk:
            if event.kind == "text":
                self._add_text(event.text)
            elif event.kind == "tool_call":
                self._calls.append(event.text)
        elif type(event) is Running:
            if event.mode == "restart":
                self._forget_text()
                self._calls.clear()
        elif type(event) is Submitted:
            self._fixed = _fixed_columns(event)
        elif type(event) is Redacted or type(event) is Archived:
            self._forget_text()
            self._calls.clear()
            if type(event) is Archived:
                self._fixed = _fixed_columns_left(event.row)

    def new_row(self) -> TaskRow:
        """Return the whole row, for a task that has none yet.

        Only where the fold began with the first event that there is; the fixed part is given away
        once, so that a cache of folds doesn't keep every prompt.
        """
        fixed = self._fixed
        if fixed is None:
            raise ValueError(f"{self.task_id}: the fixed columns are known only to the first row")
        self._fixed = None
        if self.state.redacted:
            fixed = fixed._replace(**REDACTED._asdict())
        c = self.changing_columns()
        return TaskRow(
            c.stream_id,
            self.task_id,
            c.status,
            c.platform,
            c.model,
            fixed.type,
            fixed.priority,
            c.attempts,
            c.worker,
            c.available_at,
            c.cancel_requested,
            fixed.prompt,
            c.output,
            c.partial_output,
            c.finish_reason,
            c.error_class,
            c.error,
            c.input_tokens,
            c.output_tokens,
            c.cache_read_tokens,
            c.cache_write_tokens,
            c.reasoning_tokens,
            c.cost_usd,
            self.state.submitted_at,
            c.started_at,
            c.ended_at,
            fixed.batch,
            fixed.key,
            fixed.fingerprint,
            fixed.parent,
            fixed.retry_of,
            fixed.labels,
            c.files_created,
            c.tool_calls,
            c.archived,
        )

    def content_left(self) -> Content | None:
        """Return what is left of a row's content once that is gone; None while it is there."""
        if self.state.archive is not None and self._fixed is not None:
            return Content(self._fixed.prompt, self._fixed.labels)
        return REDACTED if self.state.redacted else None

    def changing_columns(self) -> ChangingColumns:
        """Return the columns that events after the first change."""
        state = self.state
        status = state.status
        usage = state.total_usage
        text = calls = None
        if status.ended:
            calls = self.tool_calls
            if not state.redacted and state.archive is None:
                text = self.text
        completed = status is TaskStatus.COMPLETED
        return ChangingColumns(
            self.stream_id,
            status.value,
            state.platform,
            state.model,
            state.attempt,
            state.worker,
            state.available_at,
            state.cancel is not None,
            text if completed else None,
            None if completed else text,
            state.finish_reason,
            state.error_class,
            state.error,
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
            state.total_cost,
            state.started_at,
            state.ended_at,
            canonical(list(state.files)).decode() if state.files else None,
            calls,
            state.archive,
        )


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


# What a redaction leaves of a row's content, beside the output.
REDACTED: Final = Content(None, "{}")


def _fixed_columns(event: Submitted) -> _FixedColumns:
    task = event.task
    parents: Sequence[str] = task.get("parents") or ()
    messages = task.get("messages")
    labels = task.get("labels")
    return _FixedColumns(
        type=task.get("type"),
        priority=task.get("priority", 5),
        prompt=messages[-1].get("content") if messages else task.get("prompt"),
        batch=task.get("batch"),
        key=task.get("key"),
        fingerprint=task.get("fingerprint"),
        parent=parents[0] if parents else None,
        retry_of=task.get("retry_of"),
        labels=canonical(labels).decode() if labels else "{}",
    )


def _fixed_columns_left(row: ArchivedRow) -> _FixedColumns:
    return _FixedColumns(
        type=row.type,
        priority=row.priority,
        prompt=None,
        batch=row.batch,
        key=row.key,
        fingerprint=row.fingerprint,
        parent=row.parent,
        retry_of=row.retry_of,
        labels=canonical(row.labels).decode(),
    )
