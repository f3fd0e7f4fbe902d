"""`perdure list`: tasks by status, platform, batch, label, time and text."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from perdure.cli.figures import UNKNOWN, count, dollars, seconds
from perdure.cli.finding import FilterOptions
from perdure.cli.moments import duration, how_long_ago
from perdure.cli.records import record_of
from perdure.cli.session import Session
from perdure.cli.tables import tab_line, table, terminal_width
from perdure.cli.terminal import is_terminal, one_line, say, show, show_json
from perdure.store.readonly import Reader

__all__ = ["list_tasks"]

_ALL: Final = 2**62
_LISTED: Final = """
    t.task_id, t.status, t.platform, t.model, t.batch, t.submitted_at, t.started_at, t.ended_at,
    t.input_tokens, t.output_tokens, t.cost_usd, substr(t.prompt, 1, 200) AS prompt
"""


def list_tasks(
    session: Session,
    which: FilterOptions,
    limit: Annotated[
        int,
        typer.Option("--limit", "-n", metavar="N", min=0, help="At most so many; 0 for all."),
    ] = 100,
) -> None:
    """List tasks, the newest first.

    In a pipe: one task a line, tab-separated: id, status, platform, model, batch, submitted (UTC),
    seconds it ran, tokens in, tokens out, US dollars, the prompt's first 200 characters.
    """
    filters = which.filters()
    with Reader.open(session.url) as reader:
        where, parameters = filters.where(reader)
        columns = "t.*" if session.json else _LISTED
        rows = reader.rows(
            f"SELECT {columns} FROM tasks AS t WHERE {where} "
            "ORDER BY t.stream_id DESC LIMIT :limit",
            {**parameters, "limit": limit + 1 if limit else _ALL},
        )
        found = _limited(rows, limit)
        if session.json:
            for row in found:
                show_json(record_of(row))
        elif is_terminal():
            _draw(found)
        else:
            for row in found:
                show(tab_line(_fields(row)))


def _limited(rows: Iterator[sqlite3.Row], limit: int) -> Iterator[sqlite3.Row]:
    for number, row in enumerate(rows):
        if limit and number == limit:
            say(f"There are more than these {limit:,}: --limit N shows more, --limit 0 all.")
            return
        yield row


def _fields(row: sqlite3.Row) -> Sequence[object]:
    ran = duration(row["started_at"], row["ended_at"])
    return (
        *(row[name] for name in ("task_id", "status", "platform", "model", "batch")),
        row["submitted_at"],
        None if ran is None else round(ran, 3),
        *(row[name] for name in ("input_tokens", "output_tokens", "cost_usd", "prompt")),
    )


def _draw(rows: Iterator[sqlite3.Row]) -> None:
    """Draw a list in as many columns as the terminal has room for."""
    width = terminal_width()
    shown = [column for column in _COLUMNS if width >= column.from_width]
    drawn = table(
        [column.name for column in shown],
        ([column.cell(row) for column in shown] for row in rows),
        whole=("ID", "STATUS"),
        painted="STATUS",
    )
    if not drawn:
        say("There are no such tasks.")


@dataclass(frozen=True, slots=True)
class _Column:
    name: str
    cell: Callable[[sqlite3.Row], str]
    from_width: int = 0


def _tokens(row: sqlite3.Row) -> str:
    if row["input_tokens"] is None and row["output_tokens"] is None:
        return UNKNOWN
    return count((row["input_tokens"] or 0) + (row["output_tokens"] or 0))


_COLUMNS: Final = (
    _Column("ID", lambda row: row["task_id"]),
    _Column("STATUS", lambda row: row["status"]),
    _Column("MODEL", lambda row: row["model"] or UNKNOWN, 130),
    _Column("BATCH", lambda row: row["batch"] or UNKNOWN, 150),
    _Column("SUBMITTED", lambda row: how_long_ago(row["submitted_at"]), 70),
    _Column("RAN", lambda row: seconds(duration(row["started_at"], row["ended_at"])), 90),
    _Column("TOKENS", _tokens, 90),
    _Column("COST", lambda row: dollars(row["cost_usd"]), 110),
    _Column("PROMPT", lambda row: one_line(row["prompt"] or ""), 50),
)
