"""Looking after the log as a whole: verify the chain, rebuild the projection, redact content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, InvalidTransition, PerdureError, TaskNotFound
from perdure.events import EVENT_TYPES, Redacted, canonical, chain_digest, decode
from perdure.store.bulk import plain_rows
from perdure.store.content import blob_digests, digest_of
from perdure.store.dialect import any_text, take_time
from perdure.store.projection import TaskFold
from perdure.store.readonly import iso
from perdure.store.schema import Timestamp, blobs, events, log_head, streams, tasks
from perdure.store.transaction import Transaction
from perdure.text import one_line

__all__ = ["RebuildReport", "VerifyReport", "compare", "rebuild", "redact", "verify"]

Progress = Callable[[int, int], None]

PAGE: Final = 5000
MOST_PROBLEMS: Final = 100


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        events: How many events were read.
        tasks: How many streams there are.
        redacted: How many of the events have had content removed by `redact`.
        position: The head of the log.
        digest: The head's digest, in hexadecimal. Kept somewhere else, it lets a later `verify`
            notice that the end of the log was cut off or all of it written anew.
        problems: What is wrong, a line each; at most the first hundred.
    """

    events: int = 0
    tasks: int = 0
    redacted: int = 0
    position: int = 0
    digest: str = ""
    problems: list[str] = field(default_factory=list[str])

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def problem(self, text: str) -> None:
        """Note a problem, as long as there aren't too many, on one line that can be shown."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(one_line(text))


def verify(
    connection: Connection,
    *,
    expect: tuple[int, str] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Walk the whole chain: every event, its place, its digest, and the ends of log and streams.

    Args:
        connection: All reading happens in its one transaction.
        expect: A position and the digest that must stand there, noted down earlier.
        progress: Called with events read and events in all.
    """
    report = VerifyReport()
    head = _verify_head(connection, report)
    walk = _Walk(report)
    for row in _each_event(connection):
        report.events += 1
        try:
            walk.take(row)
        except _UNREADABLE:
            report.problem(f"position {row[0]}: the row is unreadable")
        if expect is not None and row[0] == expect[0] and walk.digest.hex() != expect[1]:
            report.problem(f"position {expect[0]}: its digest is not the one expected")
        if progress is not None and report.events % PAGE == 0:
            progress(report.events, report.position)
    walk.end(head)
    if expect is not None and report.position < expect[0]:
        report.problem(f"the log ends at {report.position}, before the expected {expect[0]}")
    _verify_streams(connection, walk.versions, report)
    _verify_blobs(connection, walk.blobs, report)
    return report


# What comes of values that only somebody else can have stored.
_UNREADABLE: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def _verify_head(connection: Connection, report: VerifyReport) -> bytes:
    """Note the log's head in the report; returns its digest."""
    heads = connection.execute(
        sa.select(log_head.c.id, log_head.c.position, _raw(log_head.c.digest))
    ).all()
    if len(heads) != 1:
        lost = "the log has lost its head row"
        report.problem(f"the log has {len(heads)} head rows" if heads else lost)
        return b""
    ((row_id, position, digest),) = heads
    if row_id != 1 or not isinstance(position, int) or not isinstance(digest, bytes):
        report.problem("the log's head row is unreadable")
        return b""
    report.position, report.digest = position, digest.hex()
    return digest


def _raw(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return the column's values as they are stored, whatever they are."""
    raw: sa.ColumnElement[Any] = sa.type_coerce(column, sa.types.NullType()).label(column.name)
    return raw


class _Where(NamedTuple):
    """Where an event stands; put into words only where there is something to say."""

    position: int
    task_id: str
    version: int

    def __str__(self) -> str:
        return f"position {self.position} ({self.task_id} version {self.version})"


# position, stream_id, version, type, schema_version, data, recorded_at, digest, task_id
_EventRow: TypeAlias = tuple[int, int, int, str, int, str, datetime, Any, Any]


class _Walk:
    """The state of a walk along the chain."""

    def __init__(self, report: VerifyReport) -> None:
        self.versions: dict[str, int] = {}
        self._report = report
        self._position = 0
        self.digest = b""
        self.blobs: set[str] = set()
        self._tombstones: dict[tuple[str, int], str] = {}

    def take(self, row: _EventRow) -> None:
        report = self._report
        position, stream_id, number, type_, schema_version, text, at, kept, task_id = row
        where = _Where(position, task_id, number)
        stored = kept if isinstance(kept, bytes) else b""
        # On with what is stored, so that one change is one problem and not one at every event.
        previous, self.digest = self.digest, stored
        if position != self._position + 1:
            report.problem(f"position {position}: position {self._position + 1} was expected")
        self._position = position
        if task_id is None:
            report.problem(f"position {position}: its stream is missing")
            return
        version = self.versions[task_id] = self.versions.get(task_id, 0) + 1
        if number != version:
            report.problem(f"{where}: version {version} was expected")
        if version == 1 and stream_id != position:
            report.problem(f"{where}: its stream's key is {stream_id}")
        if type_ not in EVENT_TYPES:
            report.problem(f"{where}: {type_!r} is no type of event")
        data = text.encode(errors="surrogateescape")
        digest = chain_digest(
            previous,
            position,
            task_id,
            number,
            type_,
            schema_version,
            at,
            self._data_digest(where, data),
        )
        if digest != stored:
            report.problem(f"{where}: the event, or what stands before it, was changed")
        if type_ == "submitted" and (b'"blobs":{"' in data or b'"files":' in data):
            self._note_blobs(data)
        if type_ == Redacted.type:
            self._accept_tombstones(task_id, data, where)

    def _data_digest(self, where: _Where, data: bytes) -> bytes:
        """Return the digest of the data as it was when it was written."""
        if b'"redacted":' in data:
            try:
                named = orjson.loads(data).get("redacted")
                if isinstance(named, str):
                    self._report.redacted += 1
                    self._tombstones[where.task_id, where.version] = hashlib.sha256(
                        data
                    ).hexdigest()
                    return bytes.fromhex(named)
            except (orjson.JSONDecodeError, AttributeError, ValueError):
                self._report.problem(f"{where}: its data is unreadable")
        return hashlib.sha256(data).digest()

    def _note_blobs(self, data: bytes) -> None:
        plain = orjson.loads(data)
        if "redacted" not in plain:
            self.blobs |= blob_digests(plain["task"], plain.get("blobs") or {})

    def _accept_tombstones(self, task_id: str, data: bytes, where: _Where) -> None:
        """Check the tombstones of a stream against the event that says who left them."""
        try:
            named = decode(Redacted.type, 1, data)
        except PerdureError:
            self._report.problem(f"{where}: its data is unreadable")
            return
        if isinstance(named, Redacted):
            for version, digest in named.tombstones.items():
                if self._tombstones.pop((task_id, int(version)), None) != digest:
                    self._report.problem(
                        f"{where}: the tombstone at version {version} is not the one that was left"
                    )

    def end(self, digest: bytes) -> None:
        if self._position != self._report.position:
            self._report.problem(
                f"the log ends at position {self._position}, its head says {self._report.position}"
            )
        elif self.digest != digest:
            self._report.problem("the head's digest is not that of the last event")
        for task_id, version in self._tombstones:
            self._report.problem(
                f"{task_id} version {version}: content was removed without a redaction"
            )


def _verify_streams(
    connection: Connection, versions: Mapping[str, int], report: VerifyReport
) -> None:
    last: int | None = None
    while True:
        page = sa.select(streams).order_by(streams.c.stream_id).limit(PAGE)
        rows = connection.execute(
            page if last is None else page.where(streams.c.stream_id > last)
        ).all()
        for row in rows:
            report.tasks += 1
            found = versions.get(row.task_id, 0)
            if found != row.version:
                report.problem(
                    f"{row.task_id} should be at version {row.version}, its events end at {found}"
                )
            elif not found:
                report.problem(f"{row.task_id} has no events")
        if len(rows) < PAGE:
            return
        last = rows[-1].stream_id


def _verify_blobs(connection: Connection, named: set[str], report: VerifyReport) -> None:
    stored = set(connection.scalars(sa.select(blobs.c.digest)))
    for digest in sorted(stored, key=str):
        if not isinstance(digest, str) or not digest.isascii():
            report.problem(f"blob {digest!r}: that is no digest")
            continue
        row = connection.execute(  # one at a time: each may be as large as a file
            sa.select(_raw(blobs.c.data), blobs.c.size).where(blobs.c.digest == digest)
        ).one()
        if not isinstance(row.data, bytes) or digest_of(row.data) != digest:
            report.problem(f"blob {digest}: its content was changed")
        elif row.size != len(row.data):
            report.problem(f"blob {digest}: its size is {len(row.data)} bytes, not {row.size}")
    for digest in sorted(named - stored):
        report.problem(f"blob {digest}: it is missing")


def _each_event(connection: Connection) -> Iterator[Any]:
    page = (
        sa.select(
            *(events.c.position, events.c.stream_id, events.c.version, events.c.type),
            *(events.c.schema_version, events.c.data),
            _RECORDED_AT,
            _raw(events.c.digest),
            streams.c.task_id,
        )
        .join_from(events, streams, events.c.stream_id == streams.c.stream_id, isouter=True)
        .order_by(events.c.position)
        .limit(PAGE)
    )
    last: int | None = None
    while True:
        rows = list(
            plain_rows(connection, page if last is None else page.where(events.c.position > last))
        )
        yield from rows
        if len(rows) < PAGE:
            return
        last = rows[-1][0]


class _AnyTimestamp(Timestamp):
    """A moment as it is stored; the year 1, which fits no digest, where it is none."""

    cache_ok = True

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:  # noqa: ANN401
        if value is None:
            return None
        if isinstance(value, datetime):  # the driver's year 1 is what Python has no value for
            return max(_NO_MOMENT, value)
        try:
            return _moment(value)
        except (TypeError, ValueError, OverflowError):
            return _NO_MOMENT


@lru_cache(maxsize=1024)  # all events of a transaction have one, and reading it takes as long as
def _moment(value: str) -> datetime:  # all the rest of the event
    moment = datetime.fromisoformat(value)
    written = iso(moment) if moment.tzinfo is not None else None
    return moment if value == written else _NO_MOMENT  # else it would sort in another place


_NO_MOMENT: Final = datetime(1, 1, 1, tzinfo=UTC)
_RECORDED_AT: Final = sa.type_coerce(events.c.recorded_at, _AnyTimestamp).label("recorded_at")


@dataclass(slots=True)
class RebuildReport:
    """What `rebuild` found.

    Attributes:
        tasks: How many rows there are now.
        differed: How many of them were missing, too many, or not what the log says.
    """

    tasks: int = 0
    differed: int = 0


def rebuild(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Throw `tasks` away and compute it again from the log, in the connection's transaction.

    Raises:
        DatabaseCorrupt: The log can't be folded; nothing is changed then.
    """
    take_time(connection)
    connection.execute(sa.select(log_head.c.position).with_for_update())  # nobody writes from here
    with any_text(connection):  # what is to be thrown away may be anything
        report = compare(connection, progress)
    connection.execute(sa.delete(tasks))
    for folds in _folded(connection):
        rows = [row for row in folds.values() if row is not None]
        if rows:
            connection.execute(sa.insert(tasks), rows)
    return report


def compare(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Hold `tasks` against the log, and change nothing."""
    report = RebuildReport()
    total: int = connection.execute(sa.select(sa.func.count()).select_from(streams)).scalar_one()
    for folds in _folded(connection):
        stored = {
            row["stream_id"]: dict(row)
            for row in connection.execute(
                _STORED_ROWS.where(tasks.c.stream_id.between(min(folds), max(folds)))
            ).mappings()
        }
        for stream_id, row in folds.items():
            report.tasks += row is not None
            report.differed += stored.get(stream_id) != row
        if progress is not None:
            progress(report.tasks, total)
    surplus = sa.select(sa.func.count()).where(
        tasks.c.stream_id.not_in(sa.select(streams.c.stream_id))
    )
    report.differed += int(connection.execute(surplus).scalar_one())
    return report


def _stored(column: sa.Column[Any]) -> sa.ColumnElement[Any]:
    """Return a column of `tasks` so that no value in it is an error, or passes for another one."""
    if isinstance(column.type, Timestamp):
        return sa.type_coerce(column, _AnyTimestamp).label(column.name)
    if isinstance(column.type, sa.Boolean):
        return _raw(column)
    return column


_STORED_ROWS: Final = sa.select(*(_stored(column) for column in tasks.c))


def _folded(connection: Connection) -> Iterator[dict[int, dict[str, Any] | None]]:
    """Yield the rows that the log says there should be, some at a time, by ascending stream."""
    last: int | None = None
    page = (
        sa.select(streams.c.stream_id, streams.c.task_id)
        .order_by(streams.c.stream_id)
        .limit(PAGE // 10)
    )
    while True:
        found = connection.execute(
            page if last is None else page.where(streams.c.stream_id > last)
        ).all()
        if not found:
            return
        folds = {row.stream_id: TaskFold(row.task_id, row.stream_id) for row in found}
        last = found[-1].stream_id
        rows = plain_rows(
            connection,
            sa.select(
                *(events.c.stream_id, events.c.version, events.c.type),
                *(events.c.schema_version, events.c.data),
                _RECORDED_AT,
            )
            .where(events.c.stream_id.between(found[0].stream_id, last))
            .order_by(events.c.stream_id, events.c.version),
        )
        for stream_id, version, type_, schema_version, data, at in rows:
            _fold(folds[stream_id], version, type_, schema_version, data, at)
        yield {key: _row(fold) if fold.version else None for key, fold in folds.items()}


def _fold(
    fold: TaskFold, version: int, type_: str, schema_version: int, data: str, at: datetime
) -> None:
    if at is _NO_MOMENT or version != fold.version + 1:
        raise DatabaseCorrupt(
            f"{fold.task_id} version {version} can't be folded: run `perdure verify`"
        )
    event = decode(type_, schema_version, data)
    try:
        fold.apply((event,), at)
    except (InvalidTransition, *_UNREADABLE) as error:
        raise DatabaseCorrupt(
            f"{fold.task_id} version {version} can't be folded ({error}): run `perdure verify`"
        ) from None


def _row(fold: TaskFold) -> dict[str, Any]:
    try:
        return fold.new_row()
    except _UNREADABLE as error:
        raise DatabaseCorrupt(
            f"{fold.task_id} can't be what was submitted ({error}): run `perdure verify`"
        ) from None


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
        InvalidTransition: The task hasn't ended.
    """
    fold = tx.fold(task_id)
    if fold is None:
        raise TaskNotFound(task_id)
    if not fold.state.status.ended:
        raise InvalidTransition(f"{task_id} is {fold.state.status}: cancel it before redacting it")
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
        named = connection.execute(
            sa.select(sa.literal(1))
            .where(events.c.type == "submitted", sa.cast(events.c.data, sa.Text).contains(digest))
            .limit(1)
        ).first()
        if named is None:
            connection.execute(sa.delete(blobs).where(blobs.c.digest == digest))
