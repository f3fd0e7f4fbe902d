"""`perdure archive`: old tasks into a file of their own; and what `verify` says of such files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.figures import count, size, things
from perdure.cli.moments import parse_moment
from perdure.cli.progress import progress
from perdure.cli.session import Session
from perdure.cli.terminal import say, show_json

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from perdure.store.archive import ArchiveReport
    from perdure.store.verification import VerifyReport

__all__ = ["archive", "look_into"]


async def archive(
    session: Session,
    before: Annotated[
        str,
        typer.Option(
            "--before",
            metavar="WHEN",
            help="What ended before that time: 2026-11-01, 30d, yesterday.",
            show_default=False,
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="Where it goes; nothing may be there. Its name is written into the log.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how much there is to archive.")
    ] = False,
) -> int:
    """Move the events and content of old tasks into a file, which is a database like this one.

    Their rows stay, with status, usage, cost, batch and key, so sums stay true and nothing is run
    again; `perdure output ID --db FILE` shows what was said. Others go on working meanwhile. Tasks
    that an unfinished one goes on from stay.
    """
    import asyncio

    moment = _moment(before)
    if dry_run:
        return _survey(session, moment)
    if to is None:
        raise typer.BadParameter("name the file that it goes to", param_hint="--to")
    report = None
    try:
        async with session.engine() as engine:
            report = await engine.archive_tasks(moment, to, stages=progress)
    except asyncio.CancelledError:
        if to.expanduser().exists():
            say(
                f"Interrupted. What isn't moved yet is in the log as before, and also in {to}; "
                "keep that, and archive again into another file."
            )
        else:
            say("Interrupted; nothing was changed.")
        raise
    _tell(session, to, report)
    return ExitCode.OK


def _moment(text: str) -> datetime:
    try:
        return parse_moment(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--before") from None


def _survey(session: Session, before: datetime) -> int:
    from perdure.store.archive import survey

    database = session.database()
    database.prepare(create=False, upgrade=False)
    with database.snapshot() as connection:
        plan = survey(connection, before)
    if session.json:
        show_json({name: getattr(plan, name) for name in ("tasks", "events", "bytes")})
    else:
        say(
            f"{things(plan.tasks, 'task')} with {things(plan.events, 'event')}, "
            f"{size(plan.bytes)}, would be archived."
        )
    return ExitCode.OK


def _tell(session: Session, to: Path, report: ArchiveReport) -> None:
    if session.json:
        names = ("tasks", "events", "changed", "blobs", "bytes")
        show_json({"file": report.file, **{name: getattr(report, name) for name in names}})
        return
    if report.file is None:
        say("There is nothing to archive.")
        return
    say(
        f"{things(report.tasks, 'task')} with {things(report.events, 'event')} moved to {to}: "
        f"{size(report.bytes)}"
    )
    if report.changed:
        say(
            f"{things(report.changed, 'task')} stayed, changed meanwhile; "
            f"what they were before is in {to}, too."
        )


# -- verify --archive ----------------------------------------------------------------------------


def look_into(
    connection: Connection,
    files: Sequence[Path],
    report: VerifyReport,
    expected: tuple[int, str] | None,
) -> list[dict[str, Any]]:
    """Hold archives against their log, and add to the report what is wrong; returns what was read.

    Args:
        connection: To the log.
        files: The archives.
        report: What `verify` found in the log.
        expected: A position and the digest that must stand there.
    """
    from perdure.store.evidence import check_archive

    found: list[dict[str, Any]] = []
    for file in files:
        with progress(f"reading {file.name}") as step:
            read = check_archive(connection, file, expected, step)
        for problem in read.problems:
            report.problem(f"{file}: {problem}")
        report.archived -= read.events
        report.hidden = report.hidden and not read.has_expected
        found.append({"file": file, "tasks": read.tasks, "events": read.events})
    if report.hidden and expected is not None:
        report.problem(
            f"position {count(expected[0])} is in an archive: name that with --archive, "
            "or its digest can't be checked"
        )
    return found
