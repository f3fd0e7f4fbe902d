"""Why an attempt ends: the first reason counts, wherever it comes from."""

from __future__ import annotations

import asyncio
from enum import Enum

__all__ = ["ReasonToEnd", "Stop"]


class Stop(Enum):
    """Why an attempt ends before the platform does."""

    CANCEL = "cancelled"
    LOST = "lost to another worker"
    HAND_BACK = "handed back"
    TIME_LIMIT = "the time limit was reached"
    BROKEN = "the log can't be written"


class ReasonToEnd:
    """The reason for an attempt to end, as soon as there is one.

    Attributes:
        given: Done as soon as there is one: the platform's end or error, a stop, the time.
        stopped: Done with the first reason to end before the platform does.
    """

    __slots__ = ("given", "stopped")

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.given: asyncio.Future[None] = loop.create_future()
        self.stopped: asyncio.Future[Stop] = loop.create_future()

    def stop(self, why: Stop) -> None:
        """Ask for the end."""
        if not self.stopped.done():
            self.stopped.set_result(why)
        self.give()

    def give(self) -> None:
        """Let it end; where nobody has asked for it, because the platform has ended."""
        if not self.given.done():
            self.given.set_result(None)
