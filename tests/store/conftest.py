"""The databases of the store's tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest

from servers.postgresql import Server
from store.backends import VOCABULARY, AllBackends, Backend, Postgresql, Sqlite, Store, opened


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each database that the store runs on, in turn."""
    found: Backend = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def sqlite(migrated_file: Path, tmp_path: Path) -> Sqlite:
    """Databases in SQLite files."""
    return Sqlite(tmp_path, migrated_file)


@pytest.fixture(scope="session")
def store_name(postgresql_server: Server, migrated_name: str) -> str:
    """The name of an empty database that also knows the words that the suites use."""
    postgresql_server.execute(f"CREATE DATABASE store TEMPLATE {migrated_name}")
    postgresql_server.execute(VOCABULARY, "store")
    return "store"


@pytest.fixture
def postgresql(postgresql_server: Server, store_name: str) -> Generator[Postgresql, None, None]:
    """Databases on a PostgreSQL server."""
    found = Postgresql(postgresql_server, store_name)
    yield found
    found.drop_all()


@pytest.fixture(scope="session")
def all_backends(
    tmp_path_factory: pytest.TempPathFactory,
    migrated_file: Path,
    postgresql_server: Server,
    store_name: str,
) -> AllBackends:
    """One of each, for databases that several tests share."""
    return {
        "sqlite": Sqlite(tmp_path_factory.mktemp("shared"), migrated_file),
        "postgresql": Postgresql(postgresql_server, store_name),
    }


@pytest.fixture
def database_url(backend: Backend) -> str:
    """A new, empty database of today's schema."""
    return backend.new()


@pytest.fixture
async def store(database_url: str) -> AsyncGenerator[Store, None]:
    """An open log on an empty database."""
    async with opened(database_url) as store:
        yield store
