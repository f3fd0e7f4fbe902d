"""What must be true of every log, and ways to bring about what seldom happens."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from perdure.store.database import Database
from perdure.store.rebuilding import compare
from perdure.store.verification import verify
from store.backends import Backend, Rows, Store

TABLES = ("log_head", "streams", "events", "tasks", "blobs", "workers")


def everything(backend: Backend, url: str) -> dict[str, Rows]:
    """Return all rows of all tables."""
    return {name: backend.query(url, f"SELECT * FROM {name} ORDER BY 1") for name in TABLES}


def assert_sound(url: str) -> None:
    """Hold the log to all that must be true of it, whatever happened."""
    with Database(url).snapshot() as connection:
        assert verify(connection).problems == []
        assert compare(connection).differed == 0


def gapless(backend: Backend, url: str) -> Counter[str]:
    """Check that nothing is missing and nothing is there twice; returns the events per task."""
    positions = [row[0] for row in backend.query(url, "SELECT position FROM events ORDER BY 1")]
    assert positions == list(range(1, len(positions) + 1))
    assert backend.query(url, "SELECT position FROM log_head") == [(len(positions),)]
    versions: Counter[str] = Counter()
    for task_id, version in backend.query(
        url,
        "SELECT s.task_id, e.version FROM events e JOIN streams s ON s.stream_id = e.stream_id "
        "ORDER BY e.position",
    ):
        versions[task_id] += 1
        assert version == versions[task_id]
    assert dict(backend.query(url, "SELECT task_id, version FROM streams")) == versions
    return versions


@contextmanager
def held(store: Store) -> Generator[None, None, None]:
    """Keep the writer busy meanwhile, so that what is asked for gathers."""
    release = threading.Event()
    hold = asyncio.ensure_future(store.log.write(lambda _tx: release.wait(30), alone=True))
    try:
        yield
    finally:
        release.set()
        hold.add_done_callback(lambda done: done.exception())
