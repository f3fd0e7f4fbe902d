"""Checking outputs that may take long to check, in processes of their own.

A pattern can take longer than anybody lives on a text of forty characters, and so can references
under `anyOf`. Python's `re` can't be stopped meanwhile, nor does it let anything else run. A
process can be ended. It is kept for the next output as long as it answers in time: starting one
takes a hundred times as long as a check. What takes no more than a moment is checked where it is
asked for, see `structured.check_briefly`.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from typing import Any, Final

from perdure import interpreters
from perdure.errors import OutputInvalid
from perdure.schemas import patterns, short
from perdure.structured import parse_output

__all__ = ["Checker", "Unchecked", "serve"]

LIMIT_SECONDS: Final = 5.0
# They work while they are checking, so more of them than processors would only slow each other.
MOST_HELPERS: Final = max(1, min(4, os.cpu_count() or 1))
START_SECONDS: Final = 30.0
GOODBYE_SECONDS: Final = 1.0
TRIES: Final = 2
# Where none could be started, before it is tried again.
PAUSE_SECONDS: Final = 1.0
_READY: Final = b"ready\n"


class Unchecked(Exception):
    """There was no time left to check the output."""


class _NotStarted(Exception):
    """A helper can't be started just now; the message says why."""


class Checker:
    """Other processes that check outputs; they are started when they are needed.

    Args:
        seconds: How long one check may take.
        most: How many may be done at the same time; the others wait for their turn.
    """

    def __init__(self, seconds: float = LIMIT_SECONDS, most: int = MOST_HELPERS) -> None:
        self._seconds = seconds
        self._turns = asyncio.Semaphore(most)
        self._idle: list[_Helper] = []

    async def check(self, text: str, schema: Mapping[str, Any]) -> None:
        """Return if the text satisfies the schema.

        Raises:
            OutputInvalid: It doesn't, as `parse_output` says, or that can't be found out in time.
        """
        request = json.dumps((text, schema, self._seconds)).encode() + b"\n"
        async with self._turns:
            problem = await self._problem(text, schema, request)
        if problem is not None:
            message, repairable = problem
            raise OutputInvalid(message) if repairable else OutputInvalid.beyond_repair(message)

    async def _problem(
        self, text: str, schema: Mapping[str, Any], request: bytes
    ) -> tuple[str, bool] | None:
        """Return what is wrong with the output and whether it can be repaired, if anything is."""
        lost = False
        why = ""
        for left in reversed(range(TRIES)):
            try:
                helper = self._idle.pop() if self._idle and not lost else await _Helper.start()
            except _NotStarted as error:
                why = f"no process that checks it can be started ({error})"
                await asyncio.sleep(PAUSE_SECONDS if left else 0.0)
                continue
            if helper is None:
                return _problem(text, schema)
            try:
                return await self._ask(helper, request)
            except TimeoutError:
                return self._overdue(schema), False
            except (OSError, EOFError):  # somebody has ended it
                lost = True
                why = "the process that checks it was ended, as for want of memory"
        return (
            f"the output can't be checked: {why}; `perdure output` shows it, for it is kept: mend "
            "that, and run the task again"
        ), False

    async def check_until(
        self,
        text: str,
        schema: Mapping[str, Any],
        stopped: asyncio.Future[Any],
        *,
        patience: float,
    ) -> None:
        """Check as `check` does, but only so many seconds longer once ``stopped`` is done.

        Raises:
            OutputInvalid: As `check`.
            Unchecked: It took longer.
        """
        clock = asyncio.get_running_loop().time
        limit = asyncio.timeout(None)

        def hurry(_stopped: asyncio.Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # it has just been checked
                limit.reschedule(clock() + patience)

        try:
            async with limit:
                stopped.add_done_callback(hurry)
                await self.check(text, schema)
        except TimeoutError:
            raise Unchecked from None
        finally:
            stopped.remove_done_callback(hurry)

    async def _ask(self, helper: _Helper, request: bytes) -> tuple[str, bool] | None:
        """Return what is wrong; a helper that has not answered is ended, whatever the reason."""
        answered = False
        try:
            async with asyncio.timeout(self._seconds):
                problem = await helper.ask(request)
            answered = True
        finally:
            if answered:
                self._idle.append(helper)
            else:
                await helper.end()
        return problem

    def _overdue(self, schema: Mapping[str, Any]) -> str:
        slow = "'anyOf' in a part that refers to itself, or 'uniqueItems' of objects"
        if (first := next(patterns(schema), None)) is not None:
            slow = f"repetitions inside repetitions in a pattern such as {short(first)!r}, {slow}"
        return (
            "the output can't be checked: holding it against the schema takes too long on this "
            f"output (more than {self._seconds:g} s): write the schema without {slow}"
        )

    async def close(self) -> None:
        """End those who wait for something to do."""
        idle, self._idle = self._idle, []
        for helper in idle:
            helper.say_no_more()
        for helper in idle:
            await helper.end(GOODBYE_SECONDS)


class _Helper:
    """An interpreter of our own, which checks one output after the other."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None  # noqa: S101 - for the type checkers
        assert process.stdout is not None  # noqa: S101
        self._process = process
        self._to, self._from = process.stdin, process.stdout

    @classmethod
    async def start(cls) -> _Helper | None:
        """Return one that is ready; None where there is no interpreter, or a loop starts none.

        Where Python is embedded in another program, it is that program that is started.

        Raises:
            _NotStarted: There is none just now.
        """
        if not interpreters.is_there():
            return None
        try:
            process = await asyncio.create_subprocess_exec(
                *interpreters.command(__name__), **interpreters.options()
            )
        except (FileNotFoundError, NotImplementedError):
            return None
        except (OSError, RuntimeError) as error:  # no more processes, or no thread to wait for one
            raise _NotStarted(getattr(error, "strerror", None) or str(error)) from None
        helper = cls(process)
        ready = False
        try:
            ready = await helper._be_ready()
        finally:
            if not ready:
                await helper.end()
        return helper if ready else None

    async def _be_ready(self) -> bool:
        """Wait until it says that it is ready; returns False if it is no interpreter.

        Raises:
            _NotStarted: It will never be ready, for another reason.
        """
        try:
            async with asyncio.timeout(START_SECONDS):
                said = await self._from.readline()
                code = 0 if said else await self._process.wait()
        except TimeoutError:
            raise _NotStarted(
                f"{sys.executable!r} was not ready after {START_SECONDS:g} s"
            ) from None
        if code < 0:  # as by the system for want of memory
            raise _NotStarted(f"{sys.executable!r} was ended by the signal {-code}")
        return said == _READY

    async def ask(self, request: bytes) -> tuple[str, bool] | None:
        """Return what is wrong with an output and whether it can be repaired; None if nothing is.

        Raises:
            OSError: It is gone.
            EOFError: As above.
        """
        self._to.write(request)
        await self._to.drain()
        answer = await self._from.readline()
        if not answer.endswith(b"\n"):
            raise EOFError("the helper is lost")
        problem: list[Any] | None = json.loads(answer)
        return None if problem is None else (str(problem[0]), bool(problem[1]))

    def say_no_more(self) -> None:
        """Let it end once it has nothing to do."""
        self._to.close()

    async def end(self, patience: float = 0.0) -> None:
        """See to it that it has ended, after so many seconds at the latest."""
        self._to.close()
        if patience:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._process.wait()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._from.read()  # only then the event loop lets go of the pipe
        await self._process.wait()


# -- in a helper -----------------------------------------------------------------------------------


def serve() -> None:
    """Check what comes on standard input, until that ends, as it does when the asker is gone."""
    asking, answering = sys.stdin.buffer, sys.stdout.buffer
    _problem('""', {"pattern": ""})  # what there is to be imported is imported before the time runs
    with contextlib.suppress(BrokenPipeError):
        answering.write(_READY)
        answering.flush()
        for request in asking:
            text, schema, seconds = json.loads(request)
            # In the middle of a pattern it would not notice that the asker is gone.
            faulthandler.dump_traceback_later(2 * seconds, exit=True)
            problem = _problem(text, schema)
            faulthandler.cancel_dump_traceback_later()
            answering.write(json.dumps(problem).encode() + b"\n")
            answering.flush()


def _problem(text: str, schema: Mapping[str, Any]) -> tuple[str, bool] | None:
    try:
        parse_output(text, schema)
    except OutputInvalid as invalid:
        return invalid.message, invalid.repairable
    return None
