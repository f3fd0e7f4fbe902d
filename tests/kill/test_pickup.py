"""Kill -9 while platforms that can be picked up are at work: nothing is paid for twice.

The server runs here and goes on generating while the process that listened is gone; it counts what
it was asked to generate.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from harness import Nursery, assert_sound, count_events, query, stored_events, wait_until
from scenes import SERVED

from perdure import Engine, Task
from servers.responses import ResponsesServer

pytestmark = pytest.mark.kill

TASKS = 24
KILLS = 10


class Server(Protocol):
    """What a scripted server has to have to take part."""

    generations: Counter[str]
    """Prompt -> how often an answer to it was begun."""

    @property
    def url(self) -> str:
        """Where it is."""
        ...


@dataclass(frozen=True)
class Side:
    """A platform with its server; `SERVED` in the scenes makes its adapter.

    Attributes:
        platform: Its name.
        server: Starts the server.
        options: Text -> the task's options with which the server says it, slowly.
    """

    platform: str
    server: Callable[[], AbstractContextManager[Server]]
    options: Callable[[str], dict[str, Any]]


SIDES = [
    Side(
        "chatgpt",
        ResponsesServer,
        lambda text: {"scenario": {"text": text, "reasoning": ["I think so."], "delay": 0.01}},
    ),
]


def text_for(number: int) -> str:
    """Return what the platform says to a task."""
    return " ".join(f"{number}-{word}" for word in range(40)) + " ☃ end."


async def submit(db: Path, side: Side, url: str) -> dict[str, int]:
    """Submit the tasks without running them; returns their ids and numbers."""
    async with Engine.open(db, adapters=[SERVED[side.platform](url)], run=False) as engine:
        return {
            await engine.submit_task(
                Task(prompt=f"task {n}", platform=side.platform, options=side.options(text_for(n)))
            ): n
            for n in range(TASKS)
        }


@pytest.mark.parametrize("side", SIDES, ids=lambda side: side.platform)
def test_killed_at_random_moments(
    side: Side, db: Path, nursery: Nursery, chance: random.Random
) -> None:
    """One generation per task, unless it died before the response's name was in the log.

    Then nothing can be picked up, the log says so (`interrupted` with the outcome unknown), and
    the one more generation is the price of that.
    """
    with side.server() as server:
        tasks = asyncio.run(submit(db, side, server.url))
        for n in range(KILLS):
            # Every third one dies about when it asks, the others while they are told the answer.
            awaited = ("running",) if n % 3 == 2 else ("chunk", "completed")
            begun = sum(count_events(db, kind) for kind in awaited)
            child = nursery.start("run_on", db=db, platform=side.platform, url=server.url)
            wait_until(
                lambda kinds=awaited, b=begun: sum(count_events(db, k) for k in kinds) > b,
                what="no work was begun",
            )
            time.sleep(chance.uniform(0, 0.5))
            child.kill()
            done = count_events(db, "completed")
            print(f"kill {n + 1}: {done} of {TASKS} tasks done")
            if done == TASKS:
                break
        last = nursery.start(
            "run_on", db=db, platform=side.platform, url=server.url, concurrency=TASKS
        )
        assert last.wait() == 0, last.said()
        assert_sound(db)
        outcomes: Counter[str] = Counter()
        for task_id, number in tasks.items():
            ((status, output),) = query(
                db, "SELECT status, output FROM tasks WHERE task_id = ?", task_id
            )
            assert (status, output) == ("completed", text_for(number))
            lost = Counter(
                data["outcome"]
                for kind, data in stored_events(db, task_id)
                if kind == "interrupted"
            )
            generations = server.generations[f"task {number}"]
            assert 1 <= generations <= 1 + lost["unknown"], f"{task_id}: {lost}"
            outcomes += lost
            reasoning = "".join(
                data["text"]
                for kind, data in stored_events(db, task_id)
                if kind == "chunk" and data["kind"] == "reasoning"
            )
            assert lost["unknown"] or reasoning == "I think so."
    print(f"interrupted: {dict(outcomes)}; generations: {server.generations.total()}")
    assert outcomes["reattachable"] > 0, "no kill hit a response that could be picked up"
