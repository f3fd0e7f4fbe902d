"""What an adapter gets: the task as it was given, and where to go on."""

from __future__ import annotations

from collections.abc import Mapping

from perdure.adapter import Call, LoadedFile, Resume
from perdure.errors import InvalidRequest, PerdureError
from perdure.store import claims
from perdure.store.claims import Claimed
from perdure.store.content import blob_digests, restore
from perdure.store.database import Database
from perdure.task import Attachment, Task

__all__ = ["make_call"]


async def make_call(database: Database, claimed: Claimed) -> Call:
    """Return the call for a task that was claimed, with the content that the log only names.

    Raises:
        InvalidRequest: The task, or what was attached to it, isn't there any more, as after
            `redact`.
        StoreError: The database can't be read.
    """
    submitted = claimed.submitted
    needed = blob_digests(submitted.task, submitted.blobs)
    content = await claims.load_blobs(database, sorted(needed)) if needed else {}
    try:
        task = restore(submitted.task, submitted.blobs, content, claimed.task_id)
    except PerdureError as error:
        raise InvalidRequest(f"the task can't be read any more: {error}") from None
    return Call(
        task=task,
        task_id=claimed.task_id,
        attempt=claimed.state.attempt,
        model=claimed.state.model,
        files=_loaded(task, content),
        resume=_resume(claimed),
    )


def _loaded(task: Task, content: Mapping[str, bytes]) -> tuple[LoadedFile, ...]:
    attached = [file for file in task.files if isinstance(file, Attachment)]
    for file in attached:
        if file.digest not in content:
            raise InvalidRequest(f"the content of {file.name} is not in the database any more")
    return tuple(LoadedFile(file, content[file.digest]) for file in attached)


def _resume(claimed: Claimed) -> Resume | None:
    before = claimed.previous
    if before.next_mode == "reattach" and before.accepted is not None:
        return Resume("reattach", claimed.output, before.accepted.response_id, before.cursor)
    if before.next_mode == "continue":
        return Resume("continue", claimed.output)
    if before.repairing:
        return Resume("repair", claimed.output, problem=before.error)
    return None
