"""A worker by itself: its settings, and its signs of life."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import FAST

from perdure import Engine, InvalidConfig, StoreError, Task, Timing, WorkerSettings
from perdure.presence import News, Presence
from perdure.store.claims import Scope
from perdure.testing import ScriptedAdapter

# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"concurrency": 0}, "concurrency: 0 attempts: give 1 or more"),
        ({"concurrency": 2.5}, "concurrency: give a whole number, not 2.5"),
        ({"concurrency": True}, "concurrency: give a whole number, not True"),
        ({"poll_seconds": "1"}, "poll_seconds: give seconds, not '1'"),
        ({"lease_seconds": None}, "lease_seconds: give seconds, not None"),
        ({"lease_seconds": 1e12}, "lease_seconds: 1e+12 s: give 31536000 s or less"),
        ({"concurrency": -1}, "concurrency: -1 attempts: give 1 or more"),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds: 0 s: give more than 0 s"),
        ({"poll_seconds": -0.5}, "poll_seconds: -0.5 s: give more than 0 s"),
        ({"poll_seconds": float("nan")}, "poll_seconds: nan s: give"),
        ({"lease_seconds": float("inf")}, "lease_seconds: inf s: give"),
        ({"lease_seconds": 5}, "lease_seconds: 5 s: give more than heartbeat_seconds, 5 s"),
        ({"lease_seconds": 2}, "lease_seconds: 2 s: give more than heartbeat_seconds, 5 s"),
    ],
)
def test_settings_that_can_not_work_are_refused(wrong: dict[str, Any], said: str) -> None:
    """Instead of hanging, or of losing tasks to others while it lives; the field is named."""
    with pytest.raises(InvalidConfig) as refused:
        WorkerSettings(**wrong)
    assert said in str(refused.value)
    with pytest.raises(InvalidConfig):
        replace(WorkerSettings(), **wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"chunk_interval": -1}, "chunk_interval: -1 s: give 0 s or more"),
        ({"usage_interval": float("nan")}, "usage_interval: nan s: give"),
        ({"closing_seconds": float("inf")}, "closing_seconds: inf s: give"),
        ({"buffer_characters": 0}, "buffer_characters: 0 characters: give 1 or more"),
    ],
)
def test_a_timing_that_can_not_work_is_refused(wrong: dict[str, Any], said: str) -> None:
    """The field is named; no pause at all is fine."""
    with pytest.raises(InvalidConfig) as refused:
        Timing(**wrong)
    assert said in str(refused.value)
    Timing(chunk_interval=0, usage_interval=0, closing_seconds=0, buffer_characters=1)


# -- signs of life ---------------------------------------------------------------------------------


async def test_without_signs_of_life_it_ends(
    db: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the reason: it doesn't go on claiming tasks that will be taken from it."""
    shown = asyncio.Event()

    async def broken(_presence: Presence, _scope: Scope | None) -> News:
        shown.set()
        raise LookupError("a bug")

    monkeypatch.setattr(Presence, "show", broken)
    async with Engine.open(db, adapters=[ScriptedAdapter()], settings=FAST, run=False) as engine:
        working = asyncio.create_task(engine.worker.run())
        with pytest.raises(StoreError, match="that it is alive: LookupError: a bug"):
            await asyncio.wait_for(working, 30)
        assert shown.is_set()
        assert "could not show that it is alive" in caplog.text
        assert await engine.submit_task(Task(prompt="?"))
        assert engine.worker.running == ()
