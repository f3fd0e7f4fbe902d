"""Databases are created and migrated on first use, and only ever perdure's own."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.pool import NullPool

from perdure.errors import DatabaseIncompatible, DatabaseUnavailable, StoreError
from perdure.store import schema
from perdure.store.database import Database
from perdure.store.dialect import alembic_config
from perdure.store.readonly import Reader, open_read_only
from store.backends import opened


def revisions() -> list[str]:
    """Return all revisions, the oldest first."""
    with sa.create_engine("sqlite://", poolclass=NullPool).connect() as connection:
        scripts = ScriptDirectory.from_config(alembic_config(connection))
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


def migrate(database: Database, revision: str) -> None:
    """Bring a database up to a revision, or down to one."""
    with database.migration() as connection:
        here = MigrationContext.configure(connection).get_current_revision()
        order = ["base", *revisions()]
        up = order.index(revision) > order.index(here or "base")
        (command.upgrade if up else command.downgrade)(alembic_config(connection), revision)


def objects(path: Path) -> set[tuple[str, str, str]]:
    """Return type, name and definition of everything in the schema."""
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = connection.execute(
            "SELECT type, name, coalesce(sql, '') FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
        )
        return {(kind, name, " ".join(sql.split())) for kind, name, sql in rows}


class TestTheSchema:
    """What the migrations make is what the code believes."""

    def test_revision_is_the_head_of_the_migrations(self) -> None:
        """The constant that saves asking alembic is right."""
        assert revisions()[-1] == schema.REVISION

    def test_migrated_tables_are_those_of_the_code(self, tmp_path: Path) -> None:
        """Alembic finds no difference between a migrated database and the metadata."""
        database = Database(tmp_path / "a.db")
        database.prepare()
        with database.snapshot() as connection:
            found: Any = compare_metadata(MigrationContext.configure(connection), schema.metadata)
        assert found == []

    def test_indexes_and_their_conditions_are_those_of_the_code(self, tmp_path: Path) -> None:
        """Alembic doesn't compare partial indexes: their definitions are compared as SQL."""
        migrated, made = tmp_path / "migrated.db", tmp_path / "made.db"
        Database(migrated).prepare()
        engine = sa.create_engine(f"sqlite:///{made}")
        schema.metadata.create_all(engine)
        engine.dispose()
        assert {o for o in objects(migrated) if o[0] == "index"} == {
            o for o in objects(made) if o[0] == "index"
        }

    def test_views_are_the_documented_ones(self, tmp_path: Path) -> None:
        """The list of views is true, and each can be queried."""
        database = Database(tmp_path / "a.db")
        database.prepare()
        views = {name for kind, name, _sql in objects(database.path) if kind == "view"}
        assert views == set(schema.VIEWS)
        with database.snapshot() as connection:
            for view in views:
                assert connection.execute(sa.text(f"SELECT * FROM {view}")).all() == []

    @pytest.mark.parametrize("revision", ["base", *revisions()])
    def test_every_earlier_revision_goes_up_to_the_head(
        self, tmp_path: Path, revision: str
    ) -> None:
        """From each revision there ever was, an upgrade ends in one and the same schema."""
        fresh, old = Database(tmp_path / "fresh.db"), Database(tmp_path / "old.db")
        fresh.prepare()
        migrate(old, revision) if revision != "base" else None
        old.prepare()
        assert objects(old.path) == objects(fresh.path)

    @pytest.mark.parametrize("revision", revisions())
    def test_down_and_up_again_is_the_same(self, tmp_path: Path, revision: str) -> None:
        """Each migration can be undone, to nothing at the end, and done again."""
        database = Database(tmp_path / "a.db")
        migrate(database, revision)
        before = objects(database.path)
        migrate(database, "base")
        left = {name for _kind, name, _sql in objects(database.path)}
        assert left == {"alembic_version"}
        migrate(database, revision)
        assert objects(database.path) == before

    async def test_history_survives_an_upgrade_that_has_nothing_to_do(self, tmp_path: Path) -> None:
        """Preparing a database that is up to date changes nothing."""
        database = Database(tmp_path / "a.db")
        database.prepare()
        async with opened(str(database.path)) as store:
            await store.start("demo_1")
        before = database.path.read_bytes()
        database.prepare()
        assert database.path.read_bytes() == before


# A process that dies in the middle of a transaction, before the file has its WAL.
_DIES = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(f"PRAGMA application_id = {sys.argv[2]}")
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN")
connection.execute("CREATE TABLE half (done)")
for _ in range(100):
    connection.execute("INSERT INTO half VALUES (?)", ("x" * 500,))
os._exit(9)
"""


class TestANewFile:
    """How a SQLite file is made, and how it is opened."""

    def test_whoever_made_it_died(self, tmp_path: Path) -> None:
        """What was done half is undone, and the file is made by whoever comes next."""
        path = tmp_path / "a.db"
        given = (str(path), str(schema.APPLICATION_ID))
        subprocess.run([sys.executable, "-c", _DIES, *given], check=False)
        assert path.with_name("a.db-journal").stat().st_size > 0
        Database(path).prepare()
        assert not path.with_name("a.db-journal").exists()
        with closing(open_read_only(path)) as connection:
            assert connection.execute("SELECT position FROM log_head").fetchone()[0] == 0

    def test_only_the_owner_can_read_it(self, tmp_path: Path) -> None:
        """It holds people's prompts: 0600, whatever the umask says; so do WAL and index."""
        database = Database(tmp_path / "deep" / "a.db")
        database.prepare()
        writer = database.writer()
        try:
            with writer.transaction() as connection:
                connection.execute(sa.update(schema.log_head).values(position=0))
            for path in database.path.parent.iterdir():
                assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        finally:
            writer.close()

    def test_header_says_whose_it_is(self, tmp_path: Path) -> None:
        """Application id, WAL and incremental vacuum are set in the file itself."""
        database = Database(tmp_path / "a.db")
        database.prepare()
        with closing(sqlite3.connect(database.path)) as connection, connection:
            assert connection.execute("PRAGMA application_id").fetchone()[0] == 0x70657264
            assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
            assert connection.execute("PRAGMA auto_vacuum").fetchone()[0] == 2

    def test_writer_is_as_durable_as_promised(self, tmp_path: Path) -> None:
        """synchronous=FULL, foreign keys on, and no checkpoint but our own."""
        database = Database(tmp_path / "a.db")
        database.prepare()
        writer = database.writer()
        try:
            raw: Any = writer.connection.connection.dbapi_connection
            found = {
                name: raw.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("synchronous", "foreign_keys", "wal_autocheckpoint")
            }
        finally:
            writer.close()
        assert found == {"synchronous": 2, "foreign_keys": 1, "wal_autocheckpoint": 0}

    async def test_readers_can_not_write(self, tmp_path: Path) -> None:
        """A reading connection refuses to change anything."""
        database = Database(tmp_path / "a.db")
        database.prepare()
        with pytest.raises(StoreError, match="can't be written to"):
            await database.rows(sa.text("UPDATE log_head SET position = 7 RETURNING position"))
        await database.close()

    def test_several_processes_create_it_at_once(self, tmp_path: Path) -> None:
        """Of processes that start together one migrates, and all of them can go on."""
        code = (
            "import sys; from perdure.store.database import Database; "
            "database = Database(sys.argv[1]); sys.stdin.readline(); database.prepare()"
        )
        path = tmp_path / "a.db"
        children = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(path)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(3)
        ]
        for child in children:  # all of them wait for this line, then race
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        for child in children:
            _out, errors = child.communicate(timeout=120)
            assert child.returncode == 0, errors
        Database(path).prepare(create=False, upgrade=False)


class TestOtherFiles:
    """What isn't perdure's is refused in one line, and left as it is."""

    def refused(self, path: Path, kind: type[StoreError], **how: bool) -> str:
        """Return what is said; it is one line, and the file stays as it is."""
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(kind) as caught:
            Database(path).prepare(**how)
        said = str(caught.value)
        assert "\n" not in said
        assert str(path) in said
        if before is not None:
            assert path.read_bytes() == before
        return said

    def test_database_of_another_program(self, tmp_path: Path) -> None:
        """A SQLite file with other tables is not touched."""
        path = tmp_path / "other.db"
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE songs (title TEXT)")
        assert "some other program" in self.refused(path, DatabaseIncompatible)

    def test_alembic_database_of_another_program(self, tmp_path: Path) -> None:
        """A version table alone doesn't make it ours."""
        path = tmp_path / "other.db"
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
            connection.execute("CREATE TABLE songs (title TEXT)")
        assert "some other program" in self.refused(path, DatabaseIncompatible)

    def test_newer_schema(self, tmp_path: Path) -> None:
        """A schema that this code doesn't know asks for an upgrade of perdure."""
        path = tmp_path / "a.db"
        Database(path).prepare()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE alembic_version SET version_num = '9999'")
            connection.execute("DELETE FROM compatible")
        assert "upgrade perdure" in self.refused(path, DatabaseIncompatible)

    def test_text_file(self, tmp_path: Path) -> None:
        """A file that is no database is not overwritten."""
        path = tmp_path / "notes.txt"
        path.write_text("These are my notes, and I want to keep them.\n" * 50)
        assert "not a database" in self.refused(path, DatabaseIncompatible)

    def test_directory(self, tmp_path: Path) -> None:
        """A directory is named as one."""
        assert "is a directory" in self.refused(tmp_path, DatabaseUnavailable)

    def test_missing_file_that_may_not_be_created(self, tmp_path: Path) -> None:
        """Looking something up creates nothing."""
        path = tmp_path / "none.db"
        assert "no database" in self.refused(path, DatabaseUnavailable, create=False)
        assert not path.exists()

    def test_folder_that_can_not_be_made(self, tmp_path: Path) -> None:
        """A path below a file can't be created, and the message says so."""
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "a.db"
        assert "can't create" in self.refused(path, DatabaseUnavailable)

    def test_older_databases_are_not_upgraded_by_looking(self, tmp_path: Path) -> None:
        """Where nothing may be changed, an empty file is named as what it is."""
        path = tmp_path / "a.db"
        path.touch()
        assert "is empty" in self.refused(path, DatabaseIncompatible, create=False, upgrade=False)

    def test_an_empty_file_becomes_a_database(self, tmp_path: Path) -> None:
        """A file that somebody has only touched may be used."""
        path = tmp_path / "a.db"
        path.touch()
        Database(path).prepare()
        Database(path).prepare(create=False, upgrade=False)

    @pytest.mark.parametrize("cut", [0.3, 0.9])
    def test_damaged_file(self, tmp_path: Path, migrated_file: Path, cut: float) -> None:
        """A file that was cut off, or whose middle is garbage, is named as damaged."""
        path = tmp_path / "a.db"
        whole = migrated_file.read_bytes()
        for content in (
            whole[: int(len(whole) * cut)],
            whole[:4096] + b"\xde\xad" * 4096 + whole[4096 + 8192 :],
        ):
            path.write_bytes(content)
            try:
                Database(path).prepare()
                writer = Database(path).writer()
                try:
                    with writer.transaction() as connection:
                        for table in schema.metadata.sorted_tables:
                            connection.execute(sa.select(table)).all()
                finally:
                    writer.close()
            except StoreError as damaged:
                said = str(damaged)  # which statement finds it differs
                assert str(path) in said
                assert len(said.splitlines()) == 1

    @pytest.mark.parametrize("what", ["file", "folder"])
    def test_read_only(self, make_database: Callable[[], Path], what: str) -> None:
        """What can't be written to says so; looking at it is possible all the same."""
        with tempfile.TemporaryDirectory() as folder:  # root's own temporary folders are closed
            path = Path(folder) / "a.db"
            Database(path).prepare()
            path.chmod(0o444)
            Path(folder).chmod(0o777 if what == "file" else 0o555)
            code = """
import os, sys
from perdure.errors import StoreError
from perdure.store.database import Database
def write(database):
    writer = database.writer()
    try:
        with writer.transaction() as connection:
            connection.exec_driver_sql("UPDATE log_head SET position = 7")
    finally:
        writer.close()
write(Database(sys.argv[2]))  # whatever is imported late is imported by now
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    write(Database(sys.argv[1]))
except StoreError as error:
    print(f"{type(error).__name__}: {error}")
with Database(sys.argv[1]).read_only() as reader:
    print(reader.one("SELECT position FROM log_head")[0])
"""
            done = subprocess.run(
                [sys.executable, "-c", code, str(path), str(make_database())],
                capture_output=True,
                text=True,
                check=True,
            )
            Path(folder).chmod(0o700)
        lines = done.stdout.splitlines()
        assert lines[0].startswith("DatabaseUnavailable: ")
        assert str(path) in lines[0]
        assert lines[1:] == ["0"]

    @pytest.mark.parametrize(
        "url", ["sqlite://", "sqlite:///:memory:", ":memory:", "./:memory:", Path(":memory:")]
    )
    def test_database_in_memory(
        self, url: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is gone with the process is no place for a durable log; nothing is left behind."""
        monkeypatch.chdir(tmp_path)
        for attempt in (Database, Reader.open):
            with pytest.raises(DatabaseIncompatible, match="in memory"):
                attempt(url)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "url",
        [
            *(5, b"sesame.db", ["sesame.db"], {}, "sesame\0.db", Path("a\0sesame.db")),
            *("sqlite:///sesame%00.db", "postgresql://me:sesame@h/x%00", "~sesame_not/x.db"),
        ],
        ids=repr,
    )
    def test_what_names_no_database(self, url: Any) -> None:
        """Whatever is given in place of a name is refused in one line."""
        for attempt in (Database, Reader.open):
            with pytest.raises(DatabaseIncompatible) as refused:
                attempt(url)
            assert len(str(refused.value).splitlines()) == 1
            assert "me:sesame" not in str(refused.value)

    @pytest.mark.parametrize("url", ["mysql://x/y", "http://localhost/a.db", "sqlite:/a.db://"])
    def test_url_of_something_else(self, url: str) -> None:
        """Other databases are named as what can't be used, and passwords aren't shown."""
        with pytest.raises(DatabaseIncompatible) as caught:
            Database(url)
        assert "\n" not in str(caught.value)
