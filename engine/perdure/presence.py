"""Being alive: a worker has a name, shows itself under it, and takes over what lost ones had."""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

from perdure.errors import EngineClosed, StoreError
from perdure.pacing import Pace
from perdure.platforms import Platforms
from perdure.policy import after_interruption
from perdure.settings import WorkerSettings
from perdure.store import claims, liveness
from perdure.store.claims import Scope
from perdure.store.database import Database
from perdure.store.liveness import Census
from perdure.store.log import EventLog
from perdure.store.scoping import Unreadable
from perdure.store.transaction import Transaction

__all__ = ["News", "Presence"]


class News(NamedTuple):
    """What a worker has learnt while it showed itself.

    Attributes:
        taken_over: Whether it has taken over what another one had.
        due: Whether something is to be claimed, now or before the next sign of life.
    """

    taken_over: bool
    due: bool


class Presence:
    """A worker's place among the others.

    Args:
        database: Whose clock counts.
        log: Where it is written down.
        settings: How often a worker shows itself, and for how long that holds.
        pace: Is told how many workers there are.
        platforms: Where calls of lost workers may go on that nobody wants any more.
        unreadable: Notes the tasks of others that can't be taken over, since they can't be read.

    Attributes:
        worker_id: The worker's name.
    """

    def __init__(
        self,
        database: Database,
        log: EventLog,
        settings: WorkerSettings,
        pace: Pace,
        platforms: Platforms,
        unreadable: Unreadable,
    ) -> None:
        self.worker_id = _new_worker_id()
        self._database = database
        self._log = log
        self._settings = settings
        self._pace = pace
        self._platforms = platforms
        self._unreadable = unreadable
        self._registered = False
        self._stopping: set[asyncio.Task[None]] = set()
        self._claimed = asyncio.Event()
        self._expires = math.inf  # when, by the loop's clock, the next lease is over if not renewed

    async def register(self) -> None:
        """Write down that this worker is there, unless it was already."""
        if not self._registered:
            self._registered = True
            await self._log.write(
                lambda tx: liveness.register_worker(tx, self.worker_id, self.lease)
            )

    async def take_new_name(self) -> None:
        """Give up the name, under which nothing may run any more: what was left is lost with it."""
        await self._log.write(lambda tx: liveness.forget_worker(tx, self.worker_id))
        self.worker_id = _new_worker_id()
        self._registered = False

    async def sign_off(self) -> None:
        """Write down that this worker is gone, where that still can be written."""
        await self.calls_stopped()
        if self._registered:
            self._registered = False
            with contextlib.suppress(StoreError, EngineClosed):
                await self._log.write(lambda tx: liveness.forget_worker(tx, self.worker_id))

    def note_claim(self) -> None:
        """Take the news that this worker has something to lose, from now on."""
        self._claimed.set()

    async def until_due(self, idle: Callable[[], bool]) -> None:
        """Wait for the next sign of life to be due, or for the end of somebody's lease.

        Args:
            idle: Returns whether this worker has nothing to lose; asked again at each claim.
        """
        now = asyncio.get_running_loop().time
        last = now()
        while True:
            self._claimed.clear()
            pause = self._settings.heartbeat_seconds
            if idle():
                # Who has nothing to lose need not say that it lives, only before its lease is over.
                pause = max(pause, self._settings.lease_seconds / 2)
            if (left := min(last + pause, self._expires) - now()) <= 0:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._claimed.wait()

    async def show(self, scope: Scope | None) -> News:
        """Show that this worker is alive, and take over from others that aren't.

        Args:
            scope: Where to look, at the same time, for something to claim; None for nowhere.
        """

        def show(tx: Transaction) -> tuple[Census, datetime | None]:
            census = liveness.beat_and_look(tx, self.worker_id, self.lease)
            return census, None if scope is None else claims.next_due_in(tx, scope)

        try:
            census, due = await self._log.write(show)
            taken_over = await self._take_over(census) > 0
        except Exception:
            self._expires = math.inf  # it is no reason to try again before the next sign is due
            raise
        return News(taken_over, due is not None and due <= self._database.now + self.lease)

    async def recover_lost(self) -> int:
        """Take over what lost workers had; returns how many tasks that were."""
        census = await liveness.look_around(self._database, self.lease, self._database.now)
        return await self._take_over(census)

    async def calls_stopped(self) -> None:
        """Wait until platforms were asked to stop the calls that nobody wants any more."""
        if self._stopping:
            await asyncio.wait(set(self._stopping))

    @property
    def lease(self) -> timedelta:
        """For how long a sign of life holds."""
        return timedelta(seconds=self._settings.lease_seconds)

    async def _take_over(self, census: Census) -> int:
        """Take over what lost workers had, and note when the next one may be lost."""
        self._pace.workers = max(1, census.alive)
        self._expires = math.inf
        if census.expires is not None:
            left = (census.expires - self._database.now).total_seconds()
            self._expires = asyncio.get_running_loop().time() + left + self._pace.any_turn()
        recovered = 0
        for lost in census.lost:
            if lost == self.worker_id:
                continue
            while taken := await self._take_some(lost):
                recovered += taken
        return recovered

    async def _take_some(self, lost: str) -> int:
        decide = partial(after_interruption, policy=self._settings.retry)
        taken = await self._log.write(lambda tx: claims.recover(tx, lost, decide, self._unreadable))
        for call in taken.left:  # not waited for: signs of life are due meanwhile
            stopping = asyncio.create_task(self._platforms.stop(*call))
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)
        return taken.tasks


def _new_worker_id() -> str:
    return f"worker_{secrets.token_hex(6)}"
