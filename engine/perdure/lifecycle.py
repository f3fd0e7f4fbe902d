"""The life of a task as a pure fold: `evolve(state, event, at) -> state`.

No I/O and no clock. The writer folds each event before it commits it, rebuild folds the same events
again, so what is in the log can always be folded. What may follow what::

                       ┌──────────── attempt_failed, interrupted ───────────┐
                       v                                                    │
    submitted ──> pending ── running ──> running ── accepted, chunk, usage, ┤
                       │                    │       file_created,           │
                       │                    │       cancel_requested ───────┘
                       └─> failed,          └─> completed, failed, cancelled
                           cancelled
                                                    then only: redacted; archived, the last
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, NamedTuple, cast

from perdure.errors import InvalidTransition
from perdure.events import (
    Accepted,
    Archived,
    AttemptFailed,
    Cancelled,
    CancelRequested,
    Chunk,
    ChunkKind,
    Completed,
    Event,
    Failed,
    FileCreated,
    Interrupted,
    Redacted,
    Running,
    StartMode,
    Submitted,
    UsageReported,
)
from perdure.task import TaskStatus, Usage

__all__ = ["TaskState", "evolve", "extend"]

_NOTHING: Final[Mapping[ChunkKind, int]] = MappingProxyType({})


class TaskState(NamedTuple):
    """Where a task stands after some version of its stream.

    A named tuple, since one is made for every event: a frozen data class of this size takes seven
    times as long to replace.

    Attributes:
        version: The version this state includes.
        platforms: The platforms to try, in order; `platform` is the one in use or next in turn.
        attempt: Attempts started so far.
        failures: Attempts that failed on the present platform.
        interruptions: Attempts whose worker was lost.
        repairs: Answers of the present platform that were handed back to be repaired.
        repairing: Whether the next attempt is such a repair; `error` says of what.
        worker: The owner, while running.
        next_mode: How the next attempt begins.
        available_at: When the next attempt may begin.
        accepted: What the platform named its response, for picking it up again.
        cursor: Where the platform's stream goes on.
        lengths: Characters of output, by kind.
        usage: Tokens of the present or last attempt.
        earlier_usage: Tokens of the attempts before it.
        cost_usd: US dollars of all attempts that ended; None where unknown.
        unpriced: Whether some attempt used tokens whose price is unknown.
        archive: The file that the events were moved into, once they were.
    """

    version: int
    status: TaskStatus
    platforms: tuple[str, ...]
    platform: str
    submitted_at: datetime
    available_at: datetime
    model: str | None = None
    attempt: int = 0
    failures: int = 0
    interruptions: int = 0
    repairs: int = 0
    repairing: bool = False
    worker: str | None = None
    next_mode: StartMode = "restart"
    cancel: CancelRequested | None = None
    accepted: Accepted | None = None
    cursor: str | None = None
    lengths: Mapping[ChunkKind, int] = _NOTHING
    usage: Usage | None = None
    earlier_usage: Usage | None = None
    cost_usd: float | None = None
    unpriced: bool = False
    error_class: str | None = None
    error: str | None = None
    finish_reason: str | None = None
    files: tuple[str, ...] = ()
    started_at: datetime | None = None
    ended_at: datetime | None = None
    redacted: bool = False
    archive: str | None = None

    @property
    def total_usage(self) -> Usage:
        """Tokens of all attempts."""
        if self.earlier_usage is None:
            return self.usage or _NO_USAGE
        return self.earlier_usage + (self.usage or _NO_USAGE)

    @property
    def total_cost(self) -> float | None:
        """US dollars of all attempts; None as soon as one of them has no known price."""
        return None if self.unpriced else self.cost_usd

    @property
    def open_call(self) -> tuple[str, str] | None:
        """Platform and id of a response that may go on without anybody listening."""
        accepted = self.accepted
        if accepted is None or not accepted.reattachable or accepted.response_id is None:
            return None
        if self.status is TaskStatus.PENDING and self.next_mode != "reattach":
            return None  # it was given up, and what comes next is another one
        return self.platform, accepted.response_id

    def length(self, kind: ChunkKind = "text") -> int:
        """Characters of output of that kind."""
        return self.lengths.get(kind, 0)


_NO_USAGE: Final = Usage()
_PENDING: Final = frozenset({TaskStatus.PENDING})
_RUNNING: Final = frozenset({TaskStatus.RUNNING})
_LIVE: Final = _PENDING | _RUNNING
_ENDED: Final = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})


def evolve(state: TaskState | None, event: Event, at: datetime) -> TaskState:
    """Return the state after ``event``.

    Args:
        state: The state before; None before the first event.
        event: What happened.
        at: When it was recorded (UTC).

    Raises:
        InvalidTransition: The event can't follow what was before.
    """
    if state is None:
        if isinstance(event, Archived):
            return _from_archived(event)
        if not isinstance(event, Submitted):
            raise InvalidTransition(f"{event.type!r} can't be the first event of a task")
        if not event.platforms:
            raise InvalidTransition("'submitted' names no platform")
        constraints = event.task.get("constraints")
        return TaskState(
            version=1,
            status=TaskStatus.PENDING,
            platforms=event.platforms,
            platform=event.platforms[0],
            submitted_at=at,
            available_at=at,
            model=cast("dict[str, Any]", constraints).get("model")
            if isinstance(constraints, dict)
            else None,
        )
    rule = _RULES.get(type(event))
    if rule is None:
        raise InvalidTransition(f"{event.type!r} can only be the first event of a task")
    allowed, step = rule
    if state.status not in allowed:
        raise InvalidTransition(f"{event.type!r} can't follow: the task is {state.status}")
    return step(state, event, at)


def extend(state: TaskState, chunks: int, length: int) -> TaskState:
    """Return the state after chunks of text that can follow, as `evolve` does one by one.

    Args:
        state: The state before, of a running task.
        chunks: How many.
        length: Characters of output after them.
    """
    values: list[Any] = list(state)
    values[_AT.version] += chunks
    values[_AT.lengths] = {**state.lengths, "text": length}
    return _new(TaskState, values)


def _running(state: TaskState, event: Running, at: datetime) -> TaskState:
    if event.attempt != state.attempt + 1:
        raise InvalidTransition(f"attempt {event.attempt} can't follow attempt {state.attempt}")
    if event.platform not in state.platforms:
        raise InvalidTransition(f"the task is not for the platform {event.platform!r}")
    same_call = event.mode == "reattach"
    if same_call and (state.accepted is None or not state.accepted.reattachable):
        raise InvalidTransition("there is nothing to re-attach to")
    values: list[Any] = list(state)  # not by `_changed`, for every task begins like this
    values[_AT.version] += 1
    values[_AT.status] = TaskStatus.RUNNING
    values[_AT.attempt] = event.attempt
    values[_AT.worker] = event.worker
    values[_AT.platform] = event.platform
    values[_AT.model] = event.model
    values[_AT.repairing] = False
    if not same_call:  # a call that is picked up again keeps its name, its cursor and its count
        values[_AT.accepted] = values[_AT.cursor] = values[_AT.usage] = None
        values[_AT.earlier_usage] = _known(state.total_usage)
    if event.mode == "restart":
        values[_AT.lengths] = _NOTHING
        values[_AT.files] = ()
    if state.started_at is None:
        values[_AT.started_at] = at
    return _new(TaskState, values)


def _accepted(state: TaskState, event: Accepted, at: datetime) -> TaskState:
    return _changed(
        state,
        version=state.version + 1,
        accepted=event,
        model=event.model or state.model,
        cursor=event.cursor or state.cursor,
    )


def _chunk(state: TaskState, event: Chunk, at: datetime) -> TaskState:
    length = state.lengths.get(event.kind, 0)
    if event.offset != length:
        raise InvalidTransition(
            f"a chunk of {event.kind} at {event.offset} can't follow {length} characters"
        )
    values: list[Any] = list(state)  # not by `_changed`, for most of all events are chunks
    values[_AT.version] += 1
    values[_AT.lengths] = {
        **state.lengths,
        event.kind: length + (len(event.text) if event.length is None else event.length),
    }
    values[_AT.cursor] = event.cursor or state.cursor
    return _new(TaskState, values)


def _usage(state: TaskState, event: UsageReported, at: datetime) -> TaskState:
    return _changed(state, version=state.version + 1, usage=event.usage)


def _file_created(state: TaskState, event: FileCreated, at: datetime) -> TaskState:
    files = state.files if event.path in state.files else (*state.files, event.path)
    return _changed(state, version=state.version + 1, files=files)


def _attempt_failed(state: TaskState, event: AttemptFailed, at: datetime) -> TaskState:
    if event.attempt != state.attempt:
        raise InvalidTransition(f"attempt {event.attempt} can't fail in attempt {state.attempt}")
    fallback = event.next == "fallback"
    if fallback and state.platform == state.platforms[-1]:
        raise InvalidTransition(f"there is no platform to fall back to after {state.platform!r}")
    same_call = event.next == "reattach"
    if same_call and (state.accepted is None or not state.accepted.reattachable):
        raise InvalidTransition("there is nothing to re-attach to")
    platform = state.platform
    if fallback:
        platform = state.platforms[state.platforms.index(platform) + 1]
    # A call that goes on is paid for when it ends.
    paid = {} if same_call else _paid(state, event.usage, event.cost_usd)
    repairing = event.next == "repair"
    return _changed(
        state,
        **paid,
        version=state.version + 1,
        status=TaskStatus.PENDING,
        platform=platform,
        model=None if fallback else state.model,
        failures=0 if fallback else state.failures + 1,
        repairs=0 if fallback else state.repairs + repairing,
        repairing=repairing,
        worker=None,
        next_mode="reattach" if same_call else "restart",
        available_at=event.retry_at,
        error_class=event.error_class,
        error=event.message,
    )


def _interrupted(state: TaskState, event: Interrupted, at: datetime) -> TaskState:
    if event.worker != state.worker or event.attempt != state.attempt:
        raise InvalidTransition(f"{event.worker} does not own attempt {state.attempt}")
    # A call that goes on is paid for when it ends.
    same_call = event.next == "reattach"
    paid = {} if same_call else _paid(state, event.usage, event.cost_usd)
    return _changed(
        state,
        **paid,
        version=state.version + 1,
        status=TaskStatus.PENDING,
        worker=None,
        interruptions=state.interruptions + (event.reason == "worker_lost"),
        next_mode=event.next if event.next in ("continue", "reattach") else "restart",
        available_at=at,
    )


def _cancel_requested(state: TaskState, event: CancelRequested, at: datetime) -> TaskState:
    if state.cancel is not None:
        raise InvalidTransition("'cancel_requested' can't follow: it was requested before")
    return _changed(state, version=state.version + 1, cancel=event)


def _completed(state: TaskState, event: Completed, at: datetime) -> TaskState:
    if event.output_length != state.length():
        raise InvalidTransition(
            f"'completed' with {event.output_length} characters can't follow {state.length()}"
        )
    values = _ended(state, event.usage, event.cost_usd, at)
    values[_AT.status] = TaskStatus.COMPLETED
    values[_AT.finish_reason] = event.finish_reason
    values[_AT.error_class] = values[_AT.error] = None
    return _new(TaskState, values)


def _failed(state: TaskState, event: Failed, at: datetime) -> TaskState:
    values = _ended(state, event.usage, event.cost_usd, at)
    values[_AT.status] = TaskStatus.FAILED
    values[_AT.error_class] = event.error_class
    values[_AT.error] = event.message
    return _new(TaskState, values)


def _cancelled(state: TaskState, event: Cancelled, at: datetime) -> TaskState:
    values = _ended(state, event.usage, event.cost_usd, at)
    values[_AT.status] = TaskStatus.CANCELLED
    return _new(TaskState, values)


def _redacted(state: TaskState, event: Redacted, at: datetime) -> TaskState:
    _refuse_archived(state, event)
    return _changed(state, version=state.version + 1, redacted=True, error=None, files=())


def _archived(state: TaskState, event: Archived, at: datetime) -> TaskState:
    _refuse_archived(state, event)
    if event.events != state.version or event.row.status != state.status:
        raise InvalidTransition(
            f"'archived' of {event.events} events, {event.row.status}, can't follow version "
            f"{state.version}, {state.status}"
        )
    return _from_archived(event)


def _refuse_archived(state: TaskState, event: Event) -> None:
    if state.archive is not None:
        raise InvalidTransition(f"{event.type!r} can't follow: the task is in {state.archive}")


def _from_archived(event: Archived) -> TaskState:
    """Return the same state whether the events before are still there or not."""
    row = event.row
    if event.events < 1:
        raise InvalidTransition(f"'archived' of {event.events} events can't be")
    return TaskState(
        version=event.events + 1,
        status=TaskStatus(row.status),
        platforms=(row.platform,),
        platform=row.platform,
        submitted_at=row.submitted_at,
        available_at=row.available_at,
        model=row.model,
        attempt=row.attempts,
        cancel=CancelRequested(by="") if row.cancel_requested else None,
        usage=Usage(
            input_tokens=row.input_tokens,
            output_tokens=row.output_tokens,
            cache_read_tokens=row.cache_read_tokens,
            cache_write_tokens=row.cache_write_tokens,
            reasoning_tokens=row.reasoning_tokens,
        ),
        cost_usd=row.cost_usd,
        error_class=row.error_class,
        finish_reason=row.finish_reason,
        started_at=row.started_at,
        ended_at=row.ended_at,
        archive=event.archive,
    )


def _ended(state: TaskState, usage: Usage | None, cost: float | None, at: datetime) -> list[Any]:
    """Return the state's values with what every ending changes."""
    values: list[Any] = list(state)  # not by `_changed`, for every task ends like this
    values[_AT.version] += 1
    values[_AT.worker] = None
    values[_AT.ended_at] = at
    # A pending task's attempts are paid for, but for a call that was to be picked up again.
    if state.status is TaskStatus.RUNNING or state.next_mode == "reattach":
        for name, value in _paid(state, usage, cost).items():
            values[_INDEX[name]] = value
    return values


def _paid(state: TaskState, usage: Usage | None, cost: float | None) -> dict[str, object]:
    """Return what changes when the present attempt's tokens and price are settled."""
    usage = usage or state.usage
    if cost is not None:
        return {"usage": usage, "cost_usd": (state.cost_usd or 0.0) + cost}
    unpriced = usage is not None and usage.total_tokens is not None
    return {"usage": usage, "unpriced": state.unpriced or unpriced}


def _changed(state: TaskState, **changes: object) -> TaskState:
    """Return the state with some fields changed, as `_replace` does, in a third of the time."""
    values: list[Any] = list(state)
    for name, value in changes.items():
        values[_INDEX[name]] = value
    return _new(TaskState, values)


_new: Final = cast(
    "Callable[[type[TaskState], list[Any]], TaskState]",
    tuple.__new__,  # pyright: ignore[reportUnknownMemberType]
)
_INDEX: Final = {name: index for index, name in enumerate(TaskState._fields)}
_AT: Final[Any] = TaskState._make(range(len(_INDEX)))  # each field is its own place


def _known(usage: Usage) -> Usage | None:
    return None if usage is _NO_USAGE or usage == _NO_USAGE else usage


_Step = Callable[[TaskState, Any, datetime], TaskState]

# type -> (the states it may happen in, what it does)
_RULES: Final[Mapping[type[Event], tuple[frozenset[TaskStatus], _Step]]] = {
    Running: (_PENDING, _running),
    Accepted: (_RUNNING, _accepted),
    Chunk: (_RUNNING, _chunk),
    UsageReported: (_RUNNING, _usage),
    FileCreated: (_RUNNING, _file_created),
    AttemptFailed: (_RUNNING, _attempt_failed),
    Interrupted: (_RUNNING, _interrupted),
    CancelRequested: (_RUNNING, _cancel_requested),
    Completed: (_RUNNING, _completed),
    Failed: (_LIVE, _failed),
    Cancelled: (_LIVE, _cancelled),
    Redacted: (_ENDED, _redacted),
    Archived: (_ENDED, _archived),
}
