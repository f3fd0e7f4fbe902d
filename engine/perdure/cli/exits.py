"""How a command ends: the exit codes, and the one place where errors become lines and codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from enum import IntEnum

import typer

from perdure.cli.terminal import complain
from perdure.errors import InvalidConfig, InvalidTask, PerdureError, UnknownPlatform

__all__ = ["ExitCode", "guarded"]


class ExitCode(IntEnum):
    """What the exit codes mean. They are a public contract."""

    OK = 0
    FATAL = 1
    """It couldn't be done; stderr says why in one line."""
    USAGE = 2
    """What was given on the command line makes no sense."""
    SOME_FAILED = 3
    """It was done, but some tasks failed or were cancelled, or some rows were bad."""
    BUDGET = 4
    """A budget was reached."""
    INTERRUPTED = 130
    """Ctrl-C, or a signal to end; stderr says how to go on."""


# As for every program that a closed pipe ends: 128 and the number of SIGPIPE.
_BROKEN_PIPE = 141


def guarded(command: Callable[[], int | None]) -> int:
    """Return the exit code of ``command``; every error becomes one line on stderr and a code.

    `PERDURE_DEBUG=1` shows the traceback as well.
    """
    try:
        code = command()
        sys.stdout.flush()  # here, where a closed pipe can still be answered
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        return _leave_the_pipe()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except Exception as error:
        if _is_usage_error(error):
            raise
        return _report(error)
    return ExitCode.OK if code is None else code


def _report(error: Exception) -> ExitCode:
    debug = os.environ.get("PERDURE_DEBUG", "") not in ("", "0")
    if debug:
        traceback.print_exception(error)
    if isinstance(error, PerdureError):
        complain(str(error))
        wrong_input = isinstance(error, (InvalidConfig, InvalidTask, UnknownPlatform))
        return ExitCode.USAGE if wrong_input else ExitCode.FATAL
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(f"{where}{error.strerror}")
        return ExitCode.FATAL
    hint = "" if debug else "; PERDURE_DEBUG=1 shows where"
    complain(f"unexpected {type(error).__name__}: {error}{hint}")
    return ExitCode.FATAL


def _is_usage_error(error: Exception) -> bool:
    """Return whether typer raised it; older and newer typers have different base classes."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _leave_the_pipe() -> int:
    """Let nothing more go to a closed pipe, also not what Python flushes at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    return _BROKEN_PIPE
