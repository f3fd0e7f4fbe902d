"""Runs three tasks from Python on the built-in demonstration platform, which needs no key.

python examples/library.py
"""

from __future__ import annotations

import asyncio

from perdure import Engine, Task, TaskConstraints, collect_stream
from perdure_adapters import DemoAdapter


async def main() -> None:
    """Follow one task as it is written, let two run side by side, and look at the results."""
    async with Engine.open("sqlite:///library.db", adapters=[DemoAdapter()]) as engine:
        task_id = await engine.submit_task(
            Task(prompt="What is an event log good for?", platform="demo")
        )
        async for chunk in engine.stream_result(task_id):
            print(chunk, end="", flush=True)
        result = await engine.get_result(task_id)
        print(f"\n-> {result.status}, {result.tokens_used} tokens, cost {result.cost}\n")

        # Tasks that were submitted run whether or not anybody reads them; their text can be read
        # at any time later, from the beginning, in any process.
        both = [
            await engine.submit_task(
                Task(
                    prompt=f"Name three uses of {thing}.",
                    platform="demo",
                    constraints=TaskConstraints(max_tokens=80),
                    labels={"example": "library"},
                )
            )
            for thing in ("a trigger", "a view")
        ]
        texts = await asyncio.gather(*(collect_stream(engine.stream_result(t)) for t in both))
        for task_id, text in zip(both, texts, strict=True):
            print(f"{task_id}: {len(text)} characters, {await engine.get_status(task_id)}")


if __name__ == "__main__":
    asyncio.run(main())
