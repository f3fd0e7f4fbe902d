"""ChatGPT held to the contract, in each way it can be used."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from perdure.adapter import Adapter, Call
from perdure.errors import (
    AuthenticationFailed,
    InvalidRequest,
    Overloaded,
    PlatformError,
    QuotaExhausted,
    RateLimited,
    StreamTruncated,
)
from perdure.task import Task
from perdure.testing import AdapterContract
from perdure_adapters import ChatGPTAdapter
from servers.chat import Scenario as ChatScenario
from servers.chat import events as chat_events
from servers.responses import TEXT, ResponsesServer, Scenario, events

KEY = "sk-very-secret-1234"


def asking(**scenario: Any) -> Call:
    """Return a call that the server answers so."""
    options = {"scenario": scenario} if scenario else {}
    return Call(task=Task(prompt="Say hello.", options=options), task_id="contract_1")


class TestBackground(AdapterContract):
    """Responses in the background, as it is by default."""

    how: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def _server(self, responses: ResponsesServer) -> None:
        self.server = responses

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        return ChatGPTAdapter(base_url=self.server.url, api_key=KEY, **self.how)

    def text(self) -> str:
        """Return the text of the success."""
        return TEXT

    def success(self) -> Call:
        """Return a call that succeeds."""
        return asking()

    def endless(self) -> Call:
        """Return a call that hangs on the way."""
        return asking(stall_after=8)

    def open_calls(self) -> int:
        """Return the requests that the server is answering."""
        return self.server.open

    def secrets(self) -> list[str]:
        """Return the key."""
        return [KEY]

    def failures(self) -> list[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""

        def answer(status: int, **error: object) -> Call:
            return asking(status=status, error={"message": "no\nway", **error})

        return [
            (InvalidRequest, answer(400)),
            (AuthenticationFailed, answer(401, message=f"the key {KEY} is wrong")),
            (RateLimited, answer(429)),
            (QuotaExhausted, answer(429, code="insufficient_quota")),
            (Overloaded, answer(500)),
            (StreamTruncated, asking(malformed_after=3)),
        ]

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        return [asking(cut_after=k) for k in range(len(events(Scenario())) - 1)]


class TestPlain(TestBackground):
    """Responses in the foreground."""

    how: ClassVar[dict[str, Any]] = {"background": False}


class TestChat(TestBackground):
    """Chat completions."""

    how: ClassVar[dict[str, Any]] = {"api": "chat"}

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        return [asking(cut_after=k) for k in range(len(chat_events(ChatScenario())) - 2)]
