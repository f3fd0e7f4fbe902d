"""What workers ask again and again is answered from indexes that ended tasks are not in."""

from __future__ import annotations

import sqlalchemy as sa

from perdure.store.claims import Scope, left_by_status
from perdure.store.database import Database
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
