"""What came out of a task, put together from its row and from what was asked for."""

from __future__ import annotations

from typing import Any

from perdure.errors import OutputInvalid
from perdure.store.records import Outcome, TaskRecord
from perdure.structured import read_output
from perdure.task import Result, Task, TaskStatus
from perdure.unchecked import unchecked

__all__ = ["make_result"]


def make_result(record: TaskRecord | Outcome, task: Task) -> Result:
    """Return an ended task's result, from its row or from what is known without that."""
    success = record.status is TaskStatus.COMPLETED
    began, ended = record.started_at, record.ended_at
    values = {
        "task": task,
        "task_id": record.task_id,
        "platform": record.platform,
        "output": record.output or "",
        "success": success,
        "error": record.error,
        "cost": record.cost_usd,
        "tokens_used": record.usage.total_tokens,
        "duration_seconds": (ended - began).total_seconds() if began and ended else 0.0,
        "metadata": dict(task.metadata),
        "completed_at": ended,
        "status": record.status,
        "files_created": record.files_created,
        "partial_output": record.partial_output,
        "usage": record.usage,
        "finish_reason": record.finish_reason,
        "model": record.model,
        "error_class": record.error_class,
        "attempts": record.attempts,
        "parsed": _parsed(record, task),
        "tool_calls": record.tool_calls,
    }
    return unchecked(Result, values)  # of what was checked when it was written down


def _parsed(record: TaskRecord | Outcome, task: Task) -> Any:  # noqa: ANN401 - any JSON value
    if task.output_schema is None or record.output is None:
        return None
    if record.finish_reason != "stop":  # a refusal, or calls: it was no answer to be checked
        return None
    # It was checked before it was completed. Another check could hold up the reader, for long.
    try:
        return read_output(record.output)
    except OutputInvalid:  # which an earlier perdure took for JSON
        return None
