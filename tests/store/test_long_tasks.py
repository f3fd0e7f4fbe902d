"""Tasks with very many chunks: what is done with them takes memory for a page, not for all."""

from __future__ import annotations

import gc
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

from perdure.events import Chunk, Completed
from perdure.store.archive import archive
from perdure.store.database import Database
from perdure.store.evidence import check_archive
from store.backends import Backend, opened

PAGE = 5000  # what is read at a time, by the store's own settings
FEW, MANY = 2 * PAGE, 6 * PAGE


async def _say(url: str, chunks: int) -> None:
    async with opened(url) as store:
        version = await store.start("long")
        for begin in range(0, chunks, 2000):
            said = [Chunk(text="x", offset=begin + n) for n in range(2000)]
            version = await store.log.append("long", said, version)
        await store.log.append("long", [Completed(output_length=chunks)], version)


async def _peak_of_archiving(url: str, file: Path) -> int:
    """Archive all there is and hold the archive against the log; returns the most bytes it took."""
    gc.collect()
    tracemalloc.start()
    try:
        async with opened(url) as store:
            later = datetime.now(UTC) + timedelta(days=1)
            report = await archive(store.log, store.database, later, file, by="me")
        with Database(url).snapshot() as connection:
            found = check_archive(connection, file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.tasks, found.problems) == (report.tasks, [])
    assert found.events == report.events > PAGE
    return peak


async def test_archiving_takes_no_more_memory_for_more_chunks(
    backend: Backend, tmp_path: Path
) -> None:
    """Three times the chunks take far less than a hundred bytes for each further one."""
    peaks: list[int] = []
    for chunks in (FEW, MANY):
        url = backend.new()
        await _say(url, chunks)
        peaks.append(await _peak_of_archiving(url, tmp_path / f"{chunks}.db"))
    print(f"peaks: {[round(peak / 1e6, 1) for peak in peaks]} MB")
    assert peaks[1] - peaks[0] < 50 * (MANY - FEW)
