"""Hearing of other processes' commits on PostgreSQL: one LISTEN connection per process.

A notification is a hint and nothing more: whoever gets one looks into the log. It is sent after a
commit, outside of its transaction, for a NOTIFY inside would make all commits wait for each other.
What is lost with a process that dies in between is found by a slow look.

Behind a proxy that pools transactions LISTEN succeeds and nothing is ever delivered. So the first
thing a listener does is to notify itself; where that doesn't come back, it polls.

Without any connection it has whoever follows the log look now and then. Workers look by themselves
while nothing is heard, so they are told when that begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final

import psycopg

from perdure.store.dialect import News

__all__ = ["CHANNEL", "Listener"]

CHANNEL: Final = "perdure"
POLL_SECONDS: Final = 0.015
IDLE_SECONDS: Final = 0.05
# For what was never announced, as long as somebody follows the log.
SLOW_SECONDS: Final = 2.0
# Before a lost connection is opened anew, and, growing, again where that one doesn't last.
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 5.0
_PROBE: Final = "probe"


class Listener:
    """Tells of other processes' commits, as soon as it is told itself.

    Attributes:
        hears: Whether notifications come through.
        token: What this process puts into its own notifications, so that it can tell them.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[psycopg.AsyncConnection[Any]]],
        on_news: Callable[[News], None],
        active: Callable[[], bool],
        token: str,
    ) -> None:
        """Make a listener, to be started with `run`.

        Args:
            connect: Opens a connection in autocommit mode.
            on_news: Called on the event loop.
            active: Returns whether anybody follows the log now.
            token: This process.
        """
        self.hears = False
        self.token = token
        self._connect = connect
        self._on_news = on_news
        self._active = active
        self._probe = f"{_PROBE} {secrets.token_hex(8)}"

    async def run(self) -> None:
        """Listen until cancelled, on a new connection whenever one is lost."""
        now = asyncio.get_running_loop().time
        pause = FIRST_PAUSE_SECONDS
        while True:
            heard, began = False, math.inf
            with contextlib.suppress(psycopg.Error, OSError):
                connection = await self._connected()
                began = now()
                try:
                    await self._listen(connection)
                finally:
                    heard, self.hears = self.hears, False
                    await connection.close()
            if heard:  # nobody will wake a worker that counts on being told
                self._on_news(News())
            # Not after each connection: those that are cut at once would be opened all the time.
            if now() - began > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await self._wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _connected(self) -> psycopg.AsyncConnection[Any]:
        """Open a connection, however long that takes; whoever follows the log looks meanwhile."""
        connecting = asyncio.ensure_future(self._connect())
        try:
            while not connecting.done():
                await asyncio.wait({connecting}, timeout=SLOW_SECONDS)
                if not connecting.done():
                    self._have_them_look()
        except asyncio.CancelledError:
            connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, psycopg.Error, OSError):
                await (await connecting).close()
            raise
        return connecting.result()

    async def _wait(self, seconds: float) -> None:
        """Let time pass without a connection; whoever follows the log looks meanwhile."""
        while seconds > 0:
            step = min(seconds, SLOW_SECONDS)
            await asyncio.sleep(step)
            seconds -= step
            self._have_them_look()

    def _have_them_look(self) -> None:
        """Have those look who follow the log; workers look by themselves."""
        if self._active():
            self._on_news(News(work=False))

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        connection.add_notify_handler(lambda notify: self._understand(notify.payload))
        await connection.execute(f"LISTEN {CHANNEL}".encode())
        await connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, self._probe))
        self._on_news(News())  # whatever was committed before anybody listened
        await self._poll(connection)
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        fileno = connection.fileno()  # which a lost connection doesn't know any more
        loop.add_reader(fileno, readable.set)
        try:
            while True:
                self._read(connection.pgconn)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SLOW_SECONDS):
                        await readable.wait()
                        readable.clear()
                        continue
                self._have_them_look()
        finally:
            loop.remove_reader(fileno)

    async def _poll(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Look at the log again and again, until a notification comes through."""
        seen: object = None
        while not self.hears:
            if self._active():
                cursor = await connection.execute("SELECT position FROM log_head")
                position = await cursor.fetchone()
                if position != seen:
                    self._on_news(News(work=False))
                seen = position
                await asyncio.sleep(POLL_SECONDS)
            else:
                self._read(connection.pgconn)
                await asyncio.sleep(IDLE_SECONDS)

    def _read(self, pgconn: Any) -> None:  # noqa: ANN401
        pgconn.consume_input()
        while (found := pgconn.notifies()) is not None:
            self._understand(bytes(found.extra).decode(errors="replace"))

    def _understand(self, payload: str) -> None:
        if payload.startswith(_PROBE):
            self.hears = self.hears or payload == self._probe
            return
        token, _, kind = payload.partition(" ")
        if token != self.token:
            self._on_news(News(work="w" in kind))
