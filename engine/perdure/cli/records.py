"""What the tables hold, row by row, in the form in which commands hand it on as JSON and CSV.

Plain reading over the public names; `perdure.store.readonly` says why.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any, Final

from perdure.cli.paging import each_row
from perdure.errors import PerdureError, TaskArchived
from perdure.store.readonly import Reader

__all__ = [
    "ENDED",
    "EVENT_COLUMNS",
    "TASK_COLUMNS",
    "event_record",
    "event_rows",
    "events_query",
    "find_task_row",
    "first_event_row",
    "record_of",
    "refuse_archived",
    "text_so_far",
]

# All of `tasks` but the key of its stream, which means nothing outside of the database.
TASK_COLUMNS: Final = (
    "task_id",
    "status",
    "platform",
    "model",
    "type",
    "priority",
    "attempts",
    "worker",
    "available_at",
    "cancel_requested",
    "prompt",
    "output",
    "partial_output",
    "finish_reason",
    "error_class",
    "error",
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "cost_usd",
    "submitted_at",
    "started_at",
    "ended_at",
    "batch",
    "key",
    "fingerprint",
    "parent",
    "retry_of",
    "labels",
    "files_created",
    "tool_calls",
    "archived",
)

ENDED: Final = frozenset({"completed", "failed", "cancelled"})

EVENT_COLUMNS: Final = (
    "position",
    "task_id",
    "version",
    "type",
    "schema_version",
    "data",
    "recorded_at",
    "digest",
)


def events_query(reader: Reader, condition: str, order: str) -> str:
    """Return the query for events as they are stored, with a condition on `events AS e`."""
    return (
        "SELECT e.position, s.task_id, e.version, e.type, e.schema_version, e.data, "
        f"e.recorded_at, {reader.hexed('e.digest')} AS digest "
        f"FROM events AS e JOIN streams AS s ON s.stream_id = e.stream_id "
        f"WHERE {condition} ORDER BY {order}"
    )


def record_of(row: sqlite3.Row) -> dict[str, Any]:
    """Return a row of `tasks` with its columns as what they mean."""
    record = {name: row[name] for name in row.keys() if name != "stream_id"}  # noqa: SIM118
    record["cancel_requested"] = bool(record["cancel_requested"])
    record["labels"] = _json(record["labels"]) or {}
    record["files_created"] = _json(record["files_created"]) or []
    record["tool_calls"] = _json(record["tool_calls"]) or []
    return record


def _json(text: str | None) -> Any:  # noqa: ANN401 - whatever is stored
    import orjson

    try:
        return None if text is None else orjson.loads(text)
    except ValueError:  # only somebody else can have written it
        return text


def find_task_row(reader: Reader, task_id: str) -> sqlite3.Row:
    """Return the row of a task that is in the log.

    Raises:
        PerdureError: The projection has lost it.
    """
    row = reader.one("SELECT * FROM tasks WHERE task_id = ?", (task_id,))
    if row is None:
        raise PerdureError(f"{task_id} is in the log but not in `tasks`: run `perdure rebuild`")
    return row


def refuse_archived(row: sqlite3.Row, command: str) -> None:
    """Raise an error that says where the content is, where it isn't here.

    Args:
        row: The task's row.
        command: The command that shows what was asked for, on the archive.

    Raises:
        TaskArchived: It is in an archive.
    """
    if row["archived"] is not None:
        raise TaskArchived(row["task_id"], row["archived"], command)


def text_so_far(reader: Reader, task_id: str) -> str:
    """Return a task's output: the final text, the partial one, or the chunks so far."""
    row = reader.one("SELECT text FROM task_output WHERE task_id = ?", (task_id,))
    return "" if row is None or row["text"] is None else str(row["text"])


def event_rows(reader: Reader, task_id: str, after: int = 0) -> Iterator[sqlite3.Row]:
    """Iterate over a task's events after a version, as they are stored."""
    query = events_query(reader, "s.task_id = :task_id AND e.version > :after", "e.version")
    return each_row(reader, query, {"task_id": task_id}, "version", after)


def first_event_row(reader: Reader, task_id: str) -> sqlite3.Row | None:
    """Return a task's first event that there is."""
    query = events_query(reader, "s.task_id = :task_id", "e.version")
    return reader.one(f"{query} LIMIT 1", {"task_id": task_id})


def event_record(row: sqlite3.Row) -> dict[str, Any]:
    """Return a stored event as one object, its data as it stands in the log."""
    return {**dict(row), "data": _json(row["data"])}
