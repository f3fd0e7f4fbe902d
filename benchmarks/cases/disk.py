"""What the file is larger than what was put into it.

A short task's payload is the JSON of its events. A long output's payload is its text, which is kept
twice: in its chunks, and in its task's row, where people query it. How large those chunks are is up
to the engine, which gathers what a platform writes in a while; so a slow platform makes small ones.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.measuring import Row, Sample, Target
from benchmarks.session import Session
from perdure import Engine, Task, Timing, WorkerSettings
from perdure.adapter import Call, Capabilities
from perdure.events import Chunk, Completed, Event

_WORD: Final = "word "  # about a token
_WORDS_A_SECOND: Final = 80.0
_USUAL: Final = Timing()
_COARSE: Final = Timing(chunk_interval=0.3)
_TARGET: Final = Target("at most", 2.2)


def measure(session: Session) -> Sequence[Row]:
    """Measure bytes; one round, for they hardly vary."""
    events = session.size(100_000, 1000)
    path = session.log(events)
    payload = _query(path, "SELECT sum(length(CAST(data AS BLOB))) FROM events")
    empty = _size(session.database())
    beyond = (_size(path) - empty - payload) / _query(path, "SELECT count(*) FROM events")
    tasks, words = session.size(20, 2), session.size(8000, 40)
    at_once = _LongAnswers(session.database(), tasks, words)
    as_models = _LongAnswers(session.database(), tasks, words, _WORDS_A_SECOND)
    coarse = _LongAnswers(session.database(), tasks, words, _WORDS_A_SECOND, _COARSE)
    session.say(f"  writing {words:,} words at {_WORDS_A_SECOND:g} a second ...")
    asyncio.run(_write(at_once))
    asyncio.run(_write(as_models, coarse))
    return [
        Row(
            "beyond the payload of an event",
            Sample("perdure", "bytes", (beyond,)),
            relation="value",
            target=Target("at most", 250.0, "bytes"),
            note="everything in the file: events, streams, rows of `tasks`, indexes",
        ),
        at_once.row("long outputs at full speed", empty, _TARGET),
        as_models.row("long outputs at 80 tokens a second", empty, _TARGET),
        coarse.row("the same, with `chunk_interval` at 0.3 seconds", empty),
    ]


async def _write(*answers: _LongAnswers) -> None:
    await asyncio.gather(*(each.write() for each in answers))


class _LongAnswers:
    """Tasks that are all answered at length, at the same time.

    It is the platform that answers them, too.

    Args:
        path: The database.
        tasks: How many.
        words: How many each answer has.
        pace: Words a second; None for as fast as it goes.
        timing: How attempts are paced.
    """

    platform = "bench"
    capabilities = Capabilities()
    default_model = None
    prices = None

    def __init__(
        self, path: Path, tasks: int, words: int, pace: float | None = None, timing: Timing = _USUAL
    ) -> None:
        self._path = path
        self._tasks = tasks
        self._words = words
        self._pause = 1 / pace if pace is not None else None
        self._timing = timing

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer at length."""
        due = time.monotonic()
        for _ in range(self._words):
            if self._pause is not None:
                due += self._pause
                await asyncio.sleep(due - time.monotonic())
            yield Chunk(text=_WORD)
        yield Completed(finish_reason="stop")

    async def stop(self, response_id: str) -> None:
        """Do nothing: there is nothing to stop."""

    async def close(self) -> None:
        """Do nothing: nothing is held."""

    async def write(self) -> None:
        """Have all tasks answered."""
        settings = WorkerSettings(concurrency=self._tasks, timing=self._timing)
        async with Engine.open(self._path, adapters=[self], settings=settings) as engine:

            async def one(number: int) -> None:
                task = Task(prompt=f"Question {number}", platform="bench")
                result = await engine.get_result(await engine.submit_task(task))
                assert result.output == _WORD * self._words

            await asyncio.gather(*(one(number) for number in range(self._tasks)))

    def row(self, what: str, empty: int, target: Target | None = None) -> Row:
        """Return how large the file is, but for what an empty one has, against the text."""
        text = _query(self._path, "SELECT sum(length(output)) FROM tasks")
        chunks = _query(self._path, "SELECT count(*) FROM events WHERE type = 'chunk'")
        return Row(
            what,
            Sample("file", "bytes", (float(_size(self._path) - empty),)),
            Sample("text", "bytes", (float(text),)),
            target=target,
            note=f"in chunks of {text / chunks:,.0f} characters",
        )


def _size(path: Path) -> int:
    assert not path.with_name(path.name + "-wal").exists()
    return path.stat().st_size


def _query(path: Path, statement: str) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute(statement).fetchone()[0])
    finally:
        connection.close()
