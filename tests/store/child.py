"""What tests of several processes run in the other ones: `python child.py WHAT URL …`.

Each prints `ready`, waits for a line on its standard input, does its part, and prints what came of
it as JSON.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from perdure.errors import PerdureError
from perdure.events import Chunk, Completed
from perdure.store.database import Database
from perdure.store.verification import verify
from store.backends import opened, running, submitted


def _ready() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


async def produce(url: str, name: str, producers: str, chunks: str) -> Any:
    """Run many streams at once, each from its beginning to its end."""

    async def one(number: int) -> None:
        task_id = f"{name}_{number}"
        version = await store.log.append(task_id, [submitted(), running()], 0)
        for offset in range(int(chunks)):
            version = await store.log.append(task_id, [Chunk(text="x", offset=offset)], version)
        await store.log.append(task_id, [Completed(output_length=int(chunks))], version)

    async with opened(url) as store:
        _ready()
        await asyncio.gather(*(one(number) for number in range(int(producers))))
    return "done"


async def append_chunks(url: str, task_id: str, count: str) -> Any:
    """Append chunks to a running task, whoever else does so too, and say at which versions."""
    versions: list[int] = []

    def more(tx: Any) -> int:
        offset = tx.fold(task_id).state.length()
        version: int = tx.append(task_id, [Chunk(text="x", offset=offset)], None)
        return version

    async with opened(url) as store:
        _ready()
        for _ in range(int(count)):
            versions.append(await store.log.write(more))  # noqa: PERF401 - one after another
    return versions


async def end(url: str, task_id: str) -> Any:
    """End a running task."""
    async with opened(url) as store:
        _ready()

        def finish(tx: Any) -> int:
            length = tx.fold(task_id).state.length()
            version: int = tx.append(task_id, [Completed(output_length=length)], None)
            return version

        return await store.log.write(finish)


async def fill_disk(url: str) -> Any:
    """Write until files may not grow any more, then, when they may again, write on."""
    acknowledged: list[str] = []
    async with opened(url) as store:
        _ready()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        size = store.database.path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300_000, limits[1]))
        errors: list[str] = []
        for number in range(200):
            task_id = f"task_{number}"
            try:
                await store.log.append(task_id, [submitted(prompt="x" * 10_000)], 0)
            except PerdureError as error:
                errors.append(f"{type(error).__name__}: {error}")
                if len(errors) == 3:
                    break
            else:
                acknowledged.append(task_id)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        await store.log.append("afterwards", [submitted()], 0)
        acknowledged.append("afterwards")
    with Database(url).snapshot() as connection:
        problems = verify(connection).problems
    return {"acknowledged": acknowledged, "errors": errors, "problems": problems}


async def prepare(url: str) -> Any:
    """Create the database, or find it there."""
    _ready()
    await asyncio.to_thread(Database(url).prepare)
    async with opened(url) as store:
        return await store.submit(f"task_{sys.argv[3]}")


def main() -> None:
    """Do what is asked for."""
    what = {f.__name__: f for f in (produce, append_chunks, end, fill_disk, prepare)}[sys.argv[1]]
    arguments = sys.argv[2:] if what is not prepare else sys.argv[2:3]
    print(json.dumps(asyncio.run(what(*arguments))), flush=True)  # type: ignore[operator]


if __name__ == "__main__":
    main()
