"""Taking a task in: checked, its files read, its long texts set apart, its first event made."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Final, NamedTuple

from perdure.errors import ConcurrencyError, DuplicateKey, InvalidTask
from perdure.events import Submitted
from perdure.ids import generate_task_id
from perdure.namedfile import read_file
from perdure.platforms import Platforms
from perdure.store.content import digest_of, separate
from perdure.store.transaction import Transaction
from perdure.structured import check_schemas
from perdure.task import Attachment, Task
from perdure.unchecked import unchecked

__all__ = ["Prepared", "Submission", "check_is_task", "prepare", "submit"]

MAX_FILE: Final = 32 * 2**20


class Prepared(NamedTuple):
    """A task that is ready to be written down.

    Attributes:
        task_id: Its id.
        given_id: Whether that is the one it must have.
        event: Its first event.
        content: What it brings along, by digest.
        carried: The digests of files that another task has brought.
    """

    task_id: str
    given_id: bool
    event: Submitted
    content: dict[str, bytes]
    carried: frozenset[str] = frozenset()


class Submission(NamedTuple):
    """What became of a task that was handed in.

    Attributes:
        task_id: Its id, or the id of the task that already has its key.
        new: Whether it was written down now.
    """

    task_id: str
    new: bool


def check_is_task(given: object) -> None:
    """Raise `InvalidTask` unless this is a task."""
    if not isinstance(given, Task):
        raise InvalidTask(
            f"a task must be a perdure.Task, and this is of the type {type(given).__name__!r}: "
            'make one, as in Task(prompt="…")'
        )


def prepare(task: Task, platforms: Platforms, default_platform: str | None) -> Prepared:
    """Return the task ready to be written down. Reads its files: blocking.

    Raises:
        InvalidTask: It names no platform, or a file that can't be read.
        UnknownPlatform: It names a platform that isn't installed.
    """
    platform = task.platform or default_platform
    if platform is None:
        raise InvalidTask(f"platform: name one of {', '.join(platforms.names)}")
    order = tuple(dict.fromkeys((platform, *task.fallbacks)))
    for name in order:
        platforms.check(name)
    check_schemas(task)
    content: dict[str, bytes] = {}
    files: list[Attachment] = []
    for file in task.files:
        if isinstance(file, Attachment):  # of a task that is run again: its content is there
            files.append(file)
            continue
        attachment, data = _attach(Path(file))
        files.append(attachment)
        content[attachment.digest] = data
    if files:
        task = task.model_copy(update={"files": tuple(files)})
    plain, places, texts = separate(task)
    return Prepared(
        task_id=task.task_id or generate_task_id(platform),
        given_id=task.task_id is not None,
        event=unchecked(Submitted, {"task": plain, "platforms": order, "blobs": places}),
        content=content | texts,
        carried=frozenset(file.digest for file in files) - content.keys(),
    )


def _attach(path: Path) -> tuple[Attachment, bytes]:
    try:
        data = read_file(path, MAX_FILE)
    except OSError as error:
        raise InvalidTask(f"files: can't read {path}: {error.strerror}") from None
    media_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return Attachment(
        name=path.name, media_type=media_type, size=len(data), digest=digest_of(data)
    ), data


def submit(tx: Transaction, prepared: list[Prepared]) -> list[Submission | InvalidTask]:
    """Write tasks down; one whose key is known already is not written again.

    Returns:
        One outcome per task, in order; an `InvalidTask` where the task's own id is taken.
    """
    tx.prefetch_keys([key for one in prepared if (key := one.event.task.get("key")) is not None])
    return [_submit_one(tx, one) for one in prepared]


def _submit_one(tx: Transaction, prepared: Prepared) -> Submission | InvalidTask:
    task_id = prepared.task_id
    if prepared.carried - tx.known_blobs(prepared.carried):  # it was redacted or archived just now
        return InvalidTask("files: what another task had attached is not in the database any more")
    while True:
        try:
            tx.append(task_id, (prepared.event,), 0)
        except DuplicateKey as duplicate:
            return Submission(duplicate.task_id, new=False)
        except ConcurrencyError:
            if prepared.given_id:
                return InvalidTask(f"task_id: {task_id!r} is taken; leave it out to get a new one")
            # Eight random characters collide on a busy day: the database decides, we draw again.
            task_id = generate_task_id(prepared.event.platforms[0])
        else:
            tx.put_blobs(prepared.content)
            return Submission(task_id, new=True)
