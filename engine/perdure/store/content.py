"""Long texts and files: stored once in `blobs`, named in events by their SHA-256.

Ten thousand tasks with one long system prompt keep it once. Whoever reads a task never notices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import orjson

from perdure.errors import InvalidTask
from perdure.events import canonical
from perdure.task import Task
from perdure.unchecked import unchecked

__all__ = ["blob_digests", "digest_of", "restore", "separate"]

# From this size on (bytes of UTF-8) a text that tasks are likely to share is stored apart.
SHARED_FROM: Final = 4096


def digest_of(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def separate(task: Task) -> tuple[dict[str, Any], dict[str, str], dict[str, bytes]]:
    """Return the task as JSON without its long shared texts, their places, and their content.

    The prompt, or the last message where there are messages, stays: it is what differs from task
    to task, and what people search for.
    """
    plain = _plain(task)
    places: dict[str, str] = {}
    content: dict[str, bytes] = {}
    for place, holder, key in _shared_texts(plain):
        data = str(holder[key]).encode()
        if len(data) >= SHARED_FROM:
            places[place] = digest_of(data)
            content[places[place]] = data
            holder[key] = ""
    return plain, places, content


def _plain(task: Task) -> dict[str, Any]:
    """Return a task as JSON, without its id and what it says nothing of."""
    objects = task.context or task.metadata or task.labels or task.options
    if not objects and task.model_fields_set <= _SCALARS:  # as most; it takes a fifth of the time
        given = ((name, getattr(task, name)) for name in task.model_fields_set - {"task_id"})
        return {name: value for name, value in given if value != getattr(_PATTERN, name)}
    return task.model_dump(mode="json", exclude_defaults=True, exclude={"task_id"})


def restore(
    plain: Mapping[str, Any],
    places: Mapping[str, str],
    content: Mapping[str, bytes],
    task_id: str | None = None,
) -> Task:
    """Return the task that `separate` took apart, with its id where that is given.

    Raises:
        InvalidTask: Some of its content isn't there any more.
    """
    data: dict[str, Any] = {**plain}
    for name, value in plain.items():
        if not isinstance(value, str | int):  # as it is stored, and nobody else's to change
            data[name] = orjson.loads(canonical(value))
    if task_id is not None:
        data["task_id"] = task_id
    if not places and data.get("prompt") and _AS_IT_IS.issuperset(data):
        # As `model_validate` would make it, of what was validated before it was stored.
        objects: dict[str, dict[str, Any]] = {name: {} for name in _OBJECTS}
        return unchecked(Task, {**vars(_PATTERN), **objects, **data}, given=set(data))
    for place, holder, key in list(_shared_texts(data)):
        if place in places:
            if places[place] not in content:
                raise InvalidTask(f"{place}: its text is not in the database any more")
            holder[key] = content[places[place]].decode()
    return Task.model_validate(data)


# Fields whose stored form is their value: text, numbers, and objects of nothing else.
_OBJECTS: Final = ("context", "metadata", "labels", "options")
_SCALARS: Final = frozenset(
    {"prompt", "system", "platform", "priority", "task_id", "batch", "key", "fingerprint"}
    | {"retry_of", "continue_from"}
)
_AS_IT_IS: Final = _SCALARS | {*_OBJECTS}
_PATTERN: Final = Task(prompt="-").model_copy(update={"prompt": ""})


def blob_digests(plain: Mapping[str, Any], places: Mapping[str, str]) -> set[str]:
    """Return the digests of everything that a stored task has in `blobs`."""
    attached: Iterable[Any] = plain.get("files") or ()
    if not places and not attached:
        return set()
    return {*places.values(), *(f["digest"] for f in attached if isinstance(f, dict))}


def _shared_texts(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the place, the holder and the key of every text that tasks may share."""
    if isinstance(plain.get("system"), str):
        yield "system", plain, "system"
    for index, message in enumerate((plain.get("messages") or ())[:-1]):
        yield f"messages.{index}", message, "content"
    context: dict[str, Any] = plain.get("context") or {}
    for key, value in context.items():
        if isinstance(value, str):
            yield f"context.{key}", context, key
