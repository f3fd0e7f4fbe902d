"""Commands that look something up: how long until the prompt is back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.measuring import Row, Target, samples
from benchmarks.session import Session


def measure(session: Session) -> Sequence[Row]:
    """Measure seconds of whole processes."""
    times = session.size(3, 1)
    events = session.size(1_000_000, 1000, full=10_000_000)
    path = session.log(events, pending=session.size(4000, 200))
    perdure = [sys.executable, "-m", "perdure.cli"]
    commands = {
        "perdure --help": [*perdure, "--help"],
        "import typer": [sys.executable, "-c", "import typer"],
        "perdure list": [*perdure, "list", "--db", str(path)],
    }
    found = samples(
        "s",
        {name: lambda c=command: _seconds(c, times) for name, command in commands.items()},  # type: ignore[misc]
        session.rounds,
    )
    typer = found["import typer"]
    return [
        Row("`perdure --help`", found["perdure --help"], typer, target=Target("at most", 3.0)),
        Row(
            f"`perdure list`, {events:,} events",
            found["perdure list"],
            typer,
            "value",
            Target("at most", 0.5, "s"),
        ),
    ]


def _seconds(command: Sequence[str], times: int) -> float:
    """Return the shortest of some runs: what others do on the machine only adds to it."""
    taken: list[float] = []
    environment = {**os.environ, "COLUMNS": "100"}
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, env=environment)
        taken.append(time.perf_counter() - began)
    return min(taken)
