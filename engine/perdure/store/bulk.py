"""Many rows at once, in and out, as plain tuples.

SQLAlchemy builds the parameters of an executemany anew for each row, which took a third of the
writer's time, and a `Row` around each row of a result, which took two thirds of the time to verify
a log. Here a statement of Core is compiled once per dialect, and rows go to the driver and come
from it as they are, each value by the processor of its column's type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.compiler import SQLCompiler

__all__ = ["Bulk", "plain_rows"]

# With the columns of `tasks`, far below the number of parameters a statement may have.
MOST_TOGETHER: Final = 64

Processor = Callable[[Any], Any]


def plain_rows(
    connection: Connection, statement: sa.Select[*tuple[Any, ...]], size: int = 5000
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a query as plain tuples, fetching ``size`` of them at a time."""
    result = connection.execute(statement)
    try:
        processors: list[tuple[int, Processor]] = []
        for index, column in enumerate(statement.selected_columns):
            kind = column.type.dialect_impl(connection.dialect)
            process = kind.result_processor(connection.dialect, None)
            if process is not None:
                processors.append((index, process))
        cursor = result.cursor
        while cursor is not None and (rows := cursor.fetchmany(size)):
            yield from [_processed(row, processors) for row in rows] if processors else rows
    finally:
        result.close()


def _processed(row: Sequence[Any], processors: Sequence[tuple[int, Processor]]) -> tuple[Any, ...]:
    values = list(row)
    for index, process in processors:
        values[index] = process(values[index])
    return tuple(values)


class Bulk:
    """An INSERT or UPDATE to be executed for many rows.

    Args:
        statement: What to execute; for each name it has a column or a bind parameter.
        names: What the values of a row are, in their order.
    """

    def __init__(self, statement: sa.Insert | sa.Update, names: Sequence[str]) -> None:
        self._statement = statement
        self._names: Final = tuple(names)
        self._compiled: dict[str, _Compiled] = {}

    def execute(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Execute the statement once for each row; without rows nothing happens."""
        if rows:
            self.execute_bound(connection, self.bound(connection.dialect, rows))

    def execute_bound(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Execute the statement once for each row that `bound` has returned."""
        if rows:
            for sql, parameters in self._compiled_for(connection.dialect).calls(rows):
                connection.exec_driver_sql(sql, parameters)

    def bound(self, dialect: Dialect, rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        """Return the rows as the driver would get them, values in the order of the names."""
        return self._compiled_for(dialect).bound(rows)

    def _compiled_for(self, dialect: Dialect) -> _Compiled:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = _Compiled(self._statement, self._names, dialect)
            self._compiled[dialect.name] = compiled
        return compiled


class _Compiled:
    def __init__(
        self, statement: sa.Insert | sa.Update, names: tuple[str, ...], dialect: Dialect
    ) -> None:
        columns = list(names) if isinstance(statement, sa.Insert) else None
        compiled = statement.compile(dialect=dialect, column_keys=columns)
        assert isinstance(compiled, SQLCompiler)  # noqa: S101 - which DML always is
        self.sql = str(compiled)
        self._names = None if compiled.positional else names
        order = compiled.positiontup if compiled.positional else names
        if order is None or set(order) != set(names) or len(order) != len(names):
            raise ValueError(f"a bulk statement has the values {names}, and asks for {order}")
        self._order = None if tuple(order) == names else tuple(names.index(name) for name in order)
        processors: list[tuple[int, Processor]] = []
        for index, name in enumerate(names):
            kind = compiled.binds[name].type
            process = kind.dialect_impl(dialect).bind_processor(dialect)
            if process is not None:
                processors.append((index, process))
        self._processors = processors
        # SQLite's driver gives other threads a turn at each row of an executemany, and then has to
        # wait for its own: where the event loop is busy, for milliseconds. So an INSERT takes many
        # rows at once, in powers of two, so that there are few statements to prepare.
        group = f"({', '.join('?' * len(names))})"
        single = compiled.positional and self.sql.count(group) == 1
        self._group = group if single and isinstance(statement, sa.Insert) else None
        self._sql_of: dict[int, str] = {}

    def bound(self, rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        processors = self._processors
        if processors:
            return [_processed(row, processors) for row in rows]
        return [tuple(row) for row in rows]

    def calls(self, rows: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
        """Yield SQL and parameters, as often as it takes to execute it for all these rows."""
        if self._names is not None:
            yield self.sql, [dict(zip(self._names, row, strict=True)) for row in rows]
            return
        order = self._order
        if order is not None:
            rows = [tuple([row[index] for index in order]) for row in rows]
        if self._group is None:
            yield self.sql, list(rows)
            return
        begin = 0
        while begin < len(rows):
            size = min(MOST_TOGETHER, 1 << (len(rows) - begin).bit_length() - 1)
            part = rows[begin : begin + size]
            yield self._together(size), tuple([value for row in part for value in row])
            begin += size

    def _together(self, size: int) -> str:
        sql = self._sql_of.get(size)
        if sql is None:
            assert self._group is not None  # noqa: S101 - the caller has looked
            sql = self.sql.replace(self._group, ", ".join([self._group] * size))
            self._sql_of[size] = sql
        return sql
