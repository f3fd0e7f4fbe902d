"""procrastinate: jobs deferred one by one, run by a worker in the same process, on PostgreSQL.

It keeps no results, so a client is told by its job, in memory, that it ran.
"""

from __future__ import annotations

import asyncio

from procrastinate import App, PsycopgConnector
from work import Work, answer, arguments, clients, postgres

ENDED: dict[int, asyncio.Event] = {}


async def main(work: Work, url: str) -> None:
    """Warm up, then measure."""
    app = App(connector=PsycopgConnector(conninfo=url, min_size=4, max_size=20))

    @app.task(name="task")
    async def task(number: int) -> str:
        ENDED[number].set()
        return f"Sales rose by {number} per cent."

    async def one(number: int) -> None:
        ended = ENDED[number] = asyncio.Event()
        await task.defer_async(number=number)
        await ended.wait()

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        worker = asyncio.create_task(
            app.run_worker_async(concurrency=work.at_once, install_signal_handlers=False, wait=True)
        )
        await one(-1)
        answer(await clients(work, one))
        worker.cancel()
        await asyncio.wait({worker})


if __name__ == "__main__":
    given = arguments()
    asyncio.run(main(given, postgres(given.folder)))
