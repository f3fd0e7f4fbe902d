"""Rows page by page: nothing holds the database back while they are written out."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from typing import Final

from perdure.store.readonly import Reader

__all__ = ["PAGE_ROWS", "each_row"]

PAGE_ROWS: Final = 1000
PAGE_CHARACTERS: Final = 4 * 2**20


def each_row(
    reader: Reader, query: str, parameters: Mapping[str, object], key: str, after: int = 0
) -> Iterator[sqlite3.Row]:
    """Yield the rows of a query page by page along a column.

    No query stays open while rows are written out: it would hold back the database's checkpoints
    for as long as the reader at the other end of a pipe takes.

    Args:
        reader: Where to read.
        query: In the order of ``key``, only what is behind the parameter `after`, without a LIMIT.
        parameters: The others.
        key: The column.
        after: Where to begin.
    """
    limited = f"{query} LIMIT {PAGE_ROWS}"
    while page := _page(reader.rows(limited, {**parameters, "after": after})):
        yield from page
        after = page[-1][key]


def _page(rows: Iterator[sqlite3.Row]) -> list[sqlite3.Row]:
    """Return rows until they are enough, by their number or their size."""
    page: list[sqlite3.Row] = []
    size = 0
    for row in rows:
        page.append(row)
        size += sum(len(value) for value in row if isinstance(value, str))
        if size > PAGE_CHARACTERS:
            break
    return page
