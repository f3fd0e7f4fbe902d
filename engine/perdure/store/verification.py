"""Verifying the log: every event is what was written, and none is missing or too many."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.store import scanning
from perdure.store.content import digest_of
from perdure.store.gaps import Gap, each_gap
from perdure.store.helping import NO_HELP, Helpers
from perdure.store.scanning import Progress, as_stored, page_of
from perdure.store.schema import blobs, log_head, streams
from perdure.store.walking import (
    EVENTS_ARE_THERE,
    MOST_PROBLEMS,
    Walked,
    stretches,
    tombstone_problem,
    walk,
)
from perdure.text import one_line

__all__ = ["NOT_COMPARED", "VerifyReport", "verify"]

# Whether it was changed or is a newer perdure's, the walk has said.
NOT_COMPARED: Final = (
    "`tasks` can't be held against the log: an event in it is of a type or schema version "
    "that this perdure doesn't know"
)


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
    helpers: Helpers = NO_HELP,
    flaws: Iterable[str] = (),
) -> VerifyReport:
    """Walk the whole chain: every event, its place, its digest, and the ends of log and streams.

    Args:
        connection: What is verified is what its one transaction sees.
        expect: A position and the digest that must stand there, noted down earlier.
        progress: Called with events read and events in all.
        helpers: Who walks as well.
        flaws: Problems that were found before, and come first.
    """
    report = VerifyReport()
    for flaw in flaws:
        report.problem(flaw)
    head = _verify_head(connection, report)
    whole = _Whole(report)
    for stretch, walked in helpers.each(connection, walk, stretches(connection, expect)):
        good = not walked.later or walked.untouched(stretch)
        whole.take(walked if good else walk(connection, stretch))
        if progress is not None:
            progress(report.events, report.position)
    whole.end(head, each_gap(connection, whole.position if report.events else None))
    if expect is not None and report.position < expect[0]:
        report.problem(f"the log ends at {report.position}, before the expected {expect[0]}")
    _verify_streams(connection, whole.versions, report)
    _verify_blobs(connection, whole.blobs, report)
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


class _Whole:
    """All stretches so far, put together."""

    def __init__(self, report: VerifyReport) -> None:
        self.versions: dict[str, int] = {}
        self.blobs: set[str] = set()
        self.position = 0
        self._report = report
        self._digest = b""
        self._missing = 0
        self._newer = 0
        self._first_newer = ""
        self._tombstones: dict[tuple[str, int], str] = {}

    def take(self, walked: Walked) -> None:
        """Add the next stretch."""
        report = self._report
        report.events += walked.events
        report.redacted += walked.redacted
        report.archived += walked.archived
        report.hidden = report.hidden or walked.hidden
        for problem in walked.problems:
            report.problem(problem)
        self._missing += walked.missing
        self._newer += walked.newer
        self._first_newer = self._first_newer or walked.first_newer
        self.position, self._digest = walked.position, walked.digest
        for task_id, (position, version) in walked.firsts.items():
            expected = self.versions.get(task_id, 0) + 1
            if version != expected:
                where = f"position {position} ({task_id} version {version})"
                report.problem(f"{where}: version {expected} was expected")
        for task_id, position in walked.anew.items():
            if task_id in self.versions:
                report.problem(f"position {position} ({task_id}): {EVENTS_ARE_THERE}")
        self.versions.update(walked.versions)
        for said in walked.accepted:
            if self._tombstones.pop((said.task_id, said.version), None) != said.digest:
                report.problem(tombstone_problem(said))
        self._tombstones.update(walked.tombstones)
        self.blobs |= walked.blobs

    def end(self, digest: bytes, gaps: Iterable[Gap]) -> None:
        """Hold the end of the log against its head, and what is missing against what is said."""
        report = self._report
        if self.position != report.position:
            report.problem(
                f"the log ends at position {self.position}, its head says {report.position}"
            )
        elif self._digest != digest:
            report.problem("the head's digest is not that of the last event")
        for gap in gaps:
            report.problem(f"gap at {gap.first}: nothing comes after it")
        if report.archive_of is None:
            accounted, by = report.archived, "`archived` events account for"
        else:  # it is the other way round: what is missing here is in the log
            accounted, by = self._missing, "it is an archive itself, and says that it archived"
        if self._missing != accounted or (report.archive_of and report.archived):
            report.problem(f"{self._missing} events are missing in gaps; {by} {report.archived}")
        if self._newer:  # once, for there may be millions of them, and nothing is wrong with any
            more = f", as {self._newer - 1} more are" if self._newer > 1 else ""
            report.problem(
                f"{self._first_newer} was written by a newer perdure{more}: upgrade perdure"
            )
        for task_id, version in self._tombstones:
            report.problem(f"{task_id} version {version}: content was removed without a redaction")


def _verify_streams(
    connection: Connection, versions: Mapping[str, int], report: VerifyReport
) -> None:
    page = (
        sa.select(streams.c.stream_id, streams.c.task_id, streams.c.version)
        .order_by(streams.c.stream_id)
        .limit(scanning.PAGE)
    )
    last: int | None = None
    while True:
        rows = page_of(connection, page if last is None else page.where(streams.c.stream_id > last))
        for _stream_id, task_id, version in rows:
            report.tasks += 1
            found = versions.get(task_id, 0)
            if found != version:
                report.problem(
                    f"{task_id} should be at version {version}, its events end at {found}"
                )
            elif not found:
                report.problem(f"{task_id} has no events")
        if len(rows) < scanning.PAGE:
            return
        last = rows[-1][0]


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
