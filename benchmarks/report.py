"""Results as people read them: a table, plots, and the page they stand in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from benchmarks.cases import CASES
from benchmarks.plot import bars

__all__ = ["render", "summary", "table"]

Result: TypeAlias = Mapping[str, Any]

BEGIN: Final = "<!-- measured: written by `python -m benchmarks` -->"
END: Final = "<!-- end of what was measured -->"
_VERDICTS: Final = {True: "met", False: "**missed**", None: ""}


def render(results: Path, page: Path) -> None:
    """Write the measured part of the page anew, and the plots into a folder next to it.

    Raises:
        ValueError: The page has no place for it, or there are no results.
    """
    found = _load(results)
    if not found:
        raise ValueError(f"{results.name}/ has no results: run `python -m benchmarks` first")
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _old, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.name} has lost the lines between which results are written")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    measured = _measured(found, folder)
    page.write_text(f"{before}{BEGIN}\n\n{measured}\n{END}{after}", "utf-8")


def _load(results: Path) -> list[Result]:
    paths = (results / f"{case.name}.json" for case in CASES)
    return [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]


def _measured(found: Sequence[Result], folder: Path) -> str:
    parts = [_machines(found), table(found)]
    for result in found:
        plot = _plot(result)
        if plot is not None:
            name = f"{result['case']}.svg"
            (folder / name).write_text(plot, "utf-8")
            parts.append(f"### {result['about']}\n\n![{result['about']}]({folder.name}/{name})\n")
    return "\n".join(parts)


def _machines(found: Iterable[Result]) -> str:
    lines: list[str] = []
    for result in found:
        machine = result["machine"]
        line = (
            f"Measured on {machine['cores']} cores ({machine['processor']}), {machine['system']}, "
            f"{machine['python']}, SQLite {machine['sqlite']}, SQLAlchemy {machine['sqlalchemy']}."
        )
        if line not in lines:
            lines.append(line)
    return "\n".join(lines) + "\n"


def table(found: Iterable[Result]) -> str:
    """Return the table of all figures in Markdown."""
    lines = [
        "| what | ours | beside it | figure (lowest … highest) | target | |",
        "|---|---|---|---|---|---|",
    ]
    for result in found:
        lines.append(f"| **{result['about']}** | | | | | |")
        lines.extend(_line(row) for row in result["rows"])
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    target = row["target"]
    note = f"; {row['note']}" if row["note"] else ""
    cells = (
        row["what"] + note,
        _measure(row["ours"]),
        _measure(row["rival"], named=True) if row["rival"] else "",
        (
            f"{number(row['figure'])} {row['figure_unit']} "
            f"({number(row['figure_low'])} … {number(row['figure_high'])})"
        ),
        target["text"] if target else "",
        _VERDICTS[row["met"]],
    )
    return f"| {' | '.join(cells)} |"


def _measure(sample: Mapping[str, Any], *, named: bool = False) -> str:
    value = f"{number(sample['median'])} {sample['unit']}"
    return f"{value} ({sample['name']})" if named else value


def number(value: float) -> str:
    """Return a number with three digits that mean something, and commas."""
    if abs(value) >= 1000:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def summary(result: Result) -> str:
    """Return what a person in front of a terminal wants to know of one case."""
    lines: list[str] = []
    for row in result["rows"]:
        beside = f" beside {_measure(row['rival'], named=True)}" if row["rival"] else ""
        judged = f", target {row['target']['text']}" if row["target"] else ""
        verdict = {True: ": met", False: ": MISSED", None: ""}[row["met"]]
        lines.append(
            f"{row['what']}: {_measure(row['ours'])}{beside}; "
            f"{number(row['figure'])} {row['figure_unit']}{judged}{verdict}"
        )
    return "\n".join(lines)


def _plot(result: Result) -> str | None:
    """Return bars of everything that a case measured in its first unit; None for a single one."""
    measured: dict[str, Mapping[str, Any]] = {}
    unit = result["rows"][0]["ours"]["unit"] if result["rows"] else ""
    for row in result["rows"]:
        for sample in (row["ours"], row["rival"]):
            if sample and sample["unit"] == unit:
                measured.setdefault(sample["name"], sample)
    if len(measured) < 2:
        return None
    title = f"{result['about']}, {unit}"
    return bars(
        title,
        [
            (s["name"], s["low"], s["median"], s["high"], number(s["median"]))
            for s in measured.values()
        ],
    )
