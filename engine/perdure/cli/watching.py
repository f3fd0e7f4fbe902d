"""How far a run is, on stderr while it goes on: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from perdure.cli.figures import count, seconds
from perdure.cli.summary import cost
from perdure.cli.terminal import error_console, say

if TYPE_CHECKING:
    from perdure.batch import Tally
    from perdure.engine import Engine
    from perdure.store.claims import Scope

__all__ = ["watching"]

_DRAW_SECONDS: Final = 0.25
_LINE_SECONDS: Final = 10.0
# Looking takes at most this part of the time, however much there is to count.
_SHARE: Final = 0.05
_NARROW: Final = 70


@contextlib.asynccontextmanager
async def watching(engine: Engine, scope: Scope, title: str) -> AsyncGenerator[None, None]:
    """Show how far the tasks of a scope are, until the end of the block."""
    console = error_console()
    with _Bar(title, console) if console.is_terminal else _Lines(title) as display:
        looking = asyncio.create_task(_look(engine, scope, display))
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.wait({looking})


async def _look(engine: Engine, scope: Scope, display: _Display) -> None:
    from perdure.batch import Tallying
    from perdure.errors import PerdureError

    tallying = Tallying(engine.database, scope)
    with contextlib.suppress(PerdureError):  # whoever runs the tasks has the same trouble
        try:
            while True:
                began = time.monotonic()
                display.update(await tallying.look())
                took = time.monotonic() - began
                await asyncio.sleep(max(display.interval, took / _SHARE))
        finally:
            display.update(await tallying.look())


class _Display(Protocol):
    interval: float

    def update(self, tally: Tally) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_error: object) -> None: ...


class _Lines:
    """For log files: a line every ten seconds, as long as there is news."""

    interval = 1.0

    def __init__(self, title: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._title = title
        self._clock = clock
        self._began = self._said = clock()
        self._first: Tally | None = None

    def update(self, tally: Tally) -> None:
        now = self._clock()
        if self._first is None:
            self._first = tally
        if now - self._said < _LINE_SECONDS:
            return
        self._said = now
        ended = tally.ended - self._first.ended
        left = (now - self._began) / ended * tally.left if ended else None
        parts = [
            f"{count(tally.ended)} of {count(tally.total)} done",
            f"{count(tally.running)} running",
            f"{count(tally.failed)} failed",
            f"{count(tally.tokens)} tokens",
            cost(tally),
        ]
        if left is not None and tally.left:
            parts.append(f"about {seconds(left)} left")
        say(f"{self._title}: {', '.join(parts)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return None


class _Bar:
    """For people: a bar that moves."""

    interval = _DRAW_SECONDS

    def __init__(self, title: str, console: Any) -> None:  # noqa: ANN401 - rich is loaded late
        from rich.constrain import Constrain
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        class WithRoom(Progress):
            # For the ^C that a terminal echoes: it must not begin a new line.
            def get_renderable(self) -> Constrain:
                return Constrain(super().get_renderable(), max(10, console.width - 4))

        name = Column(no_wrap=True, overflow="ellipsis", ratio=None, max_width=24)
        words = TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True))
        self._narrow = console.width < _NARROW
        self._progress = WithRoom(
            TextColumn("{task.description}", markup=False, table_column=name),
            BarColumn(bar_width=None if not self._narrow else 10),
            words,
            *(() if self._narrow else (TimeRemainingColumn(elapsed_when_finished=True),)),
            console=console,
            refresh_per_second=5,
            redirect_stdout=False,
            expand=not self._narrow,
        )
        self._task = self._progress.add_task(title, total=None, words="")

    def update(self, tally: Tally) -> None:
        done = f"{count(tally.ended)}/{count(tally.total)}"
        if self._narrow:
            words = f"{done}, {count(tally.failed)} failed"
        else:
            words = "  ".join(
                (
                    done,
                    f"{count(tally.running)} running",
                    f"{count(tally.failed)} failed",
                    f"{count(tally.tokens)} tokens",
                    cost(tally),
                )
            )
        self._progress.update(
            self._task, completed=tally.ended, total=tally.total or None, words=words
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()
