r"""Rows on stdout: a table on a terminal, tab-separated in a pipe; CSV and JSON where asked for.

A table is drawn as rows come, after a look at the first ones, so that large results don't wait or
fill the memory. It never is wider than the terminal: columns are cut, and where there are too many
of them each row becomes a block of lines.

In tab-separated text a newline, tab or backslash in a value is `\n`, `\t`, `\\`, and NULL is `\N`
(PostgreSQL's text format). In CSV NULL is an empty field and an empty text is `""`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Final

from perdure.text import printable

__all__ = ["csv_line", "fit", "paint", "tab_line", "table", "terminal_width"]

_LOOKED_AT: Final = 200
_GAP: Final = 2
_NARROWEST: Final = 8
_WIDEST_BLOB: Final = 32
_NUMBER: Final = re.compile(r"[-$]*\d[\d.,]*(e[-+]?\d+)?")
_NOTHING: Final = ("", "NULL", "-")
_COLOURS: Final = {
    "dim": "2",
    "bold": "1",
    "pending": "36",
    "running": "34",
    "completed": "32",
    "failed": "31",
    "cancelled": "33",
}


def paint(text: str, style: str) -> str:
    """Return ``text`` in the colours of a style or status, where stdout shows colours."""
    code = _COLOURS.get(style)
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    if code is None or plain or not sys.stdout.isatty():
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def terminal_width() -> int:
    """Return how many columns the terminal has."""
    return shutil.get_terminal_size().columns


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    width: int | None = None,
    null: str = "NULL",
    whole: Sequence[str] = (),
    painted: str | None = None,
) -> int:
    """Draw rows and return how many there were.

    Args:
        headers: The columns' names.
        rows: The values; text may hold anything.
        width: The terminal's width; default: as it is.
        null: What stands for NULL.
        whole: The columns that are never cut.
        painted: The column that is coloured by what it says.
    """
    write = sys.stdout.write
    width = width or terminal_width()
    cells = ([_cell(value, null) for value in row] for row in rows)
    names = [_cell(name, null) for name in headers]
    head = list(islice(cells, _LOOKED_AT))
    wanted = [
        max(cell_width(text) for text in (name, *(row[i] for row in head)))
        for i, name in enumerate(names)
    ]
    kept = [i for i, name in enumerate(headers) if name in whole]
    widths = fit(wanted, width - _GAP * (len(names) - 1), kept)
    if widths is None:
        return _blocks(names, chain(head, cells), width, kept)
    right = [_is_numeric(head, i) for i in range(len(names))]
    coloured = headers.index(painted) if painted in headers else None
    write(paint(_line(names, widths, right), "bold") + "\n")
    count = 0
    for row in chain(head, cells):
        write(_line(row, widths, right, coloured) + "\n")
        count += 1
    return count


def fit(wanted: Sequence[int], room: int, kept: Sequence[int] = ()) -> list[int] | None:
    """Return widths that fit into ``room``, the widest columns cut first; None if none do.

    Args:
        wanted: The widths that would show everything.
        room: What there is for all of them.
        kept: The columns that are not cut.
    """
    widths = list(wanted)
    surplus = sum(widths) - room
    while surplus > 0:
        free = [i for i in range(len(widths)) if i not in kept and widths[i] > _NARROWEST]
        if not free:
            return None
        widest = max(widths[i] for i in free)
        at = [i for i in free if widths[i] == widest]
        next_to = max((widths[i] for i in free if widths[i] < widest), default=_NARROWEST)
        step = min(widest - next_to, -(-surplus // len(at)))
        for i in at:
            widths[i] -= min(step, max(surplus, 0))
            surplus -= step
    return widths


def _line(
    cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], status: int | None = None
) -> str:
    shown: list[str] = []
    for i, (text, width) in enumerate(zip(cells, widths, strict=True)):
        last = i == len(cells) - 1
        cut = _cut(text, width)
        space = " " * (width - cell_width(cut))
        coloured = paint(cut, text) if i == status else cut
        padded = space + coloured if right[i] else coloured if last else coloured + space
        shown.append(padded)
    return (" " * _GAP).join(shown)


def _blocks(
    names: Sequence[str], rows: Iterable[Sequence[str]], width: int, kept: Sequence[int]
) -> int:
    """Draw each row as a block of lines, a value on each."""
    indent = max(cell_width(name) for name in names) + _GAP
    room = max(width - indent, _NARROWEST)
    count = 0
    for row in rows:
        if count:
            sys.stdout.write("\n")
        for i, (name, text) in enumerate(zip(names, row, strict=True)):
            space = " " * (indent - cell_width(name))
            shown = text if i in kept else _cut(text, room)
            sys.stdout.write(paint(name, "bold") + space + shown + "\n")
        count += 1
    return count


def _cell(value: object, null: str) -> str:
    """Return a value as one line that a terminal shows and doesn't obey."""
    match value:
        case None:
            return null
        case bytes():
            more = f"… {len(value)} bytes" if len(value) > _WIDEST_BLOB else ""
            return value[:_WIDEST_BLOB].hex() + more
        case float():
            return repr(value)
        case _:
            return printable(str(value)).replace("\n", "⏎").replace("\t", " ")


def _is_numeric(rows: Iterable[Sequence[str]], column: int) -> bool:
    texts = [row[column] for row in rows if row[column] not in _NOTHING]
    return bool(texts) and all(_NUMBER.fullmatch(text) for text in texts)


def cell_width(text: str) -> int:
    """Return how many columns of a terminal ``text`` takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def _cut(text: str, width: int) -> str:
    if cell_width(text) <= width:
        return text
    if text.isascii():
        return text[: max(width - 1, 0)] + "…"
    from rich.cells import set_cell_size

    return set_cell_size(text, max(width - 1, 0)) + "…"


def tab_line(values: Iterable[object]) -> str:
    """Return values as one line of tab-separated text."""
    return "\t".join(_tab_field(value) for value in values) + "\n"


def _tab_field(value: object) -> str:
    match value:
        case None:
            return r"\N"
        case bytes():
            return value.hex()
        case str():
            if value.isalnum():
                return value
            text = value.replace("\\", "\\\\").replace("\t", r"\t")
            return text.replace("\n", r"\n").replace("\r", r"\r")
        case _:
            return str(value)


def csv_line(values: Iterable[object]) -> str:
    """Return values as one line of CSV (RFC 4180, with lines that end as everywhere on Unix)."""
    return ",".join(_csv_field(value) for value in values) + "\n"


def _csv_field(value: object) -> str:
    match value:
        case None:
            return ""
        case bytes():
            return value.hex()
        case str():
            if value and not any(c in value for c in ',"\r\n'):
                return value
            return '"' + value.replace('"', '""') + '"'
        case _:
            return str(value)
