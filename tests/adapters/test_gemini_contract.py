"""Gemini held to the contract, each way of asking it, on the wire."""

from __future__ import annotations

import pytest
from interacting import KEY, WAYS, a_call

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
from perdure.testing import AdapterContract
from perdure_adapters import GeminiAdapter
from servers.gemini import TEXT, GeminiServer, Scenario, generate_events, interaction_events

_PER_DAY = {"violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}


class TestBackground(AdapterContract):
    """Interactions in the background."""

    way = "background"
    at_once = 15

    @pytest.fixture(autouse=True)
    def _server(self, gemini_server: GeminiServer) -> None:
        self.server = gemini_server

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        return GeminiAdapter(base_url=self.server.url, api_key=KEY, **WAYS[self.way])

    def text(self) -> str:
        """Return the text of the success."""
        return TEXT

    def success(self) -> Call:
        """Return a call that succeeds."""
        return a_call(usage_everywhere=True)

    def endless(self) -> Call:
        """Return a call that hangs on the way."""
        return a_call(stall_after=9)

    def open_calls(self) -> int:
        """Return the requests that the server is answering."""
        return self.server.open

    def secrets(self) -> list[str]:
        """Return the key."""
        return [KEY]

    def failures(self) -> list[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""

        def answer(status: int, message: str = "no\nway", **error: object) -> Call:
            return a_call(status=status, error={"message": message, **error})

        return [
            (InvalidRequest, answer(400)),
            (AuthenticationFailed, answer(401, f"the key {KEY} is wrong")),
            (RateLimited, answer(429)),
            (QuotaExhausted, answer(429, details=[_PER_DAY])),
            (Overloaded, answer(500)),
            (StreamTruncated, a_call(malformed_after=3)),
        ]

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        return [a_call(cut_after=k) for k in range(len(interaction_events(Scenario())) - 1)]


class TestPlain(TestBackground):
    """Interactions that end with their connection."""

    way = "plain"


class TestGenerate(TestBackground):
    """generateContent."""

    way = "generate"

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        return [a_call(cut_after=k) for k in range(len(generate_events(Scenario())) - 1)]
