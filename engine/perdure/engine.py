"""The engine: where everything is put together, and the face people use."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from perdure.adapter import Adapter
from perdure.background import Background
from perdure.cancellation import cancel
from perdure.config import load_config
from perdure.conversation import go_on
from perdure.errors import (
    EngineClosed,
    InvalidConfig,
    InvalidTask,
    PerdureError,
    TaskArchived,
    TaskNotFound,
)
from perdure.events import Archived, Chunk, RecordedEvent, Running
from perdure.ids import retry_key
from perdure.platforms import Platforms, check_adapters
from perdure.results import make_result
from perdure.settings import WorkerSettings
from perdure.stopping import Stop
from perdure.store.archive import ArchiveReport, Stages, archive
from perdure.store.begun import Ended
from perdure.store.claims import Scope
from perdure.store.database import Database
from perdure.store.log import EventLog
from perdure.store.readonly import default_database
from perdure.store.records import (
    Records,
    TaskFilter,
    TaskRecord,
    find_tasks,
    read_events,
)
from perdure.store.redaction import redact
from perdure.streaming import TextChunk
from perdure.submission import Prepared, Submission, check_is_task, prepare, submit
from perdure.task import Result, Task, TaskStatus
from perdure.text import clean_text, is_storable
from perdure.worker import Worker

__all__ = ["Engine", "default_database", "whoami"]


def whoami() -> str:
    """Return who acts, for the log: `user@host`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid()) if hasattr(os, "getuid") else "unknown"
    return f"{user}@{socket.gethostname()}"


class Engine:
    """Runs tasks, and answers for what became of them.

    Use it as an asynchronous context manager::

        async with Engine.open("sqlite:///perdure.db") as engine:
            task_id = await engine.submit_task(Task(prompt="…", platform="demo"))
            async for text in engine.stream_result(task_id):
                print(text, end="")

    Everything is in the database: another process, or this one after a crash, goes on where this
    one stopped.
    """

    def __init__(
        self,
        database: Database,
        platforms: Platforms,
        *,
        run: bool = True,
        create: bool = True,
        scope: Scope | None = None,
        settings: WorkerSettings | None = None,
        default_platform: str | None = None,
    ) -> None:
        self.database = database
        self.platforms = platforms
        self.log = EventLog(database)
        self.worker = Worker(database, self.log, platforms, scope=scope, settings=settings)
        self._records = Records(database)
        self._background = Background(self.worker, self.log.feed)
        self._run = run
        self._create = create
        self._default_platform = default_platform
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    def open(
        cls,
        url: str | os.PathLike[str] | None = None,
        *,
        adapters: Sequence[Adapter] | None = None,
        run: bool = True,
        create: bool = True,
        scope: Scope | None = None,
        settings: WorkerSettings | None = None,
        default_platform: str | None = None,
    ) -> Engine:
        """Return an engine on a database, to be entered with ``async with``.

        Args:
            url: A file's path or `sqlite:///FILE`; default: `PERDURE_DB`, or what `perdure.toml`
                says, or one per user.
            adapters: Exactly these platforms; None takes the ones that are installed, with the
                settings of `perdure.toml`.
            run: Run tasks in the background. Without it tasks are only submitted, read, cancelled.
            create: Create the database when it isn't there.
            scope: Which tasks to run; default: all of the platforms at hand.
            settings: How they are run.
            default_platform: For tasks that name none; default: the only or first of
                ``adapters``, or what `perdure.toml` says.

        Raises:
            InvalidConfig: `perdure.toml` can't be read, or an argument isn't what it should be.
            DatabaseIncompatible: ``url`` names no database that perdure can use.
        """
        _check_is("scope", scope, Scope)
        _check_is("settings", settings, WorkerSettings)
        settings_of: Mapping[str, Mapping[str, Any]] = {}
        if adapters is None:
            config = load_config()
            settings_of = config.platforms
            default_platform = default_platform or config.platform
        else:
            check_adapters(adapters)
            if default_platform is None and adapters:
                default_platform = adapters[0].platform
        engine = cls(
            Database(url if url is not None else default_database()),
            Platforms(adapters, settings_of),
            run=run,
            create=create,
            scope=scope,
            settings=settings,
            default_platform=default_platform,
        )
        for adapter in adapters or ():
            bind = getattr(adapter, "bind", None)
            if bind is not None:
                bind(engine)
        return engine

    async def __aenter__(self) -> Self:
        """Create or migrate the database, start writing and running.

        Raises:
            PerdureError: It was entered before, and leaving it twice would close it too early.
            StoreError: The database can't be used.
        """
        if self._loop is not None:
            raise PerdureError("an engine can be entered only once: open another one")
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.database.prepare, create=self._create)
            await self.log.open()
        except BaseException:  # nobody else would end the writer that may have begun
            await self.close()
            raise
        if self._run:
            self._background.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Hand back what runs, write what is waiting, close everything."""
        await self.close()

    def start_running(self) -> None:
        """Run tasks in the background from now on, until `stop_running`."""
        self._require_open()
        self._background.start()

    async def close(self) -> None:
        """Hand back what runs, write what is waiting, close everything. May be called again.

        It goes on to its end even where its caller is cancelled, as by a limit of time.
        """
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            await self._background.stop()
            await self.worker.close()
            await self.platforms.close()
        finally:  # also where the event loop ends meanwhile
            await self.log.close()
            await self.database.close()

    def _require_open(self) -> None:
        """Raise unless the engine can be used here and now.

        Raises:
            EngineClosed: It wasn't entered yet, or was closed.
            PerdureError: It was entered in another event loop.
        """
        if self._closing is not None:
            raise EngineClosed("the engine was closed: open another one")
        if self._loop is None:
            raise EngineClosed("the engine wasn't entered yet: use it by `async with`")
        if self._loop is not asyncio.get_running_loop():
            raise PerdureError(
                "the engine was entered in another event loop: open one here, or hand the call "
                "over by asyncio.run_coroutine_threadsafe"
            )

    # -- the five lifecycle methods --------------------------------------------------------------

    async def submit_task(self, task: Task) -> str:
        """Write a task down to be run and return its id; it is safe from then on.

        A task whose `key` is known already is not written again; its id is returned.

        Raises:
            InvalidTask: The task can't be accepted; the message says why.
            UnknownPlatform: It names a platform that isn't installed.
        """
        (outcome,) = await self.submit_tasks((task,))
        if isinstance(outcome, PerdureError):
            raise outcome
        return outcome.task_id

    async def submit_tasks(self, tasks: Iterable[Task]) -> list[Submission | PerdureError]:
        """Write many tasks down in one transaction; returns one outcome each, in order.

        A task that can't be accepted doesn't stop the others: its outcome is the error.
        """
        self._require_open()
        self._background.revive()
        outcomes: list[Submission | PerdureError | None] = []
        ready: list[Prepared] = []
        for given in tasks:
            task = given
            try:
                check_is_task(task)
                # One that is run again was given its conversation the first time.
                if task.continue_from is not None and task.retry_of is None:
                    task = await self._continued(task, task.continue_from)
                # Only files make it slow; a thread for every task would cost more than it saves.
                make = (
                    prepare(task, self.platforms, self._default_platform)
                    if not task.files
                    else (
                        await asyncio.to_thread(
                            prepare, task, self.platforms, self._default_platform
                        )
                    )
                )
            except PerdureError as error:
                outcomes.append(error)
            else:
                ready.append(make)
                outcomes.append(None)
        if ready:
            self.worker.wake()  # so that what is due at once is claimed in the same transaction
        written = iter(await self.log.write(lambda tx: submit(tx, ready)) if ready else ())
        done = [next(written) if outcome is None else outcome for outcome in outcomes]
        for outcome in done:
            if isinstance(outcome, Submission) and outcome.new:
                self.worker.add_to_scope(outcome.task_id)
                if not self.log.feed.has_begun(outcome.task_id):
                    self.worker.wake()
        return done

    async def _continued(self, task: Task, earlier: str) -> Task:
        try:
            before = await self.get_task(earlier)
            asked, platforms = await self._records.asked(earlier)
            return go_on(task, before, asked, platforms[0])
        except TaskNotFound:
            raise InvalidTask(f"continue_from: there is no task {earlier!r}") from None

    async def get_status(self, task_id: str) -> TaskStatus:
        """Return where a task stands; `TaskStatus.UNKNOWN` where there is no such task."""
        self._require_open()
        return await self._records.status(task_id)

    async def get_result(self, task_id: str, timeout: float | None = None) -> Result:
        """Wait for the end of a task and return what came out of it.

        Args:
            task_id: The task.
            timeout: Seconds to wait at most; None waits without limit.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: Its content is in an archive.
            TimeoutError: It hasn't ended in that time.
        """
        self._require_open()
        _check_can_be(task_id)
        self._background.revive()
        at_hand: Ended | None = None
        ending = self.log.feed.ending(task_id)
        try:
            if self.log.feed.knows_open(task_id):
                status = TaskStatus.PENDING  # or running by now: not over in any case
            else:
                status = await self._records.status(task_id)
            if status is TaskStatus.UNKNOWN:
                raise TaskNotFound(task_id)
            if not status.ended:
                at_hand = await ending.wait(timeout)
        finally:
            ending.stop()
        if at_hand is not None:  # all that there is to know has just passed by here
            return make_result(*await self._records.of_ended(at_hand))
        return make_result(*await self._records.both(task_id))

    async def stream_result(
        self, task_id: str, from_version: int = 0
    ) -> AsyncGenerator[TextChunk, None]:
        """Yield a task's output as it comes: first what is there, then live, until it ends.

        Any number of readers, in any process, each at its own place. What a reader is shown is in
        the log. Where an attempt was lost and had to begin again, an empty chunk of offset 0 says
        so: what came before is no longer part of the output (see `TextChunk`).

        Args:
            task_id: The task.
            from_version: Go on after this version of the task's stream.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: Its content is in an archive.
        """
        shown = from_version > 0
        async for recorded in self.stream_events(task_id, from_version):
            match recorded.event:
                case Chunk() as chunk if chunk.kind == "text":
                    shown = True
                    yield TextChunk.of(chunk, recorded.version)
                case Running() as running if shown and running.mode == "restart":
                    yield TextChunk("", offset=0, version=recorded.version)
                case _:
                    pass

    async def stream_events(
        self, task_id: str, from_version: int = 0
    ) -> AsyncGenerator[RecordedEvent, None]:
        """Yield a task's events after a version, then live, up to the one that ends it.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: They are in an archive.
        """
        self._require_open()
        _check_can_be(task_id)
        self._background.revive()

        async def has_ended() -> bool:
            status = await self._records.status(task_id)
            if status is TaskStatus.UNKNOWN:
                raise TaskNotFound(task_id)
            return status.ended

        async for recorded in self.log.feed.follow(task_id, from_version, has_ended):
            yield recorded

    async def cancel_task(
        self, task_id: str, reason: str | None = None, *, by: str | None = None
    ) -> bool:
        """Cancel a task, wherever it runs. What it has produced is kept.

        Returns:
            True when the cancellation was written down: a pending task has ended by then, a running
            one ends as soon as its owner sees it, unless the platform finished first. False, and
            nothing is written, when it had ended, was being cancelled already, or doesn't exist.
        """
        self._require_open()
        who, why = _who_and_why(by, reason)
        done = await self.log.write(lambda tx: cancel(tx, task_id, who, why), (task_id,))
        if done.left is not None:
            await self.platforms.stop(*done.left)
        return done.written

    # -- looking things up -----------------------------------------------------------------------

    async def get_task(self, task_id: str) -> TaskRecord:
        """Return a task's row.

        Raises:
            TaskNotFound: There is no such task.
        """
        self._require_open()
        record = await self._records.find(task_id)
        if record is None:
            raise TaskNotFound(task_id)
        return record

    async def list_tasks(
        self, which: TaskFilter | None = None, *, limit: int | None = 100
    ) -> list[TaskRecord]:
        """Return tasks, the newest first."""
        self._require_open()
        return await find_tasks(self.database, which or TaskFilter(), limit=limit)

    async def get_events(self, task_id: str) -> list[RecordedEvent]:
        """Return all of a task's events so far.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: They are in an archive.
        """
        self._require_open()
        _check_can_be(task_id)
        found = await read_events(self.database, task_id)
        if not found:
            raise TaskNotFound(task_id)
        if isinstance(found[-1].event, Archived):
            raise TaskArchived(task_id, found[-1].event.archive, "log")
        return found

    async def get_definition(self, task_id: str) -> Task:
        """Return the task as it was submitted.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: It is in an archive.
        """
        self._require_open()
        return await self._records.task(task_id)

    # -- once more, and no more ------------------------------------------------------------------

    async def retry_task(self, task_id: str) -> Submission:
        """Run an ended task again, as a new task that is linked to it; the old one stays as it is.

        Asking twice gives the same new task: the link is unique.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: Its content is in an archive.
            InvalidTask: It hasn't ended, or its content was redacted.
        """
        record = await self.get_task(task_id)
        if not record.status.ended:
            raise InvalidTask(f"{task_id} is {record.status}: only ended tasks can be run again")
        if record.archived is not None:
            raise TaskArchived(task_id, record.archived)
        if record.prompt is None:
            raise InvalidTask(f"{task_id} was redacted: there is nothing left to run again")
        task, platforms = await self._records.asked(task_id)
        again = task.model_copy(
            update={
                "task_id": None,
                "retry_of": task_id,
                "key": retry_key(task_id),
                "platform": task.platform or platforms[0],
            }
        )
        (outcome,) = await self.submit_tasks((again,))
        if isinstance(outcome, PerdureError):
            raise outcome
        return outcome

    async def redact_task(
        self, task_id: str, reason: str | None = None, *, by: str | None = None
    ) -> int:
        """Remove the content of an ended task for good; returns how many events were changed.

        Raises:
            TaskNotFound: There is no such task.
            TaskArchived: Its content is in an archive, where it has to be redacted.
            InvalidTransition: It hasn't ended.
        """
        self._require_open()
        who, why = _who_and_why(by, reason)
        return await self.log.write(
            lambda tx: redact(tx, task_id, who, why), (task_id,), alone=True
        )

    async def archive_tasks(
        self,
        before: datetime,
        file: str | os.PathLike[str],
        *,
        by: str | None = None,
        stages: Stages | None = None,
    ) -> ArchiveReport:
        """Move the events and the content of old tasks into a file, a database like this one.

        What `tasks` says of them stays: status, usage, cost, batch, key. Others go on working.

        Args:
            before: Tasks that ended before, and that no unfinished task goes on from.
            file: Where; nothing may be there.
            by: Who does it, for the log.
            stages: Is told how far it is.

        Raises:
            PerdureError: There can be no archive at that place, or it has the name of another one.
            StoreError: A database can't do its part; what wasn't moved by then is as it was.
        """
        self._require_open()
        who, _why = _who_and_why(by, None)
        return await archive(self.log, self.database, before, Path(file), by=who, stages=stages)

    async def recover_lost(self) -> int:
        """Take over what lost workers had; returns how many tasks that were.

        Workers do so by themselves, now and then; this doesn't wait for one, and runs nothing.
        """
        self._require_open()
        return await self.worker.recover_lost()

    async def run_until_done(self) -> None:
        """Run the scope's tasks until none is pending or running, in any process.

        An engine that runs tasks in the background goes on with what comes later.

        Raises:
            TasksUnreadable: All is done, but for some tasks that this perdure can't read.
            StoreError: The database can't do its part any more.
        """
        self._require_open()
        await self._background.until_done()

    async def stop_running(self, why: Stop = Stop.HAND_BACK) -> None:
        """Stop what runs here: handed back, or cancelled with its partial output kept.

        Nothing new is begun until `start_running` or `run_until_done`.
        """
        self._require_open()
        await self._background.stop(why)


def _check_is(name: str, given: object, kind: type) -> None:
    if given is not None and not isinstance(given, kind):
        raise InvalidConfig(f"{name}: give a {kind.__name__}, not {given!r:.80}")


def _check_can_be(task_id: str) -> None:
    """Raise `TaskNotFound` for what is in no database, and would spoil what is asked with it."""
    if not is_storable(task_id):
        raise TaskNotFound(task_id)


def _who_and_why(by: str | None, reason: str | None) -> tuple[str, str | None]:
    """Return what goes into the log: nobody's name or reason keeps a task from being cancelled."""
    return clean_text(by or whoami()), None if reason is None else clean_text(reason)
