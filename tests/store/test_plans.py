"""What workers ask again and again is answered from indexes that ended tasks are not in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from perdure.events import Submitted
from perdure.store.claims import Scope, claim, left_by_status
from perdure.store.database import Database
from perdure.store.fetching import head_and_news
from perdure.store.liveness import register_worker
from perdure.store.transaction import FoldCache, Transaction
from store.backends import Backend, opened


async def test_what_is_left_is_not_looked_for_among_all_tasks(
    backend: Backend, database_url: str
) -> None:
    """How many tasks are pending and how many running is counted in the index of each."""
    async with opened(database_url) as store:
        await store.start("runs")
        for name in ("waits", "waits, too"):
            await store.submit(name)
        rows = await store.database.rows(left_by_status(Scope()))
    assert {row["status"]: row["tasks"] for row in rows} == {"pending": 2, "running": 1}
    explain = "EXPLAIN QUERY PLAN" if backend.dialect == "sqlite" else "EXPLAIN"
    for scope in (Scope(), Scope(platforms=("demo",))):
        with Database(database_url).snapshot() as connection:
            if backend.dialect == "postgresql":  # so few rows are read faster without an index
                connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
            asked = left_by_status(scope).compile(
                connection.engine, compile_kwargs={"literal_binds": True}
            )
            plan = str(connection.execute(sa.text(f"{explain} {asked}")).all())
        assert "tasks_due" in plan, plan
        assert "tasks_running" in plan, plan


@pytest.mark.parametrize(
    ("scope", "index"),
    [
        (Scope(), "tasks_due"),
        (Scope(platforms=("demo", "other")), "tasks_due"),
        (Scope(platforms=("demo",), batch="b"), "tasks_due_in_batch"),
        (Scope(batch="b"), "tasks_due_in_batch"),
    ],
    ids=["everything", "platforms", "a batch on a platform", "a batch"],
)
def test_what_is_due_is_found_in_its_order(tmp_path: Path, scope: Scope, index: str) -> None:
    """The first tasks are read off an index; nothing that waits is sorted for them.

    On SQLite: what PostgreSQL does depends on its statistics.
    """
    database = Database(tmp_path / "log.db")
    database.prepare()
    writer = database.writer()
    asked: list[str] = []
    try:
        with writer.transaction() as connection:
            transaction = Transaction(connection, FoldCache(), writer.now)
            register_worker(transaction, "w")
            for number in range(200):
                task = {"prompt": "Hello", "batch": "b" if number % 2 else "other"}
                event = Submitted(task=task, platforms=("demo",))
                transaction.append(f"demo_{number}", (event,), 0)
            transaction.flush()
        with writer.transaction() as connection:
            raw: Any = connection.connection.dbapi_connection
            raw.set_trace_callback(asked.append)
            transaction = Transaction(connection, FoldCache(), writer.now)
            assert len(claim(transaction, "w", 3, scope, {})) == 3
            raw.set_trace_callback(None)
        (due,) = (statement for statement in asked if "'pending'" in statement)
        with writer.transaction() as connection:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {due}").all()
    finally:
        writer.close()
    plan = [row[3] for row in rows]
    assert any(step.split(" (")[0].endswith(f"USING INDEX {index}") for step in plan), plan
    assert not any("TEMP B-TREE" in step for step in plan), plan


def test_what_is_new_is_found_without_what_was_before(tmp_path: Path) -> None:
    """Following a task costs the same however long it is: the log is read from a position on.

    On SQLite: what PostgreSQL does depends on its statistics.
    """
    database = Database(tmp_path / "log.db")
    database.prepare()
    with database.snapshot() as connection:
        asked = head_and_news(of_some=True).compile(connection.engine)
        given = {**asked.params, "after": 1000, "names": '["one", "other"]'}
        parameters = tuple(given[name] for name in asked.positiontup or ())
        steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked}", parameters)
        plan = [row[3] for row in steps]
    assert "SEARCH events USING INTEGER PRIMARY KEY (rowid>?)" in plan, plan
    assert "SEARCH streams USING INTEGER PRIMARY KEY (rowid=?)" in plan, plan
