"""The platforms that come with perdure, one a file, and the base for others.

Importing this imports no SDK: each adapter does that when it is first used.
"""

from __future__ import annotations

from perdure_adapters.base import AsyncBasePlatformAdapter, BasePlatformAdapter
from perdure_adapters.compatible import CompatibleAdapter
from perdure_adapters.demo import DemoAdapter

__all__ = [
    "AsyncBasePlatformAdapter",
    "BasePlatformAdapter",
    "CompatibleAdapter",
    "DemoAdapter",
]
