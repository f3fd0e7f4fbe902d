"""The file of an archive: made beside its place, proved, and put there whole or not at all.

It is a database of perdure's like any other, always SQLite. The events in it stand at the positions
that they had in the log, with the digests they had there, and its `gaps` are all the positions that
it has no events for: so its own chain holds, and who has the log can hold it against that.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, DatabaseUnavailable, PerdureError
from perdure.events import Archived, ArchivedRow
from perdure.store.bulk import Bulk, plain_rows
from perdure.store.content import blob_digests
from perdure.store.database import Database, Writer
from perdure.store.rebuilding import compare
from perdure.store.scanning import UNREADABLE, Progress
from perdure.store.schema import blobs, events, gaps, log_head, streams, tasks
from perdure.store.transaction import chunks_of
from perdure.store.verification import verify

__all__ = [
    "MOST_EVENTS",
    "Moved",
    "Stages",
    "copy_out",
    "digest_pages",
    "draft_of",
    "named_blobs",
    "read_moved",
    "refuse_target",
]

# Gives, for what is being done, what to call with how much of it is done and how much there is.
Stages = Callable[[str], contextlib.AbstractContextManager[Progress]]

# So much is copied, and later taken out of the log, together: writers wait no longer than that.
MOST_TASKS: Final = 200
MOST_EVENTS: Final = 5000

_EVENT_COLUMNS: Final = tuple(events.c.keys())
_INSERT_EVENT: Final = Bulk(events, _EVENT_COLUMNS)
_INSERT_STREAM: Final = Bulk(streams, tuple(streams.c.keys()))
_INSERT_TASK: Final = Bulk(tasks, tuple(tasks.c.keys()))
_INSERT_GAP: Final = Bulk(gaps, tuple(gaps.c.keys()))


@dataclass(frozen=True, slots=True)
class Moved:
    """A task that is in an archive.

    Attributes:
        events: How many events it has.
        digest: What an `archived` event says of them: the digest of their digests.
        row: What its row in `tasks` keeps.
    """

    task_id: str
    stream_id: int
    events: int
    digest: str
    row: ArchivedRow


# -- its place -----------------------------------------------------------------------------------


def refuse_target(file: Path) -> Path:
    """Return the place that ``file`` names, with its links followed.

    Raises:
        PerdureError: No archive can be put there.
    """
    target = Path(os.path.realpath(file.expanduser()))
    try:
        target.name.encode()
    except UnicodeEncodeError:
        raise PerdureError("the archive's name is no UTF-8, as the log needs it") from None
    if target.is_dir():
        raise PerdureError(f"{target} is a directory: name a file for the archive")
    if not target.parent.is_dir():
        raise PerdureError(f"there is no folder {target.parent} for the archive")
    for taken in (target, target.with_name(target.name + "-wal")):
        if taken.exists():
            raise PerdureError(f"{taken} is there already: name another file for the archive")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PerdureError(f"{target.parent} can't be written to: name another file")
    return target


@contextlib.contextmanager
def draft_of(target: Path) -> Generator[Path, None, None]:
    """Give a place beside ``target``; what is there in the end goes to it, after an error nothing.

    Raises:
        PerdureError: Somebody else has put a file there meanwhile.
    """
    draft = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.part")
    wal = draft.with_name(draft.name + "-wal")
    try:
        yield draft
        if wal.exists() and wal.stat().st_size:
            raise DatabaseUnavailable(f"{draft} is in use by somebody else: try again")
        _synchronise(draft)
        try:
            # Taken first: what is there already may be the only copy of other tasks.
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            raise PerdureError(
                f"{target} is there already: name another file for the archive"
            ) from None
        draft.replace(target)
        _synchronise(target.parent)
    finally:
        for part in ("", "-wal", "-shm", "-journal"):
            draft.with_name(draft.name + part).unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    """Return once a file, or what a folder says is in it, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- making it -----------------------------------------------------------------------------------


def copy_out(
    source: Connection,
    chosen: sa.Select[Any],
    skipped: frozenset[str],
    draft: Path,
    *,
    total: int,
    stages: Stages,
) -> None:
    """Make a database of these tasks, and prove that it is what the log says. Blocking.

    Args:
        source: One state of the log.
        chosen: The rows of `tasks` to copy.
        skipped: Ids to leave out all the same.
        draft: Where; nothing is there yet.
        total: How many events there are to copy.
        stages: Is told how far it is.

    Raises:
        DatabaseCorrupt: The log, or a row, isn't what was written.
        DatabaseUnavailable: There is no room for it, or it can't be written.
    """
    database = Database(draft)
    database.prepare()
    writer = database.writer()
    try:
        with stages("copying events") as step:
            done = 0
            for batch in _batches(source, chosen, skipped):
                done += _copy_batch(source, writer, batch)
                writer.checkpoint_if_due()
                step(done, total)
        _copy_gaps(source, writer)
    except UNREADABLE as error:
        raise DatabaseCorrupt(f"a task is unreadable ({error}): run `perdure verify`") from None
    finally:
        writer.close()
    _prove(database, stages)


def _batches(
    source: Connection, chosen: sa.Select[Any], skipped: frozenset[str]
) -> Iterator[list[sa.RowMapping]]:
    """Yield rows of `tasks` with the `version` of their streams, not too many events at a time."""
    last = 0
    page = (
        chosen.with_only_columns(*tasks.c, streams.c.version)
        .join(streams, streams.c.stream_id == tasks.c.stream_id)
        .order_by(tasks.c.stream_id)
        .limit(MOST_TASKS)
    )
    while True:
        rows = list(source.execute(page.where(tasks.c.stream_id > last)).mappings())
        batch: list[sa.RowMapping] = []
        size = 0
        for row in rows:
            if row["task_id"] in skipped:
                continue
            if batch and size + row["version"] > MOST_EVENTS:
                yield batch
                batch, size = [], 0
            batch.append(row)
            size += row["version"]
        if batch:
            yield batch
        if len(rows) < MOST_TASKS:
            return
        last = rows[-1]["stream_id"]


def _copy_batch(source: Connection, writer: Writer, batch: Sequence[sa.RowMapping]) -> int:
    """Copy tasks with their events and blobs; returns how many events these were."""
    names = tuple(tasks.c.keys())
    done = 0
    with writer.transaction() as draft:
        _INSERT_STREAM.execute(
            draft, [(row["stream_id"], row["task_id"], row["version"]) for row in batch]
        )
        for rows in _pages(source, sa.select(events), [row["stream_id"] for row in batch]):
            _INSERT_EVENT.execute(draft, rows)
            done += len(rows)
            named = {
                digest for row in rows if row[3] == "submitted" for digest in named_blobs(row[5])
            }
            _copy_blobs(source, draft, named)
        _INSERT_TASK.execute(draft, [tuple(row[name] for name in names) for row in batch])
    return done


def _pages(
    source: Connection, whole: sa.Select[*tuple[Any, ...]], stream_ids: Sequence[int]
) -> Iterator[list[tuple[Any, ...]]]:
    """Yield what is selected of the events of these streams, by stream and version.

    Of several streams, which don't have many then, all at once; of one page by page.
    """
    whole = whole.where(events.c.stream_id.in_(stream_ids)).order_by(
        events.c.stream_id, events.c.version
    )
    if len(stream_ids) > 1:
        yield list(plain_rows(source, whole))
        return
    version = 0
    while True:
        page = whole.where(events.c.version.between(version + 1, version + MOST_EVENTS))
        rows = list(plain_rows(source, page))
        if not rows:
            return
        yield rows
        version += MOST_EVENTS


def digest_pages(
    connection: Connection, stream_ids: Sequence[int]
) -> Iterator[list[tuple[int, int, bytes]]]:
    """Yield stream, position and digest of the events of streams that are one batch.

    But for `archived` ones; by stream and version, and not too many at a time.
    """
    placed = sa.select(events.c.stream_id, events.c.position, events.c.digest).where(
        events.c.type != Archived.type
    )
    for rows in _pages(connection, placed, stream_ids):
        yield [(stream_id, position, bytes(digest)) for stream_id, position, digest in rows]


def named_blobs(data: str) -> set[str]:
    """Return the digests of what a stored `submitted` event has in `blobs`."""
    if '"blobs":{"' not in data and '"files":' not in data:
        return set()
    plain = orjson.loads(data)
    return set() if "redacted" in plain else blob_digests(plain["task"], plain.get("blobs") or {})


def _copy_blobs(source: Connection, draft: Connection, named: set[str]) -> None:
    known: set[str] = set()
    for part in chunks_of(sorted(named)):
        known.update(draft.scalars(sa.select(blobs.c.digest).where(blobs.c.digest.in_(part))))
    for digest in sorted(named - known):  # one at a time: each may be as large as a file
        found = source.execute(sa.select(blobs).where(blobs.c.digest == digest)).mappings().all()
        if found:  # the proof says so where it isn't there
            draft.execute(sa.insert(blobs), [dict(row) for row in found])


def _copy_gaps(source: Connection, writer: Writer) -> None:
    """Note all positions that the copy has no events for, and where it ends."""
    head = source.execute(sa.select(log_head.c.position, log_head.c.digest)).one()
    position = 0
    digest = b""
    while True:
        with writer.transaction() as draft:
            rows = draft.execute(
                sa.select(events.c.position, events.c.digest)
                .where(events.c.position > position)
                .order_by(events.c.position)
                .limit(MOST_EVENTS)
            ).all()
            missing: list[tuple[int, int]] = []
            for row in rows:
                if row.position != position + 1:
                    missing.append((position + 1, row.position - 1))
                position, digest = row.position, bytes(row.digest)
            known = _digests_at(source, [last for _, last in missing])
            _INSERT_GAP.execute(draft, [(first, last, known[last]) for first, last in missing])
            if len(rows) < MOST_EVENTS:
                origin = f"{head.position}:{bytes(head.digest).hex()}"
                draft.execute(
                    sa.update(log_head).values(position=position, digest=digest, archive_of=origin)
                )
                return


def _digests_at(source: Connection, positions: Sequence[int]) -> dict[int, bytes]:
    """Return the digests at these positions, each of an event or of the end of a gap."""
    found: dict[int, bytes] = {}
    for begin in range(0, len(positions), MOST_TASKS):
        rows = source.execute(
            sa.select(events.c.position, events.c.digest).where(
                events.c.position.in_(positions[begin : begin + MOST_TASKS])
            )
        )
        found.update((row.position, bytes(row.digest)) for row in rows)
    for position in positions:
        if position not in found:
            gap = source.execute(
                sa.select(gaps)
                .where(gaps.c.first_position <= position)
                .order_by(gaps.c.first_position.desc())
                .limit(1)
            ).one_or_none()
            if gap is None or gap.last_position != position:
                raise DatabaseCorrupt(f"position {position} is missing: run `perdure verify`")
            found[position] = bytes(gap.digest)
    return found


def _prove(database: Database, stages: Stages) -> None:
    with database.snapshot() as connection:
        with stages("verifying the copy") as step:
            problems = verify(connection, progress=step).problems
        with stages("comparing tasks") as step:
            compared = compare(connection, step)
    problems += compared.problems
    if problems:
        raise DatabaseCorrupt(
            f"what was to be archived isn't what was written ({problems[0]}): run `perdure verify`"
        )
    if compared.differed:
        raise DatabaseCorrupt(
            "`tasks` differs from the log in what was to be archived: run `perdure rebuild`"
        )


# -- reading it ----------------------------------------------------------------------------------


def read_moved(file: Path, after: int) -> list[Moved]:
    """Return some of an archive's tasks, those after stream ``after``; none at its end."""
    database = Database(file)
    with database.snapshot() as connection:
        batches = _batches(connection, sa.select(tasks).where(tasks.c.stream_id > after), _NONE)
        batch = next(batches, None) or []
        stream_ids = [row["stream_id"] for row in batch]
        found = {key: hashlib.sha256() for key in stream_ids}
        for rows in digest_pages(connection, stream_ids):
            for stream_id, _position, digest in rows:
                found[stream_id].update(digest)
    return [
        Moved(
            task_id=row["task_id"],
            stream_id=row["stream_id"],
            events=row["version"],
            digest=found[row["stream_id"]].hexdigest(),
            row=_row_left(row),
        )
        for row in batch
    ]


_NONE: Final[frozenset[str]] = frozenset()


def _row_left(row: sa.RowMapping) -> ArchivedRow:
    kept = {name: row[name] for name in ArchivedRow.model_fields}
    return ArchivedRow.model_validate({**kept, "labels": orjson.loads(row["labels"])})
