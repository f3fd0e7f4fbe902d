"""A worker: claims due tasks and runs their attempts, and is present among other workers.

It keeps nothing that the database doesn't have: killed at any moment, another one goes on from the
log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Container, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from perdure.attempt import Attempt
from perdure.calls import make_call
from perdure.checking import Checker
from perdure.containment import admit_error
from perdure.errors import (
    ConcurrencyError,
    DatabaseIncompatible,
    DatabaseUnavailable,
    PerdureError,
    PlatformError,
    StoreError,
    TasksUnreadable,
)
from perdure.pacing import CALM_SECONDS, Pace
from perdure.platforms import Platforms
from perdure.policy import Spent, after_failure, after_interruption
from perdure.presence import Presence
from perdure.settings import WorkerSettings
from perdure.stopping import Stop
from perdure.store import claims
from perdure.store.claims import Claimed, Scope
from perdure.store.database import Database
from perdure.store.log import EventLog
from perdure.store.scoping import NamedTasks, Unreadable

__all__ = ["Worker"]

_logger: Final = logging.getLogger("perdure")


@dataclass(slots=True)
class _Run:
    """What is asked of a worker from one call of `run` to its end, and what came of it.

    Attributes:
        stopping: It is to begin nothing new.
        until_done: It is to end as soon as nothing is left to do.
        stop: Why attempts end as soon as they begin, where they do.
        failure: What ends it.
        in_progress: It, or an earlier one, has begun and not come to its end: something may have
            been left running under the worker's name, which the next one gives up for that.
    """

    stopping: bool = False
    until_done: bool = False
    stop: Stop | None = None
    failure: PerdureError | None = None
    in_progress: bool = False


class Worker:
    """Runs tasks of one database in this process."""

    def __init__(
        self,
        database: Database,
        log: EventLog,
        platforms: Platforms,
        *,
        scope: Scope | None = None,
        settings: WorkerSettings | None = None,
    ) -> None:
        self.settings = settings or WorkerSettings()
        self._scope = scope or Scope()
        named = self._scope.task_ids
        self._named = None if named is None else NamedTasks(named)
        self._unreadable = Unreadable()
        self._database = database
        self._log = log
        self._platforms = platforms
        # The last attempt at a task may still be closing its stream while the next one runs.
        self._running: dict[asyncio.Task[None], str] = {}
        self._attempts: set[Attempt] = set()
        self._checker = Checker()
        self._wake = asyncio.Event()
        self._pace = Pace(self.settings.poll_seconds, self.settings.lease_seconds)
        self._presence = Presence(
            database, log, self.settings, self._pace, platforms, self._unreadable
        )
        self._claiming = asyncio.Lock()
        self._run = _Run()
        self._going = False

    # -- the face --------------------------------------------------------------------------------

    @property
    def worker_id(self) -> str:
        """Its name, for others and for the log."""
        return self._presence.worker_id

    @property
    def scope(self) -> Scope:
        """Which tasks it runs: those of its scope whose platform this process has.

        Where it names tasks, they leave it some time after they have ended. Those that turn out to
        be unreadable are excluded.
        """
        platforms = self._platforms.names
        if self._scope.platforms is not None:
            platforms = tuple(name for name in self._scope.platforms if name in platforms)
        named = None if self._named is None else self._named.task_ids
        excluded = self._scope.excluded | self._unreadable.task_ids
        return Scope(platforms, self._scope.batch, named, excluded)

    @property
    def running(self) -> tuple[str, ...]:
        """The tasks whose attempts run here now."""
        return tuple(dict.fromkeys(self._running.values()))

    @property
    def stopping(self) -> bool:
        """Whether it was asked to begin nothing new, since `run` was called last."""
        return self._run.stopping

    @property
    def named(self) -> Container[str]:
        """The tasks that the scope names, where it does; see `scope`."""
        return self._named or ()

    def add_to_scope(self, task_id: str) -> None:
        """Run this task too, until it has ended, where the scope names tasks."""
        if self._named is not None and self._named.add(task_id):
            self.wake()

    def wake(self) -> None:
        """Look for due tasks now."""
        self._pace.expect_work()
        self._wake.set()

    def _hear_of_work(self) -> None:
        self._pace.hear_with_all()
        self._wake.set()

    def stop_claiming(self) -> None:
        """Begin nothing new; what runs may finish."""
        self._run.stopping = True
        self._wake.set()

    def stop_when_done(self) -> None:
        """End as soon as nothing in the scope is pending or running, in any process."""
        self._run.until_done = True
        self._wake.set()

    def run(self, *, until_done: bool = False) -> Coroutine[Any, Any, None]:
        """Run tasks until `stop_claiming`, and then until what runs has ended.

        What it was asked before this was called, as to stop, it was asked for an earlier time.

        Args:
            until_done: As `stop_when_done`, from the beginning.

        Raises:
            PerdureError: It is running already.
            TasksUnreadable: It was to end when all is done, and all is, but for some tasks that
                this perdure can't read.
            StoreError: The database can't do its part any more.
        """
        if self._going:
            raise PerdureError("the worker is running already: wait for that, or open an engine")
        self._run = _Run(until_done=until_done, in_progress=self._run.in_progress)
        return self._run_through(self._run)

    async def _run_through(self, run: _Run) -> None:
        self._going = True
        try:
            await self._run_to_its_end(run)
        finally:
            self._going = False

    async def _run_to_its_end(self, run: _Run) -> None:
        if run.in_progress:
            await self._start_over()
        run.in_progress = True
        await self._presence.register()
        self._log.on_work(self._hear_of_work)
        await self._presence.recover_lost()
        beating = asyncio.create_task(self._beat())
        try:
            try:
                await self._claim_until_stopped(run)
            except Exception as error:  # noqa: BLE001 - raised below
                self._fail("the worker failed", error)
            if self._running:  # which needs signs of life, whatever happened
                await asyncio.wait(set(self._running))
        finally:
            beating.cancel()
            await asyncio.wait({beating})
        if run.failure is not None:
            raise run.failure
        run.in_progress = False

    async def _claim_until_stopped(self, run: _Run) -> None:
        """Begin what is due, again and again."""
        while not run.stopping and run.failure is None:
            self._wake.clear()
            try:
                began = await self._begin_due()
                idle = not began and not self._running
                if idle and run.until_done and await self._nothing_left():
                    await self._check_all_were_read()
                    return
                if not (began and self._pace.maybe_due) or not self._has_room:
                    await self._sleep()
            except DatabaseUnavailable:
                if not self._running:
                    raise
                # What runs goes on anyway, and by its end the database may be back.
                await self._woken(self.settings.poll_seconds)

    async def _start_over(self) -> None:
        """Take another name: what was running under the old one is lost, to be recovered."""
        if self._running:
            await asyncio.wait(set(self._running))
        await self._presence.take_new_name()

    async def cancel_running(self, why: Stop = Stop.HAND_BACK) -> None:
        """Stop what runs here: hand it back to be run later, or write it down as cancelled."""
        self.stop_claiming()
        self._run.stop = why
        for attempt in tuple(self._attempts):
            attempt.stop(why)
        async with self._claiming:  # what is being claimed is known after that
            pass
        running = set(self._running)
        if running:
            await asyncio.wait(running)

    async def close(self) -> None:
        """Hand back what runs, and sign off."""
        await self.cancel_running()
        await self._checker.close()
        await self._presence.sign_off()

    # -- claiming --------------------------------------------------------------------------------

    async def _begin_due(self) -> int:
        async with self._claiming:
            return await self._claim_due()

    async def _claim_due(self) -> int:
        free = self.settings.concurrency - len(self._running)
        if free <= 0:
            return 0
        if self._named is not None:
            await self._named.forget_ended(self._database)
        scope = self.scope
        looked_first = not self._pace.maybe_due
        began = asyncio.get_running_loop().time()
        if looked_first:
            await self._look()
            if not self._pace.is_due(self._database.now):
                return 0
        if self._run.stopping:
            return 0
        self._pace.begin_claim()
        models = self._platforms.default_models()
        try:
            claimed, head = await self._log.write_last(
                lambda tx: claims.claim(
                    *(tx, self.worker_id, free, scope, models),
                    unreadable=self._unreadable,
                    lease=self._presence.lease,
                )
            )
        except DatabaseUnavailable as error:
            # Whether something was claimed isn't known: it would be ours, with nobody at it.
            self._fail("claiming failed", error)
            return 0
        if not self._unreadable.task_ids <= scope.excluded:
            self.wake()  # they may have taken the place of others that are due
        self._pace.end_claim(
            looked_first=looked_first,
            claimed=len(claimed),
            free=free,
            seconds=asyncio.get_running_loop().time() - began,
        )
        if claimed:
            self._presence.note_claim()
        for one in claimed:
            running = asyncio.create_task(self._carry_out(one, head))
            self._running[running] = one.task_id
            running.add_done_callback(self._ended)
        return len(claimed)

    def _ended(self, running: asyncio.Task[None]) -> None:
        task_id = self._running.pop(running)
        if self._named is not None:
            self._named.note_change(task_id)
        self._wake.set()
        if running.cancelled():
            return
        error = running.exception()
        if isinstance(error, DatabaseIncompatible):  # a newer perdure wrote to it meanwhile
            self._unreadable.note(task_id, error)
        elif error is not None:
            self._fail(f"{task_id} could not be run", error)

    def _fail(self, what: str, error: BaseException) -> None:
        """End the worker by an error, as soon as what runs has ended; the first one counts."""
        if not isinstance(error, PerdureError):
            _logger.error("%s", what, exc_info=error)
            error = StoreError(f"{what}: {type(error).__name__}: {error}")
        self._run.failure = self._run.failure or error
        self._wake.set()

    @property
    def _hears_of_all(self) -> bool:
        """Whether this worker is told of everything that it waits for."""
        return self._log.hears and not self._run.until_done  # nobody tells of the last task's end

    @property
    def _idle(self) -> bool:
        """Whether it has nothing to lose, and need not look for work but when it shows itself."""
        return self._hears_of_all and not self._running

    @property
    def _has_room(self) -> bool:
        """Whether another attempt could begin."""
        return len(self._running) < self.settings.concurrency

    def _patience(self) -> float | None:
        """Return after how many seconds to look for work again; None where heartbeats do that."""
        return self._pace.patience(
            self._database.now,
            room=self._has_room,
            running=bool(self._running),
            hears=self._hears_of_all,
        )

    async def _sleep(self) -> None:
        """Wait for news: something was submitted or has ended here, or others may have done so."""
        if self._has_room and not self._pace.has_looked:
            # What was just claimed is served first; news within that time make it look anyway.
            if not await self._woken(CALM_SECONDS):
                await self._look()
                await self._woken(self._patience())
        else:
            await self._woken(self._patience())
        self._pace.forget_look()
        if turn := self._pace.turn_after_news():  # not all at once: the later ones find it taken
            await asyncio.sleep(turn)

    async def _woken(self, wait: float | None) -> bool:
        """Wait for so many seconds; returns whether there was news before they were over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                return await self._wake.wait()
        return False

    async def _look(self) -> None:
        """See when the next task that waits is due."""
        due = await claims.next_due(self._database, self.scope)
        self._pace.note_look(due, self._database.now)

    async def _nothing_left(self) -> bool:
        return await claims.unfinished(self._database, self.scope) == 0

    async def _check_all_were_read(self) -> None:
        """Raise the error for tasks of the scope that are left since they can't be read."""
        unreadable = self._unreadable.task_ids
        if unreadable:
            scope = self.scope
            named = unreadable if scope.task_ids is None else unreadable & scope.task_ids
            left = replace(scope, task_ids=named, excluded=self._scope.excluded)
            if ids := await claims.unfinished_ids(self._database, left):
                raise TasksUnreadable(ids, self._unreadable[ids[0]])

    # -- running ---------------------------------------------------------------------------------

    async def _carry_out(self, claimed: Claimed, head: int) -> None:
        try:
            adapter = self._platforms.get(claimed.state.platform)
            call = await make_call(self._database, claimed)
        except PlatformError as error:
            await self._fail_unstarted(claimed, error)
            return
        attempt = Attempt(
            self._log,
            adapter,
            call,
            claimed,
            since=head,
            retry=self.settings.retry,
            timing=self.settings.timing,
            checker=self._checker,
        )
        self._attempts.add(attempt)
        if self._run.stop is not None:  # asked for while the task was being put together
            attempt.stop(self._run.stop)
        try:
            await attempt.run()
        except asyncio.CancelledError:  # not by us, who ask attempts to end: else it ran for ever
            await self._recover(claimed)
            raise
        finally:
            self._attempts.discard(attempt)

    async def _fail_unstarted(self, claimed: Claimed, error: PlatformError) -> None:
        """Write down that the platform couldn't even be asked."""
        event = after_failure(
            claimed.state,
            admit_error(error),
            max_attempts=1,
            policy=self.settings.retry,
            now=self._database.now,
            chance=lambda: 0.0,
            spent=Spent(),
            output_length=claimed.state.length(),
        )
        try:
            await self._log.append(claimed.task_id, (event,), claimed.state.version)
        except ConcurrencyError:
            # Someone asked for its cancellation meanwhile; whoever recovers it sees to that.
            await self._recover(claimed)

    async def _recover(self, claimed: Claimed) -> None:
        """Take over what this worker itself has given up."""
        decide = partial(after_interruption, policy=self.settings.retry)
        left = await self._log.write(lambda tx: claims.recover_one(tx, claimed, decide))
        if left is not None:
            await self._platforms.stop(*left)

    # -- being present ---------------------------------------------------------------------------

    async def recover_lost(self) -> int:
        """Take over what lost workers had; returns how many tasks that were."""
        taken = await self._presence.recover_lost()
        await self._presence.calls_stopped()
        return taken

    async def _beat(self) -> None:
        """Show that this worker is alive, and look for others that aren't."""
        while True:
            await self._presence.until_due(lambda: self._idle)
            try:
                # What is there to be claimed as well: a notification can get lost, or who listens.
                news = await self._presence.show(None if self._running else self.scope)
            except Exception as error:  # noqa: BLE001 - `run` raises it
                # The database may be back before what runs has ended. What others have taken over
                # by then, for want of a sign of life, finds that out by itself.
                if not (self._running and isinstance(error, DatabaseUnavailable)):
                    self._fail("the worker could not show that it is alive", error)
                continue
            if news.taken_over:
                self.wake()
            elif news.due:
                self._wake.set()
