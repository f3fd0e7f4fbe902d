"""Tasks whose events are in an archive, the gaps those leave in the log; which code may use it.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from perdure.errors import DatabaseIncompatible

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns and the table; events may be deleted once an `archived` one vouches."""
    postgresql = op.get_context().dialect.name == "postgresql"
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    word = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    op.add_column("tasks", sa.Column("archived", word))
    op.add_column("log_head", sa.Column("archive_of", word))
    op.create_table(
        "gaps",
        sa.Column("first_position", big, primary_key=True, autoincrement=False),
        sa.Column("last_position", big, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
    )
    # Whose schema is among these may use this one. A later migration that only adds puts itself
    # beside them; one that older code can't work with empties the table first.
    compatible = op.create_table("compatible", sa.Column("revision", word, primary_key=True))
    op.bulk_insert(compatible, [{"revision": revision}])
    for statement in _POSTGRESQL if postgresql else _SQLITE:
        op.execute(statement)


def downgrade() -> None:
    """Remove what was added, where nothing was archived.

    Raises:
        DatabaseIncompatible: Events are elsewhere, which the older schema can't say.
    """
    connection = op.get_bind()
    for found, what in (
        ("SELECT 1 FROM gaps LIMIT 1", "some of its events are in archives"),
        ("SELECT 1 FROM log_head WHERE archive_of IS NOT NULL", "it is an archive"),
    ):
        if connection.execute(sa.text(found)).first() is not None:
            raise DatabaseIncompatible(
                f"schema {down_revision} has no archives, and {what}: stay with schema {revision}"
            )
    postgresql = op.get_context().dialect.name == "postgresql"
    for statement in _POSTGRESQL_BEFORE if postgresql else _SQLITE_BEFORE:
        op.execute(statement)
    op.drop_table("compatible")
    op.drop_table("gaps")
    op.drop_column("log_head", "archive_of")
    op.drop_column("tasks", "archived")


# An event may go whose position a gap covers, once an `archived` event ends its stream.
_SQLITE = (
    "DROP TRIGGER events_no_delete",
    """
    CREATE TRIGGER events_no_delete BEFORE DELETE ON events
    WHEN NOT (
        OLD.type <> 'archived'
        AND coalesce((
            SELECT last_position FROM gaps WHERE first_position <= OLD.position
            ORDER BY first_position DESC LIMIT 1), 0) >= OLD.position
        AND coalesce((
            SELECT type FROM events WHERE stream_id = OLD.stream_id
            ORDER BY version DESC LIMIT 1), '') = 'archived'
    )
    BEGIN SELECT RAISE(ABORT, 'events are never deleted; see perdure redact and archive'); END
    """,
)
_SQLITE_BEFORE = (
    "DROP TRIGGER events_no_delete",
    """
    CREATE TRIGGER events_no_delete BEFORE DELETE ON events
    BEGIN SELECT RAISE(ABORT, 'events are never deleted; see perdure redact'); END
    """,
)
_FUNCTION = """
    CREATE OR REPLACE FUNCTION perdure_events_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'UPDATE'
            AND (NEW.position, NEW.stream_id, NEW.version, NEW.type, NEW.schema_version,
                 NEW.recorded_at, NEW.digest)
                IS NOT DISTINCT FROM
                (OLD.position, OLD.stream_id, OLD.version, OLD.type, OLD.schema_version,
                 OLD.recorded_at, OLD.digest)
            AND OLD.data ->> 'redacted' IS NULL
            AND length(NEW.data ->> 'redacted') = 64
        THEN
            RETURN NEW;
        END IF;
        {deletion}
        RAISE EXCEPTION 'events are never changed or deleted; see perdure redact{more}';
    END $$
"""
_POSTGRESQL = (
    _FUNCTION.format(
        deletion="""
        IF TG_OP = 'DELETE' THEN
            IF OLD.type <> 'archived'
                AND (SELECT g.last_position FROM gaps g WHERE g.first_position <= OLD.position
                     ORDER BY g.first_position DESC LIMIT 1) >= OLD.position
                AND (SELECT e.type FROM events e WHERE e.stream_id = OLD.stream_id
                     ORDER BY e.version DESC LIMIT 1) = 'archived'
            THEN
                RETURN OLD;
            END IF;
        END IF;
        """,
        more=" and archive",
    ),
)
_POSTGRESQL_BEFORE = (_FUNCTION.format(deletion="", more=""),)
