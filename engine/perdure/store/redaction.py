"""Redacting a task: its content goes, and what stays says what was there and who removed it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import InvalidTransition, TaskArchived, TaskNotFound
from perdure.events import Redacted, Submitted, canonical
from perdure.store.content import blob_digests
from perdure.store.dialect import take_time
from perdure.store.schema import blobs, events, streams
from perdure.store.transaction import Transaction, chunks_of

__all__ = ["redact"]

_SOUGHT_AT_ONCE: Final = 50

# What stays of an event when its content goes: what the fold, the key of a batch's row and the sums
# need. Everything else may quote the prompt or the answer.
_KEPT: Final[Mapping[str, frozenset[str]]] = {
    "submitted": frozenset({"platforms"}),
    "chunk": frozenset({"kind", "offset", "cursor"}),
    "attempt_failed": frozenset(
        {"attempt", "error_class", "status", "retryable", "retry_after", "next", "retry_at"}
        | {"usage", "cost_usd"}
    ),
    "failed": frozenset(
        {"error_class", "status", "attempts", "output_length", "usage", "cost_usd", "price_version"}
    ),
    "file_created": frozenset({"size"}),
}
_KEPT_OF_TASK: Final = frozenset(
    {"type", "priority", "platform", "constraints", "batch", "key", "fingerprint"}
    | {"parents", "retry_of", "fallbacks"}
)


def redact(tx: Transaction, task_id: str, by: str, reason: str | None) -> int:
    """Remove the content of an ended task; returns how many events were changed.

    What is left is a tombstone with the digest of what was there, so the chain still holds, and an
    event that says who removed it.

    Raises:
        TaskNotFound: There is no such task.
        TaskArchived: Its content is in an archive, where it has to be redacted.
        InvalidTransition: The task hasn't ended.
    """
    fold = tx.fold(task_id)
    if fold is None:
        raise TaskNotFound(task_id)
    if fold.state.archive is not None:
        raise TaskArchived(task_id, fold.state.archive, "redact")
    if not fold.state.status.ended:
        raise InvalidTransition(f"{task_id} is {fold.state.status}: cancel it before redacting it")
    take_time(tx.connection)  # a long answer has many events
    rows = tx.connection.execute(
        sa.select(events)
        .where(events.c.stream_id == fold.stream_id, events.c.type.in_(tuple(_KEPT)))
        .order_by(events.c.version)
    ).mappings()
    tombstones: dict[str, str] = {}
    orphans: set[str] = set()
    for row in list(rows):
        plain = orjson.loads(row["data"])
        if "redacted" in plain:
            continue
        if row["type"] == "submitted":
            orphans |= blob_digests(plain["task"], plain.get("blobs") or {})
        stone = canonical(_tombstone(row["type"], plain, row["data"]))
        tombstones[str(row["version"])] = hashlib.sha256(stone).hexdigest()
        tx.connection.execute(
            sa.update(events)
            .where(events.c.position == row["position"])
            .values(data=stone.decode())
        )
    if tombstones:
        event = Redacted(by=by, reason=reason, tombstones=tombstones)
        tx.append(task_id, (event,), fold.version)
        _drop_orphans(tx.connection, orphans)
        tx.erases = True
    return len(tombstones)


def _tombstone(type_: str, plain: Mapping[str, Any], stored: str) -> dict[str, Any]:
    kept = {name: value for name, value in plain.items() if name in _KEPT[type_]}
    if type_ == "submitted":
        kept["task"] = {k: v for k, v in plain["task"].items() if k in _KEPT_OF_TASK}
    if type_ == "chunk":
        kept["length"] = len(plain["text"])
    return {**kept, "redacted": hashlib.sha256(stored.encode()).hexdigest()}


def _drop_orphans(connection: Connection, digests: set[str]) -> None:
    """Delete blobs that no task names any more."""
    for digest in sorted(digests):
        # Whoever is about to name it holds this lock, and is waited for.
        connection.execute(
            sa.select(blobs.c.digest).where(blobs.c.digest == digest).with_for_update()
        )
    for part in chunks_of(sorted(digests), _SOUGHT_AT_ONCE):
        unnamed = part
        while unnamed and (data := _naming(connection, unnamed)) is not None:
            unnamed = [digest for digest in unnamed if digest not in data]
        connection.execute(sa.delete(blobs).where(blobs.c.digest.in_(unnamed)))


def _naming(connection: Connection, digests: Sequence[str]) -> str | None:
    """Return the first event of some task that names one of these; None where there is none.

    That is found out by a look at all tasks: there is no index of what they name.
    """
    text = sa.cast(events.c.data, sa.Text)
    # Not LIKE, to which on SQLite a digest in capitals is the same.
    place = sa.func.strpos if connection.dialect.name == "postgresql" else sa.func.instr
    return connection.scalar(
        sa.select(text)
        .join_from(streams, events, events.c.position == streams.c.stream_id)
        .where(
            events.c.type == Submitted.type,
            sa.or_(*(place(text, digest) > 0 for digest in digests)),
        )
        .limit(1)
    )
