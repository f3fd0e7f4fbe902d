"""The tables as SQLAlchemy Core sees them.

Names of tables, views and columns are a public contract: people's SQL depends on them. What creates
and changes them in a database is `perdure_migrations`, which also holds the views and triggers; a
test keeps the two equal.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import orjson
from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from perdure.events import ENDINGS, canonical
from perdure.store.readonly import APPLICATION_ID, REVISION, VIEWS, iso

__all__ = [
    "APPLICATION_ID",
    "REVISION",
    "VIEWS",
    "blobs",
    "compatible",
    "events",
    "gaps",
    "log_head",
    "metadata",
    "streams",
    "tasks",
    "workers",
]


@lru_cache(maxsize=256)  # all that is written together has one moment, in many places
def _as_text(moment: datetime | None) -> str | None:
    return None if moment is None else iso(moment)


class Timestamp(TypeDecorator[datetime]):
    """A moment in UTC: `timestamptz` on PostgreSQL, ISO 8601 text ending in Z on SQLite."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the database's own type."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(TIMESTAMP(timezone=True))
        return dialect.type_descriptor(Text())

    def bind_processor(self, dialect: Dialect) -> Any:  # noqa: ANN401 - a function, or None
        """Return what turns a moment into what is stored; None where nothing has to."""
        return None if dialect.name == "postgresql" else _as_text

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ANN401
        """Turn what is stored into a moment."""
        return datetime.fromisoformat(value) if isinstance(value, str) else value


class PostgresqlJson(UserDefinedType[str]):
    """A JSON type of PostgreSQL that takes and gives text."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_how: object) -> str:
        """Return the type's name."""
        return self.name


class StoredJson(TypeDecorator[str]):
    """JSON that we encoded ourselves, as text: encoded once, stored and hashed as it is.

    `json` on PostgreSQL, which keeps the text to the last byte. `jsonb` would not: it reorders keys
    and writes 1e16 as an integer, so the digests would depend on today's encoder for ever.
    """

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the database's own type."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(PostgresqlJson("JSON"))
        return dialect.type_descriptor(Text())


class CanonicalJson(TypeDecorator[str]):
    """Canonical JSON for people to query: `jsonb` on PostgreSQL, read back in canonical form."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Choose the database's own type."""
        if dialect.name == "postgresql":
            return dialect.type_descriptor(PostgresqlJson("JSONB"))
        return dialect.type_descriptor(Text())

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ANN401
        """Bring what `jsonb` has put in an order of its own back into ours."""
        if value is None or dialect.name != "postgresql":
            found: str | None = value
            return found
        try:
            return canonical(orjson.loads(value)).decode()
        except ValueError:  # only somebody else can have written it
            return str(value)


_BigInt: Final = BigInteger().with_variant(Integer, "sqlite")
# Sorted by code points, as SQLite and Python do it, whatever a server's locale is.
_Name: Final = Text().with_variant(Text(collation="C"), "postgresql")

metadata: Final = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_name)s",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

log_head: Final = Table(
    "log_head",
    metadata,
    Column("id", Integer, CheckConstraint("id = 1", name="one_row"), primary_key=True),
    Column("position", _BigInt, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("archive_of", _Name),
)

streams: Final = Table(
    "streams",
    metadata,
    # The position of the stream's first event: unique and ascending without a counter of its own.
    Column("stream_id", _BigInt, primary_key=True, autoincrement=False),
    Column("task_id", _Name, nullable=False, unique=True),
    Column("version", Integer, nullable=False),
)

events: Final = Table(
    "events",
    metadata,
    Column("position", _BigInt, primary_key=True, autoincrement=False),
    Column("stream_id", _BigInt, ForeignKey("streams.stream_id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("type", _Name, nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("data", StoredJson, nullable=False),
    Column("recorded_at", Timestamp, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    UniqueConstraint("stream_id", "version", name="events_stream_version_key"),
)
_ENDED = text("type IN ({})".format(", ".join(f"'{name}'" for name in ENDINGS)))
Index(
    "events_one_ending",
    events.c.stream_id,
    unique=True,
    sqlite_where=_ENDED,
    postgresql_where=_ENDED,
)

tasks: Final = Table(
    "tasks",
    metadata,
    Column(
        "stream_id", _BigInt, ForeignKey("streams.stream_id"), primary_key=True, autoincrement=False
    ),
    Column("task_id", _Name, nullable=False, unique=True),
    Column("status", _Name, nullable=False),
    Column("platform", _Name, nullable=False),
    Column("model", _Name),
    Column("type", _Name),
    Column("priority", Integer, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("worker", _Name),
    Column("available_at", Timestamp, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("prompt", Text),
    Column("output", Text),
    Column("partial_output", Text),
    Column("finish_reason", _Name),
    Column("error_class", _Name),
    Column("error", Text),
    Column("input_tokens", _BigInt),
    Column("output_tokens", _BigInt),
    Column("cache_read_tokens", _BigInt),
    Column("cache_write_tokens", _BigInt),
    Column("reasoning_tokens", _BigInt),
    Column("cost_usd", Double),
    Column("submitted_at", Timestamp, nullable=False),
    Column("started_at", Timestamp),
    Column("ended_at", Timestamp),
    Column("batch", _Name),
    Column("key", _Name, unique=True),
    Column("fingerprint", _Name),
    Column("parent", _Name),
    Column("retry_of", _Name),
    Column("labels", CanonicalJson, nullable=False),
    Column("files_created", CanonicalJson),
    Column("tool_calls", CanonicalJson),
    Column("archived", _Name),
)


def _partial(name: str, condition: str, *columns: str) -> None:
    where = text(condition)
    Index(name, *(tasks.c[c] for c in columns), sqlite_where=where, postgresql_where=where)


# Each serves one question: what is due, what is due in a batch, who runs what, what is in a batch,
# what went wrong, what was run again. Finished tasks, most of all, are in none of the first three.
_partial("tasks_due", "status = 'pending'", "priority", "stream_id")
_partial(
    *("tasks_due_in_batch", "status = 'pending' AND batch IS NOT NULL"),
    *("batch", "priority", "stream_id"),
)
_partial("tasks_running", "status = 'running'", "worker")
_partial("tasks_batch", "batch IS NOT NULL", "batch", "status")
_partial("tasks_unsuccessful", "status IN ('failed', 'cancelled')", "stream_id")
_partial("tasks_retry_of", "retry_of IS NOT NULL", "retry_of")

# Positions whose events are elsewhere, so that the chain can be walked across them.
gaps: Final = Table(
    "gaps",
    metadata,
    Column("first_position", _BigInt, primary_key=True, autoincrement=False),
    Column("last_position", _BigInt, nullable=False),
    Column("digest", LargeBinary, nullable=False),
)

blobs: Final = Table(
    "blobs",
    metadata,
    Column("digest", _Name, primary_key=True),
    Column("size", _BigInt, nullable=False),
    Column("data", LargeBinary, nullable=False),
)

# Which revisions of this schema the code may be written for that uses the database as it is.
compatible: Final = Table("compatible", metadata, Column("revision", _Name, primary_key=True))

workers: Final = Table(
    "workers",
    metadata,
    Column("worker_id", _Name, primary_key=True),
    Column("host", _Name, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started_at", Timestamp, nullable=False),
    Column("heartbeat_at", Timestamp, nullable=False),
    Column("lease_seconds", Double),
)
