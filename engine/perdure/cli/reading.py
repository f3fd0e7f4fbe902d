"""Commands that look: list, show, log, tail, output. None of them writes, or waits for who does."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.finding import IdArgument, IdsArgument, resolve
from perdure.cli.following import tail
from perdure.cli.listing import list_tasks
from perdure.cli.moments import clock
from perdure.cli.records import (
    ENDED,
    event_record,
    event_rows,
    find_task_row,
    refuse_archived,
    text_so_far,
)
from perdure.cli.session import Session, add_command
from perdure.cli.tables import paint, tab_line, terminal_width
from perdure.cli.terminal import complain, is_terminal, show, show_json
from perdure.errors import PerdureError
from perdure.store.readonly import Reader
from perdure.text import printable

__all__ = ["register"]

_PANEL: Final = "Looking"
_ARCHIVED: Final = "SELECT task_id, archived FROM tasks WHERE task_id = ?"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, list_tasks, name="list", panel=_PANEL)
    add_command(app, show_tasks, name="show", panel=_PANEL)
    add_command(app, log, name="log", panel=_PANEL)
    add_command(app, tail, name="tail", panel=_PANEL)
    add_command(app, output, name="output", panel=_PANEL)


def show_tasks(
    session: Session,
    ids: IdsArgument,
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
) -> int:
    """Show all that is known of tasks: times, attempts, usage, cost, error, prompt and output."""
    from perdure.cli.showing import gather, lay_out

    code = ExitCode.OK
    with Reader.open(session.url) as reader:
        for number, given in enumerate(ids):
            try:
                known = gather(reader, resolve(reader, given))
            except PerdureError as error:
                if len(ids) == 1:
                    raise
                complain(str(error))  # the others are shown all the same
                code = ExitCode.FATAL
                continue
            if session.json:
                show_json(known)
                continue
            if number:
                sys.stdout.write("\n")
            for line in lay_out(known, full=full):
                sys.stdout.write(line + "\n")
    return code


def log(session: Session, task_id: IdArgument) -> None:
    """Show a task's events, one a line.

    In a pipe: tab-separated version, time (UTC), type, and what it says. With --json each event
    whole, as it is stored.
    """
    with Reader.open(session.url) as reader:
        known = resolve(reader, task_id)
        for row in reader.rows(_ARCHIVED, (known,)):  # none where the projection has lost it
            refuse_archived(row, "log")
        events = event_rows(reader, known)
        if session.json:
            for row in events:
                show_json(event_record(row))
            return
        from perdure.cli.telling import tell_stored

        # What is quoted fits on the line; what is said, such as an error, may take several.
        quoted = max(terminal_width() - 55, 20) if is_terminal() else 60
        for row in events:
            said = tell_stored(row["type"], row["schema_version"], row["data"], quoted)
            if is_terminal():
                name = paint(f"{row['type']:<16}", row["type"])
                at = paint(clock(row["recorded_at"], fraction=True), "dim")
                sys.stdout.write(f"{row['version']:>5}  {at}  {name}  {printable(said)}\n")
            else:
                show(tab_line((row["version"], row["recorded_at"], row["type"], said)))


def output(session: Session, task_id: IdArgument) -> None:
    """Write a task's output to stdout: the text and nothing else; in a pipe to the last byte.

    Of a task that isn't completed it is what there is so far, and stderr says so.
    """
    with Reader.open(session.url) as reader:
        known = resolve(reader, task_id)
        row = find_task_row(reader, known)
        refuse_archived(row, "output")
        text = text_so_far(reader, known)
    status = row["status"]
    redacted = status in ENDED and row["output"] is None and row["partial_output"] is None
    if session.json:
        complete = status == "completed" and not redacted
        show_json({"task_id": known, "status": status, "complete": complete, "text": text})
        return
    show(text)
    if is_terminal() and text and not text.endswith("\n"):
        show("\n")
    if redacted:
        complain(f"the content of {known} was redacted")
    elif status != "completed":
        what = _PARTIAL[status] if text else "there is no output"
        complain(f"{known} is {status}: {what}")


_PARTIAL: Final = {
    "pending": "this is what a lost attempt left behind",
    "running": "this is its output so far",
    "failed": "this is the partial output it left behind",
    "cancelled": "this is the partial output it left behind",
}
