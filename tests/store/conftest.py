"""The databases of the store's tests."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from store.backends import Backend, Sqlite, Store, opened


@pytest.fixture(params=["sqlite"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each database that the store runs on, in turn."""
    found: Backend = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def sqlite(migrated_file: Path, tmp_path: Path) -> Sqlite:
    """Databases in SQLite files."""
    return Sqlite(tmp_path, migrated_file)


@pytest.fixture
def database_url(backend: Backend) -> str:
    """A new, empty database of today's schema."""
    return backend.new()


@pytest.fixture
async def store(database_url: str) -> AsyncGenerator[Store, None]:
    """An open log on an empty database."""
    async with opened(database_url) as store:
        yield store
