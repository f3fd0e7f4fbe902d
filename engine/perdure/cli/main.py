"""The program: all commands, put together."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from perdure.cli import querying, reading, running, upkeep
from perdure.cli.exits import ExitCode, guarded
from perdure.cli.help import PlainGroup
from perdure.cli.session import DbOption, JsonOption, Session
from perdure.cli.terminal import complain, say

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="perdure",
    cls=PlainGroup,
    rich_markup_mode=None,
    help="Runs tasks on AI platforms and keeps everything that happens to them in SQL.",
    epilog="Data goes to stdout, all else to stderr. Exit codes: 0 all well, 1 fatal, 2 usage, "
    "3 some tasks failed, 4 budget reached, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"perdure {version('perdure')}")
        except PackageNotFoundError:  # run from a source tree
            typer.echo("perdure, not installed")
        raise typer.Exit


@app.callback()
def everywhere(
    context: typer.Context,
    db: DbOption = None,
    as_json: JsonOption = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Runs tasks on AI platforms and keeps everything that happens to them in SQL."""
    context.obj = Session(db=db, json=as_json)


for room in (running, reading, querying, upkeep):
    room.register(app)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: What follows `perdure`; default: what the process was given.
    """
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # no terminal or locale makes a text unshowable
            reconfigure(errors="backslashreplace")
    return guarded(lambda: _run(arguments))


def _open_what_is_closed() -> None:
    """Let what is written to a stream that the process was started without go nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # as after `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115


def _run(arguments: Sequence[str] | None) -> int:
    try:
        code = app(
            list(arguments) if arguments is not None else None,
            prog_name="perdure",
            standalone_mode=False,
        )
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        return ExitCode.INTERRUPTED
    except Exception as error:  # noqa: BLE001 - what isn't a usage error is raised again
        return _usage(error)
    return int(code or 0)


def _usage(error: Exception) -> int:
    """Say in one line what is wrong with the command line."""
    describe = getattr(error, "format_message", None)
    code = getattr(error, "exit_code", None)
    if describe is None or not isinstance(code, int):
        raise error
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        if context is not None:
            say(context.get_help())
        return ExitCode.USAGE
    where = f" (see `{context.command_path} --help`)" if context is not None else ""
    # Newer versions of typer check choices with pydantic, and show its words.
    what = str(describe()).rstrip(".").replace("Value error, ", "")
    complain(f"{what}{where}")
    return code


def main() -> None:
    """Run the command line of this process and end it."""
    sys.exit(run())
