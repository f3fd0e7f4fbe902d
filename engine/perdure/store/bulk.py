"""Many rows at once, in and out, as plain tuples.

SQLAlchemy builds the parameters of an executemany anew for each row, which took a third of the
writer's time, and a `Row` around each row of a result, which took two thirds of the time to verify
a log. Here rows go to the driver and come from it as they are, each value by the processor of its
column's type, and one statement takes many of them (see `direct`).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, Dialect

from perdure.store.direct import defer, processed, processors_of

__all__ = ["Bulk", "plain_pages", "plain_rows"]

# Far below the number of parameters that a statement may have.
MOST_PARAMETERS: Final = 8192
# One parameter for all of them; so many, that it does not grow without limit. From some ten million
# characters on, twice as many take the server far more than twice as long.
MOST_AS_JSON: Final = 1000
MOST_BYTES_AS_JSON: Final = 4_000_000
# In so many ways can columns be without any value, or alike; further ones are made anew each time.
MOST_FORMS: Final = 100


def plain_rows(
    connection: Connection,
    statement: sa.Select[*tuple[Any, ...]],
    parameters: Mapping[str, object] | None = None,
) -> Generator[tuple[Any, ...], None, None]:
    """Yield the rows of a query as plain tuples."""
    for rows in plain_pages(connection, statement, parameters):
        yield from rows


def plain_pages(
    connection: Connection,
    statement: sa.Select[*tuple[Any, ...]],
    parameters: Mapping[str, object] | None = None,
    size: int = 5000,
) -> Iterator[Sequence[tuple[Any, ...]]]:
    """Yield the rows of a query as plain tuples, ``size`` of them at a time."""
    result = connection.execute(statement, parameters)
    try:
        types = [column.type for column in statement.selected_columns]
        processors = processors_of(types, connection.dialect, binding=False)
        cursor = result.cursor
        while cursor is not None and (rows := cursor.fetchmany(size)):
            yield [processed(row, processors) for row in rows] if processors else rows
    finally:
        result.close()


class Bulk:
    """Rows to be inserted into a table, or to be changed there.

    They are held in memory at once, twice or three times, so they hold nothing large but text.

    Args:
        table: Which.
        names: The columns that are given, in their order.
        key: The column, one of them, whose row is changed; None to insert.
    """

    def __init__(self, table: sa.Table, names: Sequence[str], *, key: str | None = None) -> None:
        self._columns: Final = tuple(table.c[name] for name in names)
        self._table: Final = table
        self._key: Final = key
        self._compiled: dict[str, _OnSqlite | _OnPostgresql] = {}

    def execute(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Write the rows; without any nothing happens."""
        if rows:
            self.execute_bound(connection, self.bound(connection.dialect, rows))

    def execute_bound(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Write rows that `bound` has returned."""
        if rows:
            compiled = self._compiled_for(connection.dialect)
            for begin in range(0, len(rows), compiled.most):
                compiled.execute(connection, rows[begin : begin + compiled.most])

    def bound(self, dialect: Dialect, rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        """Return the rows as the driver would get them."""
        processors = self._compiled_for(dialect).processors
        if processors:
            return [processed(row, processors) for row in rows]
        return rows

    def bound_value(self, dialect: Dialect, name: str, value: object) -> Any:  # noqa: ANN401
        """Return one value as the driver would get it, for who has it in many rows."""
        for index, process in self._compiled_for(dialect).processors:
            if self._columns[index].name == name:
                return process(value)
        return value

    def _compiled_for(self, dialect: Dialect) -> _OnSqlite | _OnPostgresql:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            make = _OnPostgresql if dialect.name == "postgresql" else _OnSqlite
            compiled = make(self._table, self._columns, self._key, dialect)
            self._compiled[dialect.name] = compiled
        return compiled


Columns = Sequence[sa.Column[Any]]


class _OnSqlite:
    def __init__(
        self, table: sa.Table, columns: Columns, key: str | None, dialect: Dialect
    ) -> None:
        self.processors = processors_of([c.type for c in columns], dialect, binding=True)
        self.most = MOST_PARAMETERS // len(columns)
        self._table = table.name
        self._names = [column.name for column in columns]
        self._key = key
        self._forms: dict[tuple[int, ...], _Form] = {}

    def execute(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
        # The driver takes longer for a NULL than for anything else, and most columns hold one.
        given = tuple(
            [
                index
                for index, values in enumerate(zip(*rows, strict=True))
                if values.count(None) < len(rows)
            ]
        )
        form = self._forms.get(given)
        if form is None:
            form = self._form(given)
            if len(self._forms) < MOST_FORMS:
                self._forms[given] = form
        begin = 0
        while begin < len(rows):  # in powers of two, so that there are few statements to prepare
            size = 1 << (len(rows) - begin).bit_length() - 1
            part = rows[begin : begin + size]
            parameters = (
                [row[index] for row in part for index in given]
                if len(given) < len(self._names)
                else list(chain.from_iterable(part))
            )
            defer(connection, form.sql(size), parameters)
            begin += size

    def _form(self, given: Sequence[int]) -> _Form:
        """Return the statement where all other columns are NULL in all rows."""
        group = f"({', '.join('?' * len(given))})"
        names = [self._names[index] for index in given]
        if self._key is None:
            return _Form(f"INSERT INTO {self._table} ({', '.join(names)}) VALUES ", group, "")
        values = {name: f"given.column{number}" for number, name in enumerate(names, 1)}
        changes = ", ".join(
            f"{name} = {values.get(name, 'NULL')}" for name in self._names if name != self._key
        )
        return _Form(
            f"UPDATE {self._table} SET {changes} FROM (VALUES ",
            group,
            f") AS given WHERE {self._table}.{self._key} = {values[self._key]}",
        )


class _Form(NamedTuple):
    """A statement for any number of rows."""

    begin: str
    group: str
    end: str

    def sql(self, rows: int) -> str:
        return f"{self.begin}{', '.join([self.group] * rows)}{self.end}"


class _OnPostgresql:
    """All rows as one JSON text, so that one short statement is sent and planned.

    Without that each row of an executemany is parsed and planned by itself, for a prepared
    statement would belong to the session (see `postgresql`): a third of what is written a second.
    What all rows have alike, such as the moment, is in the statement and not in each of them.
    """

    def __init__(
        self, table: sa.Table, columns: Columns, key: str | None, dialect: Dialect
    ) -> None:
        self.processors = processors_of([c.type for c in columns], dialect, binding=True)
        self.most = MOST_AS_JSON
        self._table = table.name
        self._names = [f"{column.name}" for column in columns]  # orjson wants no subclass of str
        self._types = [column.type.compile(dialect).split(" COLLATE")[0] for column in columns]
        self._key = key
        self._forms: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}

    def execute(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
        first = rows[0]
        alike: list[int] = []  # what isn't in either is NULL, as most columns are
        varying: list[int] = []
        for index, values in enumerate(zip(*rows, strict=True)):
            if values.count(first[index]) < len(rows) or _is_zero(first[index]):
                varying.append(index)
            elif first[index] is not None:
                alike.append(index)
        if not varying and len(rows) > 1:  # as many rows as were given, for the table to refuse
            varying.append(alike.pop())
        parameters = {self._names[index]: first[index] for index in alike}
        if varying:
            given = [(self._names[index], index) for index in varying]
            data = orjson.dumps(
                [{name: row[index] for name, index in given} for row in rows], default=_hexed
            )
            if len(data) > MOST_BYTES_AS_JSON:
                del data  # which may be large
                half = len(rows) // 2
                self.execute(connection, rows[:half])
                self.execute(connection, rows[half:])
                return
            parameters[_ROWS] = data.decode()
        key = tuple(alike), tuple(varying)
        form = self._forms.get(key)
        if form is None:
            form = self._form(alike, varying)
            if len(self._forms) < MOST_FORMS:
                self._forms[key] = form
        defer(connection, form, parameters)

    def _form(self, alike: Sequence[int], varying: Sequence[int]) -> str:
        """Return the statement where these columns are alike or vary, and all others are NULL."""
        values = {
            name: f"%({name})s::{kind}"
            for name, kind in ((self._names[index], self._types[index]) for index in alike)
        }
        described: list[str] = []
        for name, kind in ((self._names[index], self._types[index]) for index in varying):
            # What is JSON is a text to the JSON that it is in.
            json = kind.startswith("JSON")
            values[name] = f"given.{name}::{kind}" if json else f"given.{name}"
            described.append(f"{name} {'TEXT' if json else kind}")
        source = f"json_to_recordset(%({_ROWS})s::json) AS given({', '.join(described)})"
        origin = f" FROM {source}" if described else ""
        if self._key is None:
            names, chosen = ", ".join(values), ", ".join(values.values())
            return f"INSERT INTO {self._table} ({names}) SELECT {chosen}{origin}"
        changes = ", ".join(
            f"{name} = {values.get(name, 'NULL')}" for name in self._names if name != self._key
        )
        return (
            f"UPDATE {self._table} SET {changes}{origin} "
            f"WHERE {self._table}.{self._key} = {values[self._key]}"
        )


def _is_zero(value: object) -> bool:
    # With a sign, which doesn't count where values are compared.
    return isinstance(value, float) and value == 0.0


# The parameter beside those that have the name of a column.
_ROWS: Final = "given_rows"


def _hexed(value: object) -> str:
    if isinstance(value, (bytes, memoryview)):
        return f"\\x{value.hex()}"
    raise TypeError(f"{type(value).__name__} is no value of a column")
