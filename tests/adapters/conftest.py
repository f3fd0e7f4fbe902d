"""Fixtures for tests of adapters: the scripted server, and an environment without settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from servers.chat import ChatServer
from servers.gemini import GeminiServer
from servers.llmock import LLMockServer, llmock_running
from servers.messages import MessagesServer
from servers.responses import ResponsesServer

_SETTINGS = (
    *("ANTHROPIC_", "GEMINI_", "GOOGLE_", "OPENAI_"),
    *("PERDURE_CHATGPT_", "PERDURE_CLAUDE_", "PERDURE_COMPATIBLE_", "PERDURE_GEMINI_"),
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(_SETTINGS):
            monkeypatch.delenv(name)


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A scripted chat-completions server."""
    with ChatServer() as server:
        yield server


@pytest.fixture
def messages_server() -> Iterator[MessagesServer]:
    """A scripted server of Anthropic's Messages."""
    with MessagesServer() as server:
        yield server


@pytest.fixture
def gemini_server() -> Iterator[GeminiServer]:
    """A scripted server of Interactions and generateContent."""
    with GeminiServer() as server:
        yield server


@pytest.fixture(scope="session")
def _llmock() -> Iterator[LLMockServer]:
    with llmock_running() as server:
        yield server


@pytest.fixture
def llmock_server(_llmock: LLMockServer) -> LLMockServer:
    """Providers that others wrote; nothing scripted, no request seen yet."""
    _llmock.reset()
    return _llmock


@pytest.fixture
def responses() -> Iterator[ResponsesServer]:
    """A scripted server for the Responses API."""
    with ResponsesServer() as server:
        yield server
