"""Holding an archive against the log that it was taken from.

The archive's own chain shows that its events are what was written; that they are those of this log,
and all of them, the log's `archived` events show.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseIncompatible, PerdureError, StoreError
from perdure.events import Archived, decode
from perdure.store import defences
from perdure.store.bulk import plain_rows
from perdure.store.database import Database
from perdure.store.rebuilding import compare
from perdure.store.scanning import UNREADABLE, Progress, as_stored
from perdure.store.schema import events, streams, tasks
from perdure.store.verification import NOT_COMPARED, VerifyReport, verify

__all__ = ["ArchiveCheck", "check_archive"]

_PAGE: Final = 500


@dataclass(slots=True)
class ArchiveCheck:
    """What came of holding an archive against its log.

    Attributes:
        tasks: How many tasks the log says are in it, and are.
        events: How many events those have.
        wrong: How many are there, and aren't what was archived.
        has_expected: Whether the expected digest stands in one of these.
        problems: What is wrong, a line each.
    """

    tasks: int = 0
    events: int = 0
    wrong: int = 0
    has_expected: bool = False
    problems: list[str] = field(default_factory=list[str])


def check_archive(
    log: Connection,
    file: Path,
    expect: tuple[int, str] | None = None,
    progress: Progress | None = None,
) -> ArchiveCheck:
    """Verify an archive, and each of its tasks against what the log says of it. Blocking.

    Args:
        log: A connection to the log.
        file: The archive.
        expect: A position and the digest that must stand there, if it is in this archive.
        progress: Called with events read and events in all.

    Raises:
        StoreError: The archive can't be read.
    """
    found = ArchiveCheck()
    archive = Database(file)
    archive.prepare(create=False, upgrade=False)
    with archive.snapshot() as inside:
        flaws = [str(flaw) for flaw in defences.look(archive, inside).flaws]
        own = verify(inside, progress=progress, flaws=flaws)
        _verify_itself(inside, own)
        found.problems += own.problems
        last = 0
        while True:
            page = inside.execute(
                sa.select(streams)
                .where(streams.c.stream_id > last)
                .order_by(streams.c.stream_id)
                .limit(_PAGE)
            ).all()
            _check_page(log, inside, file.name, page, expect, found)
            if len(page) < _PAGE:
                break
            last = page[-1].stream_id
    named = sa.select(sa.func.count()).where(tasks.c.archived == file.name)
    missing = log.execute(named).scalar_one() - found.tasks - found.wrong
    if not found.tasks and not found.wrong and not missing:
        found.problems.append(f"the log knows no archive of the name {file.name}")
    elif missing:
        found.problems.append(f"tasks that the log says are in it are not: {missing}")
    return found


def _verify_itself(inside: Connection, own: VerifyReport) -> None:
    if own.archive_of is None:
        own.problem("it is no archive")
    try:
        compared = compare(inside)
    except DatabaseIncompatible:
        own.problem(NOT_COMPARED)
        return
    except PerdureError as error:
        own.problem(str(error))
        return
    for problem in compared.problems:
        own.problem(problem)
    if compared.differed:
        own.problem(f"`tasks` differs from its events in {compared.differed} rows")


def _check_page(
    log: Connection,
    inside: Connection,
    name: str,
    page: Sequence[sa.Row[*tuple[int, str, int]]],
    expect: tuple[int, str] | None,
    found: ArchiveCheck,
) -> None:
    ids = {row[1]: row[0] for row in page}
    known = set(log.scalars(sa.select(streams.c.task_id).where(streams.c.task_id.in_(ids))))
    notes = _notes(log, list(ids))
    moved = {ids[task_id]: _Moved(note) for task_id, note in notes.items()}
    _walk(inside, moved, None if expect is None else expect[0])
    for task_id, stream_id in ids.items():
        note = notes.get(task_id)
        if note is None:  # as after an interruption: it was copied, and is still in the log
            if task_id not in known:
                found.problems.append(f"{task_id}: the log doesn't know it")
            continue
        one = moved[stream_id]
        if one.digest.hexdigest() != note.digest or stream_id != note.position:
            # One that was changed after it was copied went into a later archive as it was then.
            if note.archive == name:
                found.wrong += 1
                found.problems.append(f"{task_id}: it is not what the log says was archived")
            continue
        if expect is not None and one.expected is not None:
            found.has_expected = True
            if one.expected.hex() != expect[1]:
                found.problems.append(f"position {expect[0]}: its digest is not the one expected")
        if note.archive == name:
            found.tasks += 1
            found.events += note.events


class _Moved:
    """What was found of a task: the digest of its digests, and that at the expected position."""

    def __init__(self, note: Archived) -> None:
        self.left = note.events  # what follows was added here, as by a redaction
        self.digest = hashlib.sha256()
        self.expected: bytes | None = None


def _walk(inside: Connection, moved: Mapping[int, _Moved], expected: int | None) -> None:
    """Take in the events of these tasks, however many there are."""
    placed = (
        sa.select(events.c.stream_id, events.c.position, as_stored(events.c.digest))
        .where(events.c.stream_id.in_(moved))
        .order_by(events.c.stream_id, events.c.version)
    )
    for stream_id, position, stored in plain_rows(inside, placed):
        one = moved[stream_id]
        if not one.left:
            continue
        one.left -= 1
        digest = stored if isinstance(stored, bytes) else b""
        one.digest.update(digest)
        if position == expected:
            one.expected = digest


def _notes(log: Connection, task_ids: list[str]) -> dict[str, Archived]:
    """Return what the log says of those tasks that are archived."""
    rows = log.execute(
        sa.select(streams.c.task_id, events.c.schema_version, events.c.data)
        .join_from(
            streams,
            events,
            sa.and_(
                events.c.stream_id == streams.c.stream_id, events.c.version == streams.c.version
            ),
        )
        .where(streams.c.task_id.in_(task_ids), events.c.type == Archived.type)
    )
    notes: dict[str, Archived] = {}
    for task_id, schema_version, data in rows:
        with contextlib.suppress(StoreError, *UNREADABLE):  # what is wrong, the log's walk says
            note = decode(Archived.type, schema_version, data)
            if isinstance(note, Archived):
                notes[task_id] = note
    return notes
