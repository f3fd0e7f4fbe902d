"""`perdure stats`: how many tasks, tokens and dollars, how long they took, and what went wrong."""

from __future__ import annotations

import sqlite3
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from perdure.cli.figures import UNKNOWN, count, dollars, of_these, seconds
from perdure.cli.finding import FilterOptions, Status
from perdure.cli.session import Session
from perdure.cli.tables import paint, table
from perdure.cli.terminal import is_terminal, one_line, say, show_json, show_line
from perdure.store.readonly import Reader

__all__ = ["stats"]

Counts = dict[str, Any]

_TOKENS: Final = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
)

_PARTS: Final = (
    ("cache_read_tokens", "read from cache"),
    ("cache_write_tokens", "written to cache"),
    ("reasoning_tokens", "reasoning"),
)

# One pass over the tasks; the columns of each group and of the whole.
_SUMS: Final = ", ".join(
    (
        "count(*) AS tasks",
        *(f"count(*) FILTER (WHERE t.status = '{status}') AS {status}" for status in Status),
        *(f"sum(t.{name}) AS {name}" for name in _TOKENS),
        "sum(t.cost_usd) AS cost_usd",
        # Whatever was begun may have cost something.
        "count(*) FILTER (WHERE t.cost_usd IS NULL AND t.attempts > 0) AS unpriced_tasks",
    )
)
# Wider than any line, where nobody looks at it on a terminal.
_NEVER_CUT: Final = 1_000_000


def stats(
    session: Session,
    which: FilterOptions,
) -> None:
    """Sum tasks up: by status, platform, model, batch and error; tokens, cost, and how long.

    With --json one object a line: the whole (kind total), then one for each platform and model
    (kind model), batch and error.
    """
    filters = which.filters()
    with Reader.open(session.url) as reader:
        found = list(_sum_up(reader, *filters.where(reader)))
    if session.json:
        for one in found:
            show_json(one)
    else:
        _draw(found)


def _sum_up(reader: Reader, where: str, parameters: dict[str, object]) -> Iterator[Counts]:
    def grouped(by: str, more: str = "true") -> Iterator[sqlite3.Row]:
        columns = f"{by}, " if by else ""
        tail = f"GROUP BY {by} ORDER BY tasks DESC, {by}" if by else ""
        query = f"SELECT {columns}{_SUMS} FROM tasks AS t WHERE {where} AND {more} {tail}"
        return reader.rows(query, parameters)

    ran = _durations(reader, where, parameters)
    everything = [length for lengths in ran.values() for length in lengths]
    for row in grouped(""):
        yield {"kind": "total", **dict(row), **_percentiles(everything)}
    for row in grouped("t.platform, t.model"):
        lengths = ran.get((row["platform"], row["model"]), ())
        yield {"kind": "model", **dict(row), **_percentiles(lengths)}
    for row in grouped("t.batch", "t.batch IS NOT NULL"):
        yield {"kind": "batch", **dict(row)}
    errors = reader.rows(
        "SELECT t.platform, t.error_class, count(*) AS tasks, max(t.stream_id) AS latest "
        f"FROM tasks AS t WHERE {where} AND t.error_class IS NOT NULL "
        "GROUP BY t.platform, t.error_class ORDER BY tasks DESC, t.platform, t.error_class",
        parameters,
    )
    for row in errors:
        said = reader.one(
            "SELECT task_id AS last_task_id, error AS last_error FROM tasks WHERE stream_id = ?",
            (row["latest"],),
        )
        named = {name: row[name] for name in ("platform", "error_class", "tasks")}
        yield {"kind": "error", **named, **(dict(said) if said else {})}


def _durations(
    reader: Reader, where: str, parameters: dict[str, object]
) -> dict[tuple[str, str | None], array[float]]:
    """Return the seconds that completed tasks ran, by platform and model."""
    found: dict[tuple[str, str | None], array[float]] = {}
    ran = reader.seconds("t.started_at", "t.ended_at")
    rows = reader.rows(
        f"SELECT t.platform, t.model, {ran} FROM tasks AS t WHERE {where} "
        "AND t.status = 'completed'",
        parameters,
    )
    for platform, model, ran in rows:
        if ran is not None:
            found.setdefault((platform, model), array("d")).append(ran)
    return found


def _percentiles(lengths: Iterable[float]) -> dict[str, float | None]:
    """Return the length that half of the tasks, and that 95 of 100, did not exceed."""
    ordered = sorted(lengths)
    return {
        f"p{percent}_seconds": round(ordered[-(-len(ordered) * percent // 100) - 1], 3)
        if ordered
        else None
        for percent in (50, 95)
    }


def _draw(found: Sequence[Counts]) -> None:
    total = found[0]
    if not total["tasks"]:
        say("There are no such tasks.")
        return
    for name, value in _overview(total):
        show_line(f"{name:<10}{value}")
    for kind, heading, columns in _TABLES:
        rows = [one for one in found if one["kind"] == kind]
        if rows:
            sys.stdout.write("\n" + paint(heading, "bold") + "\n")
            table(
                [name for name, _ in columns],
                ([cell(one) for _, cell in columns] for one in rows),
                width=None if is_terminal() else _NEVER_CUT,
            )


def _overview(total: Counts) -> Iterator[tuple[str, str]]:
    yield "tasks", f"{count(total['tasks'])}: {_by_status(total)}"
    tokens = [f"{count(total['input_tokens'])} in", f"{count(total['output_tokens'])} out"]
    parts = [f"{count(total[name])} {words}" for name, words in _PARTS if total[name]]
    yield "tokens", ", ".join(tokens + parts)
    yield "cost", _cost(total)
    if total["p50_seconds"] is not None:
        half, most = seconds(total["p50_seconds"]), seconds(total["p95_seconds"])
        yield "duration", f"half within {half}, 95 of 100 within {most}"


Column = tuple[str, Callable[[Counts], str]]


def _tokens(one: Counts) -> str:
    if one["input_tokens"] is None and one["output_tokens"] is None:
        return UNKNOWN
    return count((one["input_tokens"] or 0) + (one["output_tokens"] or 0))


def _by_status(one: Counts) -> str:
    return of_these((one[status], status) for status in Status)


def _cost(one: Counts) -> str:
    unpriced = one["unpriced_tasks"]
    known = [] if one["cost_usd"] is None and unpriced else [dollars(one["cost_usd"])]
    return ", ".join(known + ([f"unknown for {unpriced:,}"] if unpriced else []))


_TABLES: Final[Sequence[tuple[str, str, Sequence[Column]]]] = (
    (
        "model",
        "By platform and model",
        (
            ("PLATFORM", lambda one: one["platform"]),
            ("MODEL", lambda one: one["model"] or UNKNOWN),
            ("TASKS", lambda one: count(one["tasks"])),
            ("FAILED", lambda one: count(one["failed"])),
            ("TOKENS", _tokens),
            ("P50", lambda one: seconds(one["p50_seconds"])),
            ("P95", lambda one: seconds(one["p95_seconds"])),
            ("COST", _cost),
        ),
    ),
    (
        "batch",
        "By batch",
        (
            ("BATCH", lambda one: one["batch"]),
            ("TASKS", _by_status),
            ("TOKENS", _tokens),
            ("COST", _cost),
        ),
    ),
    (
        "error",
        "Errors",
        (
            ("PLATFORM", lambda one: one["platform"]),
            ("ERROR", lambda one: one["error_class"]),
            ("TASKS", lambda one: count(one["tasks"])),
            ("THE LAST ONE SAID", lambda one: one_line(one["last_error"] or "", 200)),
        ),
    ),
)
