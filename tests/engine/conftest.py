"""Fixtures for tests of the engine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from apparatus import chance, db, nursery, own_server, seed, shared_nursery, sqlite_db

__all__ = ["chance", "db", "nursery", "own_server", "seed", "shared_nursery", "sqlite_db"]
