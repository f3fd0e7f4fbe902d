"""Looking things up by task: lookups that come together are one query.

Two hundred callers who wait for their results would else ask the database two hundred times, each
time with several hops between threads. While one query runs, the lookups that arrive are gathered
for the next one (the idea is that of `graphql/dataloader`). A lookup never joins a query that has
begun, so whoever asks after a commit sees it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, Generic, TypeVar

from perdure.text import is_storable

__all__ = ["Lookup"]

V = TypeVar("V")

MOST_AT_ONCE: Final = 500


class Lookup(Generic[V]):
    """One kind of lookup.

    Args:
        fetch: Returns what there is for some keys, in one query. What isn't there is left out.
    """

    def __init__(self, fetch: Callable[[Sequence[str]], Awaitable[Mapping[str, V]]]) -> None:
        self._fetch = fetch
        self._waiting: dict[str, asyncio.Future[V | None]] = {}
        self._fetching: asyncio.Task[None] | None = None

    async def get(self, key: str) -> V | None:
        """Return what there is for ``key``; None where there is nothing.

        Raises:
            StoreError: The database can't be read.
        """
        if not is_storable(key):  # it is nowhere, and would spoil the query for all others
            return None
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
            if self._fetching is None:
                self._fetching = asyncio.create_task(self._fetch_all())
        return await asyncio.shield(future)  # others may wait for the same one

    async def _fetch_all(self) -> None:
        try:
            while self._waiting:
                keys = list(self._waiting)[:MOST_AT_ONCE]
                asked = {key: self._waiting.pop(key) for key in keys}
                await self._answer(asked)
        finally:
            self._fetching = None

    async def _answer(self, asked: Mapping[str, asyncio.Future[V | None]]) -> None:
        try:
            found = await self._fetch(list(asked))
        except Exception as error:  # noqa: BLE001 - everyone who waits is told
            for future in asked.values():
                if not future.done():
                    future.set_exception(error)
                    future.exception()  # whoever asked may have gone: then nobody needs to know
            return
        for key, future in asked.items():
            if not future.done():
                future.set_result(found.get(key))
