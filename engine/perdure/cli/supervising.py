"""Running tasks under the user's eyes: until it is done, or until the user has had enough."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from perdure.cli.figures import things
from perdure.cli.interrupts import Interrupts, any_of
from perdure.cli.terminal import complain, say
from perdure.errors import TasksUnreadable

if TYPE_CHECKING:
    from perdure.engine import Engine

__all__ = ["supervise"]


async def supervise(
    engine: Engine,
    interrupts: Interrupts,
    *,
    feeding: Coroutine[Any, Any, None] | None = None,
    until_done: bool = True,
) -> bool:
    """Run the tasks of the engine's scope; returns whether all that was to be fed in was.

    Args:
        engine: Not running anything yet.
        interrupts: What the user asks for meanwhile.
        feeding: Submits tasks while others run already.
        until_done: End as soon as nothing is left; else only when asked to.

    Raises:
        StoreError: The database can't do its part any more.
    """
    # All that is left to do is written down, which a database in trouble may keep waiting.
    interrupts.on_second = engine.log.hurry
    running = asyncio.create_task(engine.worker.run())
    fed = asyncio.create_task(feeding) if feeding is not None else None
    try:
        if fed is not None:
            await any_of(interrupts.first, interrupts.terminated, work=(running, fed))
            if fed.done():
                fed.result()
        if until_done and not interrupts.interrupted:
            engine.worker.stop_when_done()
        await any_of(interrupts.first, interrupts.terminated, work=(running,))
        complete = fed is None or fed.done()
        if interrupts.interrupted:
            engine.worker.stop_claiming()
        await _end(fed)
        if not running.done():
            await _stop(engine, interrupts, running)
        try:
            running.result()
        except TasksUnreadable as error:  # they are counted among what is not done
            complain(str(error))
    finally:
        await _end(fed)
        if not running.done():
            await engine.stop_running()
            await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # asyncio would tell of it what is told already
    return complete


async def _end(fed: asyncio.Task[None] | None) -> None:
    if fed is not None and not fed.done():
        fed.cancel()
        await asyncio.wait({fed})


async def _stop(engine: Engine, interrupts: Interrupts, running: asyncio.Task[None]) -> None:
    """Let what runs end as the user wishes: by itself, cancelled, or handed back."""
    worker = engine.worker
    if not interrupts.terminated.is_set():
        if worker.running:
            say(
                f"Nothing new is begun; {things(len(worker.running), 'task')} may finish. "
                "Ctrl-C again cancels what runs and keeps its partial output."
            )
        await any_of(interrupts.second, interrupts.terminated, work=(running,))
    if interrupts.second.is_set() and not running.done():
        say(f"Cancelling {things(len(worker.running), 'task')}.")
        await asyncio.gather(*(engine.cancel_task(task_id, "Ctrl-C") for task_id in worker.running))
        await any_of(interrupts.terminated, work=(running,))
    if not running.done():
        await engine.stop_running()
        await asyncio.wait({running})
