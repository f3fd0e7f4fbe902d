"""Fixtures for tests of the engine and of crashes: databases, children, repeatable chance."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from harness import Nursery

from perdure.store.database import Database
from servers.postgresql import Server

__all__ = ["chance", "db", "nursery", "own_server", "seed", "shared_nursery", "sqlite_db"]


@pytest.fixture(params=["sqlite", "postgresql"])
def db(request: pytest.FixtureRequest) -> Path | str:
    """An empty database of today's schema: the path of a SQLite file, and a PostgreSQL URL."""
    make = "make_database" if request.param == "sqlite" else "make_server_database"
    found: Path | str = request.getfixturevalue(make)()
    return found


@pytest.fixture
def sqlite_db(make_database: Callable[[], Path]) -> Path:
    """The path of an empty SQLite database, for what only SQLite has."""
    return make_database()


@pytest.fixture
def own_server() -> Generator[Server, None, None]:
    """A server of one test, with an empty database `own`, that writes down every statement."""
    with Server(log_statement="all", log_min_messages="info", log_line_prefix="%v ") as server:
        server.execute("CREATE DATABASE own")
        Database(server.url("own")).upgrade()
        yield server


@pytest.fixture
def seed() -> int:
    """What chance begins with: ``PERDURE_TEST_SEED``, or anything; printed where a test fails."""
    chosen = int(os.environ.get("PERDURE_TEST_SEED") or secrets.randbelow(10**9))
    print(f"PERDURE_TEST_SEED={chosen}")
    return chosen


@pytest.fixture
def chance(seed: int) -> random.Random:
    """Chance that can be repeated."""
    return random.Random(seed)


@pytest.fixture(scope="session")
def shared_nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """The one place where all children come from."""
    nursery = Nursery(tmp_path_factory.mktemp("children"))
    yield nursery
    nursery.close()


@pytest.fixture
def nursery(shared_nursery: Nursery) -> Iterator[Nursery]:
    """Where children come from; those of a test end with it."""
    yield shared_nursery
    shared_nursery.end_all()
