"""The console entry point: there before the commands, so that Ctrl-C while they load is quiet."""

from __future__ import annotations

import gc
import sys
from typing import Final

__all__ = ["main"]

# ExitCode.INTERRUPTED, which isn't loaded yet.
_INTERRUPTED: Final = 130


def main() -> None:
    """Load the commands, run the command line of this process, and end it."""
    # Loading what talks to databases, and reading a million rows, make many objects and few cycles:
    # looking for these less often saves a tenth to a fifth of the time.
    gc.set_threshold(50_000, 20, 20)
    try:
        from perdure.cli.main import main as run_and_end
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    try:
        run_and_end()
    finally:
        gc.freeze()  # the end of the interpreter would look for them among all that there is
