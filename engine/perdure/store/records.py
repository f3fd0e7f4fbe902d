"""Reading tasks: one row, lists of rows, and the task as it was asked for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

import orjson
import sqlalchemy as sa

from perdure.errors import PerdureError, TaskArchived, TaskNotFound
from perdure.events import RecordedEvent, Submitted, decode
from perdure.store.begun import Ended
from perdure.store.claims import load_blobs
from perdure.store.content import blob_digests, restore
from perdure.store.database import Database
from perdure.store.dialect import Dialect
from perdure.store.direct import Statement, is_among
from perdure.store.fetching import ALL, EVENTS_OF, FIRST_EVENTS, recorded
from perdure.store.lookups import Lookup
from perdure.store.projection import TaskFold
from perdure.store.schema import events, tasks
from perdure.task import Task, TaskStatus, ToolCall, Usage

# A call whose arguments are no JSON: its name is readable all the same.
_UNREADABLE_CALL: Final = re.compile(
    r'\{"id":("(?:[^"\\]|\\.)*"),"name":("(?:[^"\\]|\\.)*"),"arguments":(.*)\}', re.DOTALL
)

__all__ = [
    "Outcome",
    "Records",
    "TaskFilter",
    "TaskRecord",
    "find_tasks",
    "read_events",
]


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A row of `tasks`; the fields mean what the columns of that name mean."""

    stream_id: int
    task_id: str
    status: TaskStatus
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
    usage: Usage
    cost_usd: float | None
    submitted_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    batch: str | None
    key: str | None
    fingerprint: str | None
    parent: str | None
    retry_of: str | None
    labels: Mapping[str, str]
    files_created: tuple[str, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    archived: str | None = None

    @classmethod
    def of(cls, row: sa.RowMapping | dict[str, Any]) -> TaskRecord:
        """Make a record of a whole row."""
        data = dict(row)
        usage = Usage(**{name: data.pop(name) for name in _USAGE_COLUMNS})
        files, calls = data["files_created"], data["tool_calls"]
        data["status"] = TaskStatus(data["status"])
        data["cancel_requested"] = bool(data["cancel_requested"])
        data["labels"] = orjson.loads(data["labels"])
        data["files_created"] = tuple(orjson.loads(files)) if files else ()
        data["tool_calls"] = tuple(map(_tool_call, orjson.loads(calls))) if calls else ()
        return cls(usage=usage, **data)


_USAGE_COLUMNS: Final = tuple(name for name in Usage.model_fields if name.endswith("_tokens"))


def _tool_call(call: Any) -> ToolCall:  # noqa: ANN401 - what the model made of it
    """Return a call that was asked for; what is none, as models write it at times, as it came."""
    try:
        if isinstance(call, dict):
            return ToolCall.model_validate(call)
        if opening := _UNREADABLE_CALL.match(str(call)):
            id_, name, arguments = opening.groups()
            return ToolCall(id=orjson.loads(id_), name=orjson.loads(name), arguments=arguments)
    except ValueError:  # pydantic's is one, and so is that of a string with a bad escape
        pass
    return ToolCall(name="", arguments=call)


class Outcome(NamedTuple):
    """What came out of a task: the part of a `TaskRecord` that is known without reading its row."""

    task_id: str
    status: TaskStatus
    platform: str
    model: str | None
    attempts: int
    output: str | None
    partial_output: str | None
    finish_reason: str | None
    error_class: str | None
    error: str | None
    usage: Usage
    cost_usd: float | None
    started_at: datetime | None
    ended_at: datetime | None
    files_created: tuple[str, ...]
    tool_calls: tuple[ToolCall, ...]

    @classmethod
    def of(cls, fold: TaskFold) -> Outcome:
        """Return what all events of an ended task come to."""
        state, calls = fold.state, fold.tool_calls
        completed = state.status is TaskStatus.COMPLETED
        usage = state.total_usage
        return cls(
            task_id=fold.task_id,
            status=state.status,
            platform=state.platform,
            model=state.model,
            attempts=state.attempt,
            output=fold.text if completed else None,
            partial_output=None if completed else fold.text,
            finish_reason=state.finish_reason,
            error_class=state.error_class,
            error=state.error,
            usage=usage if usage.raw is None else usage.model_copy(update={"raw": None}),
            cost_usd=state.total_cost,
            started_at=state.started_at,
            ended_at=state.ended_at,
            files_created=state.files,
            tool_calls=tuple(map(_tool_call, orjson.loads(calls))) if calls else (),
        )


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks to list; everything left out is no restriction.

    Attributes:
        statuses: Any of these.
        platform: That platform.
        batch: That batch.
        labels: All of these labels, with these values.
        since: Submitted at that time or later.
        until: Submitted before that time.
        search: In prompts or outputs, upper and lower case alike.
        task_ids: Any of these.
        latest: Leave out tasks that were run again.
    """

    statuses: tuple[TaskStatus, ...] = ()
    platform: str | None = None
    batch: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    since: datetime | None = None
    until: datetime | None = None
    search: str | None = None
    task_ids: tuple[str, ...] = ()
    latest: bool = False

    def conditions(self, dialect: Dialect) -> list[sa.ColumnElement[bool]]:
        """Return the filter as SQL."""
        t = tasks.c
        found: list[sa.ColumnElement[bool]] = []
        if self.statuses:
            found.append(t.status.in_([status.value for status in self.statuses]))
        if self.platform is not None:
            found.append(t.platform == self.platform)
        if self.batch is not None:
            found.append(t.batch == self.batch)
        if self.since is not None:
            found.append(t.submitted_at >= self.since)
        if self.until is not None:
            found.append(t.submitted_at < self.until)
        if self.task_ids:
            found.append(t.task_id.in_(self.task_ids))
        if self.search:
            found.append(
                sa.or_(
                    *(
                        dialect.mentions(column, self.search)
                        for column in (t.prompt, t.output, t.partial_output)
                    )
                )
            )
        for name, value in self.labels.items():
            found.append(_label(name) == value)
        if self.latest:
            again = tasks.alias("again")
            found.append(~sa.exists().where(again.c.retry_of == t.task_id))
        return found


def _label(name: str) -> sa.ColumnElement[Any]:
    # The one JSON path both databases understand by way of SQLAlchemy.
    found: sa.ColumnElement[Any] = sa.type_coerce(tasks.c.labels, sa.JSON)[name].as_string()
    return found


_ALL: Final = sa.select(tasks)


async def find_tasks(
    database: Database,
    which: TaskFilter,
    *,
    limit: int | None = None,
    newest_first: bool = True,
) -> list[TaskRecord]:
    """Return rows by the order of submission."""
    order = tasks.c.stream_id.desc() if newest_first else tasks.c.stream_id
    statement = _ALL.where(*which.conditions(database.dialect)).order_by(order)
    if limit is not None:
        statement = statement.limit(limit)
    return [TaskRecord.of(row) for row in await database.rows(statement)]


class Records:
    """Reads tasks of one database by their ids; what is asked for together is one query."""

    def __init__(self, database: Database) -> None:
        self._rows: Lookup[TaskRecord] = Lookup(partial(_rows_of, database))
        self._statuses: Lookup[TaskStatus] = Lookup(partial(_statuses_of, database))
        self._both: Lookup[tuple[TaskRecord, Submitted]] = Lookup(partial(_both_of, database))
        self._asked: Lookup[Submitted] = Lookup(partial(_first_events, database))
        self._content: Lookup[bytes] = Lookup(partial(load_blobs, database))

    async def find(self, task_id: str) -> TaskRecord | None:
        """Return a task's row; None where there is none."""
        return await self._rows.get(task_id)

    async def status(self, task_id: str) -> TaskStatus:
        """Return where a task stands; `UNKNOWN` where there is none."""
        return await self._statuses.get(task_id) or TaskStatus.UNKNOWN

    async def task(self, task_id: str) -> Task:
        """Return the task as it was submitted, its long texts in place.

        Raises:
            TaskNotFound: There is none.
            TaskArchived: It is in an archive.
        """
        task, _platforms = await self.asked(task_id)
        return task

    async def asked(self, task_id: str) -> tuple[Task, Sequence[str]]:
        """Return the same, and the platforms that it was submitted to, the first one first.

        Raises:
            TaskNotFound: There is none.
            TaskArchived: It is in an archive.
        """
        first = await self._asked.get(task_id)
        if first is None:
            raise await self._missing(task_id)
        return await self._restored(task_id, first), first.platforms

    async def _missing(self, task_id: str) -> PerdureError:
        """Return the error for a task whose first event isn't here."""
        record = await self.find(task_id)
        if record is not None and record.archived is not None:
            return TaskArchived(task_id, record.archived)
        return TaskNotFound(task_id)

    async def both(self, task_id: str) -> tuple[TaskRecord, Task]:
        """Return a task's row, and the task as it was submitted, by one query.

        Raises:
            TaskNotFound: There is none.
            TaskArchived: It is in an archive.
        """
        found = await self._both.get(task_id)
        if found is None:
            raise await self._missing(task_id)
        record, first = found
        return record, await self._restored(task_id, first)

    async def of_ended(self, ended: Ended) -> tuple[Outcome, Task]:
        """Return the same as `both`, of a task whose events are at hand."""
        outcome = Outcome.of(ended.fold)
        return outcome, await self._restored(outcome.task_id, ended.asked)

    async def _restored(self, task_id: str, first: Submitted) -> Task:
        digests = blob_digests(first.task, first.blobs)
        content = await self.content(digests) if digests else {}
        if first.task.get("prompt") or first.task.get("messages"):
            return restore(first.task, first.blobs, content, task_id)
        # Its content was redacted: what is left is shown with a note in the prompt's place.
        redacted = {**first.task, "prompt": "[redacted]"}
        return restore(redacted, first.blobs, content, task_id)

    async def content(self, digests: Iterable[str]) -> dict[str, bytes]:
        """Return digest -> content, for those that are still there."""
        found = {digest: await self._content.get(digest) for digest in digests}
        return {digest: data for digest, data in found.items() if data is not None}


async def _rows_of(database: Database, task_ids: Sequence[str]) -> dict[str, TaskRecord]:
    rows = await database.fetch(_ROWS, task_ids)
    return {row["task_id"]: TaskRecord.of(row) for row in rows}


_NAMED: Final = is_among(tasks.c.task_id, "task_ids")
_ROWS: Final = Statement(_ALL.where(_NAMED), ("task_ids",))
_STATUSES: Final = Statement(
    sa.select(tasks.c.task_id, tasks.c.status).where(_NAMED), ("task_ids",)
)
_BOTH: Final = Statement(
    sa.select(
        *tasks.c,
        events.c.schema_version.label("first_schema_version"),
        events.c.data.label("first_data"),
    )
    .join_from(tasks, events, events.c.stream_id == tasks.c.stream_id)
    .where(events.c.version == 1, _NAMED),
    ("task_ids",),
)


async def _both_of(
    database: Database, task_ids: Sequence[str]
) -> dict[str, tuple[TaskRecord, Submitted]]:
    found: dict[str, tuple[TaskRecord, Submitted]] = {}
    for data in await database.fetch(_BOTH, task_ids):
        first = decode(Submitted.type, data.pop("first_schema_version"), data.pop("first_data"))
        if isinstance(first, Submitted):
            found[data["task_id"]] = TaskRecord.of(data), first
    return found


async def _statuses_of(database: Database, task_ids: Sequence[str]) -> dict[str, TaskStatus]:
    rows = await database.fetch(_STATUSES, task_ids)
    return {row["task_id"]: TaskStatus(row["status"]) for row in rows}


async def _first_events(database: Database, task_ids: Sequence[str]) -> dict[str, Submitted]:
    rows = await database.fetch(FIRST_EVENTS, task_ids)
    found = ((row["task_id"], recorded(row).event) for row in rows)
    return {task_id: event for task_id, event in found if isinstance(event, Submitted)}


async def read_events(database: Database, task_id: str, after: int = 0) -> list[RecordedEvent]:
    """Return a stream's events after version ``after``."""
    return [recorded(row) for row in await database.fetch(EVENTS_OF, task_id, after, ALL)]
