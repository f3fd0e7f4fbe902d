"""Further interpreters of our own: what they are started with, by those who have them work.

They are talked to through pipes, and end when theirs does. `multiprocessing` would run the main
script of the program once more in each, and fork connections and locks with it.
"""

from __future__ import annotations

import os
import sys
from subprocess import DEVNULL, PIPE
from typing import TypedDict

__all__ = ["Options", "command", "is_there", "options"]


class Options(TypedDict):
    """What `subprocess` and asyncio's form of it are told besides the command."""

    stdin: int
    stdout: int
    stderr: int
    env: dict[str, str]
    start_new_session: bool


def is_there() -> bool:
    """Return whether there is an interpreter to start; a frozen program has none."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def command(module: str, first: str = "") -> list[str]:
    """Return what starts an interpreter that calls a module's `serve`.

    Args:
        module: The module's name.
        first: A statement that is run before the module is imported.
    """
    statements = (*filter(None, (first,)), f"from {module} import serve", "serve()")
    return [sys.executable, "-P", "-c", "; ".join(statements)]


def options() -> Options:
    """Return how it is started: with pipes, and with what can be imported here."""
    return {
        "stdin": PIPE,
        "stdout": PIPE,
        "stderr": DEVNULL,  # whoever asks sees by the answer, or for want of one, what went wrong
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        "start_new_session": True,  # Ctrl-C is for whoever asked, who then ends it
    }
