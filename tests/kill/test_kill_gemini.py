"""Kill -9 while Gemini answers: the same interaction goes on, and is paid for once."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import PATIENCE, assert_sound, count_events, query, wait_until

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.gemini import TEXT, GeminiServer

pytestmark = pytest.mark.kill

TASKS = 5

# Submits the tasks where they aren't there yet, and runs what is to be run to its end.
_PROGRAM = """
import asyncio, sys
from perdure import Engine, Task
from perdure_adapters import GeminiAdapter

async def main(db, url, count):
    adapter = GeminiAdapter(base_url=url, api_key="k")
    async with Engine.open(db, adapters=[adapter]) as engine:
        options = {"scenario": {"delay": 0.04}}
        tasks = [Task(prompt=f"{n}?", key=f"k{n}", options=options) for n in range(count)]
        await engine.submit_tasks(tasks)
        await engine.run_until_done()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def _started(db: Path, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _PROGRAM, str(db), url, str(TASKS)])


def _wait_until_it_asks(process: subprocess.Popen[bytes], server: GeminiServer) -> None:
    before = len(server.seen)
    wait_until(lambda: len(server.seen) > before or process.poll() is not None)


def test_killed_at_random_moments(db: Path, chance: random.Random) -> None:
    """One generation a task; one more only where it died before it could write its name down."""
    with GeminiServer() as server:
        kills = 0
        for _ in range(30):
            process = _started(db, server.url)
            try:
                if kills < 4:
                    _wait_until_it_asks(process, server)
                    time.sleep(chance.uniform(0, 0.4))  # the moment is the point
                    kills += process.poll() is None
                    process.kill()
                process.wait(PATIENCE)
            finally:
                process.kill()
                process.wait(PATIENCE)
            if process.returncode == 0:
                break
        assert kills >= 1
        assert_sound(db)
        assert count_events(db, "completed") == TASKS
        assert {output for (output,) in query(db, "SELECT output FROM tasks")} == {TEXT}
        restarts = query(
            db,
            "SELECT count(*) FROM events WHERE type = 'interrupted' AND "
            "data ->> 'next' = 'restart'",
        )[0][0]
        named = count_events(db, "accepted")
        assert named == TASKS
        # An attempt that was lost before the name was known may have been begun there, or not.
        assert TASKS <= server.generations <= TASKS + restarts
        assert server.picked_up
