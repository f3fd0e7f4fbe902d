"""What only PostgreSQL has: a server that goes away, connections that break, several hosts."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import re
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from engine.harness import eventually
from perdure import Engine, Task
from perdure.errors import (
    ConcurrencyError,
    DatabaseIncompatible,
    DatabaseUnavailable,
    PerdureError,
    StoreError,
)
from perdure.events import Chunk, Event, Submitted, canonical
from perdure.store import log as log_module
from perdure.store import postgresql as postgresql_module
from perdure.store import reaching as reaching_module
from perdure.store import roundtrips as roundtrips_module
from perdure.store import schema
from perdure.store.database import Database, parse_url
from perdure.store.dialect import spelt_url
from perdure.store.postgresql_reader import PostgresqlReader
from perdure.store.reaching import conninfo_of, patiently
from perdure.store.readonly import Reader
from perdure.store.roundtrips import MOST_UNANSWERED
from perdure.store.transaction import FoldCache, Transaction
from perdure_adapters import DemoAdapter
from servers.cutting import CuttingProxy
from servers.postgresql import Server
from store.backends import Postgresql, Store, opened, running, submitted
from store.checks import assert_sound, gapless
from store.children import run

PATIENCE = 60


@pytest.fixture
def database_url(postgresql: Postgresql) -> str:
    """A new, empty PostgreSQL database of today's schema."""
    return postgresql.new()


@pytest.fixture
def proxy(database_url: str) -> Generator[CuttingProxy, None, None]:
    """A network between the store and an empty database."""
    with CuttingProxy(database_url) as proxy:
        yield proxy


@pytest.fixture
def own_server() -> Generator[Server, None, None]:
    """A server that a test may stop, with an empty database `own` of today's schema."""
    with Server() as server:
        server.execute("CREATE DATABASE own")
        Database(server.url("own")).upgrade()
        yield server


class TestSettingUp:
    """The schema is made by a step of its own, and everything else says so."""

    def test_an_empty_database(self, postgresql: Postgresql) -> None:
        """An engine on an empty database changes nothing, and says in one line what to do."""
        url = postgresql.bare()
        with pytest.raises(DatabaseIncompatible, match="perdure db upgrade") as refused:
            Database(url).prepare()
        assert len(str(refused.value).splitlines()) == 1
        assert postgresql.query(url, "SELECT count(*) FROM pg_class WHERE relname = 'events'") == [
            (0,)
        ]

    def test_an_older_schema(self, postgresql: Postgresql, database_url: str) -> None:
        """So does one on an older schema."""
        with postgresql.shell(database_url) as shell:
            shell.run("UPDATE alembic_version SET version_num = 'older'")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("perdure.store.dialect._known_revisions", lambda: {"older"})
            with pytest.raises(DatabaseIncompatible, match=r"has schema older.*perdure db upgrade"):
                Database(database_url).prepare()

    def test_a_newer_schema(self, postgresql: Postgresql, database_url: str) -> None:
        """A schema of a newer perdure is left alone."""
        with postgresql.shell(database_url) as shell:
            shell.run("UPDATE alembic_version SET version_num = 'newer'")
            shell.run("DELETE FROM compatible")
        with pytest.raises(DatabaseIncompatible, match="upgrade perdure"):
            Database(database_url).prepare()

    def test_another_program(self, postgresql: Postgresql) -> None:
        """A database with somebody else's tables is not touched."""
        url = postgresql.bare()
        with postgresql.shell(url) as shell:
            shell.run("CREATE TABLE songs (title text)")
        for what in (Database(url).prepare, Database(url).upgrade):
            with pytest.raises(DatabaseIncompatible, match="some other program"):
                what()

    def test_ten_at_once(self, postgresql: Postgresql) -> None:
        """Of ten that set it up at the same time one does; all ten succeed."""
        url = postgresql.bare()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda _: Database(url).upgrade(), range(10)))
        Database(url).prepare()
        assert postgresql.query(url, "SELECT count(*) FROM log_head") == [(1,)]

    def test_migrated_tables_are_those_of_the_code(self, postgresql: Postgresql) -> None:
        """Columns, constraints and indexes are what the metadata would create."""
        migrated, made = postgresql.new(), postgresql.bare()
        engine = sa.create_engine(Database(made).url)
        schema.metadata.create_all(engine)
        engine.dispose()
        for query in (_COLUMNS, _INDEXES, _CONSTRAINTS):
            one, other = (
                _ask(postgresql, url, query, [*schema.metadata.tables]) for url in (migrated, made)
            )
            assert one == other != []

    def test_down_and_up_again(self, postgresql: Postgresql, database_url: str) -> None:
        """The migration can be undone, to nothing, and done again."""
        from alembic import command

        from perdure.store.dialect import alembic_config

        name = postgresql.name(database_url)
        before = postgresql.server.dump(name)
        with Database(database_url).migration() as connection:
            command.downgrade(alembic_config(connection), "base")
        assert "log_head" not in postgresql.server.dump(name)
        Database(database_url).upgrade()
        assert postgresql.server.dump(name) == before


_COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable, collation_name, ordinal_position
    FROM information_schema.columns
    WHERE table_schema = 'public' AND table_name = ANY(?) ORDER BY 1, 2
"""
_INDEXES = """
    SELECT tablename, indexname, indexdef FROM pg_indexes
    WHERE schemaname = 'public' AND tablename = ANY(?) ORDER BY 1, 2
"""
_CONSTRAINTS = """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE conrelid::regclass::text = ANY(?) AND contype NOT IN ('n', 'c') ORDER BY 1, 2
"""


def _ask(postgresql: Postgresql, url: str, query: str, *parameters: object) -> list[Any]:
    with postgresql.server.connect(postgresql.name(url)) as connection:
        return connection.execute(query.replace("?", "%s").encode(), parameters).fetchall()


class TestReaching:
    """What is said where the server can't be reached; never a password."""

    @pytest.mark.parametrize(
        ("url", "said"),
        [
            ("postgresql://me:sesame@127.0.0.1:1/x", "127.0.0.1:1"),
            ("postgresql+psycopg://me:sesame@127.0.0.1:1/x", "127.0.0.1:1"),
            ("postgres://me:sesame@127.0.0.1:1/x", "127.0.0.1:1"),
        ],
    )
    def test_nobody_there(self, url: str, said: str) -> None:
        """An address at which nobody listens."""
        for attempt in (Database(url).prepare, lambda: Reader.open(url)):
            with pytest.raises(DatabaseUnavailable, match=said) as failed:
                attempt()
            assert "sesame" not in str(failed.value)
            assert len(str(failed.value).splitlines()) == 1
        assert "sesame" not in repr(Database(url))

    def test_no_such_database(self, postgresql: Postgresql) -> None:
        """A database that doesn't exist is named."""
        with pytest.raises(DatabaseUnavailable, match="nowhere"):
            Database(postgresql.server.url("nowhere")).prepare()

    async def test_names_with_spaces(self, postgresql: Postgresql) -> None:
        """Whatever is in the names, escaped in the URL: all that connects reads them the same."""
        server = postgresql.server
        server.execute('CREATE DATABASE "My DB?+ü%"')
        server.execute('CREATE ROLE "Weird Role" LOGIN SUPERUSER')
        url = (
            f"postgresql://Weird%20Role:a%20b@/My%20DB%3F%2B%C3%BC%25?host={server.directory}"
            "&options=-c%20search_path%3Dpublic"
        )
        try:
            database = Database(url)
            database.upgrade()
            assert Database(database.address).url == database.url
            Database(database.address).prepare()
            async with Engine.open(url, adapters=[DemoAdapter()]) as engine:
                assert await engine.submit_task(Task(prompt="x"))
                await eventually(lambda: engine.log.hears)
            for reader in (Reader.open(url), database.read_only()):
                with reader:
                    found = reader.one("SELECT current_user, current_database() FROM log_head")
                    assert found is not None
                    assert [*found] == ["Weird Role", "My DB?+ü%"]
        finally:
            server.execute('DROP DATABASE IF EXISTS "My DB?+ü%" WITH (FORCE)')
            server.execute('DROP ROLE "Weird Role"')

    def test_what_passes_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that starts, or is full, is asked again; one that says no isn't."""
        monkeypatch.setattr(reaching_module, "OPENING_SECONDS", 0.5)
        calls: list[str] = []

        def connect(*said: str) -> int:
            calls.append("")
            if len(calls) <= len(said):
                raise psycopg.OperationalError(f"connection failed: FATAL:  {said[len(calls) - 1]}")
            return len(calls)

        starting, full = "the database system is starting up", "sorry, too many clients already"
        assert patiently(lambda: connect(starting, full)) == 3
        for said, most in (('role "x" does not exist', 1), (full, 10)):
            calls.clear()
            with pytest.raises(psycopg.OperationalError):
                patiently(lambda said=said: connect(*[said] * 100))  # type: ignore[misc]
            assert (most == 1) == (len(calls) == 1)
            assert len(calls) <= most

    @pytest.mark.parametrize("driver", ["postgresql+asyncpg", "postgresql+psycopg2", "mysql"])
    def test_other_drivers(self, driver: str) -> None:
        """Other drivers are refused by name, without the password."""
        with pytest.raises(DatabaseIncompatible, match="postgresql://") as refused:
            Database(f"{driver}://me:sesame@localhost/x")
        assert "sesame" not in str(refused.value)

    async def test_readers_can_not_write(self, database_url: str) -> None:
        """A reading connection refuses to change anything."""
        async with opened(database_url) as store:
            with pytest.raises(StoreError, match="read-only"):
                await store.database.rows(sa.text("UPDATE log_head SET position = 7 RETURNING 1"))


names = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)


@given(user=names, password=names, database=names, schema=names)
def test_urls_are_read_back(user: str, password: str, database: str, schema: str) -> None:
    """A URL that is spelt out stands for the same, to us and to libpq."""
    query = {"host": "/run/a b", "options": f"-c search_path={schema}"}
    url = sa.URL.create("postgresql", user, password, database=database, query=query)
    as_driver = url.set(drivername="postgresql+psycopg")
    assert parse_url(spelt_url(url)) == as_driver
    assert conninfo_to_dict(spelt_url(url)) == conninfo_to_dict(conninfo_of(as_driver))
    assert "***" in spelt_url(url, hide_password=True)


# Numbers that `jsonb` would write in another way, or could not hold at all.
numbers = (
    st.integers(-(2**53), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0.0, -0.0, 1e16, 1e22, 5e-324, 1.7976931348623157e308, 100.0, 2**64 - 1])
)
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"))
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150)
@given(values=st.lists(st.dictionaries(texts, json_values, max_size=5), min_size=1, max_size=5))
def test_stored_to_the_byte(told: dict[str, str], values: list[dict[str, Any]]) -> None:
    """Whatever JSON an event holds, what is stored is byte by byte what was hashed."""

    async def write() -> None:
        async with opened(told["url"]) as store:
            for value in values:
                name = f"t{next(_numbers)}"
                event = Submitted(task={"prompt": "?", "metadata": value}, platforms=("demo",))
                await store.log.append(name, [event], 0)
                (row,) = await store.database.rows(
                    sa.select(schema.events.c.data)
                    .join(schema.streams, schema.streams.c.stream_id == schema.events.c.stream_id)
                    .where(schema.streams.c.task_id == name)
                )
                plain = event.model_dump(mode="json", exclude_none=True)
                assert row["data"].encode() == canonical(plain)

    asyncio.run(write())


_numbers = iter(range(10**9))


@pytest.fixture(scope="module")
def told(postgresql_server: Server, store_name: str) -> Generator[dict[str, str], None, None]:
    """The URL of one database for many examples, which is sound after all of them."""
    url = Postgresql(postgresql_server, store_name).new()
    yield {"url": url}
    assert_sound(url)


class TestCommits:
    """A connection that breaks at a commit: what became of it is read back, never guessed."""

    @pytest.mark.parametrize("where", ["before", "after"])
    async def test_cut_at_a_commit(
        self, postgresql: Postgresql, database_url: str, proxy: CuttingProxy, where: str
    ) -> None:
        """Whether the server has done it or not: every append is there, once, and acknowledged."""
        async with opened(proxy.url) as store:
            assert await store.submit("first") == 1
            for number in range(8):
                proxy.cut = where
                outcomes = await asyncio.wait_for(
                    asyncio.gather(*(store.start(f"t{number}_{n}") for n in range(5))), PATIENCE
                )
                assert outcomes == [2] * 5
            assert proxy.cuts == 8
        versions = gapless(postgresql, database_url)
        assert len(versions) == 41
        assert_sound(database_url)

    @pytest.mark.parametrize("where", ["before", "after"])
    async def test_an_expected_version_after_a_cut(
        self, database_url: str, proxy: CuttingProxy, where: str
    ) -> None:
        """An append that was done is not taken for somebody else's, and versions go on from it."""
        async with opened(proxy.url) as store:
            version = await store.start("task")
            for offset in range(6):
                proxy.cut = where
                version = await store.log.append("task", [Chunk(text="x", offset=offset)], version)
            assert version == 8
        assert_sound(database_url)

    async def test_backends_that_are_ended(self, postgresql: Postgresql, database_url: str) -> None:
        """An administrator ends sessions again and again, under load: nobody notices."""
        name = postgresql.name(database_url)
        done = 0

        async def produce(number: int) -> None:
            nonlocal done
            version = await store.start(f"t{number}")
            for offset in range(20):
                chunk = Chunk(text="x", offset=offset)
                version = await store.log.append(f"t{number}", [chunk], version)
            done += 1

        async with opened(database_url) as store:
            working = [asyncio.create_task(produce(number)) for number in range(10)]
            while done < 10:
                await asyncio.to_thread(
                    postgresql.server.execute,
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{name}' AND application_name = 'perdure'",
                )
                await asyncio.sleep(0.05)
            await asyncio.wait_for(asyncio.gather(*working), PATIENCE)
        assert set(gapless(postgresql, database_url).values()) == {22}
        assert_sound(database_url)

    async def test_a_restart_under_load(self, own_server: Server) -> None:
        """The server is stopped and started, twice, once without warning: nothing is lost."""
        url = own_server.url("own")
        acknowledged: list[str] = []
        stop = asyncio.Event()

        async def produce(number: int) -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                await store.start(f"t{number}_{turn}")
                acknowledged.append(f"t{number}_{turn}")

        async def more(count: int) -> None:
            wanted = len(acknowledged) + count
            async with asyncio.timeout(PATIENCE):
                while len(acknowledged) < wanted:  # noqa: ASYNC110 - whoever produces knows nothing
                    await asyncio.sleep(0.01)

        async with opened(url) as store, opened(url) as reader:
            working = [asyncio.create_task(produce(number)) for number in range(5)]
            for mode in ("fast", "immediate"):
                await more(50)
                await asyncio.to_thread(own_server.restart, mode)
            await more(50)
            stop.set()
            await asyncio.wait_for(asyncio.gather(*working), PATIENCE)
            rows = await reader.database.rows(sa.select(schema.tasks.c.task_id))
        assert {row["task_id"] for row in rows} == set(acknowledged)
        assert_sound(url)

    async def test_a_server_that_does_not_come_back(
        self, own_server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After some patience everyone is told in one line; when it is back, all goes on."""
        monkeypatch.setattr(postgresql_module, "PATIENCE_SECONDS", 0.5)
        async with opened(own_server.url("own")) as store:
            await store.submit("before")
            await asyncio.to_thread(own_server.stop)
            with pytest.raises(DatabaseUnavailable) as failed:
                await asyncio.wait_for(store.submit("during"), PATIENCE)
            assert len(str(failed.value).splitlines()) == 1
            await asyncio.to_thread(own_server.start)
            assert await asyncio.wait_for(store.submit("during"), PATIENCE) == 1
        assert_sound(own_server.url("own"))


class TestTrouble:
    """A server that refuses again and again: it is waited for, not for ever, and not busily."""

    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Patience of a second instead of a minute, and of nearly none for those in a hurry."""
        monkeypatch.setattr(postgresql_module, "PATIENCE_SECONDS", 1.0)
        monkeypatch.setattr(postgresql_module, "HURRIED_SECONDS", 0.1)

    @staticmethod
    def take_writes(postgresql: Postgresql, url: str, *, yes: bool) -> None:
        """Let new sessions write, or not, as where a server becomes a standby."""
        name = postgresql.name(url)
        setting = "off" if yes else "on"
        postgresql.server.execute(
            f"ALTER DATABASE {name} SET default_transaction_read_only = {setting}"
        )

    @staticmethod
    async def refused(store: Store) -> str:
        """Return the one line that a write is refused with; it isn't written."""
        with pytest.raises(DatabaseUnavailable) as failed:
            await asyncio.wait_for(store.submit("task"), PATIENCE)
        assert len(str(failed.value).splitlines()) == 1
        return str(failed.value)

    async def test_writing_is_not_allowed(self, postgresql: Postgresql, database_url: str) -> None:
        """After some patience and few tries one line says so; what comes next is told at once."""
        self.take_writes(postgresql, database_url, yes=False)
        before = postgresql.server.log().count("read-only transaction")
        async with opened(database_url) as store:
            began = time.monotonic()
            assert "read-only, or a standby" in await self.refused(store)
            assert 0.9 < time.monotonic() - began < PATIENCE / 2
            assert 3 < postgresql.server.log().count("read-only transaction") - before < 20
            began = time.monotonic()
            await self.refused(store)
            assert time.monotonic() - began < 0.9
            self.take_writes(postgresql, database_url, yes=True)
            assert await store.submit("task") == 1
        assert_sound(database_url)

    async def test_a_standby_takes_over(
        self, postgresql: Postgresql, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where writing is allowed again meanwhile, on a new connection, nobody is told."""
        monkeypatch.setattr(postgresql_module, "PATIENCE_SECONDS", PATIENCE)
        self.take_writes(postgresql, database_url, yes=False)
        async with opened(database_url) as store:
            writing = asyncio.ensure_future(store.submit("task"))
            await asyncio.sleep(0.3)
            assert not writing.done()
            self.take_writes(postgresql, database_url, yes=True)
            assert await asyncio.wait_for(writing, PATIENCE) == 1
        assert_sound(database_url)

    async def test_conflicts_without_end(self, postgresql: Postgresql, database_url: str) -> None:
        """The same where each try ends in an error that another try should mend."""
        name = postgresql.name(database_url)
        postgresql.server.execute(
            "CREATE FUNCTION clash() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION 'clash' USING ERRCODE = 'serialization_failure'; END $$; "
            "CREATE TRIGGER clash BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION clash()",
            name,
        )
        async with opened(database_url) as store:
            assert "clash" in await self.refused(store)
            postgresql.server.execute("DROP TRIGGER clash ON events", name)
            assert await store.submit("task") == 1

    async def test_an_outcome_that_can_not_be_read_back(
        self, postgresql: Postgresql, database_url: str, proxy: CuttingProxy
    ) -> None:
        """A commit whose answer was lost is never repeated blindly: it is said to be unknown."""
        async with opened(proxy.url) as store:
            await store.submit("first")
            self.take_writes(postgresql, database_url, yes=False)
            proxy.cut = "after"
            assert "what was written last may be there" in await self.refused(store)
        assert gapless(postgresql, database_url) == {"first": 1, "task": 1}

    @pytest.mark.parametrize("how", ["hurry", "close"])
    async def test_a_hurry(
        self, postgresql: Postgresql, database_url: str, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        """Who has to end doesn't wait for so long, and neither does a log that is closed."""
        monkeypatch.setattr(postgresql_module, "PATIENCE_SECONDS", 2.0 * PATIENCE)
        self.take_writes(postgresql, database_url, yes=False)
        async with opened(database_url) as store:
            writing = asyncio.ensure_future(self.refused(store))
            await asyncio.sleep(0.3)
            assert not writing.done()
            if how == "hurry":
                store.log.hurry()
            else:
                await asyncio.wait_for(store.log.close(), PATIENCE / 2)
            await asyncio.wait_for(writing, PATIENCE / 2)

    async def test_a_writer_that_was_stopped_for_long(
        self, postgresql: Postgresql, database_url: str
    ) -> None:
        """What a transaction took by itself is no trouble: it is tried again."""
        name = postgresql.name(database_url)
        tries = 0

        def stop(tx: Any) -> int:
            nonlocal tries
            tries += 1
            version: int = tx.append("task", [submitted()], 0)
            if tries == 1:
                time.sleep(1.2)
                postgresql.server.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    f"WHERE datname = '{name}' AND application_name = 'perdure'"
                )
            return version

        async with opened(database_url) as store:
            assert await asyncio.wait_for(store.log.write(stop), PATIENCE) == 1
        assert tries == 2
        assert_sound(database_url)


class TestSharing:
    """Many writers, some of which stop in the middle."""

    async def test_a_writer_that_stops_in_the_middle(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A writer that holds everyone up is ended by the server; later it does it all anew."""
        begin = postgresql_module._BEGIN.replace("'20s'", "'300ms'")
        monkeypatch.setattr(postgresql_module, "_BEGIN", begin)
        async with opened(database_url) as slow, opened(database_url) as other:
            tries: list[float] = []

            def dawdle(tx: Any) -> None:
                tx.connection.execute(sa.select(schema.log_head).with_for_update())
                tx.append("slow", [submitted()], 0)
                tries.append(time.monotonic())
                if len(tries) == 1:
                    reached.set()
                    time.sleep(1.5)

            reached = asyncio.Event()
            dawdling = asyncio.ensure_future(slow.log.write(dawdle))
            await asyncio.sleep(0.1)
            began = time.monotonic()
            assert await asyncio.wait_for(other.submit("other"), PATIENCE) == 1
            assert time.monotonic() - began < 1.3
            await asyncio.wait_for(dawdling, PATIENCE)
            assert len(tries) == 2
        assert_sound(database_url)

    async def test_the_same_key_and_the_same_content(
        self, postgresql: Postgresql, database_url: str
    ) -> None:
        """Two writers store the same keys and blobs at the same time: each once, nobody fails."""

        async def one(store: Store, name: str) -> list[Any]:
            def work(number: int) -> Any:
                def write(tx: Any) -> int:
                    tx.put_blobs({f"{n:064x}": b"x" * n for n in range(number, number + 3)})
                    version: int = tx.append(f"{name}_{number}", [submitted(key=f"k{number}")], 0)
                    return version

                return write

            return await asyncio.gather(
                *(store.log.write(work(n), alone=True) for n in range(30)), return_exceptions=True
            )

        async with opened(database_url) as here, opened(database_url) as there:
            mine, theirs = await asyncio.gather(one(here, "here"), one(there, "there"))
        for first, second in zip(mine, theirs, strict=True):
            kinds = sorted(type(outcome).__name__ for outcome in (first, second))
            assert kinds == ["DuplicateKey", "int"]
        assert postgresql.query(database_url, "SELECT count(*) FROM blobs") == [(32,)]

    async def test_what_is_refused_is_told_by_nobody_else(
        self, database_url: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The driver says nothing of what was sent behind it; large and small alike."""
        for first in (submitted(), submitted(prompt="x" * (MOST_UNANSWERED + 1))):
            task_id = f"demo_{len(first.task['prompt'])}"
            async with opened(database_url) as one, opened(database_url) as other:
                both = [store.log.append(task_id, [first], 0) for store in (one, other)]
                told = await asyncio.gather(*both, return_exceptions=True)
                assert sorted(type(found).__name__ for found in told) == ["ConcurrencyError", "int"]
                with pytest.raises(ConcurrencyError):
                    await one.log.append(task_id, [first], 0)
        assert [record for record in caplog.records if record.name.startswith("psycopg")] == []

    @pytest.mark.parametrize(("known", "waits"), [(True, 2), (False, 4)])
    def test_few_answers_are_waited_for(self, proxy: CuttingProxy, known: bool, waits: int) -> None:
        """A transaction begins with its first question, and its commit goes with what is written.

        A stream that was read before is asked for together with the log's head. Else reading it
        comes in between, and the head, which everybody waits for, only then.
        """
        writer, cache = Database(proxy.url).writer(), FoldCache()

        def write(new: Sequence[Event], expected: int) -> int:
            before = proxy.waits
            cache.distrust()  # as the log does, where anybody may write
            with writer.transaction() as connection:
                transaction = Transaction(connection, cache, writer.now)
                transaction.prefetch(["task"] if expected else [], only=True)
                transaction.append("task", new, expected)
                transaction.flush()
            for fold in transaction.touched:
                cache.put(fold)
            return proxy.waits - before

        try:
            write([submitted(), running()], 0)
            if not known:
                cache.clear()
            assert write([Chunk(text="x")], 2) == waits
            assert write([Chunk(text="y", offset=1)], 3) == 2
        finally:
            writer.close()

    async def test_deadlocks_are_done_again(
        self, postgresql: Postgresql, database_url: str
    ) -> None:
        """Two writers that lock the same streams in opposite orders both succeed."""
        async with opened(database_url) as here, opened(database_url) as there:
            await here.start("a")
            await here.start("b")

            def work(first: str, second: str) -> Any:
                def write(tx: Any) -> None:
                    for name in (first, second):
                        offset = tx.fold(name).state.length()
                        tx.append(name, [Chunk(text="x", offset=offset)], None)
                        time.sleep(0.05)

                return write

            for _ in range(5):
                await asyncio.wait_for(
                    asyncio.gather(here.log.write(work("a", "b")), there.log.write(work("b", "a"))),
                    PATIENCE,
                )
        assert gapless(postgresql, database_url) == {"a": 12, "b": 12}
        assert_sound(database_url)

    async def test_time_is_the_servers(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A host whose clock is wrong writes the server's time, and goes by it."""

        class Wrong(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.now(tz) - timedelta(hours=3)

        for module in (postgresql_module, roundtrips_module):
            monkeypatch.setattr(module, "datetime", Wrong)
        async with opened(database_url) as store:
            assert abs(store.database.now - datetime.now(UTC)) < timedelta(minutes=1)
            await store.submit("task")
            (row,) = await store.database.rows(sa.select(schema.events.c.recorded_at))
            now = datetime.now(UTC)
            assert abs(row["recorded_at"] - now) < timedelta(minutes=1)
            assert abs(store.database.now - now) < timedelta(minutes=1)

    async def test_waiting_is_no_difference_of_clocks(
        self, postgresql: Postgresql, database_url: str
    ) -> None:
        """What a transaction waits for a lock isn't taken for a server that is behind."""
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        async with opened(database_url) as store:
            await store.start("task")
            with postgresql.server.connect(postgresql.name(database_url)) as other:
                other.execute("BEGIN")
                other.execute("SELECT FROM log_head FOR UPDATE")
                append = store.log.append("task", [Chunk(text="x")], None)
                await eventually(lambda: _ask(postgresql, database_url, waiting)[0][0])
                await asyncio.sleep(2)  # a wait that would be seen in the difference
                other.execute("COMMIT")
            await append
            assert abs(store.database.now - datetime.now(UTC)) < timedelta(seconds=1)

    def test_three_processes(self, postgresql: Postgresql, database_url: str) -> None:
        """Three processes run many streams each; nothing is lost and nothing doubled."""
        run(*(("produce", database_url, name, 10, 10) for name in ("x", "y", "z")))
        assert len(gapless(postgresql, database_url)) == 30
        assert_sound(database_url)


class TestHearing:
    """Readers hear of other processes' commits: by notification, else by looking."""

    @staticmethod
    @asynccontextmanager
    async def pair(url: str, other: str) -> AsyncGenerator[tuple[Store, Store], None]:
        """Give two stores that share a database."""
        async with opened(url) as writer, opened(other) as reader:
            await writer.start("task")
            yield writer, reader

    async def latencies(self, writer: Store, reader: Store, count: int = 30) -> list[float]:
        """Return how long, in seconds, commits take to reach a reader in another store."""
        arrived: asyncio.Queue[float] = asyncio.Queue()

        async def read() -> None:
            async for event in reader.log.feed.follow("task", 2):
                del event
                arrived.put_nowait(time.monotonic())

        reading = asyncio.create_task(read())
        found: list[float] = []
        version = 2
        for offset in range(count):
            version = await writer.log.append("task", [Chunk(text="x", offset=offset)], version)
            committed = time.monotonic()
            found.append(await asyncio.wait_for(arrived.get(), PATIENCE) - committed)
            await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait({reading})
        return found

    async def test_by_notification(self, database_url: str) -> None:
        """Half of the commits reach a reader elsewhere within 20 ms, and it need not look."""
        async with self.pair(database_url, database_url) as (writer, reader):
            found = await self.latencies(writer, reader)
            assert reader.log.hears
        assert sorted(found)[len(found) // 2] < 0.02

    async def test_behind_a_pooler(self, database_url: str, proxy: CuttingProxy) -> None:
        """Where notifications never arrive, that is noticed, and readers are told all the same."""
        proxy.deaf = True
        async with self.pair(database_url, proxy.url) as (writer, reader):
            found = await self.latencies(writer, reader)
            assert not reader.log.hears
        assert sorted(found)[len(found) // 2] < 0.1

    async def test_a_lost_listener_comes_back(self, database_url: str, proxy: CuttingProxy) -> None:
        """A reader whose connections were cut reads on."""
        async with self.pair(database_url, proxy.url) as (writer, reader):
            await self.latencies(writer, reader, 3)
            reading = asyncio.create_task(anext(reader.log.feed.follow("task", 5)))
            proxy.cut_all()
            await writer.log.append("task", [Chunk(text="x", offset=3)], 5)
            assert (await asyncio.wait_for(reading, PATIENCE)).version == 6

    async def test_nobody_is_told_of_what_was_not_committed(
        self, postgresql: Postgresql, database_url: str
    ) -> None:
        """Notifications come after the commit they are about."""
        with postgresql.server.connect(postgresql.name(database_url)) as plain:
            plain.execute("LISTEN perdure")
            async with opened(database_url) as store:
                with pytest.raises(PerdureError):
                    await store.log.append("task", [Chunk(text="x")], 3)
                await store.submit("task")
            told = [n.payload for n in plain.notifies(timeout=1, stop_after=1)]
            more = [n.payload for n in plain.notifies(timeout=0.2)]
        assert [payload.partition(" ")[2] for payload in told + more] == ["w"]

    async def test_a_busy_writer(
        self, postgresql: Postgresql, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It doesn't tell of each commit, but of the last one, too, and without being closed."""
        monkeypatch.setattr(log_module, "TELL_SECONDS", 0.3)
        with postgresql.server.connect(postgresql.name(database_url)) as plain:
            plain.execute("LISTEN perdure")
            async with opened(database_url) as store:
                began = time.monotonic()
                version = await store.start("task")
                for offset in range(50):
                    chunk = Chunk(text="x", offset=offset)
                    version = await store.log.append("task", [chunk], version)
                await eventually(lambda: store.log._untold is None)
                most = (time.monotonic() - began) / 0.3 + 1
                told = list(plain.notifies(timeout=0.2))
            assert 2 <= len(told) <= most
            assert list(plain.notifies(timeout=0.2)) == []


def test_json_of_events_can_be_queried(postgresql: Postgresql, database_url: str) -> None:
    """The view has `jsonb`, with all its operators."""

    async def write() -> None:
        async with opened(database_url) as store:
            await store.submit("task", labels={"a": "b"}, metadata={"x": 1e16})

    asyncio.run(write())
    found = _ask(
        postgresql,
        database_url,
        "SELECT data -> 'task' -> 'labels', data @> ?::jsonb FROM task_events",
        json.dumps({"task": {"labels": {"a": "b"}}}),
    )
    assert found == [({"a": "b"}, True)]


def test_the_driver_is_what_the_tests_think() -> None:
    """Psycopg raises errors with their SQLSTATE, by which they are told apart."""
    assert psycopg.errors.AdminShutdown.sqlstate == "57P01"


class TestRoles:
    """The roles of docs/deploy.md can do what they have to, and nothing else."""

    @pytest.fixture
    def granted(self, postgresql: Postgresql, database_url: str) -> Generator[str, None, None]:
        """A database whose roles were made as the page says."""
        page = Path(__file__).parents[2] / "docs" / "deploy.md"
        (roles,) = re.findall(r"```sql\n(-- perdure_worker.*?)```", page.read_text(), re.DOTALL)
        name = postgresql.name(database_url)
        postgresql.server.execute(roles, name)
        yield database_url
        for role in ("perdure_worker", "perdure_reader"):
            postgresql.server.execute(f"DROP OWNED BY {role}; DROP ROLE {role}", name)

    async def test_a_worker(self, postgresql: Postgresql, granted: str) -> None:
        """Its engine submits, runs and verifies; no event can be changed or deleted by it."""
        url = granted.replace("perdure@", "perdure_worker@")
        async with Engine.open(url, adapters=[DemoAdapter()]) as engine:
            long = "Be brief. " * 1000
            for _ in range(2):
                task_id = await engine.submit_task(Task(prompt="Hello?", system=long))
                assert (await engine.get_result(task_id, PATIENCE)).success
            with pytest.raises(DatabaseUnavailable, match="permission denied"):
                await engine.redact_task(task_id)
        assert_sound(url)
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in (
                "UPDATE events SET data = data",
                "DELETE FROM events",
                "TRUNCATE events",
                "DELETE FROM tasks",
                "DELETE FROM streams",
                "DELETE FROM log_head",
                "DELETE FROM blobs",
                "DROP TRIGGER events_append_only ON events",
                "ALTER TABLE events DISABLE TRIGGER ALL",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(statement.encode())

    def test_a_reader(self, granted: str) -> None:
        """It has the views and nothing else of content, by `perdure sql` as well."""
        url = granted.replace("perdure@", "perdure_reader@")
        with Reader.open(url) as reader:
            assert isinstance(reader, PostgresqlReader)
            assert [*reader.ask("SELECT count(*) FROM task_events")[1]] == [(0,)]
        with psycopg.connect(url, autocommit=True) as connection:
            for view in schema.VIEWS:
                connection.execute(f"SELECT * FROM {view}".encode())
            for table in schema.metadata.tables.keys() - {"compatible"}:
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    connection.execute(f"SELECT * FROM {table}".encode())

    def test_a_reader_and_another_schema(self, postgresql: Postgresql, granted: str) -> None:
        """It is told that the schema isn't today's; a newer one that is compatible it may use."""
        url, name = granted.replace("perdure@", "perdure_reader@"), postgresql.name(granted)
        postgresql.server.execute("UPDATE alembic_version SET version_num = 'newer'", name)
        Reader.open(url).close()
        postgresql.server.execute("DELETE FROM compatible", name)
        with pytest.raises(DatabaseIncompatible, match="upgrade perdure"):
            Reader.open(url)

    def test_a_vacuum_without_rights(self, postgresql: Postgresql, granted: str) -> None:
        """A role that may not vacuum is told so: what was redacted would still be there."""
        writer = Database(granted.replace("perdure@", "perdure_worker@")).writer()
        try:
            for full in (False, True):
                with pytest.raises(DatabaseUnavailable, match="the role that owns") as refused:
                    writer.vacuum(full=full)
                assert len(str(refused.value).splitlines()) == 1
        finally:
            writer.close()
        owner = Database(granted).writer()
        try:
            owner.vacuum(full=False)
        finally:
            owner.close()
