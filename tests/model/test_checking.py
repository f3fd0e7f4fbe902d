"""Checks that may take for ever: they are done elsewhere, and ended after a while."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from contextlib import suppress
from errno import EAGAIN
from pathlib import Path
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


@pytest.mark.parametrize("executable", ["", "/nowhere/python"])
async def test_no_interpreter(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    """Where there is none that could be started, the check is done here."""
    monkeypatch.setattr("sys.executable", executable)
    checker = Checker()
    await checker.check('"aa"', BAD)
    with pytest.raises(OutputInvalid, match="does not match"):
        await checker.check('"b"', BAD)
    assert pids_of(checker) == []
    await checker.close()


async def test_a_loop_that_starts_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, too, the check is done here."""

    async def refuse(*_command: str, **_how: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("asyncio.create_subprocess_exec", refuse)
    with pytest.raises(OutputInvalid, match="does not match"):
        await Checker().check('"b"', BAD)


class TestNoProcessToBeHad:
    """Where one can't be started just now, nothing is checked here, where nobody could end it."""

    @pytest.fixture(autouse=True)
    def never_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A check in this process is a failure, and so is a test that waits for long."""

        def here(*_what: Any) -> None:
            raise AssertionError("checked in this process")

        monkeypatch.setattr("perdure.checking.parse_output", here)
        monkeypatch.setattr("perdure.checking.PAUSE_SECONDS", 0.0, raising=False)

    async def refused(self, checker: Checker, why: str) -> None:
        """Check, and see it refused for this reason, in one line."""
        with pytest.raises(OutputInvalid, match=why) as caught:
            await checker.check(ENDLESS, BAD)
        assert not caught.value.repairable
        assert "\n" not in str(caught.value)
        assert "for it is kept" in str(caught.value)
        assert pids_of(checker) == []

    @pytest.mark.parametrize(
        "error",
        [
            BlockingIOError(EAGAIN, os.strerror(EAGAIN)),
            RuntimeError("can't start new thread"),  # which waits for the process's end
        ],
    )
    @pytest.mark.parametrize("times", [1, 2])
    async def test_no_more_processes(
        self, monkeypatch: pytest.MonkeyPatch, times: int, error: Exception
    ) -> None:
        """It is tried again; the second time, the answer counts as one that can't be checked."""
        start = asyncio.create_subprocess_exec
        refusals = [error] * times

        async def scarce(*command: Any, **how: Any) -> asyncio.subprocess.Process:
            if refusals:
                raise refusals.pop()
            return await start(*command, **how)

        monkeypatch.setattr("asyncio.create_subprocess_exec", scarce)
        checker = Checker()
        if times == 1:
            await checker.check('"aa"', BAD)
        else:
            await self.refused(checker, str(error.args[-1]))
        await checker.close()

    async def test_one_that_is_ended_at_once(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """As by the system for want of memory, before it could begin."""
        ended = tmp_path / "ended"
        ended.write_text("#!/bin/sh\nkill -9 $$\n")
        ended.chmod(0o700)
        monkeypatch.setattr("sys.executable", str(ended))
        await self.refused(Checker(), "ended' was ended by the signal 9")

    async def test_one_that_is_never_ready(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """It isn't waited for any longer, and is gone."""
        pids = tmp_path / "pids"
        sleeper = tmp_path / "sleeper"
        sleeper.write_text(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 60\n")
        sleeper.chmod(0o700)
        monkeypatch.setattr("sys.executable", str(sleeper))
        monkeypatch.setattr("perdure.checking.START_SECONDS", 0.5)
        await self.refused(Checker(), "sleeper' was not ready after 0.5 s")
        started = pids.read_text().split()
        assert len(started) == 2
        assert not any(is_there(int(pid)) for pid in started)


@pytest.mark.parametrize("program", ["/bin/false", "/bin/true", "/bin/echo"])
async def test_what_is_no_interpreter(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """As where Python is embedded in another program: then it is checked here."""
    monkeypatch.setattr("sys.executable", program)
    checker = Checker()
    await checker.check('"aa"', BAD)
    with pytest.raises(OutputInvalid):
        await checker.check('"b"', BAD)
    assert pids_of(checker) == []


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
