"""Ctrl-C and requests to end, counted instead of thrown into whatever is going on."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["Interrupts", "any_of"]

# A closed terminal asks to end as much as a service manager does.
_REQUESTS: Final = (signal.SIGTERM, signal.SIGHUP)
_MOST_TERMINATIONS: Final = 2
_SHOW_CURSOR: Final = "\x1b[?25h"


class Interrupts:
    """What the user, or the system, has asked for so far. Used as a context manager in a loop.

    Attributes:
        first: Ctrl-C was pressed: begin nothing new.
        second: Ctrl-C was pressed again: stop what runs. A third time ends the process at once,
            which loses nothing either: it is what a crash does.
        terminated: SIGTERM or SIGHUP came: hand back what runs, and end. The third ends the process
            at once, too.
        on_second: Called when a second request has come, of whatever kind.
    """

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.terminated = asyncio.Event()
        self.on_second: Callable[[], None] = lambda: None
        self._terminations = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, *_REQUESTS):
            before = signal.getsignal(number)
            if before is signal.SIG_IGN:  # nohup, or a job in the background: it stays so
                continue
            self._before[number] = before
            heard = self._pressed if number is signal.SIGINT else self._asked_to_end
            loop.add_signal_handler(number, heard)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        for number, before in self._before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, before)
        self._before.clear()

    def _asked_to_end(self) -> None:
        self._terminations += 1
        if self._terminations > _MOST_TERMINATIONS:  # as where a server that hangs keeps us
            os._exit(128 + signal.SIGTERM)
        if self.interrupted:
            self.on_second()
        self.terminated.set()

    def _pressed(self) -> None:
        if self.interrupted:
            self.on_second()
        if not self.first.is_set():
            self.first.set()
        elif not self.second.is_set():
            self.second.set()
        else:
            if sys.stderr.isatty():
                sys.stderr.write(_SHOW_CURSOR + "\n")
                sys.stderr.flush()
            os._exit(130)

    @property
    def interrupted(self) -> bool:
        """Whether anything was asked for."""
        return self.first.is_set() or self.terminated.is_set()


async def any_of(*events: asyncio.Event, work: Iterable[asyncio.Future[Any]] = ()) -> None:
    """Wait until one of the events is set or one of the futures is done; none is cancelled."""
    waiting: list[asyncio.Task[Any]] = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait({*waiting, *work}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for waiter in waiting:
            waiter.cancel()
        await _settle(waiting)


async def _settle(waiting: Iterable[Awaitable[Any]]) -> None:
    await asyncio.gather(*waiting, return_exceptions=True)
