"""One attempt by itself, on a log that fails at the worst moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import FAST, assert_sound, stored_events

from perdure import Accepted, Completed, DatabaseUnavailable, Engine, Task, TaskStatus
from perdure.attempt import Attempt
from perdure.events import Event
from perdure.stopping import Stop
from perdure.store.log import EventLog
from perdure.testing import ScriptedAdapter

ASK = Task(prompt="?")


class Moment:
    """Where the first `accepted` is being appended, which fails when the test says so.

    Attributes:
        reached: Set once it is being appended.
        attempts: The attempts that were begun, and what became of their `run`.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = asyncio.Event()
        self.attempts: list[tuple[Attempt, asyncio.Task[None]]] = []
        self._held: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        real_append, real_run = EventLog.append, Attempt.run

        def append(
            log: EventLog, task_id: str, events: Sequence[Event], expected: int | None
        ) -> asyncio.Future[int]:
            if self.reached.is_set() or not any(isinstance(event, Accepted) for event in events):
                return real_append(log, task_id, events, expected)
            self.reached.set()
            return self._held

        async def run(attempt: Attempt) -> None:
            running = asyncio.create_task(real_run(attempt))
            self.attempts.append((attempt, running))
            await running

        monkeypatch.setattr(EventLog, "append", append)
        monkeypatch.setattr(Attempt, "run", run)

    def fail(self, error: Exception) -> None:
        """Let the append end so."""
        self._held.set_exception(error)


@pytest.mark.parametrize("turns", [0, 1, 2, 10])
@pytest.mark.parametrize("why", [Stop.CANCEL, Stop.TIME_LIMIT, Stop.HAND_BACK])
async def test_a_log_that_fails_while_an_attempt_is_stopped_is_told_of(
    sqlite_db: Path, monkeypatch: pytest.MonkeyPatch, why: Stop, turns: int
) -> None:
    """It never ends without an ending and without an error: nobody would take the task over.

    What is under way is the append of a call's name; it fails so many turns of the loop after the
    stop. Nothing follows what is missing, and whoever comes next has the task to run.
    """
    adapter = ScriptedAdapter(Accepted(response_id="r", reattachable=True), "x", Completed())
    moment = Moment(monkeypatch)
    async with Engine.open(sqlite_db, adapters=[adapter], settings=FAST, run=False) as engine:
        task_id = await engine.submit_task(ASK)
        working = asyncio.create_task(engine.worker.run())
        await moment.reached.wait()
        ((attempt, running),) = moment.attempts
        attempt.stop(why)
        for _ in range(turns):
            await asyncio.sleep(0)
        moment.fail(DatabaseUnavailable("no space left"))
        with pytest.raises(DatabaseUnavailable, match="no space left"):
            await running
        with pytest.raises(DatabaseUnavailable, match="no space left"):
            await working
        assert [type_ for type_, _ in stored_events(sqlite_db, task_id)] == ["submitted", "running"]
        await engine.run_until_done()
        assert await engine.get_status(task_id) is TaskStatus.COMPLETED
    assert_sound(sqlite_db)
