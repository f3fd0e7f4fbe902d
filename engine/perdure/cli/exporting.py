"""`perdure export`: tasks or raw events as JSON lines or CSV, in constant memory."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from perdure.cli.figures import things
from perdure.cli.finding import FilterOptions
from perdure.cli.paging import PAGE_ROWS, each_row
from perdure.cli.records import EVENT_COLUMNS, TASK_COLUMNS, event_record, events_query, record_of
from perdure.cli.session import Session
from perdure.cli.tables import csv_line
from perdure.cli.terminal import json_text, say, show
from perdure.store.readonly import Reader
from perdure.wholefile import WholeFile

__all__ = ["export"]

Emit = Callable[[str], object]


def export(
    session: Session,
    which: FilterOptions,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="A file, replaced as a whole in the end; CSV if it is named so. Default: stdout.",
            show_default=False,
        ),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="CSV with a line of names.")] = False,
    events: Annotated[
        bool, typer.Option("--events", help="The tasks' events, as they are stored.")
    ] = False,
) -> None:
    """Write tasks, the oldest first, as JSON lines or CSV: every column, all of its text.

    What is submitted while it runs is left out. Other processes can go on writing.
    """
    filters = which.filters()
    out = None if out == Path("-") else out
    as_csv = csv or (out is not None and out.suffix.lower() == ".csv" and not session.json)
    if csv and session.json:
        raise typer.BadParameter("give either --csv or --json", param_hint="--csv")
    if out is not None:
        WholeFile.check(out, "--out", session.file)
    with Reader.open(session.url) as reader, _destination(out) as emit:
        where, parameters = filters.where(reader)
        rows = (_events if events else _tasks)(reader, where, parameters)
        names = EVENT_COLUMNS if events else TASK_COLUMNS
        record = event_record if events else record_of
        if as_csv:
            emit(csv_line(names))
        count = 0
        for row in rows:
            emit(csv_line(row[n] for n in names) if as_csv else json_text(record(row)) + "\n")
            count += 1
    if out is not None:
        say(f"{things(count, 'event' if events else 'task')} written to {out}")


@contextlib.contextmanager
def _destination(out: Path | None) -> Generator[Emit, None, None]:
    if out is None:
        yield show
        sys.stdout.flush()
        return
    with WholeFile(out) as file:
        # Text that is no UTF-8 can't be written as it is; nothing else has a backslash before x.
        yield lambda text: file.write(text.encode(errors="backslashreplace"))


def _tasks(reader: Reader, where: str, parameters: Mapping[str, object]) -> Iterator[sqlite3.Row]:
    """Yield the tasks that match now, in the order of their submission."""
    found = reader.rows(f"SELECT t.stream_id FROM tasks AS t WHERE {where}", parameters)
    chosen = array("q", sorted(array("q", (row["stream_id"] for row in found))))
    for first in range(0, len(chosen), PAGE_ROWS):
        named = ", ".join(map(str, chosen[first : first + PAGE_ROWS]))
        among = f"t.stream_id IN ({named})"
        yield from each_row(reader, _PAGE_OF_TASKS.format(among), {}, "stream_id")


_PAGE_OF_TASKS: Final = """
    SELECT t.* FROM tasks AS t WHERE {} AND t.stream_id > :after
    ORDER BY t.stream_id
"""


def _events(reader: Reader, where: str, parameters: Mapping[str, object]) -> Iterator[sqlite3.Row]:
    """Yield the events of the tasks that match, in the order of the log."""
    of_these = f"EXISTS (SELECT 1 FROM tasks AS t WHERE t.stream_id = e.stream_id AND {where})"
    query = events_query(
        reader,
        ("" if where == "true" else f"{of_these} AND ")
        + "e.position > :after AND e.position <= :last",
        "e.position",
    )
    head = reader.one("SELECT position FROM log_head")
    last = head["position"] if head else 0
    yield from each_row(reader, query, {**parameters, "last": last}, "position")
