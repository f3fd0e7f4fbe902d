"""`defences`: whoever drops or replaces what the database itself refuses and shows is found out."""

from __future__ import annotations

from collections.abc import Generator

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from perdure.events import Cancelled, Completed
from perdure.store.database import Database
from perdure.store.defences import Standing, look, mend
from perdure.store.schema import VIEWS
from servers.postgresql import Server
from store.backends import Backend, Postgresql, running, submitted, write


def looked_at(url: str) -> Standing:
    """Return how the defences of a database stand."""
    database = Database(url)
    with database.snapshot() as connection:
        return look(database, connection)


def flaws(url: str) -> list[str]:
    """Return what is wrong, when all can be looked at."""
    standing = looked_at(url)
    assert standing.unchecked == []
    return [str(flaw) for flaw in standing.flaws]


_ENDED = "WHERE type IN ('completed', 'failed', 'cancelled')"
_NO_DELETE = "CREATE TRIGGER events_no_delete BEFORE DELETE ON events"
_RAISES = "BEGIN SELECT RAISE(ABORT, 'no'); END"
_APPEND_ONLY = "CREATE TRIGGER events_append_only BEFORE"
_CALLS = "EXECUTE FUNCTION perdure_events_append_only()"
_FUNCTION = "CREATE OR REPLACE FUNCTION public.perdure_events_append_only() RETURNS trigger"

# By dialect: (what is done, what is found).
DAMAGE: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "sqlite": [
        (("DROP TRIGGER events_no_update",), "trigger events_no_update on events is missing"),
        (("DROP TRIGGER events_no_delete",), "trigger events_no_delete on events is missing"),
        (
            ("DROP TRIGGER events_no_delete", f"{_NO_DELETE} WHEN 0 {_RAISES}"),
            "trigger events_no_delete on events is not the one",
        ),
        (
            (
                "DROP TRIGGER events_no_delete",
                f"{_NO_DELETE} {_RAISES}".replace("events ", "tasks "),
            ),
            "trigger events_no_delete on events is missing",
        ),
    ],
    "postgresql": [
        (
            ("DROP TRIGGER events_append_only ON events",),
            "trigger events_append_only on events is missing",
        ),
        (
            ("DROP TRIGGER events_not_truncated ON events",),
            "trigger events_not_truncated on events is missing",
        ),
        (
            ("DROP FUNCTION perdure_events_append_only() CASCADE",),
            "trigger events_append_only on events is missing",
        ),
        (
            ("ALTER TABLE events DISABLE TRIGGER events_append_only",),
            "trigger events_append_only on events is switched off",
        ),
        (
            (f"{_FUNCTION} LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'",),
            "trigger events_append_only on events is not the one",
        ),
        (
            (
                "DROP TRIGGER events_append_only ON events",
                f"{_APPEND_ONLY} DELETE ON events FOR EACH ROW {_CALLS}",
            ),
            "trigger events_append_only on events is not the one",
        ),
        (
            (
                "DROP TRIGGER events_append_only ON events",
                f"{_APPEND_ONLY} DELETE ON events FOR EACH ROW WHEN (OLD.version < 0) {_CALLS}",
            ),
            "trigger events_append_only on events is not the one",
        ),
        (
            ("ALTER TABLE events DROP CONSTRAINT events_stream_version_key",),
            "unique constraint events_stream_version_key on events is missing",
        ),
        (
            ("ALTER TABLE tasks DROP CONSTRAINT tasks_key_key",),
            "unique constraint tasks_key_key on tasks is missing",
        ),
    ],
}
DAMAGE_TO_ALL: list[tuple[tuple[str, ...], str]] = [
    (("DROP INDEX events_one_ending",), "unique index events_one_ending on events is missing"),
    *(
        (
            ("DROP INDEX events_one_ending", f"CREATE {index}"),
            "unique index events_one_ending on events is not the one",
        )
        for index in (
            f"INDEX events_one_ending ON events (stream_id) {_ENDED}",
            "UNIQUE INDEX events_one_ending ON events (stream_id) WHERE type IN ('completed', 'x')",
            f"UNIQUE INDEX events_one_ending ON events (stream_id, version) {_ENDED}",
            f"UNIQUE INDEX events_one_ending ON events (stream_id) {_ENDED} AND version < 0",
        )
    ),
    *(((f"DROP VIEW {view}",), f"view {view} is missing") for view in VIEWS),
]


@pytest.fixture
def url(backend: Backend, database_url: str) -> str:
    """A database that nobody has touched."""
    return database_url


async def test_untouched(url: str) -> None:
    """What was migrated, and written to, is all there; there is nothing to mend."""
    await write(url, ("task", [(submitted(), running()), (Completed(),)]))
    assert flaws(url) == []
    mended = mend(Database(url))
    assert (mended.back, mended.failed) == ([], [])


def test_damage(backend: Backend, url: str) -> None:
    """Each thing that is dropped, switched off or replaced is found, and put back as it was."""
    for statements, says in (*DAMAGE[backend.dialect], *DAMAGE_TO_ALL):
        for statement in statements:
            backend.change(url, statement)
        found = flaws(url)
        assert any(says in flaw for flaw in found), (statements, found)
        mended = mend(Database(url))
        assert mended.failed == []
        assert mended.back
        assert flaws(url) == [], statements


def test_views_that_tell_something_else(backend: Backend, url: str) -> None:
    """A view with the same columns and other rows is found, and made as it was."""
    if backend.dialect == "sqlite":
        backend.change(url, "DROP VIEW task_output")
        create = "CREATE VIEW task_output"
    else:
        create = "CREATE OR REPLACE VIEW public.task_output"
    backend.change(url, f"{create} AS SELECT task_id, status, 'x' AS text FROM tasks")
    (found,) = flaws(url)
    assert found.startswith("the view task_output is not the one")
    assert mend(Database(url)).back == ["the view task_output"]
    assert flaws(url) == []


def test_what_somebody_has_added(backend: Backend, url: str) -> None:
    """A trigger, or a rule, of somebody else's on a table of perdure's is named and left alone."""
    if backend.dialect == "sqlite":
        added = [
            "CREATE TRIGGER odd AFTER INSERT ON events BEGIN DELETE FROM workers; END",
            "CREATE TRIGGER odder INSTEAD OF INSERT ON batches BEGIN DELETE FROM workers; END",
        ]
    else:
        added = [
            f"CREATE TRIGGER odd BEFORE INSERT ON events FOR EACH ROW {_CALLS}",
            "CREATE RULE odder AS ON DELETE TO tasks DO INSTEAD NOTHING",
        ]
    backend.change(url, "CREATE TABLE theirs (id integer)")
    for statement in added:
        backend.change(url, statement)
    found = flaws(url)
    assert all("is not perdure's" in flaw for flaw in found)
    assert {flaw.split()[2] for flaw in found} == {"odd", "odder"}
    assert mend(Database(url)).back == []
    assert len(flaws(url)) == 2


async def test_what_can_not_be_put_back(backend: Backend, url: str) -> None:
    """An index that the rows contradict stays away, and that is said; the rest is put back."""
    await write(url, ("task", [(submitted(), running()), (Completed(),)]))
    backend.change(url, "DROP INDEX events_one_ending")
    backend.change(url, "DROP VIEW batches")
    backend.change(
        url,
        "INSERT INTO events SELECT position + 1, stream_id, version + 1, "
        f"'{Cancelled.type}', schema_version, data, recorded_at, digest "
        "FROM events WHERE type = 'completed'",
    )
    mended = mend(Database(url))
    assert mended.back == ["the view batches"]
    (failed,) = mended.failed
    assert failed.startswith("the unique index events_one_ending on events can't be put back: ")
    assert "\n" not in failed


def test_a_newer_schema(backend: Backend, url: str) -> None:
    """What a newer release has made isn't judged by this one, nor undone."""
    backend.change(url, "UPDATE alembic_version SET version_num = '9999'")
    backend.change(url, "DROP INDEX events_one_ending")
    standing = looked_at(url)
    assert standing.flaws == []
    (unchecked,) = standing.unchecked
    assert "9999" in unchecked
    assert mend(Database(url)).back == []


class TestRights:
    """Who may only read."""

    @pytest.fixture
    def role(self, postgresql_server: Server) -> Generator[str, None, None]:
        """A role that may do nothing yet."""
        postgresql_server.execute("CREATE ROLE onlooker LOGIN")
        yield "onlooker"
        postgresql_server.execute("DROP ROLE onlooker")

    @pytest.mark.parametrize("temporary", [True, False])
    def test_only_reading(self, postgresql: Postgresql, role: str, temporary: bool) -> None:
        """Triggers and indexes are looked at with the right to read; views take one more."""
        url = postgresql.new()
        name = make_url(url).database
        for statement in (
            f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
            f"REVOKE TEMPORARY ON DATABASE {name} FROM PUBLIC",
            *([f"GRANT TEMPORARY ON DATABASE {name} TO {role}"] if temporary else []),
            "DROP INDEX events_one_ending",
            "DROP VIEW batches",
        ):
            postgresql.change(url, statement)
        reader = make_url(url).set(username=role).render_as_string(hide_password=False)
        standing = looked_at(reader)
        found = [flaw.what for flaw in standing.flaws]
        assert "the unique index events_one_ending on events" in found
        assert ("the view batches" in found) is temporary
        assert bool(standing.unchecked) is not temporary
        with Database(url).snapshot() as connection:
            left = connection.execute(
                sa.text("SELECT count(*) FROM pg_class WHERE relpersistence = 't'")
            ).scalar_one()
        assert left == 0
        postgresql.change(url, f"DROP OWNED BY {role}")
