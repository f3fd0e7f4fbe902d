"""`perdure cancel` and `perdure retry`: ending tasks, and running ended ones again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.figures import things
from perdure.cli.finding import Status, resolve
from perdure.cli.options import BatchOption, ConcurrencyOption
from perdure.cli.session import Session
from perdure.cli.terminal import complain, say, show_json, show_line
from perdure.cli.working import run_scope
from perdure.errors import PerdureError
from perdure.store.readonly import Reader

if TYPE_CHECKING:
    from perdure.engine import Engine

__all__ = ["cancel", "retry"]

# So many at a time are written in one transaction.
_TOGETHER: Final = 500

_GOING: Final = frozenset({Status.PENDING, Status.RUNNING})

# Seconds that running tasks have to end in, between two looks (mostly it takes milliseconds), and
# between two looks for workers that are dead.
_PATIENCE: Final = 5.0
_LOOK: Final = 0.05
_RECOVERING: Final = 1.0

_IdsOrBatch = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID...]", help="Ids of tasks, or their beginnings or endings."),
]


async def cancel(
    session: Session,
    ids: _IdsOrBatch = None,
    batch: BatchOption = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="TEXT", help="Why; goes into the log.")
    ] = None,
) -> int:
    """Cancel tasks, wherever they run; what they have produced is kept. Prints their ids.

    A running task ends when its worker sees it, in a moment, unless its answer is complete by then;
    this waits up to five seconds for that. Ended ones are left as they are.
    """
    import asyncio

    chosen = _choose(session, ids, batch, (Status.PENDING, Status.RUNNING))
    telling = _Telling(session, each=batch is None)
    stopping: list[str] = []
    # The engine outside: its connection is the last one then, and leaves the database in one file.
    async with session.engine() as engine:
        with Reader.open(session.url) as reader:
            for part in chosen:
                written = await asyncio.gather(
                    *(engine.cancel_task(task_id, reason) for task_id in part)
                )
                now = _statuses(reader, part)
                for task_id, done in zip(part, written, strict=True):
                    if done and now[task_id] in _GOING:
                        stopping.append(task_id)
                    else:
                        telling.tell(task_id, now[task_id], asked=done)
            try:
                await _wait_until_stopped(engine, reader, stopping)
            finally:  # after Ctrl-C, too: what was asked for is in the log
                now = _statuses(reader, stopping)
                for task_id in stopping:
                    telling.tell(task_id, now[task_id], asked=True)
                telling.summarize()
    return ExitCode.OK


class _Telling:
    """Tells what became of tasks that were to be cancelled, and counts them."""

    def __init__(self, session: Session, *, each: bool) -> None:
        self._session = session
        self._each = each
        self._counts: Counter[str] = Counter()

    def tell(self, task_id: str, status: str, *, asked: bool) -> None:
        """Tell of one: ``asked`` is whether this command's wish is in the log."""
        cancelled = asked and status == Status.CANCELLED
        if asked:
            self._counts[status] += 1
        if self._session.json:
            show_json({"task_id": task_id, "cancelled": cancelled, "status": status})
        elif cancelled:
            show_line(task_id)
        elif not self._each:
            return
        elif not asked:
            say(f"{task_id} had ended, or was being cancelled, already.")
        elif status in _GOING:
            say(f"{task_id} was asked to stop, and does as soon as its worker sees it.")
        else:
            say(f"{task_id} {status} before it could be cancelled.")

    def summarize(self) -> None:
        """Say how many there were of each kind."""
        going = sum(self._counts.pop(status, 0) for status in _GOING)
        parts = [f"{things(self._counts.pop(Status.CANCELLED, 0), 'task')} cancelled"]
        parts += [f"{count:,} {status} before" for status, count in sorted(self._counts.items())]
        if going:
            parts.append(f"{going:,} asked to stop")
        say(f"{', '.join(parts)}.")


def _statuses(reader: Reader, task_ids: Sequence[str]) -> dict[str, str]:
    """Return how tasks stand; `unknown` where their rows are missing."""
    found = dict.fromkeys(task_ids, "unknown")
    for i in range(0, len(task_ids), _TOGETHER):
        part = task_ids[i : i + _TOGETHER]
        places = ", ".join("?" * len(part))
        query = f"SELECT task_id, status FROM tasks WHERE task_id IN ({places})"
        found.update((row["task_id"], row["status"]) for row in reader.rows(query, tuple(part)))
    return found


async def _wait_until_stopped(engine: Engine, reader: Reader, task_ids: Sequence[str]) -> None:
    """Wait until tasks have ended, for a while; those of dead workers are ended here."""
    import asyncio

    latest = time.monotonic() + _PATIENCE
    recover_at = 0.0
    while True:
        if time.monotonic() >= recover_at:
            await engine.recover_lost()
            recover_at = time.monotonic() + _RECOVERING
        now = _statuses(reader, task_ids)
        if _GOING.isdisjoint(now.values()) or time.monotonic() >= latest:
            return
        await asyncio.sleep(_LOOK)


async def retry(
    session: Session,
    ids: _IdsOrBatch = None,
    batch: BatchOption = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Of a batch: what failed. The default.")
    ] = False,
    cancelled: Annotated[
        bool, typer.Option("--cancelled", help="Of a batch: what was cancelled.")
    ] = False,
    no_run: Annotated[
        bool, typer.Option("--no-run", help="Only submit the new tasks; somebody else runs them.")
    ] = False,
    concurrency: ConcurrencyOption = 8,
) -> int:
    """Run ended tasks again, as new tasks that are linked to them; prints the new ids.

    The old ones stay as they are, with their errors. What was run again already is not run a third
    time: its latest run is what counts.
    """
    from perdure.store.claims import Scope

    if batch is None and (failed or cancelled):
        raise typer.BadParameter("goes with --batch", param_hint="--failed, --cancelled")
    statuses = [Status.FAILED] if failed or not cancelled else []
    if cancelled:
        statuses.append(Status.CANCELLED)
    chosen = _choose(session, ids, batch, statuses)
    wrong = 0
    again: list[str] = []
    async with session.engine() as engine:
        for part in chosen:
            for task_id, new in await _retry(engine, part):
                if isinstance(new, PerdureError):
                    wrong += 1
                    complain(str(new))
                    continue
                again.append(new)
                if session.json:
                    show_json({"task_id": new, "retry_of": task_id})
                else:
                    show_line(new)
    say(f"{things(len(again), 'task')} to run again.")
    if no_run or not again:
        return ExitCode.FATAL if wrong else ExitCode.OK
    scope = Scope(batch=batch) if batch is not None else Scope(task_ids=frozenset(again))
    code = await run_scope(session, scope, concurrency, until_done=True, title=batch or "tasks")
    return code or (ExitCode.FATAL if wrong else ExitCode.OK)


def _choose(
    session: Session, ids: Sequence[str] | None, batch: str | None, statuses: Sequence[Status]
) -> Iterator[list[str]]:
    """Return the ids of the tasks that are meant, in parts; of a batch only the latest runs.

    Raises:
        typer.BadParameter: Neither ids nor a batch were given, or both.
        PerdureError: There is no such task or batch.
    """
    if bool(ids) == (batch is not None):
        raise typer.BadParameter("give either ids or a batch", param_hint="ID, --batch")
    with Reader.open(session.url) as reader:
        if batch is None:
            known = list(dict.fromkeys(resolve(reader, given) for given in ids or ()))
            return (known[i : i + _TOGETHER] for i in range(0, len(known), _TOGETHER))
        if reader.one("SELECT 1 FROM tasks WHERE batch = ?", (batch,)) is None:
            raise PerdureError(f"there is no batch {batch!r}; `perdure stats` shows what there is")
    return _of_batch(session, batch, statuses)


def _of_batch(session: Session, batch: str, statuses: Sequence[Status]) -> Iterator[list[str]]:
    named = ", ".join(f"'{status}'" for status in statuses)
    query = (
        f"SELECT stream_id, task_id FROM tasks AS t WHERE batch = ? AND status IN ({named}) "
        "AND stream_id > ? AND stream_id <= ? "
        "AND NOT EXISTS (SELECT 1 FROM tasks AS again WHERE again.retry_of = t.task_id) "
        f"ORDER BY stream_id LIMIT {_TOGETHER}"
    )
    last = 0
    with Reader.open(session.url) as reader:
        # What comes later isn't meant, as what this command itself submits, and others fail again.
        newest = reader.one("SELECT max(stream_id) AS newest FROM tasks WHERE batch = ?", (batch,))
        end = 0 if newest is None else newest["newest"] or 0
        while page := list(reader.rows(query, (batch, last, end))):
            last = page[-1]["stream_id"]
            yield [row["task_id"] for row in page]


async def _retry(engine: Engine, task_ids: Sequence[str]) -> list[tuple[str, str | PerdureError]]:
    """Return task id -> the id of the task that runs it again, or why there is none."""
    import asyncio

    from perdure.batch import latest_runs

    latest = await latest_runs(engine.database, task_ids)

    async def again(task_id: str) -> str | PerdureError:
        run = latest.get(task_id)
        if run is not None and run.status == "completed":
            return PerdureError(f"{task_id} was run again already: {run.task_id} is completed")
        if run is not None and not run.unsuccessful:
            return run.task_id
        try:
            return (await engine.retry_task(task_id if run is None else run.task_id)).task_id
        except PerdureError as error:
            return error

    return list(zip(task_ids, await asyncio.gather(*map(again, task_ids)), strict=True))
