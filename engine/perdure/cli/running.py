"""Commands that run tasks: ask, run, submit, worker, resume, cancel, retry."""

from __future__ import annotations

import typer

from perdure.cli.asking import ask
from perdure.cli.batching import run, submit
from perdure.cli.redoing import cancel, retry
from perdure.cli.session import add_command
from perdure.cli.working import resume, worker

__all__ = ["register"]

_PANEL = "Running"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, ask, name="ask", panel=_PANEL)
    add_command(app, run, name="run", panel=_PANEL)
    add_command(app, submit, name="submit", panel=_PANEL)
    add_command(app, worker, name="worker", panel=_PANEL)
    add_command(app, resume, name="resume", panel=_PANEL)
    add_command(app, cancel, name="cancel", panel=_PANEL)
    add_command(app, retry, name="retry", panel=_PANEL)
