"""Archiving: ended tasks move, with their events and content, into a file of their own.

First the file: copied from one state of the log, proved, synchronised, in its place. Only then the
log lets go of what is in it, some hundred tasks at a time through the ordinary writer: each gets an
`archived` event, which vouches for what was there, and its other events are deleted. So at any
moment each task is whole in the log, or archived in a file that is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, PerdureError, StoreError
from perdure.events import Archived, Submitted
from perdure.store import scanning
from perdure.store.archivefile import (
    MOST_EVENTS,
    Moved,
    Stages,
    copy_out,
    digest_pages,
    draft_of,
    named_blobs,
    read_moved,
    refuse_target,
)
from perdure.store.bulk import plain_rows
from perdure.store.database import Database
from perdure.store.dialect import take_time
from perdure.store.gaps import open_gaps
from perdure.store.log import EventLog
from perdure.store.scanning import UNREADABLE, Progress
from perdure.store.schema import blobs, events, log_head, streams, tasks
from perdure.store.transaction import IN_LIMIT, Transaction, chunks_of

__all__ = ["ArchivePlan", "ArchiveReport", "Stages", "archive", "survey"]

# Of blobs, in one transaction: what is deleted is overwritten, and goes through the WAL.
MOST_BYTES_DROPPED: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """What there is to archive.

    Attributes:
        tasks: How many tasks.
        events: How many events they have.
        bytes: How much the JSON of those takes.
    """

    tasks: int
    events: int
    bytes: int


@dataclass(slots=True)
class ArchiveReport:
    """What was archived.

    Attributes:
        file: The archive; None where there was nothing to archive.
        tasks: How many tasks went.
        events: How many events they had.
        changed: Tasks that are in the file and in the log: they were changed meanwhile.
        blobs: How many texts and files went that nothing in the log needs any more.
        bytes: The size of the file.
    """

    file: Path | None = None
    tasks: int = 0
    events: int = 0
    changed: int = 0
    blobs: int = 0
    bytes: int = 0


@contextlib.contextmanager
def _silent(_what: str) -> Generator[Progress, None, None]:
    yield lambda _done, _total: None


_ENDED: Final = ("completed", "failed", "cancelled")


def _ended(before: datetime) -> tuple[sa.ColumnElement[bool], ...]:
    """Return the conditions for what may be archived; what is needed is among it."""
    return tasks.c.status.in_(_ENDED), tasks.c.ended_at < before, tasks.c.archived.is_(None)


def _needed(connection: Connection) -> frozenset[str]:
    """Return the tasks that unfinished ones go on from."""
    found = connection.scalars(
        sa.select(tasks.c.parent).where(tasks.c.status.not_in(_ENDED), tasks.c.parent.is_not(None))
    )
    return frozenset(found)


def survey(connection: Connection, before: datetime) -> ArchivePlan:
    """Return what there is to archive of what ended before a moment. Blocking.

    Raises:
        PerdureError: The database is an archive itself.
    """
    _refuse_archive(connection)
    octets = (
        sa.func.octet_length(sa.cast(events.c.data, sa.Text))
        if connection.dialect.name == "postgresql"
        else sa.func.length(sa.cast(events.c.data, sa.LargeBinary))
    )
    of_tasks = sa.join(tasks, events, events.c.stream_id == tasks.c.stream_id)
    sizes = sa.select(sa.func.count(), sa.func.sum(octets)).select_from(of_tasks)
    kept = _each_needed(before, _needed(connection))
    found, _ = _count(connection, before)
    all_events, size = _summed(connection, [sizes.where(*_ended(before))])
    less_events, less_size = _summed(connection, [sizes.where(*where) for where in kept])
    return ArchivePlan(found, all_events - less_events, size - less_size)


def _refuse_archive(connection: Connection) -> None:
    if connection.execute(sa.select(log_head.c.archive_of)).scalar() is not None:
        raise PerdureError("this database is an archive itself: name the log with --db")


def _count(connection: Connection, before: datetime) -> tuple[int, int]:
    """Return how many tasks there are to archive, and how many events they have."""
    of_tasks = sa.join(tasks, streams, streams.c.stream_id == tasks.c.stream_id)
    counts = sa.select(sa.func.count(), sa.func.sum(streams.c.version)).select_from(of_tasks)
    kept = _each_needed(before, _needed(connection))
    whole = _summed(connection, [counts.where(*_ended(before))])
    less = _summed(connection, [counts.where(*where) for where in kept])
    return whole[0] - less[0], whole[1] - less[1]


def _each_needed(
    before: datetime, needed: frozenset[str]
) -> list[tuple[sa.ColumnElement[bool], ...]]:
    """Return the conditions for what would be archived, were it not needed."""
    return [(*_ended(before), tasks.c.task_id.in_(part)) for part in chunks_of(sorted(needed))]


def _summed(
    connection: Connection, queries: Sequence[sa.Select[*tuple[Any, ...]]]
) -> tuple[int, int]:
    found = [connection.execute(query).one() for query in queries]
    return sum(int(row[0]) for row in found), sum(int(row[1] or 0) for row in found)


async def archive(
    log: EventLog,
    database: Database,
    before: datetime,
    file: Path,
    *,
    by: str,
    stages: Stages | None = None,
) -> ArchiveReport:
    """Move the tasks that ended before a moment into an archive.

    Whoever works goes on meanwhile. Where it is broken off, nothing is lost: what has not been
    moved by then is in the log as before, and goes into another archive the next time.

    Args:
        log: The log, to write to.
        database: The same, to read from.
        before: Tasks that ended before it, and that no unfinished task goes on from.
        file: Where the archive goes; nothing may be there.
        by: Who does it.
        stages: Is told how far it is.

    Raises:
        PerdureError: There can be no archive at that place, or it has the name of another one.
        StoreError: A database can't do its part.
    """
    stages = stages or _silent
    stop = threading.Event()
    try:
        target = await asyncio.to_thread(_make, database, before, file, stages, stop)
    except asyncio.CancelledError:
        stop.set()
        raise
    report = ArchiveReport(file=target)
    if target is None:
        return report
    report.bytes = target.stat().st_size
    with stages("moving tasks") as step:
        await _let_go(log, target, by, report, step)
    report.blobs = await _drop_blobs(log, database)
    with contextlib.suppress(StoreError):  # what is free and not given back is used again
        await asyncio.to_thread(_give_back, database)
    with contextlib.suppress(StoreError):  # whoever can write clears away what readers leave
        await asyncio.to_thread(lambda: Database(target).writer().close())
    return report


def _make(
    database: Database, before: datetime, file: Path, stages: Stages, stop: threading.Event
) -> Path | None:
    """Put the archive in its place; returns where, None where there is nothing to archive."""
    target = refuse_target(file)
    with database.snapshot() as connection:
        _refuse_archive(connection)
        found, total = _count(connection, before)
        if not found:
            return None
        named = sa.select(sa.literal(1)).where(tasks.c.archived == target.name).limit(1)
        if connection.execute(named).first() is not None:
            raise PerdureError(
                f"the log has tasks in another archive of the name {target.name}: give another one"
            )
        with draft_of(target) as draft:
            copy_out(
                connection,
                sa.select(tasks).where(*_ended(before)),
                _needed(connection),
                draft,
                total=total,
                stages=partial(_until, stop, stages),
            )
            _check(stop)
    return target


@contextlib.contextmanager
def _until(stop: threading.Event, stages: Stages, what: str) -> Generator[Progress, None, None]:
    """Give what `stages` gives, and break off once nobody waits for it any more."""
    with stages(what) as step:

        def checked(done: int, total: int) -> None:
            _check(stop)
            step(done, total)

        yield checked


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise PerdureError("archiving was stopped; nothing was changed")


# -- taking it out of the log --------------------------------------------------------------------


async def _let_go(
    log: EventLog, file: Path, by: str, report: ArchiveReport, step: Progress
) -> None:
    """Take out of the log what is in an archive, and count it."""
    total = await asyncio.to_thread(_tasks_in, file)
    batch = await asyncio.to_thread(read_moved, file, 0)
    while batch:
        following = await asyncio.to_thread(read_moved, file, batch[-1].stream_id)
        work = partial(_move, batch=batch, archive=file.name, by=by, last=not following)
        gone = await log.write(work, [one.task_id for one in batch], alone=True)
        report.tasks += len(gone)
        report.events += sum(gone)
        report.changed += len(batch) - len(gone)
        step(report.tasks + report.changed, total)
        batch = following


def _tasks_in(file: Path) -> int:
    with Database(file).snapshot() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(tasks)).scalar_one()


def _move(
    tx: Transaction, *, batch: Sequence[Moved], archive: str, by: str, last: bool
) -> list[int]:
    """Archive these tasks, but for those that were changed; returns how many events each had."""
    if sum(one.events for one in batch) > MOST_EVENTS:  # one task alone
        take_time(tx.connection)
    moved: list[Moved] = []
    for one in batch:
        fold = tx.fold(one.task_id)
        if fold is None or fold.version != one.events or fold.state.archive is not None:
            continue  # as after a redaction: the copy has what was removed here
        note = Archived(
            by=by,
            archive=archive,
            events=one.events,
            position=one.stream_id,
            digest=one.digest,
            row=one.row,
        )
        tx.append(one.task_id, (note,), fold.version)
        moved.append(one)
    if moved:
        tx.do_last(lambda: _delete_events(tx.connection, moved))
    tx.erases = last
    return [one.events for one in moved]


def _delete_events(connection: Connection, moved: Sequence[Moved]) -> None:
    """Delete the events of tasks that are archived; what is deleted is what the archive has."""
    stream_ids = [one.stream_id for one in moved]
    found = {key: hashlib.sha256() for key in stream_ids}
    for rows in digest_pages(connection, stream_ids):
        for stream_id, _position, digest in rows:
            found[stream_id].update(digest)
        open_gaps(connection, [(position, digest) for _stream, position, digest in rows])
    if any(found[one.stream_id].hexdigest() != one.digest for one in moved):
        raise DatabaseCorrupt("events were changed while they were archived: run `perdure verify`")
    connection.execute(
        sa.delete(events).where(events.c.stream_id.in_(stream_ids), events.c.type != Archived.type)
    )


# -- what nothing needs any more -----------------------------------------------------------------


async def _drop_blobs(log: EventLog, database: Database) -> int:
    """Delete the blobs that no task in the log names; returns how many those were."""
    head, unnamed = await asyncio.to_thread(_unnamed_blobs, database)
    dropped = 0
    for part in _parts(unnamed):
        dropped += await log.write(partial(_drop, digests=part, since=head), alone=True)
    return dropped


def _parts(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Divide blobs into those that are dropped together: others wait as long as that takes."""
    part: list[str] = []
    octets = 0
    for digest, size in sizes.items():
        part.append(digest)
        octets += size
        if octets >= MOST_BYTES_DROPPED or len(part) == IN_LIMIT:
            yield part
            part, octets = [], 0
    if part:
        yield part


def _unnamed_blobs(database: Database) -> tuple[int, dict[str, int]]:
    """Return the log's head, and the blobs that no task up to there names, with their sizes."""
    with database.snapshot() as connection:
        head = connection.execute(sa.select(log_head.c.position)).scalar_one()
        sizes = dict(plain_rows(connection, sa.select(blobs.c.digest, blobs.c.size)))
        unnamed = set(sizes)
        last = 0
        # A stream's key is the position of its first event, if that is still here.
        page = (
            sa.select(events.c.position, events.c.data)
            .join_from(streams, events, events.c.position == streams.c.stream_id)
            .order_by(streams.c.stream_id)
            .limit(scanning.PAGE)
        )
        while unnamed:
            rows = list(plain_rows(connection, page.where(streams.c.stream_id > last)))
            unnamed -= _named(data for _, data in rows)
            if len(rows) < scanning.PAGE:
                break
            last = rows[-1][0]
    return int(head), {digest: sizes[digest] for digest in sorted(unnamed)}


def _named(stored: Any) -> set[str]:  # noqa: ANN401 - texts, one after the other
    try:
        return {digest for data in stored for digest in named_blobs(data)}
    except UNREADABLE:
        raise DatabaseCorrupt("a task's first event is unreadable: run `perdure verify`") from None


def _drop(tx: Transaction, *, digests: Sequence[str], since: int) -> int:
    take_time(tx.connection)  # what was submitted meanwhile may be much
    # Whoever is about to name one of them holds this lock, and is waited for.
    tx.connection.execute(
        sa.select(blobs.c.digest)
        .where(blobs.c.digest.in_(digests))
        .order_by(blobs.c.digest)
        .with_for_update()
    )
    fresh = tx.connection.scalars(
        sa.select(events.c.data).where(events.c.position > since, events.c.type == Submitted.type)
    )
    gone = sorted(set(digests) - _named(fresh))
    tx.connection.execute(sa.delete(blobs).where(blobs.c.digest.in_(gone)))
    tx.erases = True
    return len(gone)


def _give_back(database: Database) -> None:
    writer = database.writer()
    try:
        writer.vacuum(full=False)
    finally:
        writer.close()
