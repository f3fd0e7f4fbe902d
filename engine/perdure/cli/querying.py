"""`perdure sql`: people's own SQL, on a connection that only reads."""

from __future__ import annotations

import math
import sqlite3
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Final

import typer

from perdure.cli.exporting import export
from perdure.cli.session import Session, add_command
from perdure.cli.statistics import stats
from perdure.cli.tables import csv_line, paint, tab_line, table
from perdure.cli.terminal import is_terminal, one_line, say, show, show_json, show_line
from perdure.errors import PerdureError
from perdure.store.readonly import Reader

__all__ = ["register"]

_PANEL: Final = "Looking"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add_command(app, sql, name="sql", panel=_PANEL)
    add_command(app, export, name="export", panel=_PANEL)
    add_command(app, stats, name="stats", panel=_PANEL)


def sql(
    session: Session,
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="[QUERY]", help="One statement; - reads it from stdin.", show_default=False
        ),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="CSV with a line of names.")] = False,
) -> None:
    r"""Ask the database in SQL. Without a query: the tables and views with their columns.

    On a terminal a table; in a pipe tab-separated with a line of names, NULL as \N; with --json
    one object a line. Nothing can be changed this way.
    """
    if csv and session.json:
        raise typer.BadParameter("give either --csv or --json", param_hint="--csv")
    if query == "-":
        query = sys.stdin.read()
    if query is not None and not query.strip():
        raise typer.BadParameter("it is empty", param_hint="QUERY")
    with Reader.open(session.url) as reader:
        if query is not None:
            _write(*_ask(reader, query), csv=csv, as_json=session.json)
        elif is_terminal() and not (csv or session.json):
            _draw_schema(_columns(reader))
        else:
            _write(_SCHEMA_COLUMNS, _columns(reader), csv=csv, as_json=session.json)


def _write(
    names: Sequence[str], rows: Iterable[Sequence[object]], *, csv: bool, as_json: bool
) -> None:
    if as_json:
        keys = _distinct(names)
        for row in rows:
            show_json({key: _json_value(value) for key, value in zip(keys, row, strict=True)})
    elif is_terminal() and not csv:
        if names and not table(names, rows):
            say("There are no such rows.")
    elif names:
        line = csv_line if csv else tab_line
        show(line(names))
        for row in rows:
            show(line(row))


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names for the fields of an object: of several that are equal, `x`, `x_2`, `x_3`."""
    found: dict[str, None] = {}
    for name in names:
        free, number = name, 1
        while free in found:
            number += 1
            free = f"{name}_{number}"
        found[free] = None
    return list(found)


def _json_value(value: object) -> object:
    # JSON has no infinity, and no bytes: those are shown as the digests are.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _ask(reader: Reader, query: str) -> tuple[Sequence[str], Iterator[Sequence[object]]]:
    """Begin a query and return its columns and its rows, which come as they are found.

    Raises:
        PerdureError: It isn't one statement that reads, or SQLite can't make sense of it.
    """
    if reader.dialect != "sqlite":
        from perdure.store.postgresql_reader import PostgresqlReader

        if isinstance(reader, PostgresqlReader):
            return reader.ask(query)
    refused: list[str] = []

    def judge(action: int, first: Any, *_more: Any) -> int:  # noqa: ANN401
        if action in _READING or (action == sqlite3.SQLITE_PRAGMA and first in _PRAGMAS):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_UPDATE and first == "sqlite_master":
            return sqlite3.SQLITE_OK  # so it asks where a function is used like a table
        refused.append(str(first))
        return sqlite3.SQLITE_DENY

    reader.connection.set_authorizer(judge)
    try:
        cursor = reader.connection.execute(query)
    except (sqlite3.Error, sqlite3.Warning, UnicodeEncodeError) as error:
        raise _explained(error, refused) from None
    names = [column[0] for column in cursor.description or ()]
    return names, _each(cursor, refused)


def _each(cursor: sqlite3.Cursor, refused: Sequence[str]) -> Iterator[Sequence[object]]:
    try:
        for row in cursor:
            yield tuple(row)
    except sqlite3.Error as error:
        raise _explained(error, refused) from None


def _explained(error: Exception, refused: Sequence[str]) -> BaseException:
    name = getattr(error, "sqlite_errorname", None) or ""
    if name == "SQLITE_INTERRUPT":
        return KeyboardInterrupt()
    message = one_line(str(error))
    if refused or name.startswith("SQLITE_READONLY"):
        return PerdureError("`perdure sql` only reads: give a SELECT; nothing was changed")
    if "one statement at a time" in message:
        return PerdureError("give one statement at a time")
    if "bindings" in message:
        return PerdureError("the query has a placeholder (? or :name): put a value in its place")
    return PerdureError(f"SQL: {message}")


_READING: Final = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)
_PRAGMAS: Final = frozenset(
    {"table_info", "table_xinfo", "table_list", "index_list", "index_info", "index_xinfo"}
    | {"foreign_key_list", "function_list", "compile_options", "page_count", "page_size"}
    | {"freelist_count", "integrity_check", "quick_check"}
)


_SCHEMA_COLUMNS: Final = ("table", "kind", "column", "type")


def _columns(reader: Reader) -> Iterator[Sequence[str]]:
    """Yield table, kind, column and type for everything that people may ask for."""
    if reader.dialect != "sqlite":
        from perdure.store.postgresql_reader import PostgresqlReader

        if isinstance(reader, PostgresqlReader):
            yield from reader.columns()
            return
    kinds = reader.rows(
        "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') "
        "AND name NOT LIKE 'sqlite_%' AND name <> 'alembic_version' ORDER BY type, name"
    )
    for name, kind in list(kinds):
        for column in reader.rows("SELECT name, type FROM pragma_table_info(?)", (name,)):
            yield name, kind, column["name"], column["type"].lower()


def _draw_schema(rows: Iterable[Sequence[str]]) -> None:
    shown = ""
    for name, kind, column, type_ in rows:
        if name != shown:
            show_line(("\n" if shown else "") + f"{name} ({kind})")
            shown = name
        sys.stdout.write(f"  {column:<20}" + paint(type_, "dim") + "\n")
