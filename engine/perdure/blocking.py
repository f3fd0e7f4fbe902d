"""One task from beginning to end, for programs that know no event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress

from perdure.adapter import Adapter
from perdure.engine import Engine
from perdure.errors import RunningLoop
from perdure.store.claims import Scope
from perdure.task import Result, Task

__all__ = ["execute"]


def execute(
    task: Task,
    *,
    url: str | os.PathLike[str] | None = None,
    adapters: Sequence[Adapter] | None = None,
    timeout: float | None = None,
) -> Result:
    """Run one task and wait for its result: the blocking form.

    Args:
        task: What to do.
        url: The database; default: `PERDURE_DB`, or what `perdure.toml` says, or one per user.
        adapters: Exactly these platforms; None takes the ones that are installed.
        timeout: Seconds to wait at most; None waits without limit.

    Raises:
        RunningLoop: Called where an event loop is running; use `Engine` there.
        TimeoutError: The task hasn't ended in that time; it can be resumed.
    """
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        raise RunningLoop("execute() blocks, and an event loop is running here: use Engine instead")

    async def run() -> Result:
        scope = Scope(task_ids=frozenset())
        async with Engine.open(url, adapters=adapters, scope=scope) as engine:
            task_id = await engine.submit_task(task)
            engine.worker.add_to_scope(task_id)
            return await engine.get_result(task_id, timeout)

    return asyncio.run(run())
