"""Positions of the log whose events are elsewhere, and the digests to walk the chain across them.

A chain is broken where an event is missing: the next one's digest covers that of the one before. So
each gap keeps the digest of the last event in it. A gap proves nothing by itself; in a log each is
vouched for by the `archived` events of the tasks that it swallowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.store import scanning
from perdure.store.scanning import as_stored
from perdure.store.schema import gaps

__all__ = ["Gap", "each_gap", "joined", "open_gaps"]


class Gap(NamedTuple):
    """Positions that are not there, all from the first to the last."""

    first: int
    last: int
    digest: bytes
    """The digest of the last event."""


def joined(found: Iterable[Gap]) -> Iterator[Gap]:
    """Yield the same positions in as few gaps as possible, in their order."""
    open_: Gap | None = None
    for gap in sorted(found):
        if open_ is not None and gap.first == open_.last + 1:
            open_ = Gap(open_.first, gap.last, gap.digest)
            continue
        if open_ is not None:
            yield open_
        open_ = gap
    if open_ is not None:
        yield open_


def open_gaps(connection: Connection, new: Iterable[tuple[int, bytes]]) -> None:
    """Write down that events are elsewhere: their positions and digests.

    Nobody else may do so at the same time; the lock on the log's head sees to that.
    """
    missing = sorted(Gap(position, position, digest) for position, digest in new)
    if not missing:
        return
    first = missing[0].first
    # The gap before them counts too, for they may go on where it ends.
    before = sa.select(sa.func.max(gaps.c.first_position)).where(gaps.c.first_position < first)
    known = {
        Gap(row.first_position, row.last_position, bytes(row.digest))
        for row in connection.execute(
            sa.select(gaps).where(
                gaps.c.first_position >= sa.func.coalesce(before.scalar_subquery(), 0),
                gaps.c.first_position <= missing[-1].last + 1,
            )
        )
    }
    wanted = set(joined([*known, *missing]))
    gone = known - wanted
    if gone:
        connection.execute(
            sa.delete(gaps).where(gaps.c.first_position == sa.bindparam("first")),
            [{"first": gap.first} for gap in sorted(gone)],
        )
    connection.execute(
        sa.insert(gaps),
        [
            {"first_position": gap.first, "last_position": gap.last, "digest": gap.digest}
            for gap in sorted(wanted - known)
        ],
    )


def each_gap(
    connection: Connection, after: int | None = None, last: int | None = None
) -> Iterator[Gap]:
    """Yield gaps in their order, as they are stored: those that begin behind ``after``.

    Args:
        connection: Where to read.
        after: A position; None for none.
        last: The position after which no more are wanted; None for none.
    """
    while True:
        rows = connection.execute(
            _page(bounded=last is not None, further=after is not None),
            {"after": after, "last": last, "most": scanning.PAGE},
        ).all()
        for row in rows:
            yield Gap(*row)
        if len(rows) < scanning.PAGE:
            return
        after = rows[-1][0]


@cache
def _page(*, bounded: bool, further: bool) -> sa.Select[*tuple[Any, ...]]:
    page = (
        sa.select(*(as_stored(column) for column in gaps.c))
        .order_by(gaps.c.first_position)
        .limit(sa.bindparam("most", type_=sa.Integer))
    )
    if bounded:
        page = page.where(gaps.c.first_position <= sa.bindparam("last"))
    return page.where(gaps.c.first_position > sa.bindparam("after")) if further else page
