"""DBOS: workflows with one step, and writes on streams, as in its programming guide."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from dbos import DBOS
from work import answer, arguments, clients, postgres

WORK = arguments()


@DBOS.step()
async def step(number: int) -> str:
    """Do what a step does."""
    return f"Sales rose by {number} per cent."


@DBOS.workflow()
async def task(number: int) -> str:
    """Run one step."""
    return await step(number)


@DBOS.workflow()
async def writer(number: int) -> None:
    """Write on a stream, one value after the other."""
    for index in range(WORK.count // WORK.at_once):
        await DBOS.write_stream_async("words", f"and so the third quarter {number} {index}")


async def run_task(number: int) -> None:
    """Start a workflow and await its result."""
    handle = await DBOS.start_workflow_async(task, number)
    await handle.get_result()


async def run_writer(number: int) -> None:
    """Start a workflow that writes, and await its end."""
    handle = await DBOS.start_workflow_async(writer, number)
    await handle.get_result()


async def main() -> None:
    """Warm up, then measure."""
    await run_task(0)
    if WORK.name == "tasks":
        answer(await clients(WORK, run_task))
    else:
        streams = replace(WORK, count=WORK.at_once)
        rate = await clients(streams, run_writer)
        answer(rate * (WORK.count // WORK.at_once))


if __name__ == "__main__":
    url = f"sqlite:///{WORK.folder}/dbos.sqlite"
    if WORK.options:
        url = postgres(WORK.folder)
    DBOS(config={"name": "bench", "system_database_url": url, "log_level": "ERROR"})
    DBOS.launch()
    asyncio.run(main())
    DBOS.destroy()
