"""`perdure run` and `perdure submit`: the rows of a file as a batch of tasks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.figures import count, things
from perdure.cli.options import ConcurrencyOption, TaskOptions
from perdure.cli.session import Session
from perdure.cli.summary import Summary
from perdure.cli.terminal import complain, say, show_json, show_line
from perdure.errors import InvalidTask

if TYPE_CHECKING:
    from perdure.batch import Defaults, Intake, Ledger, Source, Taken
    from perdure.engine import Engine
    from perdure.store.database import Database

__all__ = ["run", "submit"]


class RowLayout(StrEnum):
    """How rows are written down."""

    JSONL = "jsonl"
    CSV = "csv"


NameOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--name", "-n", metavar="NAME", help="The batch's name; default: from the file's name."
    ),
]
LayoutOption: TypeAlias = Annotated[
    RowLayout | None,
    typer.Option(
        "--format", metavar="jsonl|csv", help="How the rows are written; default: found out."
    ),
]
RetryOption: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Run rows again that failed or were cancelled, as they are in the file now.",
    ),
]


async def run(
    session: Session,
    file: Annotated[
        str, typer.Argument(metavar="FILE|-", help="JSON lines or CSV, a row a task; - is stdin.")
    ],
    task: TaskOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE|-",
            help="Where the results go, as JSON lines in the order of the input; - is stdout.",
        ),
    ] = None,
    concurrency: ConcurrencyOption = 8,
    name: NameOption = None,
    retry_failed: RetryOption = False,
    layout: LayoutOption = None,
) -> int:
    """Run a file of tasks, or go on with it.

    Running the same command again does only what isn't done. Ctrl-C lets what runs finish; twice
    cancels it and keeps the partial output.
    """
    from perdure.batch import Ledger, count_batch, count_failures
    from perdure.cli.interrupts import Interrupts
    from perdure.cli.supervising import supervise
    from perdure.cli.watching import watching
    from perdure.settings import WorkerSettings
    from perdure.store.claims import Scope

    source, batch, defaults = _prepare(session, file, name, task, out)
    scope = Scope(batch=batch)
    settings = WorkerSettings(concurrency=concurrency)
    written = None
    with Ledger() as ledger:
        async with session.engine(create=True, scope=scope, settings=settings) as engine:
            kept = None if out is None else ledger
            intake = _intake(engine, source, batch, defaults, retry_failed, kept)
            with Interrupts() as interrupts:
                async with watching(engine, scope, batch):
                    feeding = _feed(intake, source, layout)
                    complete = await supervise(engine, interrupts, feeding=feeding)
                if out is not None and complete and not interrupts.terminated.is_set():
                    written = await _write_results(engine.database, ledger, out)
            tally = await count_batch(engine.database, batch)
            failures = await count_failures(engine.database, batch) if tally.failed else []
    summary = Summary(
        batch=batch,
        tally=tally,
        again=session.same_command,
        counts=intake.counts,
        out=written,
        failures=failures,
        interrupted=interrupts.interrupted,
    )
    if session.json and written != "-":
        show_json(summary.as_json(session))
    for line in summary.lines(session):
        say(line)
    return summary.exit_code


async def submit(
    session: Session,
    task: TaskOptions,
    file: Annotated[
        str | None, typer.Argument(metavar="FILE|-", help="JSON lines or CSV, a row a task.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="One task instead of a file.")
    ] = None,
    name: NameOption = None,
    retry_failed: RetryOption = False,
    layout: LayoutOption = None,
) -> int:
    """Write tasks down to be run by somebody else, such as `perdure worker`; prints their ids."""
    if (file is None) == (prompt is None):
        raise typer.BadParameter("give either a file or a prompt", param_hint="FILE, --prompt")
    if file is None:
        return await _submit_one(session, prompt or "", task)
    from perdure.batch import Ledger, each_result

    source, batch, defaults = _prepare(session, file, name, task, None, runs_here=False)
    with Ledger() as ledger:
        async with session.engine(create=True) as engine:
            intake = _intake(engine, source, batch, defaults, retry_failed, ledger)
            await _feed(intake, source, layout)
            async with aclosing(each_result(engine.database, ledger)) as results:
                async for result in results:
                    _show_submitted(session, result)
    counts = intake.counts
    known = counts.known + counts.repeated
    say(f"{batch}: {count(counts.new + counts.retried)} submitted, {count(known)} known already")
    if counts.bad:
        say(f"{things(counts.bad, 'row')} could not be submitted.")
    say(f"To run them: {session.command_line('worker', '--until-done')}")
    return ExitCode.SOME_FAILED if counts.bad else ExitCode.OK


def _show_submitted(session: Session, result: Mapping[str, Any]) -> None:
    if session.json:
        names = ("line", "id", "task_id", "status", "error")
        show_json({name: result.get(name) for name in names})
    elif result["task_id"] is not None:
        show_line(result["task_id"])


async def _submit_one(session: Session, prompt: str, options: TaskOptions) -> int:
    from perdure.task import Task, TaskConstraints

    options.check()
    constraints = TaskConstraints(**options.constraints())
    one = Task(prompt=prompt, constraints=constraints, **options.task_fields())
    async with session.engine(create=True) as engine:
        task_id = await engine.submit_task(one)
    if session.json:
        show_json({"task_id": task_id})
    else:
        show_line(task_id)
    return ExitCode.OK


def _prepare(
    session: Session,
    file: str,
    name: str | None,
    options: TaskOptions,
    out: Path | None,
    *,
    runs_here: bool = True,
) -> tuple[Source, str, Defaults]:
    """Check everything that can be checked before anything is written."""
    from perdure.batch import Defaults, batch_name, open_source
    from perdure.wholefile import WholeFile

    options.check(runs_here=runs_here)
    source = open_source(file)
    batch = batch_name(source.batch if name is None else name)
    if out is not None and str(out) != "-":
        WholeFile.check(out, "--out", session.file)
        if source.reads(out):
            raise InvalidTask(f"--out: {out} is the input; name another file")
    return source, batch, Defaults({**options.task_fields(), **options.constraints()})


def _intake(
    engine: Engine,
    source: Source,
    batch: str,
    defaults: Defaults,
    retry: bool,
    ledger: Ledger | None,
) -> Intake:
    from perdure.batch import Intake

    return Intake(
        engine,
        batch,
        defaults,
        retry=retry,
        on_taken=lambda rows: _note(rows, ledger),
        on_remark=lambda remark: complain(f"{source.name}: {remark}"),
    )


async def _feed(intake: Intake, source: Source, layout: RowLayout | None) -> None:
    from perdure.batch import Layout

    given = None if layout is None else Layout(layout.value)
    await intake.take(source.rows(given, lambda remark: complain(f"{source.name}: {remark}")))
    if not intake.counts.rows:
        complain(f"{source.name}: there are no rows in it")


def _note(rows: Sequence[Taken], ledger: Ledger | None) -> None:
    for row in rows:
        if row.problem is not None:
            own = f" (id {row.id!r})" if row.id is not None else ""
            complain(f"line {row.line}{own}: {row.problem}")
    if ledger is not None:
        ledger.add(rows)


async def _write_results(database: Database, ledger: Ledger, out: Path) -> str:
    from perdure.batch import each_result, result_line
    from perdure.wholefile import WholeFile

    async with aclosing(each_result(database, ledger)) as results:
        if str(out) == "-":
            async for result in results:
                sys.stdout.buffer.write(result_line(result))
            sys.stdout.buffer.flush()
        else:
            with WholeFile(out) as whole:
                async for result in results:
                    whole.write(result_line(result))
    return str(out)
