"""Who works on what: due tasks, claimed and taken away again. Runs inside a `Transaction`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import sqlalchemy as sa

from perdure.errors import DatabaseCorrupt, DatabaseIncompatible
from perdure.events import Event, Running, Submitted, decode
from perdure.lifecycle import TaskState
from perdure.store.database import Database
from perdure.store.direct import Statement, has_one_of, is_among
from perdure.store.liveness import beat, forget_worker
from perdure.store.projection import TaskFold
from perdure.store.schema import blobs, events, streams, tasks
from perdure.store.scoping import RULES, Scope, Unreadable
from perdure.store.transaction import IN_LIMIT, Transaction, chunks_of
from perdure.task import TaskStatus
from perdure.unchecked import unchecked

__all__ = [
    "Claimed",
    "Recovered",
    "Scope",
    "claim",
    "left_by_status",
    "load_blobs",
    "next_due",
    "next_due_in",
    "recover",
    "recover_one",
    "unfinished",
    "unfinished_ids",
]


class Claimed(NamedTuple):
    """A task that a worker owns from now on.

    Attributes:
        task_id: The task.
        state: Where it stands, the claim included.
        submitted: What was asked for.
        output: The text before the claim: to go on from, or to be repaired.
        previous: The state before the claim: what there is to re-attach to.
    """

    task_id: str
    state: TaskState
    submitted: Submitted
    output: str
    previous: TaskState


def claim(
    tx: Transaction,
    worker: str,
    limit: int,
    scope: Scope,
    models: Mapping[str, str | None],
    unreadable: Unreadable | None = None,
    lease: timedelta | None = None,
) -> list[Claimed]:
    """Take up to ``limit`` due tasks, by priority, then age: two workers can't get the same one.

    Also those that are submitted in the very same transaction, if that was before.

    Args:
        tx: The transaction.
        worker: Who takes them.
        limit: How many at most.
        scope: Which ones.
        models: Platform -> the model to use where a task names none.
        unreadable: Is told of tasks that are due and can't be read. They are left alone, and take
            the place of others unless the scope excludes them.
        lease: For how long the worker's signs of life hold, should nobody know it any more.
    """
    due = _due_tasks(tx, scope, limit)
    fresh = _due_at_once(tx, scope)
    if fresh:  # they are younger, so those that are equal stay in order
        due = sorted([*due, *((task_id, fresh[task_id][0]) for task_id in fresh)], key=_priority)
    folds = _folds(tx, [task_id for task_id, _priority in due[:limit]], unreadable)
    asked = _submitted(tx, folds.values(), {one: fresh[one][1] for one in fresh})
    claimed: list[Claimed] = []
    for task_id, fold in folds.items():
        before = fold.state
        if before.status is not TaskStatus.PENDING:
            continue  # cancelled in this very transaction, whose rows come last
        output = fold.text  # a new beginning forgets it, and an answer to be repaired is needed
        started = unchecked(
            Running,
            {
                "attempt": before.attempt + 1,
                "worker": worker,
                "platform": before.platform,
                "model": before.model or models.get(before.platform),
                "mode": before.next_mode,
            },
        )
        tx.append(task_id, (started,), before.version)
        claimed.append(Claimed(task_id, fold.state, asked[task_id], output, before))
    if claimed:
        beat(tx, worker, lease)  # who owns something is never without a row that says it is alive
    return claimed


def _priority(due: tuple[str, int]) -> int:
    _task_id, priority = due
    return priority


def _due_at_once(tx: Transaction, scope: Scope) -> dict[str, tuple[int, Submitted]]:
    """Return what was submitted in this very transaction: task -> priority and first event."""
    rules = scope.rules()
    return {
        fold.task_id: (asked.task.get("priority", 5), asked)
        for fold, asked in tx.begun()
        if fold.state.status is TaskStatus.PENDING
        and fold.state.available_at <= tx.at
        and all(rule.admits(values, fold, asked) for rule, values in rules)
    }


def _due_tasks(tx: Transaction, scope: Scope, limit: int) -> list[tuple[str, int]]:
    """Return what was submitted before: task and priority, in the order of being served."""
    fields, values = _restrictions(scope)
    rows = _due(fields).rows(tx.connection, tx.at, limit, *values)
    return [(task_id, priority) for task_id, priority in rows]


def _restrictions(scope: Scope) -> tuple[tuple[str, ...], list[Any]]:
    """Return the fields of a scope that restrict something, and their values."""
    rules = scope.rules()
    return tuple(rule.field for rule, _values in rules), [values for _rule, values in rules]


def _pending(fields: tuple[str, ...]) -> list[sa.ColumnElement[bool]]:
    """Return what holds of what waits in such scopes: each field is a parameter of its name."""
    pending = tasks.c.status == sa.literal_column("'pending'")  # so that its index can be used
    return [pending, *(rule.condition_on_parameter() for rule in RULES if rule.field in fields)]


@cache
def _due(fields: tuple[str, ...]) -> Statement:
    """Return the statement for what is due in scopes in which these fields restrict something."""
    return Statement(
        sa.select(tasks.c.task_id, tasks.c.priority)
        .where(
            tasks.c.available_at <= sa.bindparam("now", type_=tasks.c.available_at.type),
            *_pending(fields),
        )
        .join(streams, streams.c.stream_id == tasks.c.stream_id)
        .order_by(tasks.c.priority, tasks.c.stream_id)
        .limit(sa.bindparam("most", type_=sa.Integer()))
        # The stream is what everyone locks first, before any row of `tasks`.
        .with_for_update(skip_locked=True, of=streams),
        ("now", "most", *fields),
    )


_FIRST_EVENTS: Final = Statement(
    sa.select(events.c.stream_id, events.c.type, events.c.schema_version, events.c.data).where(
        is_among(events.c.stream_id, "stream_ids"), events.c.version == 1
    ),
    ("stream_ids",),
)


def _folds(
    tx: Transaction, task_ids: Sequence[str], unreadable: Unreadable | None
) -> dict[str, TaskFold]:
    """Return the folds of these streams, without those that this perdure can't read."""
    tx.prefetch(task_ids)
    found: dict[str, TaskFold] = {}
    for task_id in task_ids:
        try:
            found[task_id] = _fold(tx, task_id)
        except (DatabaseCorrupt, DatabaseIncompatible) as error:
            if unreadable is not None:
                unreadable.note(task_id, error)
    return found


def _fold(tx: Transaction, task_id: str) -> TaskFold:
    fold = tx.fold(task_id)
    if fold is None:
        raise DatabaseCorrupt(f"{task_id} has a row and no events: run `perdure verify`")
    return fold


def _submitted(
    tx: Transaction,
    folds: Iterable[TaskFold],
    known: Mapping[str, Submitted] = MappingProxyType({}),
) -> dict[str, Submitted]:
    """Return the first events of these streams, of which some are known."""
    found: dict[str, Submitted] = {}
    unknown: dict[int, str] = {}
    for fold in folds:
        first = known.get(fold.task_id, fold.asked)
        if first is not None:
            found[fold.task_id] = first
        else:
            unknown[fold.stream_id] = fold.task_id
    stream_ids = list(unknown)
    for begin in range(0, len(stream_ids), IN_LIMIT):
        part = stream_ids[begin : begin + IN_LIMIT]
        for stream_id, type_, schema_version, data in _FIRST_EVENTS.rows(tx.connection, part):
            event = decode(type_, schema_version, data)
            if isinstance(event, Submitted):
                found[unknown[stream_id]] = event
    return found


async def next_due(database: Database, scope: Scope) -> datetime | None:
    """Return when the next pending task of the scope may begin; None where none is pending."""
    fields, values = _restrictions(scope)
    (row,) = await database.fetch(_next_due(fields), *values)
    due: datetime | None = row["due"]
    return due


def next_due_in(tx: Transaction, scope: Scope) -> datetime | None:
    """Do as `next_due`, in a transaction."""
    fields, values = _restrictions(scope)
    ((due,),) = _next_due(fields).rows(tx.connection, *values)
    found: datetime | None = due
    return found


@cache
def _next_due(fields: tuple[str, ...]) -> Statement:
    """Return the statement for the next task in scopes in which these fields restrict something."""
    first = sa.func.min(tasks.c.available_at, type_=tasks.c.available_at.type)
    return Statement(sa.select(first.label("due")).where(*_pending(fields)), fields)


async def unfinished(database: Database, scope: Scope) -> int:
    """Return how many tasks of the scope are pending or running, whoever runs them."""
    return sum(row["tasks"] for row in await database.rows(left_by_status(scope)))


async def unfinished_ids(database: Database, scope: Scope) -> list[str]:
    """Return which tasks of the scope are pending or running, the oldest first."""
    rows = await database.rows(
        sa.select(tasks.c.task_id)
        .where(tasks.c.status.in_(("pending", "running")), *scope.conditions())
        .order_by(tasks.c.stream_id)
    )
    return [row["task_id"] for row in rows]


def left_by_status(scope: Scope) -> sa.CompoundSelect[str, int]:
    """Return the SQL for how many tasks of the scope are pending, and how many running.

    One after the other, for each has an index that it alone is in; asked for together, they are
    looked for among all tasks.
    """
    return sa.union_all(
        *(
            sa.select(sa.literal(status).label("status"), sa.func.count().label("tasks"))
            .select_from(tasks)
            .where(tasks.c.status == status, *scope.conditions())
            for status in ("pending", "running")
        )
    )


async def load_blobs(database: Database, digests: Sequence[str]) -> dict[str, bytes]:
    """Return digest -> content, for those that are still there."""
    found: dict[str, bytes] = {}
    for part in chunks_of(digests):
        for row in await database.rows(
            sa.select(blobs.c.digest, blobs.c.data).where(blobs.c.digest.in_(part))
        ):
            found[row["digest"]] = bytes(row["data"])
    return found


# -- recovering ----------------------------------------------------------------------------------


_BATCH: Final = 200

# Returns what to write for a task that its worker has lost, from its state and its constraints.
Decide = Callable[[TaskState, Mapping[str, Any]], Sequence[Event]]


# Platform and id of a response that nobody listens to any more.
OpenCall = tuple[str, str]


class Recovered(NamedTuple):
    """What was taken away from a lost worker.

    Attributes:
        tasks: How many tasks; 0 when it has none left.
        left: Calls of tasks that have ended by that, which may go on at their platforms.
    """

    tasks: int
    left: Sequence[OpenCall] = ()


def recover(
    tx: Transaction, lost: str, decide: Decide, unreadable: Unreadable | None = None
) -> Recovered:
    """Take running tasks away from a lost worker, many of them at a time.

    Args:
        tx: The transaction.
        lost: The worker.
        decide: Returns what to write for a task, from its state and its constraints.
        unreadable: The tasks that can't be read: those are left as they are, until somebody can.
    """
    unreadable = unreadable or Unreadable()
    while owned := tx.connection.scalars(_owned(lost, unreadable.task_ids)).all():
        folds = _folds(tx, owned, unreadable)
        if folds:
            asked = _submitted(tx, folds.values())
            left = [
                _take_away(tx, fold, lost, asked[task_id], decide)
                for task_id, fold in folds.items()
            ]
            return Recovered(len(folds), [call for call in left if call is not None])
    forget_worker(tx, lost)
    return Recovered(0)


def _owned(worker: str, excluded: Collection[str]) -> sa.Select[str]:
    owned = (
        sa.select(tasks.c.task_id)
        .where(tasks.c.status == "running", tasks.c.worker == worker)
        .join(streams, streams.c.stream_id == tasks.c.stream_id)
        .limit(_BATCH)
        .with_for_update(skip_locked=True, of=streams)
    )
    return owned.where(sa.not_(has_one_of(tasks.c.task_id, excluded))) if excluded else owned


def recover_one(tx: Transaction, claimed: Claimed, decide: Decide) -> OpenCall | None:
    """Take a task away from the worker that has claimed it, where it still owns it.

    Returns:
        The call that may go on at its platform, where the task has ended by that.
    """
    fold = tx.fold(claimed.task_id)
    if fold is None:
        return None
    return _take_away(tx, fold, str(claimed.state.worker), claimed.submitted, decide)


def _take_away(
    tx: Transaction, fold: TaskFold, worker: str, asked: Submitted, decide: Decide
) -> OpenCall | None:
    state = fold.state
    if state.status is not TaskStatus.RUNNING or state.worker != worker:
        return None  # changed since it was looked up, as in this transaction, whose rows come last
    constraints: dict[str, Any] = asked.task.get("constraints") or {}
    following = decide(state, constraints)
    tx.append(fold.task_id, following, fold.version)
    return state.open_call if following[-1].ends_task else None
