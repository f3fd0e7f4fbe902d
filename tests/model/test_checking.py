"""Checks that may take for ever: they are done elsewhere, and ended after a while."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest

from perdure import OutputInvalid
from perdure.checking import Checker

BAD: dict[str, Any] = {"type": "string", "pattern": "(a+)+$"}
ENDLESS = json.dumps("a" * 40 + "!")


def pids_of(checker: Checker) -> list[int]:
    """Return the processes that wait for something to check."""
    return [helper._process.pid for helper in checker._idle]


def is_there(pid: int) -> bool:
    """Return whether there is such a process, be it a zombie."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_checks_as_in_this_process() -> None:
    """One process does check after check, says what is wrong, and is gone in the end."""
    checker = Checker()
    await checker.check('"aa"', BAD)
    (pid,) = pids_of(checker)
    for text, says in {
        "aa": "is no JSON",
        "7": r"7 is not of type 'string' \(at \$\)",
        '"b"': "does not match",
    }.items():
        with pytest.raises(OutputInvalid, match=says) as caught:
            await checker.check(text, BAD)
        assert caught.value.repairable
    assert pids_of(checker) == [pid]
    await checker.close()
    assert not is_there(pid)
    await checker.check('"aa"', BAD)  # it starts another one
    await checker.close()


async def test_an_endless_check_is_ended() -> None:
    """Others are done meanwhile, and nothing is left of its process."""
    checker = Checker(seconds=3.0, most=2)
    # So that both processes are there: starting one may take longer than three seconds.
    await asyncio.gather(checker.check('"aa"', BAD), checker.check('"aa"', BAD))
    endless = asyncio.create_task(checker.check(ENDLESS, BAD))
    await checker.check('"aa"', BAD)
    assert not endless.done()
    with pytest.raises(OutputInvalid, match="takes too long on this output") as caught:
        await endless
    assert "a pattern such as '(a+)+$'" in str(caught.value)
    assert not caught.value.repairable
    assert len(pids_of(checker)) == 1
    await checker.close()


async def test_a_cancelled_check_is_ended() -> None:
    """Its process is gone when the cancellation is done, and its turn is free."""
    checker = Checker(most=1)
    await checker.check('"aa"', BAD)
    (pid,) = pids_of(checker)
    endless = asyncio.create_task(checker.check(ENDLESS, BAD))
    await asyncio.sleep(0)  # it has begun
    assert pids_of(checker) == []
    endless.cancel()
    with pytest.raises(asyncio.CancelledError):
        await endless
    assert not is_there(pid)
    await checker.check('"aa"', BAD)
    await checker.close()


async def test_only_so_many_at_a_time() -> None:
    """However many are asked for, there are no more processes than that."""
    checker = Checker(most=2)
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(checker.check('"aa"', BAD))
    assert len(pids_of(checker)) <= 2
    await checker.close()


async def test_a_process_that_was_lost() -> None:
    """Another one takes over what it was to do."""
    checker = Checker()
    await checker.check('"aa"', BAD)
    checker._idle[0]._process.kill()
    await checker.check('"aa"', BAD)
    await checker.close()


async def test_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be started, the check is done here."""
    monkeypatch.setattr("sys.executable", "")
    checker = Checker()
    await checker.check('"aa"', BAD)
    with pytest.raises(OutputInvalid, match="does not match"):
        await checker.check('"b"', BAD)
    assert pids_of(checker) == []
    await checker.close()


def test_a_process_whose_asker_is_gone() -> None:
    """It ends by itself, even from the middle of a pattern, where it would never notice."""
    started = subprocess.run(
        [sys.executable, "-P", "-c", "from perdure.checking import serve; serve()"],
        input=json.dumps((ENDLESS, BAD, 0.5)).encode() + b"\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert started.stdout == b"ready\n"
    assert started.returncode == 1
