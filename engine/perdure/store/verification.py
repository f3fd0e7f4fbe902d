"""Verifying the log: every event is what was written, and none is missing or too many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final, TypeAlias

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import PerdureError
from perdure.events import (
    EVENT_TYPES,
    Archived,
    Redacted,
    chain_link,
    decode,
    link_tail,
    micros_of,
)
from perdure.store import scanning
from perdure.store.content import blob_digests, digest_of
from perdure.store.gaps import Gap, each_gap
from perdure.store.scanning import (
    NO_MOMENT,
    UNREADABLE,
    Progress,
    as_stored,
    moment_of,
    page_of,
)
from perdure.store.schema import blobs, events, log_head, streams
from perdure.text import one_line

__all__ = ["VerifyReport", "verify"]

MOST_PROBLEMS: Final = 100


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        events: How many events were read.
        tasks: How many streams there are.
        redacted: How many of the events have had content removed by `redact`.
        archived: How many events are in archives, and were not looked at.
        archive_of: Where this database is an archive: the POSITION:DIGEST of the log, when it was
            made. That no task is missing from an archive, only that log can tell.
        hidden: Whether the expected position is among those that are not here.
        position: The head of the log.
        digest: The head's digest, in hexadecimal. Kept somewhere else, it lets a later `verify`
            notice that the end of the log was cut off or all of it written anew.
        problems: What is wrong, a line each; at most the first hundred.
    """

    events: int = 0
    tasks: int = 0
    redacted: int = 0
    archived: int = 0
    archive_of: str | None = None
    hidden: bool = False
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
    walk = _Walk(report, each_gap(connection), expect)
    expected, expected_digest = expect or (None, "")
    for rows in _pages(connection):
        take = walk.take
        for row in rows:
            try:
                take(row)
            except UNREADABLE:
                report.problem(f"position {row[0]}: the row is unreadable")
            if row[0] == expected and walk.digest.hex() != expected_digest:
                report.problem(f"position {expected}: its digest is not the one expected")
        report.events += len(rows)
        if progress is not None and len(rows) == scanning.PAGE:
            progress(report.events, report.position)
    walk.end(head)
    if expect is not None and report.position < expect[0]:
        report.problem(f"the log ends at {report.position}, before the expected {expect[0]}")
    _verify_streams(connection, walk.versions, report)
    _verify_blobs(connection, walk.blobs, report)
    return report


def _verify_head(connection: Connection, report: VerifyReport) -> bytes:
    """Note the log's head in the report; returns its digest."""
    heads = connection.execute(
        sa.select(
            *(log_head.c.id, log_head.c.position),
            *(as_stored(log_head.c.digest), log_head.c.archive_of),
        )
    ).all()
    if len(heads) != 1:
        lost = "the log has lost its head row"
        report.problem(f"the log has {len(heads)} head rows" if heads else lost)
        return b""
    ((row_id, position, digest, report.archive_of),) = heads
    if row_id != 1 or not isinstance(position, int) or not isinstance(digest, bytes):
        report.problem("the log's head row is unreadable")
        return b""
    report.position, report.digest = position, digest.hex()
    return digest


# position, stream_id, version, type, schema_version, data, recorded_at, digest, task_id
_EventRow: TypeAlias = tuple[Any, ...]


def _where(row: _EventRow) -> str:
    """Say where an event stands."""
    return f"position {row[0]} ({row[8]} version {row[2]})"


class _Walk:
    """The state of a walk along the chain."""

    def __init__(
        self, report: VerifyReport, gaps: Iterator[Gap], expect: tuple[int, str] | None
    ) -> None:
        self.versions: dict[str, int] = {}
        self._report = report
        self._gaps = gaps
        self._gap = next(gaps, None)
        self._missing = 0
        self._expect = expect
        self._position = 0
        self._at: object = None
        self._micros = micros_of(NO_MOMENT)
        self.digest = b""
        self.blobs: set[str] = set()
        self._tombstones: dict[tuple[str, int], str] = {}

    def take(self, row: _EventRow) -> None:
        report = self._report
        position, stream_id, number, type_, schema_version, text, at, kept, task_id = row
        stored = kept if isinstance(kept, bytes) else b""
        if position != self._position + 1 or self._gap is not None:
            self._jump(position)
        # On with what is stored, so that one change is one problem and not one at every event.
        previous, self.digest = self.digest, stored
        self._position = position
        if task_id is None:
            report.problem(f"position {position}: its stream is missing")
            return
        data = text.encode(errors="surrogateescape")
        version = self.versions.get(task_id, 0) + 1
        if type_ == Archived.type:
            version = self._archived(data, schema_version, stream_id, version, row)
        self.versions[task_id] = version
        if number != version:
            report.problem(f"{_where(row)}: version {version} was expected")
        if version == 1 and stream_id != position:
            report.problem(f"{_where(row)}: its stream's key is {stream_id}")
        if type_ not in EVENT_TYPES:
            report.problem(f"{_where(row)}: {type_!r} is no type of event")
        if at != self._at:  # all events of a transaction have one
            self._at, self._micros = at, micros_of(moment_of(at))
        redacted = b'"redacted":' in data
        data_digest = self._original_digest(row, data) if redacted else sha256(data).digest()
        tail = link_tail(type_, schema_version, self._micros)
        digest = chain_link(previous, position, task_id, number, tail, data_digest)
        if digest != stored:
            report.problem(f"{_where(row)}: the event, or what stands before it, was changed")
        if type_ == "submitted" and (b'"blobs":{"' in data or b'"files":' in data):
            self._note_blobs(data)
        elif type_ == "redacted":
            self._accept_tombstones(row, data)

    def _jump(self, position: int) -> None:
        """Go on at ``position``, across the gap before it where there is one."""
        report = self._report
        expected = self._position + 1
        while self._gap is not None and self._gap.first < expected:
            report.problem(f"gap at {self._gap.first}: its events are there")
            self._gap = next(self._gaps, None)
        if position == expected:
            return
        if self._gap is None or self._gap[:2] != (expected, position - 1):
            report.problem(f"position {position}: position {expected} was expected")
            return
        self._missing += position - expected
        self.digest = self._gap.digest
        if self._expect is not None and expected <= self._expect[0] < position:
            report.hidden = True
            if self._expect == (position - 1, self.digest.hex()):
                report.hidden = False  # the next event's digest vouches for it
        self._gap = next(self._gaps, None)

    def _archived(
        self, data: bytes, schema_version: int, stream_id: int, version: int, row: _EventRow
    ) -> int:
        """Take the note that the events before it were moved; returns the version it must have."""
        try:
            noted = decode(Archived.type, schema_version, data)
        except PerdureError:
            self._report.problem(f"{_where(row)}: its data is unreadable")
            return version
        if not isinstance(noted, Archived):
            return version
        if version > 1:
            self._report.problem(f"{_where(row)}: it was archived, and its events are there")
            return version
        if stream_id != noted.position:
            self._report.problem(f"{_where(row)}: its stream's key is {stream_id}")
        self._report.archived += noted.events
        return noted.events + 1

    def _original_digest(self, row: _EventRow, data: bytes) -> bytes:
        """Return the digest of the data as it was when it was written."""
        try:
            named = orjson.loads(data).get("redacted")
            if isinstance(named, str):
                self._report.redacted += 1
                self._tombstones[row[8], row[2]] = sha256(data).hexdigest()
                return bytes.fromhex(named)
        except (orjson.JSONDecodeError, AttributeError, ValueError):
            self._report.problem(f"{_where(row)}: its data is unreadable")
        return sha256(data).digest()

    def _note_blobs(self, data: bytes) -> None:
        plain = orjson.loads(data)
        if "redacted" not in plain:
            self.blobs |= blob_digests(plain["task"], plain.get("blobs") or {})

    def _accept_tombstones(self, row: _EventRow, data: bytes) -> None:
        """Check the tombstones of a stream against the event that says who left them."""
        try:
            named = decode(Redacted.type, 1, data)
        except PerdureError:
            self._report.problem(f"{_where(row)}: its data is unreadable")
            return
        if isinstance(named, Redacted):
            for version, digest in named.tombstones.items():
                if self._tombstones.pop((row[8], int(version)), None) != digest:
                    self._report.problem(
                        f"{_where(row)}: the tombstone at version {version} is not the one that "
                        "was left"
                    )

    def end(self, digest: bytes) -> None:
        if self._position != self._report.position:
            self._report.problem(
                f"the log ends at position {self._position}, its head says {self._report.position}"
            )
        elif self.digest != digest:
            self._report.problem("the head's digest is not that of the last event")
        while self._gap is not None:
            self._report.problem(f"gap at {self._gap.first}: nothing comes after it")
            self._gap = next(self._gaps, None)
        if self._report.archive_of is None:
            accounted, by = self._report.archived, "`archived` events account for"
        else:  # it is the other way round: what is missing here is in the log
            accounted, by = self._missing, "it is an archive itself, and says that it archived"
        if self._missing != accounted or (self._report.archive_of and self._report.archived):
            self._report.problem(
                f"{self._missing} events are missing in gaps; {by} {self._report.archived}"
            )
        for task_id, version in self._tombstones:
            self._report.problem(
                f"{task_id} version {version}: content was removed without a redaction"
            )


def _verify_streams(
    connection: Connection, versions: Mapping[str, int], report: VerifyReport
) -> None:
    last: int | None = None
    while True:
        page = sa.select(streams).order_by(streams.c.stream_id).limit(scanning.PAGE)
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
        if len(rows) < scanning.PAGE:
            return
        last = rows[-1].stream_id


def _verify_blobs(connection: Connection, named: set[str], report: VerifyReport) -> None:
    stored = set(connection.scalars(sa.select(blobs.c.digest)))
    for digest in sorted(stored, key=str):
        if not isinstance(digest, str) or not digest.isascii():
            report.problem(f"blob {digest!r}: that is no digest")
            continue
        row = connection.execute(  # one at a time: each may be as large as a file
            sa.select(as_stored(blobs.c.data), blobs.c.size).where(blobs.c.digest == digest)
        ).one()
        if not isinstance(row.data, bytes) or digest_of(row.data) != digest:
            report.problem(f"blob {digest}: its content was changed")
        elif row.size != len(row.data):
            report.problem(f"blob {digest}: its size is {len(row.data)} bytes, not {row.size}")
    for digest in sorted(named - stored):
        report.problem(f"blob {digest}: it is missing")


def _pages(connection: Connection) -> Iterator[list[tuple[Any, ...]]]:
    """Yield all events by position, a page at a time."""
    page = (
        sa.select(
            *(events.c.position, events.c.stream_id, events.c.version, events.c.type),
            *(events.c.schema_version, events.c.data),
            as_stored(events.c.recorded_at),
            as_stored(events.c.digest),
            streams.c.task_id,
        )
        .join_from(events, streams, events.c.stream_id == streams.c.stream_id, isouter=True)
        .order_by(events.c.position)
        .limit(scanning.PAGE)
    )
    last: int | None = None
    while True:
        rows = page_of(connection, page if last is None else page.where(events.c.position > last))
        if rows:
            yield rows
        if len(rows) < scanning.PAGE:
            return
        last = rows[-1][0]
