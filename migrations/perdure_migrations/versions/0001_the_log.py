"""The log, its projection, the views, and the triggers that keep history as it is.

Revision ID: 0001
Revises:
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSON, JSONB, TIMESTAMP

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ENDING = "type IN ('completed', 'failed', 'cancelled')"


def upgrade() -> None:
    """Create everything."""
    postgresql = op.get_context().dialect.name == "postgresql"
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    word = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
    json = sa.Text().with_variant(JSONB(), "postgresql")
    exact_json = sa.Text().with_variant(JSON(), "postgresql")  # to the byte, as it was hashed
    moment = sa.Text().with_variant(TIMESTAMP(timezone=True), "postgresql")

    op.create_table(
        "log_head",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("position", big, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.CheckConstraint("id = 1", name="log_head_one_row_check"),
    )
    op.create_table(
        "streams",
        sa.Column("stream_id", big, primary_key=True, autoincrement=False),
        sa.Column("task_id", word, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.UniqueConstraint("task_id", name="streams_task_id_key"),
    )
    op.create_table(
        "events",
        sa.Column("position", big, primary_key=True, autoincrement=False),
        sa.Column("stream_id", big, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("type", word, nullable=False),
        sa.Column("schema_version", sa.Integer, nullable=False),
        sa.Column("data", exact_json, nullable=False),
        sa.Column("recorded_at", moment, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("stream_id", "version", name="events_stream_version_key"),
        sa.ForeignKeyConstraint(["stream_id"], ["streams.stream_id"], name="events_stream_id_fkey"),
    )
    _partial_index("events_one_ending", "events", _ENDING, "stream_id", unique=True)
    op.create_table(
        "tasks",
        sa.Column("stream_id", big, primary_key=True, autoincrement=False),
        sa.Column("task_id", word, nullable=False),
        sa.Column("status", word, nullable=False),
        sa.Column("platform", word, nullable=False),
        sa.Column("model", word),
        sa.Column("type", word),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("worker", word),
        sa.Column("available_at", moment, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("prompt", sa.Text),
        sa.Column("output", sa.Text),
        sa.Column("partial_output", sa.Text),
        sa.Column("finish_reason", word),
        sa.Column("error_class", word),
        sa.Column("error", sa.Text),
        sa.Column("input_tokens", big),
        sa.Column("output_tokens", big),
        sa.Column("cache_read_tokens", big),
        sa.Column("cache_write_tokens", big),
        sa.Column("reasoning_tokens", big),
        sa.Column("cost_usd", sa.Double),
        sa.Column("submitted_at", moment, nullable=False),
        sa.Column("started_at", moment),
        sa.Column("ended_at", moment),
        sa.Column("batch", word),
        sa.Column("key", word),
        sa.Column("fingerprint", word),
        sa.Column("parent", word),
        sa.Column("retry_of", word),
        sa.Column("labels", json, nullable=False),
        sa.Column("files_created", json),
        sa.UniqueConstraint("task_id", name="tasks_task_id_key"),
        sa.UniqueConstraint("key", name="tasks_key_key"),
        sa.ForeignKeyConstraint(["stream_id"], ["streams.stream_id"], name="tasks_stream_id_fkey"),
    )
    _partial_index("tasks_due", "tasks", "status = 'pending'", "priority", "stream_id")
    _partial_index("tasks_running", "tasks", "status = 'running'", "worker")
    _partial_index("tasks_batch", "tasks", "batch IS NOT NULL", "batch", "status")
    _partial_index("tasks_unsuccessful", "tasks", "status IN ('failed', 'cancelled')", "stream_id")
    _partial_index("tasks_retry_of", "tasks", "retry_of IS NOT NULL", "retry_of")
    op.create_table(
        "blobs",
        sa.Column("digest", word, primary_key=True),
        sa.Column("size", big, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "workers",
        sa.Column("worker_id", word, primary_key=True),
        sa.Column("host", word, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("started_at", moment, nullable=False),
        sa.Column("heartbeat_at", moment, nullable=False),
    )
    head = sa.table(
        "log_head",
        sa.column("id", sa.Integer),
        sa.column("position", sa.Integer),
        sa.column("digest", sa.LargeBinary),
    )
    op.execute(sa.insert(head).values(id=1, position=0, digest=b""))

    for statement in (
        (*_POSTGRESQL_DEFENCES, *_POSTGRESQL_STORAGE) if postgresql else _SQLITE_TRIGGERS
    ):
        op.execute(statement)
    for name, body in _views(postgresql).items():
        op.execute(f"CREATE VIEW {name} AS {body}")


def downgrade() -> None:
    """Remove everything, history included."""
    postgresql = op.get_context().dialect.name == "postgresql"
    for name in _views(postgresql):
        op.execute(f"DROP VIEW {name}")
    if postgresql:
        op.execute("DROP TRIGGER events_append_only ON events")
        op.execute("DROP TRIGGER events_not_truncated ON events")
        op.execute("DROP FUNCTION perdure_events_append_only()")
    else:
        op.execute("DROP TRIGGER events_no_update")
        op.execute("DROP TRIGGER events_no_delete")
    for table in ("workers", "blobs", "tasks", "events", "streams", "log_head"):
        op.drop_table(table)


def _partial_index(
    name: str, table: str, condition: str, *columns: str, unique: bool = False
) -> None:
    where = sa.text(condition)
    op.create_index(
        name, table, list(columns), unique=unique, sqlite_where=where, postgresql_where=where
    )


# The one change allowed is a redaction: content gives way to a tombstone that names what was there.
_SQLITE_TRIGGERS = (
    """
    CREATE TRIGGER events_no_update BEFORE UPDATE ON events
    WHEN NOT (
        NEW.position IS OLD.position AND NEW.stream_id IS OLD.stream_id
        AND NEW.version IS OLD.version AND NEW.type IS OLD.type
        AND NEW.schema_version IS OLD.schema_version
        AND NEW.recorded_at IS OLD.recorded_at AND NEW.digest IS OLD.digest
        AND json_extract(OLD.data, '$.redacted') IS NULL
        AND length(json_extract(NEW.data, '$.redacted')) IS 64 -- NULL would let anything pass
    )
    BEGIN SELECT RAISE(ABORT, 'events are never changed; see perdure redact'); END
    """,
    """
    CREATE TRIGGER events_no_delete BEFORE DELETE ON events
    BEGIN SELECT RAISE(ABORT, 'events are never deleted; see perdure redact'); END
    """,
)
_POSTGRESQL_DEFENCES = (
    """
    CREATE FUNCTION perdure_events_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
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
        RAISE EXCEPTION 'events are never changed or deleted; see perdure redact';
    END $$
    """,
    """
    CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON events
    FOR EACH ROW EXECUTE FUNCTION perdure_events_append_only()
    """,
    """
    CREATE TRIGGER events_not_truncated BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION perdure_events_append_only()
    """,
    # What is stored as text can be read as `jsonb` by everyone who asks, or it isn't stored.
    """
    ALTER TABLE events ADD CONSTRAINT events_data_check
    CHECK (jsonb_typeof(data::jsonb) = 'object')
    """,
)
# Rows that change all the time find room for their next version on their own page, and what they
# leave behind is cleared away soon.
_POSTGRESQL_STORAGE = (
    """
    ALTER TABLE log_head SET (
        fillfactor = 10, autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0)
    """,
    "ALTER TABLE streams SET (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02)",
    """
    ALTER TABLE tasks SET (
        fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_analyze_scale_factor = 0.02)
    """,
    "ALTER TABLE workers SET (fillfactor = 50)",
)


def _views(postgresql: bool) -> dict[str, str]:
    """Return name -> query. What differs is how text is joined, JSON is read, a day is cut."""

    def field(name: str, cast: str = "", event: str = "e") -> str:
        if postgresql:
            return f"({event}.data ->> '{name}'){cast}"
        return f"json_extract({event}.data, '$.{name}')"  # SQLite has ->> only from 3.38 on

    joined = (
        "string_agg(piece.text, '' ORDER BY piece.version)"
        if postgresql
        else "group_concat(piece.text, '')"
    )
    data = "e.data::jsonb AS data" if postgresql else "e.data"
    digest = "encode(e.digest, 'hex')" if postgresql else "lower(hex(e.digest))"
    day = "(t.submitted_at AT TIME ZONE 'UTC')::date" if postgresql else "date(t.submitted_at)"
    count_if = "count(*) FILTER (WHERE {})".format
    return {
        "task_events": f"""
            SELECT e.position, s.task_id, e.version, e.type, {data}, e.recorded_at,
                   {digest} AS digest
            FROM events e JOIN streams s ON s.stream_id = e.stream_id
        """,
        # A running task's text is what its chunks say since its output last began anew.
        "task_output": f"""
            SELECT t.task_id, t.status, coalesce(t.output, t.partial_output, (
                SELECT {joined} FROM (
                    SELECT {field("text")} AS text, e.version AS version FROM events e
                    WHERE e.stream_id = t.stream_id AND e.type = 'chunk'
                      AND {field("kind")} = 'text'
                      AND e.version > coalesce((
                          SELECT max(e.version) FROM events e
                          WHERE e.stream_id = t.stream_id AND e.type = 'running'
                            AND {field("mode")} = 'restart'), 0)
                    ORDER BY e.version) AS piece
            ), '') AS text
            FROM tasks t
        """,
        "attempts": f"""
            SELECT s.task_id, {field("attempt", "::integer")} AS attempt,
                   {field("platform")} AS platform,
                   {field("model")} AS model, {field("worker")} AS worker,
                   {field("mode")} AS mode, e.recorded_at AS started_at,
                   f.recorded_at AS ended_at, coalesce(f.type, 'running') AS outcome,
                   {field("error_class", event="f")} AS error_class,
                   {field("message", event="f")} AS error,
                   {field("cost_usd", "::double precision", event="f")} AS cost_usd
            FROM events e
            JOIN streams s ON s.stream_id = e.stream_id
            LEFT JOIN events f ON f.stream_id = e.stream_id AND f.version = (
                SELECT min(g.version) FROM events g
                WHERE g.stream_id = e.stream_id AND g.version > e.version
                  AND g.type IN ('attempt_failed', 'interrupted', 'completed', 'failed',
                                 'cancelled'))
            WHERE e.type = 'running'
        """,
        "usage_daily": f"""
            SELECT {day} AS day, t.platform, t.model, count(*) AS tasks,
                   sum(t.input_tokens) AS input_tokens, sum(t.output_tokens) AS output_tokens,
                   sum(t.cache_read_tokens) AS cache_read_tokens,
                   sum(t.cache_write_tokens) AS cache_write_tokens,
                   sum(t.reasoning_tokens) AS reasoning_tokens,
                   sum(t.cost_usd) AS cost_usd,
                   {count_if("t.cost_usd IS NULL AND t.input_tokens IS NOT NULL")}
                       AS unpriced_tasks
            FROM tasks t GROUP BY 1, 2, 3
        """,
        # A task that was run again counts once, with its latest run; `retried` counts the others.
        "batches": f"""
            SELECT t.batch, {count_if("NOT t.again")} AS tasks,
                   {count_if("NOT t.again AND t.status = 'pending'")} AS pending,
                   {count_if("NOT t.again AND t.status = 'running'")} AS running,
                   {count_if("NOT t.again AND t.status = 'completed'")} AS completed,
                   {count_if("NOT t.again AND t.status = 'failed'")} AS failed,
                   {count_if("NOT t.again AND t.status = 'cancelled'")} AS cancelled,
                   {count_if("t.again")} AS retried,
                   sum(t.input_tokens) AS input_tokens, sum(t.output_tokens) AS output_tokens,
                   sum(t.cost_usd) AS cost_usd,
                   min(t.submitted_at) AS submitted_at, max(t.ended_at) AS ended_at
            FROM (
                SELECT t.*, EXISTS (
                    SELECT 1 FROM tasks r WHERE r.retry_of = t.task_id) AS again
                FROM tasks t WHERE t.batch IS NOT NULL
            ) AS t GROUP BY t.batch
        """,
    }
