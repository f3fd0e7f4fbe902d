"""One write transaction over the log: stage appends, then write them all at once.

`append` decides at once whether an event may be written, against the stream as it is inside this
transaction; `flush` writes what was accepted with a handful of statements, however many appends
there were. Taking the counter row (`log_head`) comes late, since everyone waits for it where
several processes write: nothing that may take long comes between that and the commit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from perdure.errors import (
    ConcurrencyError,
    DatabaseCorrupt,
    DatabaseUnavailable,
    DuplicateKey,
    InvalidTransition,
)
from perdure.events import (
    Archived,
    Chunk,
    Event,
    RecordedEvent,
    Submitted,
    chain_link,
    decode,
    decode_text,
    encode_data,
    link_tail,
    micros_of,
)
from perdure.store.bulk import Bulk
from perdure.store.direct import Statement, is_among
from perdure.store.projection import ChangingColumns, TaskFold, TaskRow
from perdure.store.schema import blobs, events, log_head, streams, tasks
from perdure.text import is_storable

__all__ = ["IN_LIMIT", "FoldCache", "Transaction", "chunks_of"]

# Well below the number of parameters a statement may have on any supported SQLite.
IN_LIMIT: Final = 500
# So many events of a stream are read at a time, however long it is.
MOST_FOLDED: Final = 5000
# What was asked is kept with a fold up to that size, so that whoever claims it need not read it.
KEPT_BYTES: Final = 2000

# Made once: for small transactions, making a statement costs more than executing it.
_FIND_STREAMS: Final = Statement(
    sa.select(streams.c.task_id, streams.c.stream_id, streams.c.version)
    .where(is_among(streams.c.task_id, "task_ids"))
    .order_by(streams.c.task_id)
    .with_for_update(),
    ("task_ids",),
)
_LOOK_AT_HEAD: Final = Statement(
    sa.select(log_head.c.position, log_head.c.digest, log_head.c.archive_of)
)
_HEAD: Final = Statement(
    sa.select(log_head.c.position, log_head.c.digest, log_head.c.archive_of).with_for_update()
)
_MOVE_HEAD: Final = Statement(
    sa.update(log_head).values(
        position=sa.bindparam("to_position"), digest=sa.bindparam("to_digest")
    ),
    ("to_position", "to_digest"),
)
_INSERT_STREAM: Final = Bulk(streams, ("stream_id", "task_id", "version"))
_INSERT_EVENT: Final = Bulk(
    events,
    (
        *("position", "stream_id", "version", "type", "schema_version"),
        *("data", "recorded_at", "digest"),
    ),
)
_INSERT_TASK: Final = Bulk(tasks, TaskRow._fields)
# Locked where that is possible, so that no redaction takes one away that is about to be named.
_KNOWN_BLOBS: Final = Statement(
    sa.select(blobs.c.digest)
    .where(is_among(blobs.c.digest, "digests"))
    .order_by(blobs.c.digest)
    .with_for_update(read=True, key_share=True),
    ("digests",),
)
# Another process may store the same content at the same time.
_INSERT_BLOB: Final = {
    name: insert(blobs).on_conflict_do_nothing()
    for name, insert in (("sqlite", sqlite.insert), ("postgresql", postgresql.insert))
}
# They were looked up in the same transaction, so what they are at is known.
_MOVE_STREAMS: Final = Statement(
    sa.update(streams)
    .where(is_among(streams.c.stream_id, "of_streams"))
    .values(version=streams.c.version + sa.bindparam("by")),
    ("by", "of_streams"),
)
_UPDATE_TASK: Final = Bulk(tasks, ChangingColumns._fields, key="stream_id")
_FORGET_CONTENT: Final = Bulk(tasks, ("stream_id", "prompt", "labels"), key="stream_id")
_KNOWN_KEYS: Final = Statement(
    sa.select(tasks.c.key, tasks.c.task_id).where(is_among(tasks.c.key, "keys")), ("keys",)
)
_STREAM_EVENTS: Final = Statement(
    sa.select(
        events.c.version,
        events.c.type,
        events.c.schema_version,
        events.c.data,
        events.c.recorded_at,
    )
    .where(
        events.c.stream_id == sa.bindparam("of_stream"), events.c.version > sa.bindparam("after")
    )
    .order_by(events.c.version)
    .limit(MOST_FOLDED),
    ("of_stream", "after"),
)


def chunks_of(items: Iterable[str], size: int = IN_LIMIT) -> Iterator[list[str]]:
    """Yield ``items`` in lists of at most ``size``."""
    part: list[str] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part


class FoldCache:
    """Folds of the streams written to last, so that most appends read nothing.

    A fold is used only where its version is still the stream's, so another process's write is
    always noticed; where nobody else has written, that is known without looking.
    """

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._folds: OrderedDict[str, tuple[TaskFold, int]] = OrderedDict()
        self._head: tuple[int, bytes] | None = None
        self._disturbances = 0

    def get(self, task_id: str) -> TaskFold | None:
        """Return the fold of a stream, if it is kept; its stream may have moved on."""
        kept = self._folds.get(task_id)
        return None if kept is None else kept[0]

    def trusted(self, task_id: str) -> TaskFold | None:
        """Return the fold of a stream, if it is kept and surely is where the stream is."""
        kept = self._folds.get(task_id)
        return kept[0] if kept is not None and kept[1] == self._disturbances else None

    def distrust(self) -> None:
        """Note that somebody else may have written."""
        self._disturbances += 1
        self._head = None

    @property
    def head(self) -> tuple[int, bytes] | None:
        """The position and digest of the log's head, where it surely is there."""
        return self._head

    def put_head(self, head: tuple[int, bytes] | None) -> None:
        """Keep where the log's head is, of a log that takes new streams."""
        self._head = head

    def put(self, fold: TaskFold) -> None:
        """Keep a fold that is where its stream is."""
        kept = self._folds.get(fold.task_id)
        if kept is None or kept[0] is not fold or kept[1] != self._disturbances:
            self._folds[fold.task_id] = fold, self._disturbances
        self._folds.move_to_end(fold.task_id)
        if len(self._folds) > self._size:
            self._folds.popitem(last=False)

    def clear(self) -> None:
        """Forget everything: the database may be another one, such as a standby that took over."""
        self._folds.clear()
        self._head = None

    def drop(self, task_ids: Iterable[str]) -> None:
        """Forget folds that may hold what was never committed."""
        for task_id in task_ids:
            self._folds.pop(task_id, None)


@dataclass(slots=True)
class _Staged:
    fold: TaskFold
    first_version: int
    events: list[tuple[Event, bytes]]
    new: bool
    row_changed: bool


class Transaction:
    """What is being written together.

    Args:
        connection: Where to.
        cache: Folds that need not be read.
        now: Returns the moment that is recorded; called once.
        careful: Look whether the name of a new stream is taken. Else the database refuses the
            whole transaction where it is, which it hardly ever has to.

    Attributes:
        connection: For statements beside the log, in the same transaction.
        erases: Set where content was removed, which then must not stay in any file either.
        mark: The position and the digest of the last event that `flush` has written.
    """

    def __init__(
        self,
        connection: Connection,
        cache: FoldCache,
        now: Callable[[], datetime],
        *,
        careful: bool = True,
    ) -> None:
        self.connection = connection
        self._now = now
        self._at: datetime | None = None
        self._careful = careful
        self.erases = False
        self.mark: tuple[int, bytes] | None = None
        self._takes_new = False
        self._head_rows: Sequence[Sequence[Any]] | None = None
        self._cache = cache
        self._versions: dict[str, tuple[int, int] | None] = {}
        self._folds: dict[str, TaskFold] = {}
        self._staged: dict[str, _Staged] = {}
        self._keys: dict[str, str] = {}
        self._free_keys: set[str] = set()
        self._blobs: dict[str, bytes] = {}
        self._last: list[Callable[[], None]] = []

    @property
    def at(self) -> datetime:
        """The moment that is recorded."""
        if self._at is None:  # a cached_property of Python 3.11 would wait for other transactions'
            self._at = self._now()
        return self._at

    # -- reading ---------------------------------------------------------------------------------

    def prefetch(self, task_ids: Iterable[str], *, only: bool = False) -> None:
        """Look up (and on PostgreSQL lock) these streams in one go, in an order all agree on.

        Args:
            task_ids: The streams.
            only: Nothing but these will be asked for before it is written. Then the counter row is
                taken by the same message, unless a stream isn't known: reading all of one may take
                long. Of one that is known it is what others have appended to it since.
        """
        wanted: set[str] = set()
        for task_id in task_ids:
            if task_id not in self._folds and task_id not in self._versions:
                fold = self._cache.trusted(task_id)
                if fold is None and not is_storable(task_id):  # would spoil the query for others
                    self._versions[task_id] = None
                elif fold is None:
                    wanted.add(task_id)
                    only = only and self._cache.get(task_id) is not None
                else:
                    self._folds[task_id] = fold
        only = only and len(wanted) <= IN_LIMIT
        for part in chunks_of(sorted(wanted)):
            self._versions.update(dict.fromkeys(part))
            if only:
                rows, self._head_rows = _FIND_STREAMS.rows_and(_HEAD, self.connection, part)
            else:
                rows = _FIND_STREAMS.rows(self.connection, part)
            for task_id, stream_id, version in rows:
                self._versions[task_id] = (stream_id, version)

    def fold(self, task_id: str) -> TaskFold | None:
        """Return the stream as it is now in this transaction; None where there is none."""
        known = self._folds.get(task_id)
        if known is not None:  # one and the same, so that whoever holds it sees what is appended
            return known
        trusted = self._cache.trusted(task_id)
        if trusted is not None:
            self._folds[task_id] = trusted
            return trusted
        if task_id not in self._versions:
            self.prefetch((task_id,))
        found = self._versions[task_id]
        if found is None:
            return None
        stream_id, version = found
        fold = self._cache.get(task_id)
        if fold is None or fold.version > version:
            fold = TaskFold(task_id, stream_id)
        if fold.version < version:
            fold = self._load(fold)
        if fold.version != version:
            raise DatabaseCorrupt(
                f"{task_id} should be at version {version}, its events end at {fold.version}: "
                "run `perdure verify`"
            )
        self._folds[task_id] = fold
        return fold

    def _load(self, fold: TaskFold) -> TaskFold:
        # Forgotten first: were something unreadable half way, the fold would be of no version.
        self._cache.drop((fold.task_id,))
        after = fold.version
        while True:
            rows = _STREAM_EVENTS.rows(self.connection, fold.stream_id, after)
            try:
                fold = _folded(fold, rows)
            except (InvalidTransition, LookupError) as error:
                raise DatabaseCorrupt(
                    f"{fold.task_id} can't be folded after version {after} ({error}): "
                    "run `perdure verify`"
                ) from None
            if len(rows) < MOST_FOLDED:
                return fold
            after = rows[-1][0]

    # -- staging ---------------------------------------------------------------------------------

    def append(self, task_id: str, new: Sequence[Event], expected: int | None) -> int:
        """Accept events for a stream, all of them or none; returns the version after them.

        Args:
            task_id: The stream.
            new: What happened.
            expected: The version the stream must be at; 0 for a new one; None for any, as long as
                the events may follow what is there.

        Raises:
            ConcurrencyError: The stream is at another version.
            DuplicateKey: Another task has the new task's key.
            InvalidTransition: The events can't follow.
        """
        # Where the database is sure to notice: it has the name of each stream but once.
        hoped_for = not self._careful and expected == 0 and new and type(new[0]) is Submitted
        fold = self._folds.get(task_id) if hoped_for else self.fold(task_id)
        actual = 0 if fold is None else fold.version
        if expected is not None and actual != expected:
            raise ConcurrencyError(task_id, expected, actual)
        if not new:
            return actual
        if fold is None:
            fold = TaskFold(task_id)
        encoded: list[tuple[Event, bytes]] = []
        changes_row = False  # a chunk changes no row: it only moves its stream on
        for event in new:
            encoded.append((event, encode_data(event)))
            if type(event) is not Chunk:
                changes_row = True
        fold.apply(new, self.at)
        first, data = encoded[0]
        if type(first) is Submitted:  # after the fold: what is refused claims no key
            try:
                self._claim_key(first.task.get("key"), task_id)
            except DuplicateKey:
                there = self.fold(task_id) if hoped_for else None
                if there is None:
                    raise
                raise ConcurrencyError(task_id, 0, there.version) from None
            if len(data) <= KEPT_BYTES:
                fold.asked = first
        staged = self._staged.get(task_id)
        if staged is None:
            self._staged[task_id] = _Staged(fold, actual + 1, encoded, actual == 0, changes_row)
            self._folds[task_id] = fold
        else:
            staged.events += encoded
            staged.row_changed = staged.row_changed or changes_row
        return fold.version

    def begun(self) -> Iterator[tuple[TaskFold, Submitted]]:
        """Yield the streams that have begun in this transaction, in order."""
        for staged in self._staged.values():
            if staged.new:
                first, _data = staged.events[0]
                if type(first) is Submitted:
                    yield staged.fold, first

    def known_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """Return key -> task id, for those keys that some task has."""
        found: dict[str, str] = {}
        for part in chunks_of(keys):
            found.update((key, self._keys[key]) for key in part if key in self._keys)
            rows = _KNOWN_KEYS.rows(self.connection, part)
            found.update((key, task_id) for key, task_id in rows)
        return found

    def prefetch_keys(self, keys: Iterable[str]) -> None:
        """Look up in one go which of these keys are taken."""
        for part in chunks_of(keys):
            self._free_keys.update(part)
            taken = self.known_keys(part)
            self._keys.update(taken)
            self._free_keys.difference_update(taken)

    def _claim_key(self, key: str | None, task_id: str) -> None:
        if key is None:
            return
        if key not in self._keys and key not in self._free_keys:
            self.prefetch_keys((key,))
        if key in self._keys:
            raise DuplicateKey(key, self._keys[key])
        self._keys[key] = task_id

    def put_blobs(self, new: Mapping[str, bytes]) -> None:
        """Store content by its digest, once."""
        self._blobs.update(new)

    def do_last(self, work: Callable[[], None]) -> None:
        """Call ``work`` once all events are written, before the commit, where there are any."""
        self._last.append(work)

    # -- writing ---------------------------------------------------------------------------------

    @property
    def touched(self) -> list[TaskFold]:
        """The streams that were appended to."""
        return [staged.fold for staged in self._staged.values()]

    def flush(self) -> tuple[int, list[RecordedEvent]]:
        """Write everything; returns the log's new head and what was written, in order."""
        self._flush_blobs()
        if not self._staged:
            return self._head(_LOOK_AT_HEAD)[0], []
        position, digest = self._head(_HEAD)
        stream_rows: list[tuple[Any, ...]] = []
        event_rows: list[tuple[Any, ...]] = []
        written: list[RecordedEvent] = []
        at, micros = self.at, micros_of(self.at)
        moment = _INSERT_EVENT.bound_value(self.connection.dialect, "recorded_at", at)
        for task_id, staged in self._staged.items():
            fold = staged.fold
            if staged.new:
                fold.stream_id = position + 1
                stream_rows.append((fold.stream_id, task_id, fold.version))
            stream_id = fold.stream_id
            version = staged.first_version
            for event, data in staged.events:
                position += 1
                type_, schema = event.type, event.schema_version
                tail = link_tail(type_, schema, micros)
                digest = chain_link(digest, position, task_id, version, tail, sha256(data).digest())
                text = data.decode()
                event_rows.append(
                    (position, stream_id, version, type_, schema, text, moment, digest)
                )
                written.append(RecordedEvent(position, task_id, version, event, at))
                version += 1
        _INSERT_STREAM.execute(self.connection, stream_rows)
        _INSERT_EVENT.execute_bound(self.connection, event_rows)
        self._flush_rows()
        _MOVE_HEAD.defer(self.connection, position, digest)
        for work in self._last:
            work()
        self.mark = position, digest
        return position, written

    @property
    def new_head(self) -> tuple[int, bytes] | None:
        """Where the head is once this is committed, for `FoldCache.put_head`."""
        return self.mark if self._takes_new else None

    def _head(self, statement: Statement) -> tuple[int, bytes]:
        known = self._cache.head
        if known is not None:
            self._takes_new = True
            return known
        rows = self._head_rows
        if rows is None:
            rows = statement.rows(self.connection)
        if not rows:
            raise DatabaseCorrupt("the log has lost its head row: restore a backup")
        ((position, digest, archive_of),) = rows
        if archive_of is not None and any(staged.new for staged in self._staged.values()):
            raise DatabaseUnavailable(
                "this database is an archive, and nothing new goes into it: name the log with --db"
            )
        self._takes_new = archive_of is None
        return int(position), bytes(digest)

    def _flush_rows(self) -> None:
        moved: dict[int, list[int]] = {}  # how far -> which streams
        fresh: list[tuple[Any, ...]] = []
        changed: list[tuple[Any, ...]] = []
        forgotten: list[tuple[Any, ...]] = []
        for staged in self._staged.values():
            fold = staged.fold
            if staged.new:
                fresh.append(fold.new_row())
                continue
            moved.setdefault(len(staged.events), []).append(fold.stream_id)
            if not staged.row_changed:
                continue
            changed.append(fold.changing_columns())
            left = fold.content_left()
            if left is not None:
                forgotten.append((fold.stream_id, *left))
        for by, stream_ids in moved.items():
            for begin in range(0, len(stream_ids), IN_LIMIT):
                part = stream_ids[begin : begin + IN_LIMIT]
                _MOVE_STREAMS.defer(self.connection, by, part)
        _INSERT_TASK.execute(self.connection, fresh)
        _UPDATE_TASK.execute(self.connection, changed)
        _FORGET_CONTENT.execute(self.connection, forgotten)

    def known_blobs(self, digests: Iterable[str]) -> set[str]:
        """Return which of these contents are stored; nobody takes them away before the commit."""
        known: set[str] = set()
        for part in chunks_of(sorted(digests)):  # in an order all agree on
            known.update(digest for (digest,) in _KNOWN_BLOBS.rows(self.connection, part))
        return known

    def _flush_blobs(self) -> None:
        if not self._blobs:
            return
        known = self.known_blobs(self._blobs)
        new = [
            {"digest": digest, "size": len(data), "data": data}
            for digest, data in sorted(self._blobs.items())
            if digest not in known
        ]
        if new:
            self.connection.execute(_INSERT_BLOB[self.connection.dialect.name], new)


def _folded(fold: TaskFold, rows: Iterable[Sequence[Any]]) -> TaskFold:
    """Return the fold after these events."""
    for version, type_, schema_version, data, recorded_at in rows:
        piece = decode_text(schema_version, data) if type_ == Chunk.type else None
        if piece is not None and fold.apply_text(*piece):
            continue
        if type_ == Archived.type and version != fold.version + 1:
            # What the fold would go on with is in an archive: it begins anew.
            fold = TaskFold(fold.task_id, fold.stream_id)
        fold.apply_one(decode(type_, schema_version, data), recorded_at)
    return fold
