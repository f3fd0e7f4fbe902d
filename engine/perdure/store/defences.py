"""What the database itself refuses and shows: is it still there, as the migrations made it?

Nothing in the chain tells that a trigger, a unique index or a view was dropped or replaced. So they
are held against what the migrations of this code make of an empty database.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from perdure.errors import StoreError
from perdure.store.database import Database
from perdure.store.dialect import ONE_MIGRATION, alembic_config
from perdure.store.schema import REVISION, VIEWS, metadata
from perdure.text import one_line

__all__ = ["Flaw", "Mended", "Standing", "look", "mend"]


class Flaw(NamedTuple):
    """A defence that isn't as it should be.

    Attributes:
        what: Which one.
        wrong: What is wrong with it, and what to do about it.
        remedy: The statements that put it right; none where only people can tell what to do.
    """

    what: str
    wrong: str
    remedy: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what} {self.wrong}"


@dataclass(slots=True)
class Standing:
    """How the defences of a database stand.

    Attributes:
        flaws: What isn't as it should be.
        unchecked: What could not be looked at, and why, a line each.
    """

    flaws: list[Flaw] = field(default_factory=list[Flaw])
    unchecked: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Mended:
    """What came of mending.

    Attributes:
        back: What was put back.
        failed: What could not be put back, and why, a line each.
    """

    back: list[str] = field(default_factory=list[str])
    failed: list[str] = field(default_factory=list[str])


class Made(NamedTuple):
    """A trigger or a view.

    Attributes:
        definition: What is compared.
        remedy: The statements that make it, whatever is there.
        off: Whether it is there and does nothing.
    """

    definition: str
    remedy: tuple[str, ...] = ()
    off: bool = False


# (kind, the table that it is on, name) -> what it is; a view is on itself.
Parts = Mapping[tuple[str, str, str], Made]


class Unique(NamedTuple):
    """Columns of a table whose values are there only once, among the rows of a condition."""

    table: str
    columns: tuple[str | None, ...]
    condition: str


PUTS_BACK: Final = "`perdure db upgrade` puts it back"


def look(database: Database, connection: Connection) -> Standing:
    """Hold the defences of a database against what the migrations make. Blocking.

    Needs no right but to read. On PostgreSQL the views are compared in a transaction of its own
    that is rolled back, which takes the right to make temporary tables; whoever hasn't got it is
    told that they were not looked at.

    Args:
        database: Whose defences they are.
        connection: Sees a state of it.
    """
    standing = Standing()
    revision = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if revision != REVISION:  # what a newer one makes, only its own migrations say
        standing.unchecked.append(
            f"triggers, unique indexes and views: the schema, {revision}, is newer than that of "
            f"this perdure, {REVISION}; a newer perdure's `verify` looks at them"
        )
        return standing
    if connection.dialect.name == "sqlite":
        expected, found, unique = _migrated(), _sqlite_parts(connection), _sqlite_unique(connection)
    else:
        from perdure.store import catalogue  # for servers only

        expected, found = catalogue.expected_triggers(), catalogue.found_triggers(connection)
        unique = catalogue.found_unique(connection)
        try:
            views = catalogue.compare_views(database)
        except StoreError as error:
            standing.unchecked.append(f"views: {error}")
        else:
            expected, found = {**expected, **views.expected}, {**found, **views.found}
    standing.flaws += _compare(expected, found)
    standing.flaws += _compare_unique(connection, unique)
    return standing


def mend(database: Database) -> Mended:
    """Put back what is missing or other than the migrations make it. Blocking.

    What somebody else has added is left alone.

    Raises:
        StoreError: The database can't be written to.
    """
    mended = Mended()
    with database.snapshot() as connection:
        flaws = [flaw for flaw in look(database, connection).flaws if flaw.remedy]
    if not flaws:
        return mended
    with database.dialect.translate(), database.migration() as connection:
        for flaw in flaws:
            try:
                with connection.begin_nested():
                    for statement in flaw.remedy:
                        connection.exec_driver_sql(statement)
            except SQLAlchemyError as error:
                said = one_line(str(getattr(error, "orig", None) or error))
                mended.failed.append(f"{flaw.what} can't be put back: {said}")
            else:
                mended.back.append(flaw.what)
    return mended


# -- comparing -----------------------------------------------------------------------------------


def _compare(expected: Parts, found: Parts) -> Iterator[Flaw]:
    for (kind, table, name), made in expected.items():
        there = found.get((kind, table, name))
        what = f"the {kind} {name}" if kind == "view" else f"the {kind} {name} on {table}"
        if there is None:
            yield Flaw(what, f"is missing: {PUTS_BACK}", made.remedy)
        elif there.off:
            yield Flaw(what, f"is switched off: {PUTS_BACK}", made.remedy)
        elif there != made._replace(remedy=()):
            yield Flaw(what, f"is not the one that perdure made: {PUTS_BACK}", made.remedy)
    for kind, table, name in found.keys() - expected.keys():
        if kind != "view" and table in _OURS:
            wrong = "is not perdure's: look at what it does, and drop it"
            yield Flaw(f"the {kind} {name} on {table}", wrong)


_OURS: Final = frozenset((*metadata.tables, *VIEWS))


def _compare_unique(connection: Connection, found: Mapping[str, Unique | None]) -> Iterator[Flaw]:
    """Yield what is not unique any more, by whatever index.

    Args:
        connection: Says how statements are written.
        found: All indexes by name; None for one that isn't unique.
    """
    quote = connection.dialect.identifier_preparer.quote
    there = set(found.values())
    for name, wanted, index in _wanted_unique():
        if wanted in there:
            continue
        listed = ", ".join(quote(str(column)) for column in wanted.columns)
        if index is not None:
            made = str(sa.schema.CreateIndex(index).compile(dialect=connection.dialect))
        elif connection.dialect.name == "sqlite":  # which adds no constraint to a table
            made = f"CREATE UNIQUE INDEX {name} ON {wanted.table} ({listed})"
        else:
            made = f"ALTER TABLE {wanted.table} ADD CONSTRAINT {name} UNIQUE ({listed})"
        wrong = "is not the one that perdure made" if name in found else "is missing"
        yield Flaw(
            f"the unique {'constraint' if index is None else 'index'} {name} on {wanted.table}",
            f"{wrong}: {PUTS_BACK}",
            (*((f"DROP INDEX {name}",) if name in found else ()), made),
        )


def _wanted_unique() -> Iterator[tuple[str, Unique, sa.Index | None]]:
    for table in metadata.sorted_tables:
        for constraint in table.constraints:
            if isinstance(constraint, sa.UniqueConstraint):
                columns = tuple(column.name for column in constraint.columns)
                yield str(constraint.name), Unique(table.name, columns, ""), None
        for index in table.indexes:
            if index.unique:
                columns = tuple(column.name for column in index.columns)
                where = index.dialect_options["sqlite"]["where"]
                condition = plain_condition(None if where is None else str(where))
                yield str(index.name), Unique(table.name, columns, condition), index


def plain_condition(condition: str | None) -> str:
    """Return the condition of an index without what each database writes in its own way."""
    said = (condition or "").replace("::text", "").replace("]", "")
    return re.sub(r"[\s()]", "", said.replace("= ANY (ARRAY[", "IN ("))


def plain_lines(text: str) -> str:
    """Return the lines without the space around them, which may have come from another editor."""
    return "\n".join(filter(None, map(str.strip, text.splitlines())))


# -- SQLite --------------------------------------------------------------------------------------


@cache
def _migrated() -> Parts:
    """Return what the migrations make of an empty database."""
    from alembic import command

    engine = sa.create_engine("sqlite://", poolclass=StaticPool)
    try:
        with ONE_MIGRATION, engine.begin() as connection:
            command.upgrade(alembic_config(connection), "head")
            made = connection.exec_driver_sql(_SQLITE_PARTS).all()
    finally:
        engine.dispose()
    return {
        (kind, table, name): Made(
            plain_lines(sql), (f"DROP {kind.upper()} IF EXISTS {name}", str(sql))
        )
        for kind, name, table, sql in made
    }


_SQLITE_PARTS: Final = """
    SELECT type, name, tbl_name, sql FROM sqlite_master WHERE type IN ('trigger', 'view')
"""


def _sqlite_parts(connection: Connection) -> Parts:
    rows: Iterable[Any] = connection.exec_driver_sql(_SQLITE_PARTS).all()
    return {(kind, table, name): Made(plain_lines(str(sql))) for kind, name, table, sql in rows}


_SQLITE_INDEXES: Final = """
    SELECT m.tbl_name, m.name, m.sql, coalesce((
        SELECT l."unique" FROM pragma_index_list(m.tbl_name) AS l WHERE l.name = m.name), 0)
    FROM sqlite_master AS m WHERE m.type = 'index'
"""


def _sqlite_unique(connection: Connection) -> dict[str, Unique | None]:
    found: dict[str, Unique | None] = {}
    for table, name, sql, unique in connection.exec_driver_sql(_SQLITE_INDEXES).all():
        found[name] = None
        if unique:
            columns = connection.exec_driver_sql(
                "SELECT name FROM pragma_index_info(?) ORDER BY seqno", (name,)
            ).scalars()
            condition = re.split(r"\bWHERE\b", str(sql or ""), maxsplit=1, flags=re.IGNORECASE)
            found[name] = Unique(table, tuple(columns), plain_condition("".join(condition[1:])))
    return found
