"""What all tests share: how hypothesis runs, and databases that are ready to use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

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


@pytest.fixture
def make_database(migrated_file: Path, tmp_path: Path) -> Callable[[], Path]:
    """A function that returns the path of a new, empty SQLite database of today's schema."""
    made = 0

    def make() -> Path:
        nonlocal made
        made += 1
        return Path(shutil.copy(migrated_file, tmp_path / f"perdure{made}.db"))

    return make
