"""Commands that look after the log: verify, rebuild, redact, archive; and `perdure db …`."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from perdure.cli.archiving import archive, look_into
from perdure.cli.exits import ExitCode
from perdure.cli.figures import count, things
from perdure.cli.files import backup, upgrade, vacuum
from perdure.cli.finding import IdsArgument, resolve
from perdure.cli.health import doctor, platforms
from perdure.cli.progress import progress
from perdure.cli.records import find_task_row, refuse_archived
from perdure.cli.session import Session, add_command, add_group
from perdure.cli.terminal import complain, one_line, say, show_json, show_line
from perdure.errors import DatabaseIncompatible
from perdure.store.readonly import Reader

if TYPE_CHECKING:
    from perdure.store.verification import VerifyReport

__all__ = ["register"]

_PANEL: Final = "Looking after it"
# What went on from a task, what ran it again, and what it ran again.
_SAME_TEXT: Final = (
    "SELECT task_id FROM tasks WHERE prompt IS NOT NULL AND (parent = ? OR retry_of = ? "
    "OR task_id = (SELECT retry_of FROM tasks WHERE task_id = ?))"
)
_SEAL: Final = re.compile(r"(\d{1,18}):([0-9a-f]{64})", re.IGNORECASE)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, verify, name="verify", panel=_PANEL)
    add_command(app, rebuild, name="rebuild", panel=_PANEL)
    add_command(app, redact, name="redact", panel=_PANEL)
    add_command(app, archive, name="archive", panel=_PANEL)
    group = add_group(app, name="db", about="Upgrade, back up, shrink the database.", panel=_PANEL)
    add_command(group, upgrade, name="upgrade")
    add_command(group, backup, name="backup")
    add_command(group, vacuum, name="vacuum")
    add_command(app, doctor, name="doctor", panel=_PANEL)
    add_command(app, platforms, name="platforms", panel=_PANEL)


# -- verify --------------------------------------------------------------------------------------


def verify(
    session: Session,
    expect: Annotated[
        str | None,
        typer.Option(
            "--expect",
            metavar="POSITION:DIGEST",
            help="What an earlier verify printed: it must still stand there.",
            show_default=False,
        ),
    ] = None,
    archives: Annotated[
        list[Path] | None,
        typer.Option(
            "--archive",
            metavar="FILE",
            help="An archive of this log, to be read as well and held against it; repeatable.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Walk the whole log and hold `tasks` against it: has anybody changed anything?

    Triggers, unique indexes and views have to be those that perdure made.

    Prints POSITION:DIGEST of the log's end. Keep it somewhere else: with --expect it shows later
    that the log was not cut off or written anew since. What is in archives is looked at only where
    they are named. Exit code 1 where something is wrong.
    """
    expected = None if expect is None else _seal(expect)
    from perdure.store import defences, rebuilding, verification
    from perdure.store.helping import helpers_for

    database = session.database()
    database.prepare(create=False, upgrade=False)
    differed = 0
    with database.snapshot() as connection:
        standing = defences.look(database, connection)
        with helpers_for(database, connection) as helpers:
            with progress("reading the log") as step:
                report = verification.verify(
                    connection,
                    expect=expected,
                    progress=step,
                    helpers=helpers,
                    flaws=[str(flaw) for flaw in standing.flaws],
                )
            with progress("comparing tasks") as step:
                try:
                    compared = rebuilding.compare(connection, step, helpers)
                except DatabaseIncompatible:
                    report.problem(verification.NOT_COMPARED)
                else:
                    differed = compared.differed
                    for problem in compared.problems:
                        report.problem(problem)
        read = look_into(connection, archives or (), report, expected)
    if differed:
        report.problem(
            f"`tasks` differs from the log in {things(differed, 'row')}: run `perdure rebuild`"
        )
    if session.json:
        show_json(
            {
                "ok": report.ok,
                **{name: getattr(report, name) for name in ("events", "tasks", "redacted")},
                **{name: getattr(report, name) for name in ("archived", "archive_of")},
                **{name: getattr(report, name) for name in ("position", "digest")},
                "archives": read,
                "rows_differing": differed,
                "problems": report.problems,
                "unchecked": standing.unchecked,
            }
        )
    else:
        _tell(session, report, read)
        for what in standing.unchecked:
            say(f"Not looked at: {what}")
    return ExitCode.OK if report.ok else ExitCode.FATAL


def _seal(text: str) -> tuple[int, str]:
    found = _SEAL.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is no POSITION:DIGEST as verify prints it", param_hint="--expect"
        )
    return int(found[1]), found[2].lower()


def _tell(session: Session, report: VerifyReport, archives: Sequence[Mapping[str, Any]]) -> None:
    for problem in report.problems:
        show_line(problem)
    read = f"{things(report.events, 'event')} of {things(report.tasks, 'task')}"
    if not report.ok:
        complain(f"read {read}, found {things(len(report.problems), 'problem')}")
        return
    if report.position:
        show_line(f"{report.position}:{report.digest}")
    redacted = f", {count(report.redacted)} of them redacted" if report.redacted else ""
    say(f"All is well: {read}{redacted}; the chain holds, and `tasks` is what the log says.")
    for one in archives:
        inside = f"{things(one['events'], 'event')} of {things(one['tasks'], 'task')}"
        say(f"{one['file'].name}: {inside}, and they are what was archived.")
    if report.archived:
        say(
            f"{things(report.archived, 'event')} in archives not looked at: "
            f"`{session.command_line('verify', '--archive', 'FILE')}` does."
        )
    if report.archive_of is not None:
        say(
            "It is an archive: whether it is all that was archived, its log can tell "
            f"(`perdure verify --archive {session.shown_db or 'FILE'}`)."
        )
        return
    if report.position:
        again = session.command_line(
            "verify", "--expect", f"{report.position}:{report.digest[:8]}…"
        )
        say(f"Keep that line elsewhere; `{again}` shows later that nothing before it was changed.")


# -- rebuild -------------------------------------------------------------------------------------


def rebuild(session: Session) -> None:
    """Throw the `tasks` table away and compute it again from the log.

    Nothing is lost by it. Whoever writes waits meanwhile, for half a minute at most: stop the
    workers first where the log has more than two million events. Who reads doesn't notice.
    """
    from perdure.store import rebuilding
    from perdure.store.helping import helpers_for

    database = session.database()
    database.prepare(create=False)
    writer = database.writer()
    try:
        with (
            writer.transaction() as connection,
            helpers_for(database, connection) as helpers,
            progress("folding the log") as step,
        ):
            report = rebuilding.rebuild(connection, step, helpers)
        writer.checkpoint_if_due()
    finally:
        writer.close()
    if session.json:
        show_json({"tasks": report.tasks, "rows_mended": report.differed})
        return
    wrong = (
        f"{things(report.differed, 'difference')} mended" if report.differed else "all was right"
    )
    say(f"{things(report.tasks, 'row')} computed again; {wrong}.")


# -- redact --------------------------------------------------------------------------------------


async def redact(
    session: Session,
    ids: IdsArgument,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why; kept in the log.", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> int:
    """Remove the content of ended tasks for good: prompts, outputs, labels, error messages, files.

    What happened when stays, with usage and cost, and so do the digests of what was removed:
    `perdure verify` still holds. Backups and exports that were made before are not touched.
    """
    with Reader.open(session.url) as reader:
        rows = [find_task_row(reader, resolve(reader, given)) for given in ids]
        for row in rows:
            refuse_archived(row, "redact")
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter(
                "there is nobody to ask: say it with --yes", param_hint="--yes"
            )
        for row in rows:
            say(f"{row['task_id']}  {row['status']}  {one_line(row['prompt'] or '', 60)}")
        what = "this task" if len(rows) == 1 else f"these {len(rows)} tasks"
        say(f"Remove the content of {what} for good? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            say("Nothing was removed.")
            return ExitCode.INTERRUPTED
    async with session.engine() as engine:
        for row in rows:
            changed = await engine.redact_task(row["task_id"], reason)
            if session.json:
                show_json({"task_id": row["task_id"], "events_redacted": changed})
            elif changed:
                say(f"{row['task_id']}: the content of {things(changed, 'event')} was removed")
            else:
                say(f"{row['task_id']}: its content had been removed before")
    _name_descendants(session, [row["task_id"] for row in rows])
    return ExitCode.OK


def _name_descendants(session: Session, removed: Collection[str]) -> None:
    """Say which tasks went on from those whose content was removed, or ran the same: its text."""
    with Reader.open(session.url) as reader:
        found = {
            row["task_id"]: None
            for one in removed
            for row in reader.rows(_SAME_TEXT, (one, one, one))
            if row["task_id"] not in removed
        }
    if found:
        say(
            f"{things(len(found), 'task')} went on from what was removed or ran the same, and may "
            f"hold its text: `{session.command_line('redact', *found)}`"
        )
