"""Commands that run tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from perdure.cli.session import Session, add_command
from perdure.cli.terminal import show_line


def hello(session: Session, n: Annotated[int, typer.Option(help="count")] = 1) -> int | None:
    """Say hello."""
    show_line(f"{session} {n}")
    return 0


def register(app: typer.Typer) -> None:
    """Add them."""
    add_command(app, hello, name="hello", panel="Running")
