"""A worker in the background of an engine: begun, ended and begun again, as it was asked for."""

from __future__ import annotations

import asyncio

from perdure.attempt import Stop
from perdure.errors import DatabaseUnavailable, PerdureError, TasksUnreadable
from perdure.store.feed import Feed
from perdure.worker import Worker

__all__ = ["Background"]


class Background:
    """Runs a worker as an asyncio task, and tells who waits for results when it has failed.

    Args:
        worker: What runs the tasks.
        feed: Where the readers are.
    """

    def __init__(self, worker: Worker, feed: Feed) -> None:
        self._worker = worker
        self._feed = feed
        self._wanted = False  # beyond the moment at which all is done
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Run tasks from now on, until `stop`."""
        self._wanted = True
        self._start()

    def _start(self, *, until_done: bool = False) -> asyncio.Task[None]:
        """Have the worker run, if it doesn't already."""
        if self._working is None or self._working.done():
            self._feed.resume()
            self._working = asyncio.create_task(self._worker.run(until_done=until_done))
            self._working.add_done_callback(self._ended)
        elif until_done:
            self._worker.stop_when_done()
        return self._working

    def _ended(self, working: asyncio.Task[None]) -> None:
        if working.cancelled():
            return
        error = working.exception()
        if isinstance(error, PerdureError):
            # Nobody would ever see the end of what they are waiting for.
            self._feed.suspend(error)
        elif error is not None:
            self._feed.suspend(PerdureError(f"the worker failed: {type(error).__name__}: {error}"))
        all_done = error is None or isinstance(error, TasksUnreadable)
        if all_done and self._wanted and not self._worker.stopping:
            self._start()  # for what comes later

    def revive(self) -> None:
        """Run tasks again where that has ended because the database was out of reach.

        It may be back. If not, who waits is told that again.
        """
        working = self._working
        if working is None or not working.done() or working.cancelled():
            return
        if isinstance(working.exception(), DatabaseUnavailable):
            self._start()

    async def until_done(self) -> None:
        """Run tasks until none is pending or running; then go on, if `start` has asked for it.

        Raises:
            TasksUnreadable: All is done, but for some tasks that this perdure can't read.
            StoreError: The database can't do its part any more.
        """
        if self._worker.stopping and self._working is not None:  # by somebody, just now
            await asyncio.wait({self._working})
        working = self._start(until_done=True)
        await asyncio.wait({working})
        working.result()

    async def stop(self, why: Stop = Stop.HAND_BACK) -> None:
        """Stop what runs, and begin nothing new until one of the others is called."""
        self._wanted = False
        await self._worker.cancel_running(why)
        if self._working is not None:
            await asyncio.wait({self._working})
