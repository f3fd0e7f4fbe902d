"""What PostgreSQL's catalogues say of triggers, unique indexes and views, and what they should say.

What the migrations make of an empty database can't be looked at without one, and who verifies may
only read. So the migrations are written out as SQL. What they say of triggers is spelt as the
server spells it. Queries it spells in a way of its own, another one in each version: the views are
made once more, as temporary ones on temporary tables, and rolled back.
"""

from __future__ import annotations

import contextlib
import re
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from perdure.store.database import Database
from perdure.store.defences import Made, Parts, Unique, plain_condition, plain_lines
from perdure.store.dialect import ONE_MIGRATION

__all__ = ["Views", "compare_views", "expected_triggers", "found_triggers", "found_unique"]


class _Written(list[str]):
    """Takes what alembic writes, a statement at a time."""

    def write(self, text: str) -> None:
        """Take a statement."""
        self.append(text.strip().removesuffix(";"))

    def flush(self) -> None:
        """Do nothing, as nothing is held back."""


@cache
def _statements() -> tuple[str, ...]:
    """Return all migrations as SQL, in their order."""
    from alembic.config import Config
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "perdure_migrations:")
    written: Any = _Written()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": written}
    )
    with ONE_MIGRATION, Operations.context(context):
        for script in reversed(list(ScriptDirectory.from_config(config).walk_revisions())):
            script.module.upgrade()
    return tuple(written)


# -- triggers ------------------------------------------------------------------------------------

_CREATED: Final = re.compile(r"CREATE (?:OR REPLACE )?(FUNCTION|TRIGGER) (\w+)")
_DROPPED: Final = re.compile(r"DROP (FUNCTION|TRIGGER) (?:IF EXISTS )?(\w+)")
_TRIGGER: Final = re.compile(
    r"CREATE TRIGGER (?P<name>\S+) (?P<when>BEFORE|AFTER) (?P<what>[A-Z ]+) ON (?:\S+\.)?"
    r"(?P<table>\w+) (?P<each>FOR EACH \w+) EXECUTE FUNCTION (?:\S+\.)?(?P<function>\w+)\(\)"
)


@cache
def expected_triggers() -> Parts:
    """Return the triggers that the migrations make."""
    made: dict[tuple[str, str], str] = {}
    for statement in _statements():
        if created := _CREATED.match(statement):
            made[created[1], created[2]] = statement
        elif dropped := _DROPPED.match(statement):
            made.pop((dropped[1], dropped[2]), None)
    triggers: dict[tuple[str, str, str], Made] = {}
    for (kind, name), statement in made.items():
        said = _TRIGGER.fullmatch(" ".join(statement.split()))
        if kind == "TRIGGER" and said is not None:
            function = made["FUNCTION", said["function"]]
            anew = function.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1)
            triggers["trigger", said["table"], name] = Made(
                _trigger(statement, function.split("$$")[1], "plpgsql"),
                (_plainly(anew), f"DROP TRIGGER IF EXISTS {name} ON {said['table']}", statement),
            )
    return triggers


def found_triggers(connection: Connection) -> Parts:
    """Return the triggers and rules that are on tables and views."""
    rows = connection.exec_driver_sql(_TRIGGERS).all()
    return {
        (kind, table, name): Made(_trigger(definition, body, language), off=off)
        for kind, name, table, definition, body, language, off in rows
    }


_TRIGGERS: Final = """
    WITH ours AS (SELECT c.oid, c.relname FROM pg_class c WHERE c.relnamespace = (
        SELECT relnamespace FROM pg_class WHERE oid = to_regclass('events')))
    SELECT 'trigger', t.tgname::text, o.relname::text, pg_get_triggerdef(t.oid), p.prosrc,
        l.lanname::text, t.tgenabled NOT IN ('O', 'A')
    FROM pg_trigger t JOIN ours o ON o.oid = t.tgrelid
    JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_language l ON l.oid = p.prolang
    WHERE NOT t.tgisinternal
    UNION ALL
    SELECT 'rule', r.rulename::text, o.relname::text, '', '', '', false
    FROM pg_rewrite r JOIN ours o ON o.oid = r.ev_class WHERE r.rulename <> '_RETURN'
"""


def _trigger(definition: str, body: str, language: str) -> str:
    """Return what a trigger does, spelt the same wherever it was read."""
    said = _TRIGGER.fullmatch(" ".join(definition.split()))
    if said is None:  # with a condition, say, as none of ours is
        return definition
    events = " OR ".join(sorted(said["what"].split(" OR ")))
    head = f"{said['name']} {said['when']} {events} ON {said['table']} {said['each']}"
    return f"{head} {said['function']} {language}\n{plain_lines(body)}"


def _plainly(statement: str) -> str:
    """Return a statement as the driver takes it where it looks for parameters."""
    return statement.replace("%", "%%")


# -- unique indexes ------------------------------------------------------------------------------


def found_unique(connection: Connection) -> dict[str, Unique | None]:
    """Return all indexes by name; None for one that keeps nothing unique."""
    return {
        name: Unique(table, tuple(columns), plain_condition(condition)) if unique else None
        for table, name, columns, condition, unique in connection.exec_driver_sql(_INDEXES).all()
    }


_INDEXES: Final = """
    SELECT c.relname::text, i.relname::text, ARRAY(
            SELECT a.attname::text
            FROM unnest(x.indkey::int2[]) WITH ORDINALITY AS k (number, place)
            LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number
            WHERE k.place <= x.indnkeyatts ORDER BY k.place),
        pg_get_expr(x.indpred, x.indrelid), x.indisunique AND x.indisvalid AND x.indisready
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class c ON c.oid = x.indrelid
    WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('events'))
"""


# -- views ---------------------------------------------------------------------------------------


class Views(NamedTuple):
    """The views that there should be, and those that there are."""

    expected: Parts
    found: Parts


class _Undo(Exception):
    """Ends a transaction that nothing is to be left of."""


def compare_views(database: Database) -> Views:
    """Return the views, both as the server itself spells them.

    Raises:
        StoreError: The role, or the server, doesn't let us make temporary tables.
    """
    found: dict[str, str] = {}
    made: dict[str, str] = {}
    with (
        contextlib.suppress(_Undo),
        database.dialect.translate(),
        database.migration() as connection,
    ):
        # Each in a search path in which what it is made of is found first.
        connection.exec_driver_sql(_SEARCH_THERE)
        found = _definitions(connection, "to_regclass('events')")
        connection.exec_driver_sql("SET LOCAL search_path = pg_temp")
        for statement in _statements():
            if statement.startswith(_WHAT_VIEWS_NEED):
                connection.exec_driver_sql(_plainly(statement))
        made = _definitions(connection, "to_regclass('pg_temp.events')")
        raise _Undo
    return Views(
        {("view", name, name): Made(query, _anew(name, query)) for name, query in made.items()},
        {("view", name, name): Made(query) for name, query in found.items()},
    )


_WHAT_VIEWS_NEED: Final = ("CREATE TABLE", "ALTER TABLE", "CREATE VIEW", "DROP VIEW")
_SEARCH_THERE: Final = """
    SELECT set_config('search_path', quote_ident(n.nspname), true)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.oid = to_regclass('events')
"""


def _definitions(connection: Connection, beside: str) -> dict[str, str]:
    """Return name -> query of the views in the schema of a table."""
    rows = connection.exec_driver_sql(
        "SELECT c.relname::text, pg_get_viewdef(c.oid) FROM pg_class c WHERE c.relkind = 'v' AND "
        f"c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = {beside})"
    )
    return {row[0]: row[1] for row in rows}


def _anew(name: str, query: str) -> tuple[str, ...]:
    """Return what makes a view, and keeps the rights that people have on it where it is there."""
    return (_plainly(f"CREATE OR REPLACE VIEW {name} AS {query}"),)
