"""Fixtures for tests of crashes: those of the engine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from apparatus import chance, db, nursery, seed, shared_nursery

__all__ = ["chance", "db", "nursery", "seed", "shared_nursery"]
