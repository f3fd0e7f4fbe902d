"""`perdure worker` and `perdure resume`: run what is waiting, whoever submitted it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.options import ConcurrencyOption
from perdure.cli.session import Session
from perdure.cli.summary import Summary
from perdure.cli.terminal import say, show_json

if TYPE_CHECKING:
    from perdure.batch import Failures
    from perdure.store.claims import Scope

__all__ = ["resume", "run_scope", "worker"]


async def worker(
    session: Session,
    platforms: Annotated[
        list[str] | None,
        typer.Option(
            "--platforms",
            "--platform",
            "-p",
            metavar="NAME,…",
            help="Only tasks of these platforms; default: of all that can be used here.",
        ),
    ] = None,
    concurrency: ConcurrencyOption = 8,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="End when nothing is left to run.")
    ] = False,
) -> int:
    """Run what is pending, also what others submit, until it is stopped.

    Tasks of platforms that can't be used on this machine are left to other workers. Ctrl-C lets
    what runs finish; SIGTERM hands it back at once, to be run by another worker.
    """
    from perdure.errors import InvalidTask, NotConfigured
    from perdure.platforms import Platforms
    from perdure.store.claims import Scope

    named = tuple(name.strip() for given in platforms or () for name in given.split(","))
    if "" in named:
        raise InvalidTask("--platforms: give names, separated by commas")
    installed = Platforms.configured()
    for name in named:
        installed.check(name)
    problems = {name: installed.problem(name) for name in named or installed.names}
    for problem in problems.values():
        if problem is not None and named:
            raise NotConfigured(problem)
    usable = tuple(name for name, problem in problems.items() if problem is None)
    if not usable:
        raise NotConfigured(
            "no platform can be used here: `perdure platforms` says what is missing"
        )
    say(f"This worker runs tasks of {', '.join(usable)}. Ctrl-C stops it.")
    if len(usable) < len(problems):
        left = ", ".join(name for name in problems if name not in usable)
        say(f"Left to other workers: {left}; `perdure platforms` says what is missing here.")
    scope = Scope(platforms=usable)
    return await run_scope(session, scope, concurrency, until_done=until_done, create=True)


async def resume(session: Session, concurrency: ConcurrencyOption = 8) -> int:
    """Take over what lost workers had, and run everything that is pending, to its end."""
    from perdure.store.claims import Scope

    return await run_scope(session, Scope(), concurrency, until_done=True)


async def run_scope(
    session: Session,
    scope: Scope,
    concurrency: int,
    *,
    until_done: bool,
    create: bool = False,
    title: str = "tasks",
) -> int:
    """Run the tasks of a scope, show how far it is, and say how it ended."""
    from perdure.batch import Tallying, count_batch, count_failures
    from perdure.cli.interrupts import Interrupts
    from perdure.cli.supervising import supervise
    from perdure.cli.watching import watching
    from perdure.settings import WorkerSettings

    settings = WorkerSettings(concurrency=concurrency)
    async with session.engine(create=create, scope=scope, settings=settings) as engine:
        tallying = Tallying(engine.database, scope)
        await tallying.look()
        with Interrupts() as interrupts:
            async with watching(engine, scope, title):
                await supervise(engine, interrupts, until_done=until_done)
        failures: list[Failures] = []
        if scope.batch is None:
            tally = await tallying.look()
        else:
            tally = await count_batch(engine.database, scope.batch)
            failures = await count_failures(engine.database, scope.batch) if tally.failed else []
    summary = Summary(
        batch=scope.batch,
        tally=tally,
        failures=failures,
        again=session.same_command,
        interrupted=interrupts.interrupted,
    )
    if session.json:
        show_json(summary.as_json(session))
    for line in summary.lines(session):
        say(line)
    if not until_done and not interrupts.first.is_set():
        return ExitCode.OK  # SIGTERM is how a service is ended, and nothing went wrong
    return summary.exit_code
