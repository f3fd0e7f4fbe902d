"""What `perdure doctor` looks at where the database is on a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from perdure.cli.figures import size
from perdure.cli.findings import LOG, Finding, of_defences, of_log
from perdure.errors import DatabaseIncompatible, StoreError
from perdure.store.database import Database
from perdure.store.readonly import REVISION

__all__ = ["examine_server"]

_SKEW_SECONDS: Final = 2.0
_ASKED: Final = """
    SELECT current_setting('server_version') AS version,
           current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('fsync') AS fsync,
           current_setting('server_encoding') AS encoding,
           pg_is_in_recovery() AS standby,
           extract(epoch FROM clock_timestamp())::double precision AS now
"""


def examine_server(database: Database) -> Iterator[Finding]:
    """Yield what is found about the server, the schema and the log.

    Raises:
        StoreError: The server can't be reached, or the schema isn't today's.
    """
    import time

    place = database.dialect.place
    with database.snapshot() as connection:
        found: Any = connection.exec_driver_sql(_ASKED).mappings().one()
    skew = abs(time.time() - found["now"])
    yield Finding("database", "ok", place)
    yield Finding("server", "ok", f"PostgreSQL {found['version']}")
    yield from _durability(found)
    if found["encoding"] != "UTF8":
        hint = "create the database with ENCODING 'UTF8'"
        yield Finding("encoding", "broken", found["encoding"], hint)
    if found["standby"]:
        hint = "it can be read, not written to: give the address of the primary"
        yield Finding("standby", "warning", "the server is a standby", hint)
    if skew > _SKEW_SECONDS:
        hint = "perdure goes by the server's; set this host's clock all the same"
        yield Finding("clock", "note", f"{skew:.0f} s away from the server's", hint)
    try:
        revision = database.revision()
    except DatabaseIncompatible as error:
        yield Finding("schema", "broken", "unknown", str(error))
        raise
    if revision != REVISION:
        yield Finding("schema", "broken", revision or "none", "`perdure db upgrade` sets it up")
        raise StoreError(f"{place} has schema {revision or 'none'}, not {REVISION}")
    yield Finding("schema", "ok", str(revision))
    yield Finding("size", "ok", f"{size(database.dialect.size())}, indexes included")
    with database.snapshot() as connection:
        head = connection.exec_driver_sql(LOG).one_or_none()
    yield of_log(head)
    yield of_defences(database)


def _durability(found: Any) -> Iterator[Finding]:  # noqa: ANN401 - a row
    if found["fsync"] == "off":
        hint = "what was acknowledged is lost when the server's machine fails: set fsync = on"
        yield Finding("durability", "warning", "fsync is off", hint)
    elif found["synchronous_commit"] == "off":
        hint = "what was acknowledged last is lost in a crash: set synchronous_commit = on"
        yield Finding("durability", "warning", "synchronous_commit is off", hint)
    else:
        yield Finding("durability", "ok", f"synchronous_commit {found['synchronous_commit']}")
