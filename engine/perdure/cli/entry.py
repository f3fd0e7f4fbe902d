"""The console entry point: there before the commands, so that Ctrl-C while they load is quiet."""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["main"]

# ExitCode.INTERRUPTED, which isn't loaded yet.
_INTERRUPTED: Final = 130


def main() -> None:
    """Load the commands, run the command line of this process, and end it."""
    try:
        from perdure.cli.main import main as run_and_end
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    run_and_end()
