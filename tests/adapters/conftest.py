"""Fixtures for tests of adapters: the scripted server, and an environment without settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.chat import ChatServer


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("OPENAI_", "PERDURE_COMPATIBLE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A scripted chat-completions server."""
    with ChatServer() as server:
        yield server
