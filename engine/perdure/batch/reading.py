"""Lines to rows: JSON lines and CSV, streamed, each with the number of the line it begins at.

A line that can't be read is a row too, one with an error: it never stops the others. Only what
makes the whole input unreadable (another encoding, a header that is ambiguous) is raised.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import orjson

from perdure.errors import InvalidTask

__all__ = ["Layout", "RawRow", "detect_layout", "read_rows"]

# Far beyond the 32 Mi characters that a task may hold, so that the task's own message is seen.
MAX_LINE: Final = 256 * 2**20
MAX_CELL: Final = 64 * 2**20
_BOM: Final = b"\xef\xbb\xbf"
_DELIMITERS: Final = ",;\t"
# Cells of these columns may hold JSON; one that doesn't is taken as the one item of a list.
_LISTS: Final = frozenset({"files", "fallbacks", "stop_sequences"})
# Of these one may well begin like JSON, as `[DONE]` does.
_TEXTS: Final = frozenset({"stop_sequences"})
_LIST: Final = re.compile(r'\s*\[\s*(?:"|\])')
_STRUCTURED: Final = _LISTS | {
    "messages",
    "context",
    "labels",
    "metadata",
    "options",
    "constraints",
    "output_schema",
    "tools",
}


class Layout(StrEnum):
    """How the rows are written down."""

    JSONL = "jsonl"
    CSV = "csv"


class RawRow(NamedTuple):
    """A row as it was read.

    Attributes:
        line: The number of the line at which it begins, from 1.
        fields: What it holds; empty where it can't be read.
        error: Why it can't be read.
        size: Bytes, about.
    """

    line: int
    fields: Mapping[str, Any]
    error: str | None = None
    size: int = 0


def detect_layout(name: str, head: bytes) -> Layout:
    """Return the layout of an input, from its name and its first bytes.

    Raises:
        InvalidTask: It is none that can be read; the message says what to do.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidTask(f"{name} is UTF-16: convert it, as in `iconv -f UTF-16 -t UTF-8`")
    if head.startswith((b"\x1f\x8b", b"PK\x03\x04", b"\x28\xb5\x2f\xfd", b"BZh")):
        raise InvalidTask(f"{name} is compressed: unpack it, or pipe it in with `-` as the file")
    begin = head.removeprefix(_BOM).lstrip()
    suffix = Path(name).suffix.lower()
    if begin.startswith(b"["):
        raise InvalidTask(
            f"{name} is one JSON array: give one object on each line, as in `jq -c '.[]' FILE`"
        )
    if suffix in (".csv", ".tsv"):
        return Layout.CSV
    if suffix in (".jsonl", ".ndjson", ".json") or begin.startswith(b"{") or not begin:
        return Layout.JSONL
    return Layout.CSV


def read_rows(
    stream: BinaryIO,
    layout: Layout,
    *,
    name: str,
    remark: Callable[[str], None] = lambda _text: None,
) -> Iterator[RawRow]:
    """Yield the rows of ``stream``, one at a time.

    Args:
        stream: Bytes, from the beginning.
        layout: JSON lines or CSV.
        name: What to call the input in errors.
        remark: Called with what is odd about the whole, and can be read all the same.

    Raises:
        InvalidTask: The CSV header makes no sense.
    """
    if layout is Layout.CSV:
        return _csv_rows(stream, name, remark)
    return _json_rows(stream)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    """Yield number, content and whether it is whole, for each line."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        whole = len(line) <= MAX_LINE
        if not whole:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
        yield number, line, whole


# -- JSON lines ----------------------------------------------------------------------------------


def _json_rows(stream: BinaryIO) -> Iterator[RawRow]:
    for number, line, whole in _lines(stream):
        if not whole:
            yield RawRow(number, {}, f"is longer than {MAX_LINE // 2**20} MiB")
            continue
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            text = line.removeprefix(_BOM).strip()
            if text:
                yield _json_row(number, text)
        else:
            yield _row_of(number, value, line)


def _json_row(number: int, text: bytes) -> RawRow:
    try:
        return _row_of(number, _parse(text), text)
    except _Unreadable as error:
        return RawRow(number, {}, str(error))


def _row_of(number: int, value: Any, text: bytes) -> RawRow:  # noqa: ANN401 - whatever JSON holds
    if not isinstance(value, dict):
        kind = "an array" if isinstance(value, list) else "no object"
        return RawRow(number, {}, f'is {kind}; a row is an object such as {{"prompt": "…"}}')
    fields = cast("dict[str, Any]", value)
    # Only what may be there twice is read again by the parser that tells; it is the slower one.
    if any(text.count(b'"%b"' % name.encode(errors="surrogatepass")) > 1 for name in fields):
        twice = _given_twice(text)
        if twice is not None:
            return RawRow(number, {}, f"gives {twice[:40]!a} twice")
    return RawRow(number, fields, None, len(text))


def _given_twice(text: bytes) -> str | None:
    """Return a name that the object in ``text`` itself, and none inside it, gives twice."""
    names: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _value in pairs]  # the outermost object ends last

    with suppress(RecursionError):  # so deep that it is refused anyway
        json.loads(text, object_pairs_hook=note)
    return next((name for name, count in Counter(names).items() if count > 1), None)


class _Unreadable(Exception):
    """Why a text is no JSON."""


def _parse(text: bytes) -> Any:  # noqa: ANN401 - whatever JSON holds
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as bad:
            raise _Unreadable(f"is not UTF-8: byte {bad.start + 1} of the line") from None
        try:
            # What only the strict parser refuses (NaN, a lone surrogate) the task's own checks
            # name better than any parser does.
            return json.loads(decoded)
        except (ValueError, RecursionError):
            raise _Unreadable(f"is not JSON: {error.msg} at column {error.colno}") from None


# -- CSV -----------------------------------------------------------------------------------------


class _CsvLines:
    """Lines as the csv module takes them, counted. Bytes that are no UTF-8 become surrogates."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = _lines(stream)
        self._again: str | None = None
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again is not None:
            line, self._again = self._again, None
            return line
        self.number, raw, _whole = next(self._lines)  # what was cut off is too large for a cell
        return raw.removeprefix(_BOM).decode("utf-8", "surrogateescape")

    def first(self) -> str:
        """Return the first line that isn't blank; it will come again."""
        for line in self:
            if line.strip():
                self._again = line
                return line
        return ""


def _csv_rows(stream: BinaryIO, name: str, remark: Callable[[str], None]) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_CELL)
    lines = _CsvLines(stream)
    first = lines.first()
    if not first:
        return
    reader = csv.reader(lines, delimiter=_delimiter(first), strict=True)
    try:
        header = _check_header([cell.strip() for cell in next(reader)], name, remark)
    except csv.Error as error:
        raise InvalidTask(f"{name}: the header is no CSV: {error}") from None
    while True:
        begin = lines.number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield RawRow(begin, {}, _csv_problem(str(error)))
            continue
        if cells is None:
            return
        if any(cells):
            yield _csv_row(begin, header, cells)


def _delimiter(first: str) -> str:
    """Return what separates the columns: the one that makes a column of ours appear."""
    for delimiter in _DELIMITERS:
        cells = {cell.strip().strip('"') for cell in first.split(delimiter)}
        if cells & {"prompt", "messages"}:
            return delimiter
    return max(_DELIMITERS, key=first.count)


def _check_header(header: Sequence[str], name: str, remark: Callable[[str], None]) -> Sequence[str]:
    if any(not cell.isprintable() for cell in header):
        raise InvalidTask(f"{name}: the header holds what is no text; is it a CSV file in UTF-8?")
    twice = [cell for cell, times in Counter(header).items() if times > 1 and cell]
    if twice:
        raise InvalidTask(f"{name}: the header has the column {twice[0]!r} more than once")
    if not {"prompt", "messages"} & set(header):
        columns = ", ".join(filter(None, header))
        raise InvalidTask(f"{name}: the header has no column 'prompt' (its columns: {columns})")
    for index, cell in enumerate(header, 1):
        if not cell:
            remark(f"column {index} has no name and is left out")
    return header


def _csv_row(line: int, header: Sequence[str], cells: Sequence[str]) -> RawRow:
    if len(cells) > len(header):
        return RawRow(line, {}, f"has {len(cells)} cells, but the header has {len(header)}")
    named = {name: cell for name, cell in zip(header, cells, strict=False) if name and cell}
    try:
        size = sum(len(cell.encode()) for cell in named.values())
        fields = {name: _cell(name, cell) for name, cell in named.items()}
    except UnicodeEncodeError:
        column = next(name for name, cell in named.items() if not _encodable(cell))
        return RawRow(line, {}, f"is not UTF-8: column {column!r}")
    except _Unreadable as error:
        return RawRow(line, {}, str(error))
    return RawRow(line, fields, size=size)


def _encodable(text: str) -> bool:
    return all(not "\ud800" <= character <= "\udfff" for character in text)


def _cell(name: str, cell: str) -> Any:  # noqa: ANN401 - text, or what its JSON holds
    if name not in _STRUCTURED:
        return cell
    if cell.lstrip().startswith(("[", "{")) and not (name in _TEXTS and not _LIST.match(cell)):
        try:
            return _parse(cell.encode())
        except _Unreadable as error:
            raise _Unreadable(f"{name}: the cell {error}") from None
    return [cell] if name in _LISTS else cell


def _csv_problem(message: str) -> str:
    if "unexpected end of data" in message:
        return "opens quotes that are never closed"
    if "field limit" in message:
        return f"has a cell of more than {MAX_CELL // 2**20} Mi characters: are its quotes closed?"
    return f"is not CSV: {message}"
