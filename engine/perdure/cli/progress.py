"""A line on stderr that says how far it is, for commands that read everything there is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import Final

__all__ = ["progress"]

_EVERY_SECONDS: Final = 0.1


@contextlib.contextmanager
def progress(label: str) -> Generator[Callable[[int, int], None], None, None]:
    """Give a function to be called with how much is done and how much there is.

    It draws on a terminal only, and not before it is worth it; the line is gone in the end.
    """
    latest = time.monotonic()
    drawn = False

    def step(done: int, total: int) -> None:
        nonlocal latest, drawn
        now = time.monotonic()
        if now - latest < _EVERY_SECONDS or not sys.stderr.isatty():
            return
        latest, drawn = now, True
        percent = min(100, done * 100 // total) if total else 100
        sys.stderr.write(f"\r\x1b[K{label}: {percent} % of {total:,}")
        sys.stderr.flush()

    try:
        yield step
    finally:
        if drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
