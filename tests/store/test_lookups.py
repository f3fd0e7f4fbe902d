"""Lookups that come together are one query, and see what was there when they were made."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from perdure.store.lookups import MOST_AT_ONCE, Lookup


class Shelf:
    """Things to be looked up, and the queries that were made."""

    def __init__(self, **things: int) -> None:
        self.things = things
        self.queries: list[list[str]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.asked = asyncio.Event()
        self.error: Exception | None = None

    async def fetch(self, keys: Sequence[str]) -> Mapping[str, int]:
        """Answer a query with what was there when it began."""
        self.queries.append(list(keys))
        self.asked.set()
        found = {key: self.things[key] for key in keys if key in self.things}
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return found


async def test_together_they_are_one_query() -> None:
    """Each caller gets its own; what isn't there is None."""
    shelf = Shelf(a=1, b=2)
    lookup = Lookup(shelf.fetch)
    assert await asyncio.gather(*map(lookup.get, "abca")) == [1, 2, None, 1]
    assert shelf.queries == [["a", "b", "c"]]


async def test_none_joins_a_query_that_has_begun() -> None:
    """What was there before one asked is seen, though an older query for the same is under way."""
    shelf = Shelf()
    lookup = Lookup(shelf.fetch)
    shelf.open.clear()
    early = asyncio.create_task(lookup.get("a"))
    await shelf.asked.wait()
    shelf.things["a"] = 1
    late = asyncio.create_task(lookup.get("a"))
    await asyncio.sleep(0)
    shelf.open.set()
    assert (await early, await late) == (None, 1)
    assert shelf.queries == [["a"], ["a"]]


async def test_a_failure_reaches_all_of_its_query_and_no_other() -> None:
    """Whoever was part of it is told; the next lookup is a new query."""
    shelf = Shelf(a=1)
    lookup = Lookup(shelf.fetch)
    shelf.error = OSError("broken")
    outcomes = await asyncio.gather(lookup.get("a"), lookup.get("b"), return_exceptions=True)
    assert outcomes == [shelf.error, shelf.error]
    shelf.error = None
    assert await lookup.get("a") == 1


async def test_one_who_leaves_takes_nothing_from_the_others() -> None:
    """A cancelled caller doesn't cancel the query that others wait for."""
    shelf = Shelf(a=1)
    lookup = Lookup(shelf.fetch)
    shelf.open.clear()
    leaving = asyncio.create_task(lookup.get("a"))
    staying = asyncio.create_task(lookup.get("a"))
    await shelf.asked.wait()
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    shelf.open.set()
    assert await staying == 1


@pytest.mark.parametrize("odd", ["\udcff", "a\x00b", 7, b"a", None, ["a"]])
async def test_what_can_be_nowhere_spoils_no_query(odd: Any) -> None:
    """It isn't asked for: databases refuse it, and with it all that is asked together."""
    shelf = Shelf(a=1)
    lookup = Lookup(shelf.fetch)
    assert await asyncio.gather(lookup.get(odd), lookup.get("a")) == [None, 1]
    assert shelf.queries == [["a"]]


async def test_very_many() -> None:
    """No query asks for more than a database takes."""
    shelf = Shelf(**{f"k{n}": n for n in range(3 * MOST_AT_ONCE)})
    lookup = Lookup(shelf.fetch)
    assert await asyncio.gather(*map(lookup.get, shelf.things)) == list(shelf.things.values())
    assert [len(query) for query in shelf.queries] == [MOST_AT_ONCE] * 3
