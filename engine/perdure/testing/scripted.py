"""A platform that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, TypeAlias, Union

from perdure.adapter import Call, Capabilities
from perdure.events import Chunk, Completed, Event

__all__ = ["Hold", "ScriptedAdapter", "Step"]


class Hold:
    """A point in a script where the platform waits until it is released.

    Attributes:
        reached: Set once a call waits here.
    """

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let all calls go on, those that come later too."""
        self._released.set()

    async def wait(self) -> None:
        """Wait for the release."""
        self.reached.set()
        await self._released.wait()


Step: TypeAlias = Union[  # noqa: UP007 - an alias is read at run time too
    str, float, Event, BaseException, asyncio.Event, Hold, Callable[[Call], Any]
]
"""One thing a script does.

Text is a chunk, a number a wait in seconds, an event is yielded, an exception raised, an
`asyncio.Event` or a `Hold` waited for; a function is called with the `Call`, and awaited if it
returns something to await.
"""


class ScriptedAdapter:
    """A platform that does exactly what it is told, for tests of engines.

    The script is played as it is: without a `Completed` in it the stream just stops.

    Args:
        script: The steps of every call; a function from the `Call` to its steps where calls
            differ. Without any: a short greeting.
        platform: The platform's name.
        capabilities: What it says it can do.
        prices: The provider's name in the price table.

    Attributes:
        calls: Every call, in order.
        running: Calls under way.
        most_running: The most there were at once.
        finished: Ids of the tasks whose script was played to its end.
        cancelled: Ids of the tasks whose call was cancelled or closed on the way.
        stopped: Response ids that `stop` was called with.
        closed: How often `close` was called.
    """

    def __init__(
        self,
        *script: Step,
        per_call: Callable[[Call], Iterable[Step]] | None = None,
        platform: str = "scripted",
        capabilities: Capabilities | None = None,
        default_model: str | None = None,
        prices: str | None = None,
    ) -> None:
        self.platform = platform
        self.capabilities = capabilities or Capabilities(reattach=True, usage_on_the_way=True)
        self.default_model = default_model
        self.prices = prices
        self.calls: list[Call] = []
        self.running = 0
        self.most_running = 0
        self.finished: list[str] = []
        self.cancelled: list[str] = []
        self.stopped: list[str] = []
        self.closed = 0
        self._script = script or ("Hello, ", "world.", Completed())
        self._per_call = per_call

    def __repr__(self) -> str:
        """Return its name and how often it was called."""
        return f"{type(self).__name__}(platform={self.platform!r}, calls={len(self.calls)})"

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Play the script."""
        self.calls.append(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        cut = True
        try:
            for step in self._script if self._per_call is None else self._per_call(call):
                match step:
                    case Event():
                        cut = not isinstance(step, Completed)  # who reads stops there
                        yield step
                    case str():
                        yield Chunk(text=step)
                    case _:
                        await _play(step, call)
            cut = False
        except Exception:
            cut = False
            raise
        finally:
            self.running -= 1
            (self.cancelled if cut else self.finished).append(call.task_id)

    async def stop(self, response_id: str) -> None:
        """Remember that the response was stopped."""
        self.stopped.append(response_id)

    async def close(self) -> None:
        """Remember that it was closed."""
        self.closed += 1


async def _play(
    step: float | BaseException | asyncio.Event | Hold | Callable[[Call], Any], call: Call
) -> None:
    match step:
        case int() | float():
            await asyncio.sleep(step)
        case BaseException():
            raise step
        case asyncio.Event() | Hold():
            await step.wait()
        case _:
            result = step(call)
            if asyncio.iscoroutine(result) or asyncio.isfuture(result):
                await result
