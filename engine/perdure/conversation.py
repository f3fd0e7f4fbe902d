"""Conversations: the task that goes on from a completed one, with all that was said before."""

from __future__ import annotations

from perdure.errors import InvalidTask
from perdure.store.records import TaskRecord
from perdure.task import Message, Task, TaskStatus

__all__ = ["go_on"]


def go_on(task: Task, before: TaskRecord, asked: Task, first: str) -> Task:
    """Return ``task`` with the turns before it, and with what it leaves to the task before it.

    The facts and files of the earlier question go along again; platform, model and system prompt
    are the earlier ones where the new task names none.

    Args:
        task: The new task, whose `continue_from` names the one before.
        before: That one's row.
        asked: What was asked in it, its own earlier turns included.
        first: The platform that it was meant for, whatever other one it fell back to.

    Raises:
        InvalidTask: There is nothing to go on from.
    """
    if before.status is not TaskStatus.COMPLETED:
        raise InvalidTask(
            f"continue_from: {before.task_id} is {before.status}; only a completed task can be "
            "continued"
        )
    if before.prompt is None:
        raise InvalidTask(f"continue_from: {before.task_id} was redacted")
    if not (before.output or "").strip():
        raise InvalidTask(f"continue_from: {before.task_id} has no text to go on from")
    question = asked.messages or (Message(role="user", content=asked.prompt),)
    answer = Message(role="assistant", content=before.output or "")
    new = task.messages or (Message(role="user", content=task.prompt),)
    platform = task.platform or before.platform
    # A model's name means something on its own platform only.
    model = task.limits.model or (asked.limits.model if platform == first else None)
    return task.model_copy(
        update={
            "prompt": "",
            "messages": (*question, answer, *new),
            "system": task.system if task.system is not None else asked.system,
            "context": {**asked.context, **task.context},
            "files": (*asked.files, *task.files),
            "platform": platform,
            "constraints": task.limits.model_copy(update={"model": model})
            if model is not None
            else task.constraints,
            "parents": tuple(dict.fromkeys((before.task_id, *task.parents))),
        }
    )
