"""`docs/sql.md` says what is there, and its queries run."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from invoking import Perdure
from stories import complete, fail, running, submit, tell

from perdure.events import CancelRequested, Chunk

PAGE = (Path(__file__).parents[2] / "docs" / "sql.md").read_text("utf-8")
QUERIES = re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)


def documented() -> dict[str, dict[str, str]]:
    """Return what the page says there is: name -> column -> type."""
    found: dict[str, dict[str, str]] = {}
    for section in PAGE.split("\n### ")[1:]:
        name = section.split("`")[1]
        rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", section, re.MULTILINE)
        assert all(meaning.strip() for _, _, meaning in rows)
        found[name] = {column: type_ for column, type_, _ in rows}
    return found


def test_tables_and_views(migrated_file: Path) -> None:
    """Every table and view of a fresh database, with its columns in their order, and no other."""
    with closing(sqlite3.connect(migrated_file)) as connection:
        kinds: dict[str, str] = dict(
            connection.execute(
                "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') "
                "AND name NOT LIKE 'sqlite_%' AND name <> 'alembic_version'"
            )
        )
        columns = {
            name: connection.execute("SELECT name, type FROM pragma_table_info(?)", (name,))
            for name in kinds
        }
        real = {name: dict(found.fetchall()) for name, found in columns.items()}
    said = documented()
    assert {name: list(found) for name, found in said.items()} == {
        name: list(real[name]) for name in said
    }
    assert {*said} == {*real}
    tables, views = PAGE.split("\n## Views\n")
    for name, kind in kinds.items():
        assert f"\n### `{name}`\n" in (tables if kind == "table" else views)
        if kind == "table":  # what type a view's columns have, SQLite knows only in part
            assert said[name] == {column: type_.lower() for column, type_ in real[name].items()}


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_queries(database: Path, migrated_file: Path, perdure: Perdure, query: str) -> None:
    """Every query runs, through `perdure sql`, on a database with tasks of all kinds."""
    database.write_bytes(migrated_file.read_bytes())
    for n in range(2):
        submit(database, f"demo_{n}", "Why?", batch="b", system="s" * 5000, labels={"team": "red"})
    complete(database, "demo_0", "Because.", cost=0.5)
    fail(database, "demo_1")
    submit(database, "demo_2", "x")
    tell(database, "demo_2", running(), Chunk(text="so far"), CancelRequested(by="me"))
    ended = perdure("sql", query)
    assert (ended.code, ended.err) == (0, "")
    assert len(ended.lines) >= 1
