"""All adapters that need no key, held to the contract."""

from __future__ import annotations

import asyncio

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
from perdure.events import Accepted, Chunk, Completed
from perdure.task import Task, Usage
from perdure.testing import AdapterContract, ScriptedAdapter
from perdure_adapters import CompatibleAdapter, DemoAdapter
from servers.chat import TEXT, ChatServer, Scenario, events

KEY = "sk-very-secret-1234"


def asking(**options: object) -> Call:
    """Return a call whose options are for the platform."""
    return Call(task=Task(prompt="Say hello.", options=options), task_id="contract_1")


class TestDemo(AdapterContract):
    """The demo platform keeps the contract."""

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        return DemoAdapter(words=40)

    def success(self) -> Call:
        """Return a call that succeeds."""
        return asking(reattach=True)

    def endless(self) -> Call:
        """Return a call that hangs on the way."""
        return asking(stall_after=3)

    def failures(self) -> list[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""
        return [
            (Overloaded, asking(fail="Overloaded")),
            (RateLimited, asking(fail="RateLimited", fail_after=5)),
            (InvalidRequest, asking(wrods=5)),
        ]

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        return [asking(truncate_after=n) for n in range(11)]


class TestScripted(AdapterContract):
    """The scripted adapter keeps the contract, as long as its script does."""

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        return ScriptedAdapter(per_call=self._script)

    def _script(self, call: Call) -> list[object]:
        if call.task.prompt == "fail":
            return ["Hel", Overloaded("too much to do")]
        if call.task.prompt == "hang":
            return ["Hel", asyncio.Event()]
        begin = Accepted(response_id="r1", reattachable=True, cursor="0")
        rest = [Chunk(text=t, cursor=str(i)) for i, t in enumerate(("Hel", "lo"), start=1)]
        if call.resume is not None and call.resume.mode == "reattach":
            rest = rest[int(call.resume.cursor or 0) :]
        return [begin, *rest, Completed(usage=Usage(input_tokens=1, output_tokens=2))]

    def text(self) -> str:
        """Return the text of the success."""
        return "Hello"

    def endless(self) -> Call:
        """Return a call that hangs on the way."""
        return Call(task=Task(prompt="hang"), task_id="t")

    def failures(self) -> list[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""
        return [(Overloaded, Call(task=Task(prompt="fail"), task_id="t"))]


class TestCompatible(AdapterContract):
    """The adapter to OpenAI-compatible servers keeps the contract, on the wire."""

    @pytest.fixture(autouse=True)
    def _server(self, chat_server: ChatServer) -> None:
        self.server = chat_server

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        return CompatibleAdapter(self.server.url, api_key=KEY, default_model="m")

    def text(self) -> str:
        """Return the text of the success."""
        return TEXT

    def success(self) -> Call:
        """Return a call that succeeds."""
        return asking()

    def endless(self) -> Call:
        """Return a call that hangs on the way."""
        return asking(scenario={"stall_after": 4})

    def open_calls(self) -> int:
        """Return the requests that the server is answering."""
        return self.server.open

    def secrets(self) -> list[str]:
        """Return the key."""
        return [KEY]

    def failures(self) -> list[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""

        def answer(status: int, **error: object) -> Call:
            return asking(scenario={"status": status, "error": {"message": "no\nway", **error}})

        return [
            (InvalidRequest, answer(400)),
            (AuthenticationFailed, answer(401, message=f"the key {KEY} is wrong")),
            (RateLimited, answer(429)),
            (QuotaExhausted, answer(429, code="insufficient_quota")),
            (Overloaded, answer(500)),
            (StreamTruncated, asking(scenario={"malformed_after": 3})),
        ]

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        before_the_end = range(len(events(Scenario())) - 2)
        return [asking(scenario={"cut_after": k}) for k in before_the_end]
