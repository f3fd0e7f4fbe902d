"""llmock: mocked providers that nobody here wrote, broken on demand, and a verdict on the client.

It runs in a process of its own, on a free port of the loopback interface, and speaks Anthropic
Messages, OpenAI Responses and chat completions, and Gemini (v1beta)::

    async def test_a_cut(llmock_server: LLMockServer) -> None:
        llmock_server.script(stream_fault("truncate", after_chunks=3), reply("Hello there."))
        adapter = ClaudeAdapter(base_url=llmock_server.anthropic, api_key="any")
        ...  # the next streaming request gets both: this text, cut after three events
        assert llmock_server.requests[0]["fault"] == "stream:truncate"
        llmock_server.assert_resilient()

`llmock_server` is a fixture of `tests/adapters/conftest.py`: one process for the session, forgotten
requests and no faults before each test. What is scripted waits in a queue; a request takes at most
one of each kind, the first that matches it. The verdict ties attempts of one call together by their
body and is only fair to who retries: hand it an engine's attempts, not single calls of an adapter
that are to fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any, Final, Literal

# The port is chosen by the system and bound before it is told, so nobody else can take it. The
# process ends with the pipe that it reads from, even where the tests were killed.
_SERVE: Final = """
import sys
from llmock.testing import LLMockServer
with LLMockServer() as server:
    print(server.port, flush=True)
    sys.stdin.read()
"""
# No proxy stands between this machine and itself.
_direct: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Waits with full jitter are alike at times; and a server that has sent everything before the client
# closes can't tell whether it was read. Whether something is missing, the tests see by the text.
_BY_CHANCE = {"no_backoff", "malformed_chunk_ignored"}


class LLMockServer:
    """A running llmock.

    Attributes:
        port: Where it listens, on loopback.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    @property
    def url(self) -> str:
        """The root."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def anthropic(self) -> str:
        """The base URL for Anthropic's SDK."""
        return f"{self.url}/anthropic"

    @property
    def openai(self) -> str:
        """The base URL for OpenAI's SDK."""
        return f"{self.url}/v1"

    @property
    def gemini(self) -> str:
        """The base URL for Google's SDK; the API version is `v1beta`."""
        return f"{self.url}/gemini"

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The requests so far: `path`, `body`, `status`, `fault`, `completed`, `chunks_sent`."""
        records: list[dict[str, Any]] = self._ask("GET", "/requests")["requests"]
        return records

    @property
    def verdict(self) -> dict[str, Any]:
        """How the client coped: `passed`, `calls`, `attempts`, `faults_injected`, `findings`."""
        found: dict[str, Any] = self._ask("GET", "/verdict")
        return found

    def script(self, *behaviors: dict[str, Any]) -> None:
        """Queue what the next requests meet; see `fail`, `stream_fault`, `reply`, `delay`."""
        self._ask("POST", "/scenario", {"behaviors": list(behaviors)})

    def reset(self) -> None:
        """Forget all requests and all that was scripted."""
        self._ask("POST", "/reset", {})

    def assert_resilient(self) -> None:
        """Fail with llmock's findings where the client did something wrong or careless."""
        verdict = self.verdict
        assert verdict["passed"], verdict["findings"]
        findings = [found for found in verdict["findings"] if found["code"] not in _BY_CHANCE]
        assert not findings, findings

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(  # noqa: S310 - the address is ours
            f"{self.url}/_llmock{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        with _direct.open(request, timeout=10) as response:
            return json.loads(response.read())


def fail(status: int, *, times: int = 1, **fields: object) -> dict[str, Any]:
    """Return an HTTP error for the next requests; also `retry_after` (s), `message`, `code`."""
    return {"type": "fail", "status": status, "times": times, **fields}


def stream_fault(
    kind: Literal["disconnect", "truncate", "stall", "malformed"],
    *,
    after_chunks: int = 1,
    times: int = 1,
    **fields: object,
) -> dict[str, Any]:
    """Return a fault in the next stream, after so many events; also `stall_seconds`."""
    return {
        "type": "stream_fault",
        "kind": kind,
        "after_chunks": after_chunks,
        "times": times,
        **fields,
    }


def reply(text: str | None = None, *, times: int = 1, **fields: object) -> dict[str, Any]:
    """Return what the model says next.

    Also `tool_calls` (`[{"name": …, "arguments": {…}}]`) and `finish_reason` (`stop`, `length`,
    `tool_calls`, `content_filter`).
    """
    return {"type": "reply", "text": text, "times": times, **fields}


def delay(seconds: float, *, first_token: bool = False, times: int = 1) -> dict[str, Any]:
    """Return a wait before the response, or before its first event."""
    kind = "slow_first_token" if first_token else "delay"
    return {"type": kind, "seconds": seconds, "times": times}


@contextlib.contextmanager
def llmock_running() -> Iterator[LLMockServer]:
    """Start llmock in a process of its own, wait until it listens, and stop it at the end."""
    # Without its settings from outside, which would change what it does.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMOCK_")}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline()
            assert port.strip(), "llmock did not start; what it said is above"
            yield LLMockServer(int(port))
        finally:
            process.stdin.close()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
