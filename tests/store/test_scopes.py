"""What a scope means is the same in every place that goes by it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from perdure.events import AttemptFailed, Event, Running, Submitted
from perdure.store import claims
from perdure.store.claims import Scope, left_by_status
from perdure.store.database import Database
from perdure.store.dialect import Writer
from perdure.store.schema import tasks
from perdure.store.transaction import FoldCache, Transaction
from store.backends import Backend

# What quoting could get wrong, in both ways of writing down a list of names.
ODD = st.sampled_from(
    ["", " ", "a", "A", "a,b", "{a}", "NULL", "null", '"', "'", "\\", '\\"', "%", "%s", "é", "\n"]
)
NAMES = ODD | st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=4
)
PLATFORMS = st.sampled_from(["demo", "other", "odd, {one}"])


class Given(NamedTuple):
    """A task, as far as scopes go by it; it may have fallen back to its last platform."""

    task_id: str
    platforms: tuple[str, ...]
    batch: str | None
    fell_back: bool

    @property
    def platform(self) -> str:
        """The one it waits for."""
        return self.platforms[-1 if self.fell_back else 0]

    def tell(self, tx: Transaction) -> None:
        """Write down what has happened to it."""
        asked = {"prompt": "Hello?"} | ({} if self.batch is None else {"batch": self.batch})
        told: list[Event] = [Submitted(task=asked, platforms=self.platforms)]
        if self.platform != self.platforms[0]:
            began = Running(attempt=1, worker="w", platform=self.platforms[0], model=None)
            failed = AttemptFailed(
                attempt=1,
                error_class="Overloaded",
                message="busy",
                retryable=True,
                next="fallback",
                retry_at=tx.at,
            )
            told += [began, failed]
        tx.append(self.task_id, told, 0)


TASKS = st.lists(
    st.builds(
        Given,
        NAMES,
        st.lists(PLATFORMS, min_size=1, max_size=2, unique=True).map(tuple),
        st.none() | NAMES,
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda task: task.task_id,
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Given], Scope]:
    """Return tasks, and a scope that knows some of their names."""
    given_tasks = draw(TASKS)
    ids = st.sampled_from([task.task_id for task in given_tasks]) if given_tasks else NAMES
    named = st.frozensets(ids | NAMES, max_size=5)
    batches = st.sampled_from([task.batch for task in given_tasks]) if given_tasks else NAMES
    scope = Scope(
        platforms=draw(st.none() | st.lists(PLATFORMS, max_size=2).map(tuple)),
        batch=draw(st.none() | batches | NAMES),
        task_ids=draw(st.none() | named),
        excluded=draw(st.just(frozenset[str]()) | named),
    )
    return given_tasks, scope


def is_in(task: Given, scope: Scope) -> bool:
    """Return whether a task is of a scope, as its documentation has it."""
    return (
        (scope.platforms is None or task.platform in scope.platforms)
        and (scope.batch is None or task.batch == scope.batch)
        and (scope.task_ids is None or task.task_id in scope.task_ids)
        and task.task_id not in scope.excluded
    )


class _Undo(Exception):
    """Ends a transaction without a trace."""


@pytest.fixture
def writer(backend: Backend, database_url: str) -> Generator[Writer, None, None]:
    """A connection to an empty database."""
    del backend
    writer = Database(database_url).writer()
    yield writer
    writer.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(cases())
@example(([Given("a", ("demo",), None, False)], Scope(platforms=(), task_ids=frozenset())))
def test_whatever_the_scope_all_agree(writer: Writer, case: tuple[list[Given], Scope]) -> None:
    """What is looked for, what is claimed, and what is claimed as it is submitted is the same.

    Nothing is left of it, so that all cases are tried on one database.
    """
    given_tasks, scope = case
    expected = {task.task_id for task in given_tasks if is_in(task, scope)}
    with contextlib.suppress(_Undo), writer.transaction() as connection:
        transaction = Transaction(connection, FoldCache(), writer.now)
        for task in given_tasks:
            task.tell(transaction)
        assert set(claims._due_at_once(transaction, scope)) == expected
        transaction.flush()
        due = claims._due_tasks(transaction, scope, limit=len(given_tasks) + 1)
        assert sorted(task_id for task_id, _priority in due) == sorted(expected)
        found = connection.scalars(
            sa.select(tasks.c.task_id).where(tasks.c.status == "pending", *scope.conditions())
        ).all()
        assert sorted(found) == sorted(expected)
        left = connection.execute(left_by_status(scope)).all()
        assert sorted(left) == [("pending", len(expected)), ("running", 0)]
        raise _Undo
