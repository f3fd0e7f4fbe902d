"""Kill -9 while Claude answers, which can't be picked up: paid for as often as the log says."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest
from harness import Nursery, assert_sound, count_events, query, stored_events, wait_until
from scenes import SERVED

from perdure import Engine, Task, TaskConstraints
from servers.messages import MessagesServer

pytestmark = pytest.mark.kill

TASKS = 12
KILLS = 6


def text_for(number: int) -> str:
    """Return what the platform says to a task."""
    return " ".join(f"{number}-{word}" for word in range(40)) + " ☃ end."


async def submit(db: Path, url: str) -> dict[str, int]:
    """Submit the tasks without running them; returns their ids and numbers."""
    async with Engine.open(db, adapters=[SERVED["claude"](url)], run=False) as engine:
        return {
            await engine.submit_task(
                Task(
                    prompt=f"task {n}",
                    platform="claude",
                    options={"scenario": {"text": text_for(n), "delay": 0.01}},
                    constraints=TaskConstraints(max_tokens=1000),
                )
            ): n
            for n in range(TASKS)
        }


def test_killed_at_random_moments(db: Path, nursery: Nursery, chance: random.Random) -> None:
    """Every generation is an attempt in the log, and of a lost one the outcome is unknown."""
    with MessagesServer() as server:
        tasks = asyncio.run(submit(db, server.url))
        for _ in range(KILLS):
            begun = count_events(db, "chunk")
            child = nursery.start("run_on", db=db, platform="claude", url=server.url)
            wait_until(lambda b=begun: count_events(db, "chunk") > b, what="no work was begun")
            time.sleep(chance.uniform(0, 0.4))  # the moment is the point
            child.kill()
            if count_events(db, "completed") == TASKS:
                break
        last = nursery.start("run_on", db=db, platform="claude", url=server.url, concurrency=TASKS)
        assert last.wait() == 0, last.said()
        generations = server.generations
    assert_sound(db)
    for task_id, number in tasks.items():
        assert query(db, "SELECT status, output FROM tasks WHERE task_id = ?", task_id) == [
            ("completed", text_for(number))
        ]
        kinds = [kind for kind, _ in stored_events(db, task_id)]
        assert kinds.count("completed") == 1
    lost = query(db, "SELECT data ->> 'outcome' FROM events WHERE type = 'interrupted'")
    assert {outcome for (outcome,) in lost} == {"unknown"}
    # One that died between asking and hearing the answer's name is in the log as begun.
    assert count_events(db, "accepted") <= generations <= count_events(db, "running")
    print(f"{len(lost)} attempts were lost; {generations} generations")
