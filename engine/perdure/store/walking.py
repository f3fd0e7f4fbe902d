"""Walking along a stretch of the chain: is every event there what was written, in its place?

A stretch is walked by itself: it begins with the digest that is stored before it. What only the
stretches before it can tell, such as whether a task's first event here is the next one of its
stream, is handed back as it is found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final, NamedTuple, TypeAlias

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import PerdureError
from perdure.events import (
    EVENT_TYPES,
    Archived,
    Redacted,
    Submitted,
    chain_link,
    decode,
    link_tail,
    micros_of,
)
from perdure.store import scanning
from perdure.store.content import blob_digests
from perdure.store.gaps import each_gap
from perdure.store.scanning import UNREADABLE, as_stored, moment_of, page_of
from perdure.store.schema import events, streams
from perdure.text import one_line

__all__ = [
    "EVENTS_ARE_THERE",
    "MOST_PROBLEMS",
    "Stretch",
    "Walked",
    "stretches",
    "tombstone_problem",
    "walk",
]

MOST_PROBLEMS: Final = 100


class Stretch(NamedTuple):
    """Events that follow each other.

    Attributes:
        after: The position of the event before them; None where there is none.
        last: The position of the last of them.
        end: The position of the last event of all, when they were divided.
        expect: A position, of these or not, and the digest that must stand there.
    """

    after: int | None
    last: int
    end: int
    expect: tuple[int, str] | None = None


class First(NamedTuple):
    """A task's first event in a stretch, where there may be others before."""

    position: int
    version: int


class Accepted(NamedTuple):
    """What an event says of a tombstone that stands in an earlier stretch."""

    task_id: str
    version: int
    digest: str
    where: str


@dataclass(slots=True)
class Walked:
    """What was found along a stretch.

    Attributes:
        later: Whether this was seen of a later state, with content redacted or archived since.
        position: Where the walk has ended.
        digest: The digest that is stored there.
        events: How many there are.
        redacted: How many of them have had content removed.
        archived: How many events of theirs are in archives.
        missing: How many positions are in gaps.
        hidden: Whether the expected position is in a gap, and nothing vouches for its digest.
        newer: How many events are as they were written, by a perdure newer than this one.
        first_newer: What the first of them is.
        problems: What is wrong, a line each.
        versions: The version that each task's last event here has, by what is before it.
        firsts: The first event of each task that nothing here is before.
        anew: The position of the event that stands in for all that was archived of a task.
        tombstones: (task, version) -> the digest of a tombstone that nothing has accepted yet.
        accepted: What is said of earlier tombstones.
        blobs: The digests of the content that is named.
    """

    later: bool = False
    position: int = 0
    digest: bytes = b""
    events: int = 0
    redacted: int = 0
    archived: int = 0
    missing: int = 0
    hidden: bool = False
    newer: int = 0
    first_newer: str = ""
    problems: list[str] = field(default_factory=list[str])
    versions: dict[str, int] = field(default_factory=dict[str, int])
    firsts: dict[str, First] = field(default_factory=dict[str, First])
    anew: dict[str, int] = field(default_factory=dict[str, int])
    tombstones: dict[tuple[str, int], str] = field(default_factory=dict[tuple[str, int], str])
    accepted: list[Accepted] = field(default_factory=list[Accepted])
    blobs: set[str] = field(default_factory=set[str])

    def problem(self, text: str) -> None:
        """Note a problem, as long as there aren't too many, on one line that can be shown."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(one_line(text))

    def untouched(self, stretch: Stretch) -> bool:
        """Return whether all of the stretch is there as it was written.

        Then it was like that at all times, since it was written.
        """
        altered = self.problems or self.redacted or self.archived or self.missing
        return not altered and self.position == stretch.last


def stretches(connection: Connection, expect: tuple[int, str] | None) -> Iterator[Stretch]:
    """Divide the whole log, in its order."""
    end: int | None = connection.scalar(_END)
    after: int | None = None
    while end is not None and after != end:
        ahead = _AHEAD if after is None else _AHEAD_BEHIND
        found: int | None = connection.scalar(ahead, {"after": after, "few": scanning.PAGE - 1})
        stretch = Stretch(after, end if found is None else found, end, expect)
        yield stretch
        after = stretch.last


def walk(connection: Connection, stretch: Stretch) -> Walked:
    """Walk along a stretch."""
    taking = _Walk(connection, stretch)
    walked = taking.walked
    expected, expected_digest = stretch.expect or (None, "")
    rows = page_of(connection, _ROWS if stretch.after is None else _ROWS_BEHIND, stretch._asdict())
    done = 0
    while (done := taking.pass_plain(rows, done)) < len(rows):
        row = rows[done]
        try:
            taking.take(row)
        except UNREADABLE:
            walked.problem(f"position {row[0]}: the row is unreadable")
        if row[0] == expected and walked.digest.hex() != expected_digest:
            walked.problem(f"position {expected}: its digest is not the one expected")
        done += 1
    walked.events = len(rows)
    taking.end()
    return walked


# position, stream_id, version, type, schema_version, data, recorded_at, digest, task_id
_EventRow: TypeAlias = tuple[Any, ...]


# Statements are made once: to put them together for each stretch took a tenth of the time.
_BEHIND: Final = events.c.position > sa.bindparam("after")
_END: Final = sa.select(sa.func.max(events.c.position))
_AHEAD: Final = (
    sa.select(events.c.position)
    .order_by(events.c.position)
    .offset(sa.bindparam("few", type_=sa.Integer))
    .limit(1)
)
_AHEAD_BEHIND: Final = _AHEAD.where(_BEHIND)
_ROWS: Final = (
    sa.select(
        *(events.c.position, events.c.stream_id, events.c.version, events.c.type),
        *(events.c.schema_version, events.c.data),
        as_stored(events.c.recorded_at),
        as_stored(events.c.digest),
        streams.c.task_id,
    )
    .join_from(events, streams, events.c.stream_id == streams.c.stream_id, isouter=True)
    .where(events.c.position <= sa.bindparam("last"))
    .order_by(events.c.position)
)
_ROWS_BEHIND: Final = _ROWS.where(_BEHIND)
_ALTERING: Final = (
    sa.select(events.c.position)
    .where(_BEHIND, events.c.type.in_((Redacted.type, Archived.type)))
    .limit(1)
)
_DIGEST: Final = sa.select(as_stored(events.c.digest)).where(
    events.c.position == sa.bindparam("at")
)


def _altered_since(connection: Connection, end: int) -> bool:
    """Return whether what stands up to ``end`` may look otherwise than when that was the last."""
    return connection.execute(_ALTERING, {"after": end}).first() is not None


def _digest_at(connection: Connection, position: int) -> bytes:
    digest: object = connection.scalar(_DIGEST, {"at": position})
    return digest if isinstance(digest, bytes) else b""


# What these say is nothing that has to agree with others.
_GOING_ON: Final = EVENT_TYPES.keys() - {Submitted.type, Redacted.type, Archived.type}


def _begins_plainly(row: _EventRow) -> bool:
    """Return whether it is a task's first event, and names no content that is stored apart."""
    position, stream_id, version, type_, _, text, *_, task_id = row
    there = task_id is not None and stream_id == position and version == 1
    return there and type_ == Submitted.type and not _names_content(text)


def _names_content(text: str) -> bool:
    return '"blobs":{"' in text or '"files":' in text


@lru_cache(maxsize=1024)  # all events of a transaction have one moment
def _tail(type_: str, schema_version: int, at: object) -> str:
    return link_tail(type_, schema_version, micros_of(moment_of(at)))


@lru_cache(maxsize=1024)  # as above
def _known_tail(type_: str, schema_version: int, at: object) -> str:
    """Return the tail; of what only a newer perdure can have written, one that fits no digest."""
    return "" if _is_newer(type_, schema_version) else _tail(type_, schema_version, at)


def _is_newer(type_: str, schema_version: int) -> bool:
    model = EVENT_TYPES.get(type_)
    return model is None or schema_version > model.schema_version


def _where(row: _EventRow) -> str:
    """Say where an event stands."""
    return f"position {row[0]} ({row[8]} version {row[2]})"


class _Walk:
    """The state of a walk."""

    def __init__(self, connection: Connection, stretch: Stretch) -> None:
        self.walked = Walked(later=_altered_since(connection, stretch.end))
        self._from_start = stretch.after is None
        if stretch.after is not None:
            self.walked.position = stretch.after
            self.walked.digest = _digest_at(connection, stretch.after)
        self._gaps = each_gap(connection, stretch.after, stretch.last)
        self._gap = next(self._gaps, None)
        self._expect = stretch.expect

    def pass_plain(self, rows: Sequence[_EventRow], begin: int) -> int:
        """Take events that are the next of their tasks, and just as they were written.

        Most are. The others are left to `take`, which would find nothing wrong with these either,
        but takes three times as long.

        Returns:
            The index of the first, from ``begin`` on, that is left.
        """
        if self._gap is not None:
            return begin
        walked, from_start = self.walked, self._from_start
        versions, firsts = walked.versions, walked.firsts
        place, digest = walked.position, walked.digest
        expected = None if self._expect is None else self._expect[0]
        index = begin
        try:
            for index in range(begin, len(rows)):
                position, _, number, type_, schema, text, at, kept, task_id = rows[index]
                place += 1
                known = versions.get(task_id)
                if number == 1:  # what is before it, of whatever version, is too many
                    plain = known is None and _begins_plainly(rows[index])
                else:
                    plain = known == number - 1 and type_ in _GOING_ON
                if not plain or position != place or position == expected or '"redacted":' in text:
                    return index
                inner = sha256(text.encode()).digest()
                tail = _known_tail(type_, schema, at)
                if chain_link(digest, position, task_id, number, tail, inner) != kept:
                    return index
                if number == 1 and not from_start:
                    firsts[task_id] = First(position, number)
                versions[task_id] = number
                walked.position = position
                walked.digest = digest = kept
        except UNREADABLE:
            return index
        return len(rows)

    def take(self, row: _EventRow) -> None:
        """Take an event, and note whatever is to be said of it."""
        walked = self.walked
        position, stream_id, number, type_, schema_version, text, at, kept, task_id = row
        stored = kept if isinstance(kept, bytes) else b""
        if position != walked.position + 1 or self._gap is not None:
            self._jump(position)
        # On with what is stored, so that one change is one problem and not one at every event.
        previous, walked.digest = walked.digest, stored
        walked.position = position
        if task_id is None:
            walked.problem(f"position {position}: its stream is missing")
            return
        data = text.encode(errors="surrogateescape")
        known = walked.versions.get(task_id)
        version = self._first_version(row) if known is None else known + 1
        if type_ == Archived.type:
            version = self._archived(data, version, known, row)
        walked.versions[task_id] = version
        if number != version:
            walked.problem(f"{_where(row)}: version {version} was expected")
        if version == 1 and stream_id != position:
            walked.problem(f"{_where(row)}: its stream's key is {stream_id}")
        redacted = b'"redacted":' in data
        data_digest = self._original_digest(row, data) if redacted else sha256(data).digest()
        tail = _tail(type_, schema_version, at)
        digest = chain_link(previous, position, task_id, number, tail, data_digest)
        if digest != stored:
            if type_ not in EVENT_TYPES:
                walked.problem(f"{_where(row)}: {type_!r} is no type of event")
            walked.problem(f"{_where(row)}: the event, or what stands before it, was changed")
        elif _is_newer(type_, schema_version):
            self._note_newer(row)
            return  # what it says, only that one knows
        if type_ == Submitted.type and _names_content(text):
            self._note_blobs(data)
        elif type_ == Redacted.type:
            self._accept_tombstones(row, data)

    def _note_newer(self, row: _EventRow) -> None:
        walked = self.walked
        walked.newer += 1
        if walked.newer == 1:
            walked.first_newer = f"{_where(row)}: {row[3]!r} of schema version {row[4]}"

    def _first_version(self, row: _EventRow) -> int:
        """Return the version that a task's first event here has to have, as far as is known."""
        position, number, task_id = row[0], row[2], row[8]
        if self._from_start:
            return 1
        version = int(number)
        self.walked.firsts[task_id] = First(position, version)
        return version

    def _jump(self, position: int) -> None:
        """Go on at ``position``, across the gap before it where there is one."""
        walked = self.walked
        expected = walked.position + 1
        while self._gap is not None and self._gap.first < expected:
            walked.problem(f"gap at {self._gap.first}: its events are there")
            self._gap = next(self._gaps, None)
        if position == expected:
            return
        if self._gap is None or self._gap[:2] != (expected, position - 1):
            walked.problem(f"position {position}: position {expected} was expected")
            return
        walked.missing += position - expected
        walked.digest = self._gap.digest
        if self._expect is not None and expected <= self._expect[0] < position:
            # At its end, the next event's digest vouches for it.
            walked.hidden = self._expect != (position - 1, walked.digest.hex())
        self._gap = next(self._gaps, None)

    def _archived(self, data: bytes, version: int, known: int | None, row: _EventRow) -> int:
        """Take the note that the events before it were moved; returns the version it must have."""
        walked = self.walked
        position, stream_id, schema_version, task_id = row[0], row[1], row[4], row[8]
        try:
            noted = decode(Archived.type, schema_version, data)
        except PerdureError:
            walked.problem(f"{_where(row)}: its data is unreadable")
            return version
        if not isinstance(noted, Archived):
            return version
        if known is not None:
            walked.problem(f"{_where(row)}: {EVENTS_ARE_THERE}")
            return version
        walked.firsts.pop(task_id, None)
        walked.anew[task_id] = position
        if stream_id != noted.position:
            walked.problem(f"{_where(row)}: its stream's key is {stream_id}")
        walked.archived += noted.events
        return noted.events + 1

    def _original_digest(self, row: _EventRow, data: bytes) -> bytes:
        """Return the digest of the data as it was when it was written."""
        try:
            named = orjson.loads(data).get("redacted")
            if isinstance(named, str):
                self.walked.redacted += 1
                self.walked.tombstones[row[8], row[2]] = sha256(data).hexdigest()
                return bytes.fromhex(named)
        except (orjson.JSONDecodeError, AttributeError, ValueError):
            self.walked.problem(f"{_where(row)}: its data is unreadable")
        return sha256(data).digest()

    def _note_blobs(self, data: bytes) -> None:
        plain = orjson.loads(data)
        if "redacted" not in plain:
            self.walked.blobs |= blob_digests(plain["task"], plain.get("blobs") or {})

    def _accept_tombstones(self, row: _EventRow, data: bytes) -> None:
        """Check the tombstones of a stream against the event that says who left them."""
        try:
            named = decode(Redacted.type, 1, data)
        except PerdureError:
            self.walked.problem(f"{_where(row)}: its data is unreadable")
            return
        if not isinstance(named, Redacted):
            return
        for version, digest in named.tombstones.items():
            said = Accepted(row[8], int(version), digest, _where(row))
            here = self.walked.tombstones.pop((said.task_id, said.version), None)
            if here is None:
                self.walked.accepted.append(said)
            elif here != digest:
                self.walked.problem(tombstone_problem(said))

    def end(self) -> None:
        while self._gap is not None:
            self.walked.problem(f"gap at {self._gap.first}: its events are there")
            self._gap = next(self._gaps, None)


EVENTS_ARE_THERE: Final = "it was archived, and its events are there"


def tombstone_problem(said: Accepted) -> str:
    """Return the problem of a tombstone that isn't what it is said to be."""
    return f"{said.where}: the tombstone at version {said.version} is not the one that was left"
