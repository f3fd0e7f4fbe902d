"""Looking after the log as a whole: verify the chain, rebuild the projection, redact content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, RowMapping

from perdure.errors import DatabaseCorrupt, InvalidTransition, PerdureError, TaskNotFound
from perdure.events import Redacted, canonical, chain_digest, decode
from perdure.store.content import blob_digests, digest_of
from perdure.store.database import overwrite_deleted
from perdure.store.projection import TaskFold
from perdure.store.schema import Timestamp, blobs, events, log_head, streams, tasks
from perdure.store.transaction import Transaction

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
        """Note a problem, as long as there aren't too many."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(text)


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
    head = connection.execute(sa.select(log_head)).mappings().one_or_none()
    if head is None:
        report.problem("the log has lost its head row")
        return report
    report.position, report.digest = head["position"], bytes(head["digest"]).hex()
    walk = _Walk(report)
    for row in _each_event(connection):
        report.events += 1
        try:
            walk.take(row)
        except (TypeError, ValueError, AttributeError):
            report.problem(f"position {row['position']}: the row is unreadable")
        if expect is not None and row["position"] == expect[0] and walk.digest.hex() != expect[1]:
            report.problem(f"position {expect[0]}: its digest is not the one expected")
        if progress is not None and report.events % PAGE == 0:
            progress(report.events, report.position)
    walk.end(head["position"], bytes(head["digest"]))
    if expect is not None and head["position"] < expect[0]:
        report.problem(f"the log ends at {head['position']}, before the expected {expect[0]}")
    _verify_streams(connection, walk.versions, report)
    _verify_blobs(connection, walk.blobs, report)
    return report


class _Walk:
    """The state of a walk along the chain."""

    def __init__(self, report: VerifyReport) -> None:
        self.versions: dict[str, int] = {}
        self._report = report
        self._position = 0
        self.digest = b""
        self.blobs: set[str] = set()
        self._tombstones: dict[tuple[str, int], str] = {}

    def take(self, row: RowMapping) -> None:
        report, position, task_id = self._report, row["position"], row["task_id"]
        where = f"position {position} ({task_id} version {row['version']})"
        if position != self._position + 1:
            report.problem(
                f"position {position}: {position - self._position - 1} events are missing"
            )
        self._position = position
        if task_id is None:
            report.problem(f"position {position}: its stream is missing")
            self.digest = bytes(row["digest"])
            return
        expected_version = self.versions.get(task_id, 0) + 1
        if row["version"] != expected_version:
            report.problem(f"{where}: version {expected_version} was expected")
        self.versions[task_id] = row["version"]
        data = row["data"].encode(errors="surrogateescape")
        digest = chain_digest(
            self.digest,
            position,
            task_id,
            row["version"],
            row["type"],
            row["schema_version"],
            row["recorded_at"],
            self._data_digest(row, data, where),
        )
        stored = bytes(row["digest"])
        if digest != stored:
            report.problem(f"{where}: the event, or what stands before it, was changed")
        if row["type"] == "submitted" and (b'"blobs":{"' in data or b'"files":' in data):
            self._note_blobs(data)
        if row["type"] == Redacted.type:
            self._accept_tombstones(task_id, data, where)
        # On with what is stored, so that one change is one problem and not one at every event.
        self.digest = stored

    def _data_digest(self, row: RowMapping, data: bytes, where: str) -> bytes:
        """Return the digest of the data as it was when it was written."""
        if b'"redacted":' in data:
            try:
                named = orjson.loads(data).get("redacted")
                if isinstance(named, str):
                    self._report.redacted += 1
                    key = (row["task_id"], row["version"])
                    self._tombstones[key] = hashlib.sha256(data).hexdigest()
                    return bytes.fromhex(named)
            except (orjson.JSONDecodeError, AttributeError, ValueError):
                self._report.problem(f"{where}: its data is unreadable")
        return hashlib.sha256(data).digest()

    def _note_blobs(self, data: bytes) -> None:
        plain = orjson.loads(data)
        if "redacted" not in plain:
            self.blobs |= blob_digests(plain["task"], plain.get("blobs") or {})

    def _accept_tombstones(self, task_id: str, data: bytes, where: str) -> None:
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

    def end(self, position: int, digest: bytes) -> None:
        if self._position != position:
            self._report.problem(
                f"the log ends at position {self._position}, its head says {position}"
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
    last = ""
    left = dict(versions)
    while True:
        page = connection.execute(
            sa.select(streams)
            .where(streams.c.task_id > last)
            .order_by(streams.c.task_id)
            .limit(PAGE)
        ).mappings()
        rows = list(page)
        for row in rows:
            report.tasks += 1
            found = left.pop(row["task_id"], 0)
            if found != row["version"]:
                report.problem(
                    f"{row['task_id']} should be at version {row['version']}, "
                    f"its events end at {found}"
                )
        if len(rows) < PAGE:
            return
        last = rows[-1]["task_id"]


def _verify_blobs(connection: Connection, named: set[str], report: VerifyReport) -> None:
    last = ""
    missing = set(named)
    while True:  # one at a time: each may be as large as a file
        row = connection.execute(
            sa.select(blobs.c.digest, blobs.c.data)
            .where(blobs.c.digest > last)
            .order_by(blobs.c.digest)
            .limit(1)
        ).first()
        if row is None:
            break
        last = row.digest
        missing.discard(last)
        if digest_of(bytes(row.data)) != last:
            report.problem(f"blob {last}: its content was changed")
    for digest in sorted(missing):
        report.problem(f"blob {digest}: it is missing")


def _each_event(connection: Connection) -> Iterator[RowMapping]:
    position = 0
    while True:
        rows = list(
            connection.execute(
                sa.select(
                    *(c for c in events.c if c is not events.c.recorded_at),
                    sa.type_coerce(events.c.recorded_at, _AnyTimestamp).label("recorded_at"),
                    streams.c.task_id,
                )
                .join_from(events, streams, events.c.stream_id == streams.c.stream_id, isouter=True)
                .where(events.c.position > position)
                .order_by(events.c.position)
                .limit(PAGE)
            ).mappings()
        )
        yield from rows
        if len(rows) < PAGE:
            return
        position = rows[-1]["position"]


class _AnyTimestamp(Timestamp):
    """A moment as it is stored; the year 1, which fits no digest, where it is none."""

    cache_ok = True

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime:  # noqa: ANN401
        try:
            return super().process_result_value(value, dialect) or _NO_MOMENT
        except ValueError:
            return _NO_MOMENT


_NO_MOMENT: Final = datetime(1, 1, 1, tzinfo=UTC)


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
    report = compare(connection, progress)
    connection.execute(sa.delete(tasks))
    for rows in _folded(connection):
        if rows:
            connection.execute(sa.insert(tasks), rows)
    return report


def compare(connection: Connection, progress: Progress | None = None) -> RebuildReport:
    """Hold `tasks` against the log, and change nothing."""
    report = RebuildReport()
    total: int = connection.execute(sa.select(sa.func.count()).select_from(streams)).scalar_one()
    for rows in _folded(connection):
        stored = (
            {
                row["stream_id"]: dict(row)
                for row in connection.execute(
                    sa.select(tasks).where(
                        tasks.c.stream_id >= rows[0]["stream_id"],
                        tasks.c.stream_id <= rows[-1]["stream_id"],
                    )
                ).mappings()
            }
            if rows
            else {}
        )
        for row in rows:
            report.tasks += 1
            report.differed += stored.pop(row["stream_id"], None) != row
        report.differed += len(stored)
        if progress is not None:
            progress(report.tasks, total)
    surplus = sa.select(sa.func.count()).where(
        tasks.c.stream_id.not_in(sa.select(streams.c.stream_id))
    )
    report.differed += int(connection.execute(surplus).scalar_one())
    return report


def _folded(connection: Connection) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows that the log says there should be, some at a time, by ascending stream."""
    stream_id = 0
    while True:
        page = connection.execute(
            sa.select(streams.c.stream_id, streams.c.task_id)
            .where(streams.c.stream_id > stream_id)
            .order_by(streams.c.stream_id)
            .limit(PAGE // 10)
        ).all()
        if not page:
            return
        folds = {row.stream_id: TaskFold(row.task_id, row.stream_id) for row in page}
        found = connection.execute(
            sa.select(events)
            .where(
                events.c.stream_id >= page[0].stream_id, events.c.stream_id <= page[-1].stream_id
            )
            .order_by(events.c.stream_id, events.c.version)
            .execution_options(yield_per=PAGE)
        )
        for row in found:
            fold = folds[row.stream_id]
            try:
                fold.apply((decode(row.type, row.schema_version, row.data),), row.recorded_at)
            except InvalidTransition as error:
                raise DatabaseCorrupt(
                    f"{fold.task_id} version {row.version} can't be folded ({error}): "
                    "run `perdure verify`"
                ) from None
        yield [fold.new_row() for fold in folds.values() if fold.version]
        stream_id = page[-1].stream_id


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
    overwrite_deleted(tx.connection)
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
    for digest in digests:
        named = connection.execute(
            sa.select(sa.literal(1))
            .where(events.c.type == "submitted", sa.cast(events.c.data, sa.Text).contains(digest))
            .limit(1)
        ).first()
        if named is None:
            connection.execute(sa.delete(blobs).where(blobs.c.digest == digest))
