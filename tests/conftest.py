"""What all tests share: how hypothesis runs, and databases that are ready to use."""

from __future__ import annotations

import secrets
import shutil
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from servers.postgresql import Server

# A shell that starts a command in the background has it ignore Ctrl-C, and all children inherit
# that: tests that press it would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: two busy cores say nothing about the code. A failure prints how to repeat it.
settings.register_profile(
    "perdure", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("perdure")


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database of today's schema, to be copied: migrating takes a second."""
    from perdure.store.database import Database

    path = tmp_path_factory.mktemp("migrated") / "perdure.db"
    Database(path).prepare()
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    return path


@pytest.fixture(scope="session")
def postgresql_server() -> Generator[Server, None, None]:
    """A PostgreSQL server for all tests of this process."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_name(postgresql_server: Server) -> str:
    """The name of an empty PostgreSQL database of today's schema, to be copied."""
    from perdure.store.database import Database

    postgresql_server.execute("CREATE DATABASE migrated")
    Database(postgresql_server.url("migrated")).upgrade()
    return "migrated"


@pytest.fixture
def make_database(migrated_file: Path, tmp_path: Path) -> Callable[[], Path]:
    """A function that returns the path of a new, empty SQLite database of today's schema."""
    made = 0

    def make() -> Path:
        nonlocal made
        made += 1
        return Path(shutil.copy(migrated_file, tmp_path / f"perdure{made}.db"))

    return make


@pytest.fixture
def make_server_database(
    postgresql_server: Server, migrated_name: str
) -> Generator[Callable[[], str], None, None]:
    """A function that returns the URL of a new, empty PostgreSQL database of today's schema."""
    made: list[str] = []

    def make() -> str:
        made.append(f"made_{secrets.token_hex(6)}")
        postgresql_server.execute(
            f"CREATE DATABASE {made[-1]} TEMPLATE {migrated_name} STRATEGY file_copy"
        )
        return postgresql_server.url(made[-1])

    yield make
    for name in made:
        postgresql_server.execute(f"DROP DATABASE {name} WITH (FORCE)")
