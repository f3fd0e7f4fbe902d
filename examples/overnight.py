"""Asks the same of many texts, and can be killed at any moment: run it again, and it goes on.

python examples/overnight.py
"""

from __future__ import annotations

import asyncio

from perdure import Engine, PerdureError, Recovery, Task, TaskConstraints, TaskFilter, TaskStatus
from perdure_adapters import DemoAdapter

REPORTS = [f"Report {n}: all is well in sector {n}." for n in range(1, 41)]


async def main() -> None:
    """Submit what isn't there yet, run what isn't done yet, and say what came of it."""
    # `demo` needs no key; ClaudeAdapter(), ChatGPTAdapter() and GeminiAdapter() go in its place.
    async with Engine.open("sqlite:///overnight.db", adapters=[DemoAdapter()]) as engine:
        outcomes = await engine.submit_tasks(
            Task(
                prompt=f"Summarize in a sentence: {report}",
                key=f"overnight-{number}",  # what has this key is submitted once, ever
                labels={"job": "overnight"},
                constraints=TaskConstraints(
                    max_attempts=3,  # of each platform, with longer and longer waits
                    timeout_seconds=120,  # of each attempt; what was written by then is kept
                    recovery=Recovery.RESTART,  # after a crash; or CONTINUE, or FAIL
                ),
                options={"words": 30, "delay": 0.02},  # so that there is something to watch
            )
            for number, report in enumerate(REPORTS)
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, PerdureError)]
        known = sum(not isinstance(o, PerdureError) and not o.new for o in outcomes)
        print(f"{len(REPORTS)} tasks, {known} of them known already, {len(refused)} refused")

        await engine.run_until_done()

        done = await engine.list_tasks(TaskFilter(labels={"job": "overnight"}), limit=None)
        completed = sum(record.status is TaskStatus.COMPLETED for record in done)
        print(f"{completed} completed, in {sum(record.attempts for record in done)} attempts")


if __name__ == "__main__":
    asyncio.run(main())
