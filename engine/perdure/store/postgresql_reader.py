"""Reading a PostgreSQL database with nothing but its driver: what `readonly` is for SQLite."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, Final

import psycopg
from psycopg.adapt import Loader
from psycopg.types.datetime import TimestamptzLoader
from psycopg.types.string import TextLoader

from perdure.errors import PerdureError, StoreError
from perdure.store.database import Database, parse_url
from perdure.store.reaching import CONNECT, conninfo_of, patiently, shown_place, translated
from perdure.store.readonly import REVISION, Parameters, Reader, iso

__all__ = ["PostgresqlReader"]

_LOOK_SECONDS: Final = 0.01
_OURS: Final = (
    "SELECT to_regclass('log_head') IS NOT NULL AND to_regclass('events') IS NOT NULL "
    "AND to_regclass('alembic_version') IS NOT NULL"
)
# What begins a statement that only reads. `COPY … TO PROGRAM` begins with none of them.
_READING: Final = re.compile(
    r"(?:\s|\(|--[^\n]*(?:\n|$)|/\*.*?\*/)*(select|with|values|table|explain|show)\b",
    re.IGNORECASE | re.DOTALL,
)
_QUOTED: Final = re.compile(r"('(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")")
_NAMED: Final = re.compile(r"(?<![:\w]):([a-z_][a-z_0-9]*)")


class Row:
    """A row whose values go by number and by name, as those of `sqlite3.Row`."""

    __slots__ = ("_names", "_values")

    def __init__(self, names: Mapping[str, int], values: Sequence[Any]) -> None:
        self._names = names
        self._values = values

    def keys(self) -> list[str]:
        """Return the names."""
        return list(self._names)

    def __getitem__(self, which: int | str | slice) -> Any:  # noqa: ANN401 - whatever it is
        return self._values[self._names[which] if isinstance(which, str) else which]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class PostgresqlReader(Reader):
    """A connection that can't change anything. Use it as a context manager.

    Every transaction on it is a read-only one. Values come as they come from SQLite: moments and
    JSON as text, sums as numbers.
    """

    dialect = "postgresql"

    def __init__(self, url: str | os.PathLike[str]) -> None:
        parsed = parse_url(url)
        self.place = shown_place(parsed)
        self.path = Path(self.place)
        conninfo = conninfo_of(parsed)
        with self._errors():
            self.server = patiently(lambda: psycopg.connect(conninfo, **CONNECT))
        adapters = self.server.adapters
        for name in ("json", "jsonb", "date"):
            adapters.register_loader(name, TextLoader)
        adapters.register_loader("timestamptz", _Moment)
        adapters.register_loader("numeric", _Number)
        self.server.read_only = True
        self._position: object = None
        try:
            self._check_schema(url)
        except BaseException:
            self.close()
            raise

    def _check_schema(self, url: str | os.PathLike[str]) -> None:
        ours = self.one(_OURS)
        found = self.one("SELECT version_num FROM alembic_version") if ours and ours[0] else None
        if found is None or found[0] != REVISION:
            Database(url).prepare(create=False, upgrade=False)  # tells what it is instead

    @contextlib.contextmanager
    def _errors(self) -> Generator[None, None, None]:
        try:
            yield
        except psycopg.Error as error:
            raise translated(error, self.place) from error
        except UnicodeEncodeError:
            raise PerdureError("what was asked for is no UTF-8: nothing here is like it") from None

    def rows(self, sql: str, parameters: Parameters = ()) -> Iterator[Any]:
        """Return the rows of a query.

        Raises:
            StoreError: The database can't be read.
        """
        with self._errors(), self.server.transaction():
            cursor = self.server.execute(_spelt(sql).encode(), parameters)
            names = {column.name: n for n, column in enumerate(cursor.description or ())}
            found = [Row(names, values) for values in cursor]
        return iter(found)

    def changed(self) -> bool:
        """Return whether anything was committed since this was last asked."""
        time.sleep(_LOOK_SECONDS)  # a look goes to the server and back
        row = self.one("SELECT position FROM log_head")
        position = row[0] if row else None
        changed, self._position = position != self._position, position
        return changed

    def ask(self, query: str) -> tuple[Sequence[str], Iterator[Sequence[object]]]:
        """Begin people's own query; returns its columns and its rows, which come as they are found.

        Raises:
            PerdureError: It isn't one statement that reads, or makes no sense.
        """
        if _READING.match(query) is None:
            raise PerdureError("`perdure sql` only reads: give a SELECT; nothing was changed")
        try:
            # From its first query on, a transaction can't be made one that writes.
            self.server.execute("SELECT 1")
            cursor = self.server.cursor()
            # Row by row the server takes one statement and no more.
            rows = cursor.stream(query.encode())
            first = next(rows, None)
        except psycopg.Error as error:
            raise _explained(error) from None
        names = [column.name for column in cursor.description or ()]
        return names, _each(first, rows)

    def columns(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield table, kind, column and type for everything that people may ask for."""
        for row in self.rows(_COLUMNS):
            yield tuple(row)

    def close(self) -> None:
        """Give the connection back."""
        self.server.close()

    # -- what is said in another way -------------------------------------------------------------

    def hexed(self, column: str) -> str:
        """Return the SQL for bytes in hexadecimal."""
        return f"encode({column}, 'hex')"

    def seconds(self, begin: str, end: str) -> str:
        """Return the SQL for the seconds from one moment to another."""
        return f"extract(epoch FROM {end} - {begin})::double precision"

    def has_label(self, name: str, value: str) -> str:
        """Return the condition that `tasks AS t` has a label; the arguments name parameters."""
        return f"t.labels ->> :{name} = :{value}"

    def mentions(self, columns: Sequence[str], text: str, found: dict[str, object]) -> str:
        """Return the condition that a column has a text in it, in upper or lower case."""
        escaped = re.sub(r"([\\%_])", r"\\\1", text)
        found["search"] = f"%{escaped}%"
        return "(" + " OR ".join(f"{column} ILIKE :search" for column in columns) + ")"


def _spelt(sql: str) -> str:
    """Return a query with its parameters marked as the driver wants them."""
    parts = _QUOTED.split(sql.replace("%", "%%"))
    for index in range(0, len(parts), 2):
        parts[index] = _NAMED.sub(r"%(\1)s", parts[index].replace("?", "%s"))
    return "".join(parts)


def _each(first: Any, rows: Iterator[Any]) -> Iterator[Sequence[object]]:  # noqa: ANN401
    try:
        if first is not None:
            yield first
            yield from rows
    except psycopg.Error as error:
        raise _explained(error) from None


def _explained(error: psycopg.Error) -> PerdureError | StoreError:
    state = error.sqlstate or ""
    if state == "25006":
        return PerdureError("`perdure sql` only reads: give a SELECT; nothing was changed")
    if state == "42601" and "multiple commands" in str(error):
        return PerdureError("give one statement at a time")
    if state == "42P02":
        return PerdureError("the query has a placeholder ($1): put a value in its place")
    message = error.diag.message_primary or str(error)
    return PerdureError(f"SQL: {' '.join(message.split())}")


class _Moment(TimestamptzLoader):
    def load(self, data: Any) -> Any:  # noqa: ANN401 - a moment to them, text to us
        try:
            return iso(super().load(data).astimezone(UTC))
        except (psycopg.DataError, OverflowError):
            return bytes(data).decode()


class _Number(Loader):
    def load(self, data: Any) -> int | float:  # noqa: ANN401 - bytes, as psycopg has them
        text = bytes(data).decode()
        return int(text) if text.lstrip("-").isdigit() else float(text)


_COLUMNS: Final = """
    SELECT c.table_name, CASE t.table_type WHEN 'VIEW' THEN 'view' ELSE 'table' END,
           c.column_name, c.data_type
    FROM information_schema.columns c
    JOIN information_schema.tables t USING (table_schema, table_name)
    WHERE c.table_schema = current_schema() AND c.table_name <> 'alembic_version'
    ORDER BY 2, 1, c.ordinal_position
"""
