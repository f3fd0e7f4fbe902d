"""Statements that are executed again and again, straight on the driver's connection.

A statement of Core is compiled once per dialect. What SQLAlchemy does around each execution
(building parameters, a context, a result, a `Row` for each row) took longer than the execution:
without it, what a lone append takes beyond its commit takes half as long.

SQLite's driver gives other threads a turn at each statement and at each row, and then has to wait
for its own: where the event loop is busy, for milliseconds. So there many rows are written by one
statement, and read as one. What is read for the event loop goes to the reading thread once, where
SQLAlchemy would go there five times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from traceback import clear_frames
from typing import TYPE_CHECKING, Any, Final

import orjson
import sqlalchemy as sa
from sqlalchemy import Connection, Dialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import Text, TypeDecorator, TypeEngine

if TYPE_CHECKING:  # see `Dialect.readers`
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["ROUND_TRIPS", "Statement", "defer", "execute", "has_one_of", "is_among"]

Processor = Callable[[Any], Any]

# Under this name a connection to a server has its `RoundTrips`.
ROUND_TRIPS: Final = "round_trips"


def execute(connection: Connection, sql: str, parameters: Any) -> Any:  # noqa: ANN401 - a driver's
    """Execute ``sql`` on the driver's connection and return its cursor.

    Raises:
        IntegrityError: The database refuses what was to be written.
        Exception: Whatever else the driver raises, as it is.
    """
    trips = connection.info.get(ROUND_TRIPS)
    if trips is not None:
        return trips.ask((sql, parameters))
    raw: Any = connection.connection.dbapi_connection
    try:
        return raw.execute(sql, parameters)
    except connection.dialect.loaded_dbapi.IntegrityError as error:
        raise IntegrityError(None, None, error) from error


def defer(connection: Connection, sql: str, parameters: Any) -> None:  # noqa: ANN401 - a driver's
    """Execute ``sql``, whose answer nobody needs, without waiting for it where that is well.

    What the database refuses is raised then by what is executed next, or by the commit. So a
    savepoint isn't to be left with something deferred where one would go on after an error.

    Raises:
        IntegrityError: The database refuses what was to be written, now or before.
        Exception: Whatever else the driver raises, as it is.
    """
    trips = connection.info.get(ROUND_TRIPS)
    if trips is not None:
        trips.send(sql, parameters)
    else:
        execute(connection, sql, parameters)


class Statement:
    """A statement of Core with the parameters it is executed with.

    Args:
        statement: A SELECT of columns that JSON can hold, or something that changes rows.
        names: Its bind parameters, in the order in which `rows` and `change` are given values.
    """

    def __init__(
        self, statement: sa.Select[*tuple[Any, ...]] | sa.Update, names: Sequence[str] = ()
    ) -> None:
        self._statement = statement
        self._names: Final = tuple(names)
        self._compiled: dict[str, _Compiled] = {}

    def rows(self, connection: Connection, *values: object) -> Sequence[Sequence[Any]]:
        """Return all rows of a SELECT."""
        compiled = self._compiled_for(connection.dialect)
        parameters = compiled.parameters(values)
        rows = self._packed(connection, compiled, parameters)
        if rows is None:
            rows = execute(connection, compiled.sql, parameters).fetchall()
        return compiled.processed(rows)

    async def mappings(self, connection: AsyncConnection, *values: object) -> list[dict[str, Any]]:
        """Return all rows of a SELECT, by column name, on a connection that reads."""
        compiled = self._compiled_for(connection.dialect)
        parameters = compiled.parameters(values)
        found: Iterable[Sequence[Any]]
        if connection.dialect.name == "sqlite":
            raw: Any = await connection.get_raw_connection()
            try:
                found = await raw.driver_connection.execute_fetchall(compiled.sql, parameters)
            except Exception as error:
                # Whoever keeps it would keep the cursor, and the connection in the past.
                clear_frames(error.__traceback__)
                raise
        else:
            found = await connection.exec_driver_sql(compiled.sql, parameters)
        rows = compiled.processed(list(found))
        return [dict(zip(compiled.columns, row, strict=True)) for row in rows]

    def _packed(
        self,
        connection: Connection,
        compiled: _Compiled,
        parameters: Any,  # noqa: ANN401 - as the driver wants it
    ) -> list[Sequence[Any]] | None:
        """Return all rows, read as one; None where that can't be."""
        if compiled.packed is None:
            return None
        driver = connection.dialect.loaded_dbapi
        try:
            ((text,),) = execute(connection, compiled.packed, parameters).fetchall()
            rows: list[Sequence[Any]] = orjson.loads(text)
        # Larger than a text may be, or with what JSON has no word for, as somebody else may store.
        except (driver.DataError, driver.OperationalError, ValueError):
            return None
        return rows

    def rows_and(
        self, other: Statement, connection: Connection, *values: object
    ) -> tuple[Sequence[Sequence[Any]], Sequence[Sequence[Any]]]:
        """Return all rows, and those of another SELECT without parameters that is asked with it."""
        trips = connection.info.get(ROUND_TRIPS)
        if trips is None:
            return self.rows(connection, *values), other.rows(connection)
        first = self._compiled_for(connection.dialect)
        second = other._compiled_for(connection.dialect)
        cursor = trips.ask(
            (first.sql, first.parameters(values)), (second.sql, second.parameters(()))
        )
        last = second.processed(cursor.fetchall())
        return first.processed(cursor.set_result(-2).fetchall()), last

    def change(self, connection: Connection, *values: object) -> int:
        """Execute what changes rows; returns how many were."""
        compiled = self._compiled_for(connection.dialect)
        count: int = execute(connection, compiled.sql, compiled.parameters(values)).rowcount
        return count

    def defer(self, connection: Connection, *values: object) -> None:
        """Execute what changes rows, as the function `defer` does."""
        compiled = self._compiled_for(connection.dialect)
        defer(connection, compiled.sql, compiled.parameters(values))

    def _compiled_for(self, dialect: Dialect) -> _Compiled:
        compiled = self._compiled.get(dialect.name)
        if compiled is None:
            compiled = _Compiled(self._statement, self._names, dialect)
            self._compiled[dialect.name] = compiled
        return compiled


class _Compiled:
    def __init__(
        self,
        statement: sa.Select[*tuple[Any, ...]] | sa.Update,
        names: tuple[str, ...],
        dialect: Dialect,
    ) -> None:
        compiled = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        assert isinstance(compiled, SQLCompiler)  # noqa: S101 - which it always is
        if not set(names) <= compiled.binds.keys():
            raise ValueError(f"a statement has the parameters {names}, and asks for others")
        # What isn't named is part of the statement, such as a number that is asked for.
        fixed = {name: value for name, value in compiled.params.items() if name not in names}
        self._fixed = tuple(fixed.values())
        given = (*names, *fixed)
        types = [compiled.binds[name].type for name in given]
        self._processors = processors_of(types, dialect, binding=True)
        if compiled.positional:
            self._names = None
            order = [given.index(name) for name in compiled.positiontup or ()]
            self._order = None if order == list(range(len(given))) else order
        else:
            self._names = given
        self.sql = str(compiled)
        columns = list(statement.selected_columns) if isinstance(statement, sa.Select) else []
        self.columns = tuple(column.name for column in columns)
        self.results = processors_of([column.type for column in columns], dialect, binding=False)
        binary = any(isinstance(column.type, sa.LargeBinary) for column in columns)
        self.packed = None
        if dialect.name == "sqlite" and columns and not binary:
            row = ", ".join(f'"{name}"' for name in self.columns)
            self.packed = f"SELECT json_group_array(json_array({row})) FROM ({self.sql})"

    def processed(self, rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        return [processed(row, self.results) for row in rows] if self.results else rows

    def parameters(self, values: Sequence[object]) -> Any:  # noqa: ANN401 - as the driver wants it
        if self._fixed:
            values = (*values, *self._fixed)
        if self._processors:
            values = processed(values, self._processors)
        if self._names is not None:
            return dict(zip(self._names, values, strict=True))
        return values if self._order is None else [values[index] for index in self._order]


def processors_of(
    types: Sequence[TypeEngine[Any]], dialect: Dialect, *, binding: bool
) -> list[tuple[int, Processor]]:
    """Return what turns values into the driver's (``binding``) or back, by their place."""
    found: list[tuple[int, Processor]] = []
    for index, kind in enumerate(types):
        if isinstance(kind, sa.LargeBinary | sa.Float):  # drivers take and give them as they are
            continue
        own = kind.dialect_impl(dialect)
        process = own.bind_processor(dialect) if binding else own.result_processor(dialect, None)
        if process is not None:
            found.append((index, process))
    return found


def processed(row: Sequence[Any], processors: Sequence[tuple[int, Processor]]) -> tuple[Any, ...]:
    """Return a row with its values turned into what they have to be."""
    values = list(row)
    for index, process in processors:
        values[index] = process(values[index])
    return tuple(values)


# -- any number of values as one parameter -------------------------------------------------------


class _Listed(TypeDecorator[Sequence[Any]]):
    """Values of one type as text: JSON, or what PostgreSQL makes an array of.

    The driver for PostgreSQL makes an array of a list, too, and takes twenty times as long.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Sequence[Any] | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        if dialect.name == "postgresql":
            return f"{{{','.join([_element(each) for each in value])}}}"
        return orjson.dumps(list(value)).decode()


def _element(value: object) -> str:
    if isinstance(value, int):
        return str(value)
    text = value if isinstance(value, str) else str(value)  # a subclass may show itself otherwise
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


class _Among(FunctionElement[bool]):
    # Of no type: of a boolean, SQLite would be asked whether it equals 1, and use no index for it.
    # A function, since SQLAlchemy knows of its arguments what makes two statements the same.
    inherit_cache = True


class _AmongMany(_Among):
    # PostgreSQL looks through an array once more for each row, but makes a hash table of rows.
    inherit_cache = True


def is_among(
    column: sa.ColumnElement[Any], name: str, *, many: bool = False
) -> sa.ColumnElement[bool]:
    """Return the condition that ``column`` has one of the values given as the parameter ``name``.

    One parameter for all of them, so that the statement is the same for any number, and there may
    be more of them than a statement may have parameters.

    Args:
        column: The column.
        name: The parameter.
        many: There may be thousands, and more rows that have none of them.
    """
    return (_AmongMany if many else _Among)(column, sa.bindparam(name, type_=_Listed()))


def has_one_of(column: sa.Column[Any], values: Iterable[Any]) -> sa.ColumnElement[bool]:
    """Return the condition that ``column`` has one of ``values``: one parameter for all."""
    return _AmongMany(column, sa.bindparam(None, list(values), type_=_Listed()))


@compiles(_Among, "sqlite")
def _among_sqlite(element: _Among, compiler: SQLCompiler, **how: Any) -> str:  # noqa: ANN401
    column, given = (compiler.process(each, **how) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({given}))"


@compiles(_Among, "postgresql")
def _among_postgresql(element: _Among, compiler: SQLCompiler, **how: Any) -> str:  # noqa: ANN401
    column, given = (compiler.process(each, **how) for each in element.clauses)
    return f"{column} = ANY ({_array(element, given)})"


@compiles(_AmongMany, "postgresql")
def _many_postgresql(element: _AmongMany, compiler: SQLCompiler, **how: Any) -> str:  # noqa: ANN401
    column, given = (compiler.process(each, **how) for each in element.clauses)
    return f"{column} IN (SELECT unnest({_array(element, given)}))"


def _array(element: _Among, given: str) -> str:
    column, _given = element.clauses
    return f"CAST({given} AS {'BIGINT' if isinstance(column.type, sa.Integer) else 'TEXT'}[])"
