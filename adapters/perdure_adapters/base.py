"""What all platform adapters share: the abstract bases.

Whoever adds a platform inherits `AsyncBasePlatformAdapter` and writes one method, `run`::

    class EchoAdapter(AsyncBasePlatformAdapter):
        platform = "echo"

        async def run(self, call):
            yield Chunk(text=call.task.question)
            yield Completed()

All else follows from it: tasks are submitted, watched and cancelled through the engine that the
adapter is bound to, so they are in the log whichever way they came.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TypeVar, cast

from perdure.adapter import Call, Capabilities
from perdure.errors import InvalidTask
from perdure.events import Event
from perdure.ids import generate_task_id
from perdure.task import Result, Task, TaskStatus

if TYPE_CHECKING:
    from perdure import Engine

__all__ = ["AsyncBasePlatformAdapter", "BasePlatformAdapter", "Lifecycle"]

T = TypeVar("T")


class Lifecycle(Protocol):
    """The part of an engine that adapters delegate to."""

    async def submit_task(self, task: Task) -> str:
        """Write the task down and return its id."""
        ...

    async def get_status(self, task_id: str) -> TaskStatus:
        """Return where the task stands."""
        ...

    async def get_result(self, task_id: str, timeout: float | None = None) -> Result:
        """Wait for the end and return how the task ended."""
        ...

    def stream_result(self, task_id: str, from_version: int = 0) -> AsyncIterator[str]:
        """Replay the output, then follow it to the end."""
        ...

    async def cancel_task(self, task_id: str, reason: str | None = None) -> bool:
        """Cancel the task; False where it had ended."""
        ...


class BasePlatformAdapter(ABC):
    """The synchronous face of a platform, for callers that block."""

    @abstractmethod
    def execute(self, task: Task) -> Result:
        """Run ``task`` to its end and return how it ended."""


class AsyncBasePlatformAdapter(BasePlatformAdapter):
    """The base of all platform adapters; a `perdure.adapter.Adapter` that knows its engine.

    ``async with adapter:`` releases everything the adapter holds. Used without an engine, the
    first of the lifecycle methods opens one of its own on the default database, and `close`
    closes it.

    Attributes:
        platform: The platform's name: lower-case letters, digits and underscores.
        capabilities: What the platform can do.
        default_model: Used where a task names none; None leaves it to the platform.
        prices: The provider's name in the price table, or None where prices aren't known.
    """

    platform: str
    capabilities: Capabilities = Capabilities()
    default_model: str | None = None
    prices: str | None = None

    __engine: Lifecycle | None = None
    __own: Engine | None = None
    __opening: asyncio.Lock | None = None

    # What the engine asks for.

    @abstractmethod
    def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yield what happens to ``call``, as it happens, by the rules of `perdure.adapter`."""

    def check(self) -> None:
        """Raise `NotConfigured` where this machine lacks something: an SDK, a key, an address.

        `perdure platforms` asks for it. It needs no network and no event loop. Here: nothing is
        ever missing.
        """

    async def stop(self, response_id: str) -> None:
        """Stop a response that goes on without us listening. Here: there is nothing to stop."""

    async def close(self) -> None:
        """Close the adapter's own engine, where it has one. May be called more than once.

        Subclasses that hold connections call this first and then give back theirs. An adapter
        can be used again afterwards.
        """
        # The engine closes its adapters, this one among them: forget it before, not after.
        own, self.__own = self.__own, None
        if own is not None:
            if self.__engine is own:
                self.__engine = None
            await own.close()

    def bind(self, engine: Lifecycle | None) -> None:
        """Make ``engine`` the one that the lifecycle methods use. Engines call this on opening."""
        self.__engine = engine

    # What people ask for.

    async def submit_task(self, task: Task) -> str:
        """Write ``task`` down for this platform and return its id.

        Raises:
            InvalidTask: The task names another platform.
        """
        return await (await self.__bound()).submit_task(self.__for_here(task))

    async def get_status(self, task_id: str) -> TaskStatus:
        """Return where the task stands; `TaskStatus.UNKNOWN` where there is none of that id."""
        return await (await self.__bound()).get_status(task_id)

    async def get_result(self, task_id: str, timeout: float | None = None) -> Result:
        """Wait for the task's end and return how it ended.

        Raises:
            TaskNotFound: There is no such task.
            TimeoutError: It did not end within ``timeout`` seconds; it goes on.
        """
        return await (await self.__bound(task_id)).get_result(task_id, timeout)

    async def stream_result(self, task_id: str, from_version: int = 0) -> AsyncGenerator[str, None]:
        """Yield the task's output: first what is there, then the rest as it comes.

        Args:
            task_id: The task.
            from_version: Leave out what came up to that version of the task's stream.
        """
        stream = (await self.__bound(task_id)).stream_result(task_id, from_version)
        try:
            async for chunk in stream:
                yield chunk
        finally:  # a reader that leaves early must not leave the engine's side open
            if isinstance(stream, AsyncGenerator):
                await cast("AsyncGenerator[str, None]", stream).aclose()

    async def cancel_task(self, task_id: str, reason: str | None = None) -> bool:
        """Cancel the task, its partial output kept; return False where it had ended before."""
        return await (await self.__bound()).cancel_task(task_id, reason)

    def execute(self, task: Task) -> Result:
        """Run ``task`` on this platform and return how it ended; blocks.

        Raises:
            RunningLoop: An event loop is running here; use `submit_task` and `get_result`.
            InvalidTask: The task names another platform.
        """
        from perdure import execute

        # The engine of this one call takes the adapter over, and closes it at the end.
        before = self.__engine, self.__own
        self.__own = None
        try:
            return execute(self.__for_here(task), adapters=[self])
        finally:
            self.__engine, self.__own = before

    async def __aenter__(self) -> Self:
        """Return the adapter; nothing is opened before it is needed."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release everything."""
        await self.close()

    # What subclasses use.

    def _generate_task_id(self) -> str:
        """Return a new id for a task on this platform: `platform_yyyymmdd_uuid8`."""
        return generate_task_id(self.platform)

    async def _wait_with_timeout(self, awaitable: Awaitable[T], timeout: float | None) -> T:
        """Return the result of ``awaitable``, waiting at most ``timeout`` seconds.

        A cancellation from outside passes through; in both cases the inner work is cancelled
        and has ended when this returns.

        Raises:
            TimeoutError: It took longer.
        """
        async with asyncio.timeout(timeout):
            return await awaitable

    async def __bound(self, task_id: str | None = None) -> Lifecycle:
        """Return the engine to delegate to, opening one where there is none.

        The adapter's own engine runs what the adapter is asked about, and nothing else that may
        wait in the same database.
        """
        if self.__engine is None:
            if self.__opening is None:
                self.__opening = asyncio.Lock()
            async with self.__opening:
                if self.__engine is None:
                    self.__own = await self.__open()
                    self.__engine = self.__own
            self.__opening = None  # a lock belongs to one event loop, an adapter does not
        own = self.__own
        if task_id is not None and own is not None and task_id not in own.worker.named:
            status = await own.get_status(task_id)
            if status is not TaskStatus.UNKNOWN and not status.ended:
                own.worker.add_to_scope(task_id)
        return self.__engine

    async def __open(self) -> Engine:
        from perdure import Engine, Scope

        engine = Engine.open(adapters=[self], scope=Scope(task_ids=frozenset()))
        self.__engine = None  # opening bound it, but it can't be used before it was entered
        return await engine.__aenter__()

    def __for_here(self, task: Task) -> Task:
        """Return ``task`` with this platform set."""
        if task.platform is None:
            return task.model_copy(update={"platform": self.platform})
        if task.platform != self.platform:
            raise InvalidTask(
                f"platform: the task is for {task.platform!r}, this adapter is "
                f"{self.platform!r}; submit it to the engine, or leave the platform out"
            )
        return task
