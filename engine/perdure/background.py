"""A worker in the background of an engine: begun, ended and begun again, as it was asked for."""

from __future__ import annotations

import asyncio

from perdure.errors import DatabaseUnavailable, PerdureError, TasksUnreadable
from perdure.stopping import Stop
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
        self._again = False  # was asked for while the worker was being stopped
        self._stops = 0
        self._working: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Run tasks from now on, until `stop`."""
        self._wanted = True
        self._again = self._worker.stopping
        self._start()

    @property
    def _runs(self) -> bool:
        return self._working is not None and not self._working.done()

    def _start(self, *, until_done: bool = False) -> asyncio.Task[None]:
        """Have the worker run, if it doesn't already."""
        if self._working is None or self._working.done():
            self._again = False
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
        # Nobody would ever see the end of what they are waiting for.
        if isinstance(error, TasksUnreadable):
            self._feed.fail_readers(error, error.task_ids)
        elif error is not None:
            if not isinstance(error, PerdureError):
                error = PerdureError(f"the worker failed: {type(error).__name__}: {error}")
            self._feed.suspend(error)
            return
        if self._wanted and (self._again or not self._worker.stopping):
            self._start()  # for what comes later

    def revive(self) -> None:
        """Go on where running has ended because the database was out of reach.

        It may be back. If not, who waits is told that again.
        """
        working = self._working
        if working is None or not working.done() or working.cancelled():
            return
        if isinstance(working.exception(), DatabaseUnavailable):
            if self._wanted:
                self._start()
            else:
                self._feed.resume()

    async def until_done(self) -> None:
        """Run tasks until none is pending or running; then go on, if `start` has asked for it.

        It ends earlier where `stop` is called.

        Raises:
            TasksUnreadable: All is done, but for some tasks that this perdure can't read.
            StoreError: The database can't do its part any more.
        """
        stops = self._stops
        if self._worker.stopping and self._working is not None:  # by somebody, just now
            await asyncio.wait({self._working})
        # What ran already may have seen that all is done a moment ago, and ends by that.
        for _ in range(2 if self._runs else 1):
            if self._stops != stops:
                return
            working = self._start(until_done=True)
            await asyncio.wait({working})
            working.result()

    async def stop(self, why: Stop = Stop.HAND_BACK) -> None:
        """Stop what runs, and begin nothing new until one of the others is called."""
        self._wanted = False
        self._stops += 1
        working = self._working  # not one that is begun after this
        await self._worker.cancel_running(why)
        if working is not None:
            await asyncio.wait({working})
