"""A server of `/v1/messages` that does what the request's `scenario` tells it to, byte by byte.

It is Anthropic's side of `servers.chat`: on an event loop in a thread of its own, on a free port of
the loopback interface. Whatever that side can do to a client is a field of `Scenario`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from servers.chat import ChatServer, Response, Seen

TEXT = "Hello from a server, with a snowman ☃ and two lines.\nThis is the second."
USAGE = {
    "input_tokens": 7,
    "cache_creation_input_tokens": 20,
    "cache_read_input_tokens": 100,
    "output_tokens": 1,
}


@dataclass(frozen=True)
class Scenario:
    """How one request is answered."""

    blocks: list[dict[str, Any]] | None = None
    """The answer: blocks as they would be in a whole message; none is the text."""
    text: str = TEXT
    """Streamed word by word."""
    stop_reason: str | None = "end_turn"
    delta: dict[str, Any] = field(default_factory=dict[str, Any])
    """What else `message_delta` says."""
    usage: dict[str, Any] | None = field(default_factory=lambda: dict(USAGE))
    """In `message_start`."""
    end_usage: dict[str, Any] | None = field(default_factory=lambda: {"output_tokens": 12})
    """In `message_delta`."""
    pings: bool = True
    """Whether a `ping` comes before each delta."""
    raw: list[tuple[str, str]] | None = None
    """These names and data of events instead of everything above."""
    turns: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Other fields for the request whose conversation ends with so many assistant's turns."""
    cut_after: int | None = None
    """Stop after so many events."""
    cut: Literal["clean", "abort", "reset"] = "clean"
    """How: as if all were said; without the end of the body; with a TCP reset."""
    malformed_after: int | None = None
    """Send half a JSON object after so many events."""
    garbage_after: int | None = None
    """Send bytes that are no UTF-8 after so many events."""
    error_after: int | None = None
    """Send `error` as an event after so many events."""
    error: dict[str, Any] | None = None
    stall_after: int | None = None
    """Say nothing more after so many events."""
    delay: float = 0.0
    """Seconds between events."""
    first_delay: float = 0.0
    """Seconds before the response's first byte."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: str | None = None
    """The whole body, instead of a stream."""


class MessagesServer(ChatServer):
    """The server; a context manager. See `ChatServer` for what it counts.

    Attributes:
        generations: Answers that were begun.
        repairs: Other fields of the scenario for a request that hands an answer back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generations = 0
        self.repairs: dict[str, Any] = {}

    @property
    def url(self) -> str:
        """The base URL for clients, which add the version."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def messages(self) -> list[Seen]:
        """The requests for a message."""
        return [seen for seen in self.seen if seen.path.startswith("/v1/messages")]

    async def _answer(self, response: Response, seen: Seen) -> bool:
        if seen.path.partition("?")[0] != "/v1/messages":
            return await response.whole(404, "404 page not found", {"content-type": "text/plain"})
        scenario = _of_this_turn(Scenario(**seen.body.pop("scenario", {})), seen.body)
        if self.repairs and len(seen.body["messages"]) > 2:
            scenario = replace(scenario, **self.repairs)
        named = {"request-id": f"req-{len(self.messages)}"}
        await asyncio.sleep(scenario.first_delay)
        if scenario.body is not None or scenario.status != 200:
            body = scenario.body
            if body is None:
                body = json.dumps({"type": "error", "error": scenario.error})
            return await response.whole(scenario.status, body, named | scenario.headers)
        self.generations += 1
        return await self._tell(response, scenario, seen.body, named)

    async def _tell(
        self,
        response: Response,
        scenario: Scenario,
        body: dict[str, Any],
        named: dict[str, str],
    ) -> bool:
        await response.begin(named | scenario.headers)
        for index, event in enumerate([*events(scenario, body.get("model", "m")), None]):
            if scenario.delay:
                await asyncio.sleep(scenario.delay)
            if index == scenario.stall_after:
                await asyncio.Event().wait()
            if index == scenario.error_after:
                fault = {"type": "error", "error": scenario.error}
                await _event(response, "error", json.dumps(fault))
            if index == scenario.malformed_after:
                half = '{"type":"content_block_delta","index":0,"del'
                await _event(response, "content_block_delta", half)
            if index == scenario.garbage_after:
                await _event(response, "content_block_delta", b'{"type": "\xff\xfe"}')
            if index == scenario.cut_after and scenario.cut != "clean":
                response.drop(reset=scenario.cut == "reset")
                return False
            if event is None or index == scenario.cut_after:
                break
            await _event(response, *event)
        return await response.end()


def events(scenario: Scenario, model: str = "m") -> list[tuple[str, str]]:
    """Return the names and data of all events of a scenario, those that are cut off too."""
    if scenario.raw is not None:
        return [(name, data) for name, data in scenario.raw]
    message = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": scenario.usage,
    }
    told: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
    blocks = scenario.blocks
    if blocks is None:
        blocks = [{"type": "text", "text": scenario.text}]
    for index, block in enumerate(blocks):
        begun, deltas = _in_pieces(block)
        told.append({"type": "content_block_start", "index": index, "content_block": begun})
        for delta in deltas:
            told += [{"type": "ping"}] if scenario.pings else []
            told.append({"type": "content_block_delta", "index": index, "delta": delta})
        told.append({"type": "content_block_stop", "index": index})
    end = {"stop_reason": scenario.stop_reason, "stop_sequence": None, **scenario.delta}
    told.append({"type": "message_delta", "delta": end, "usage": scenario.end_usage})
    told.append({"type": "message_stop"})
    return [(event["type"], json.dumps(event)) for event in told]


def _in_pieces(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block as it begins, and the deltas that make it whole."""
    match block["type"]:
        case "text":
            deltas = [{"type": "text_delta", "text": piece} for piece in _words(block["text"])]
            deltas += [
                {"type": "citations_delta", "citation": c} for c in block.get("citations", [])
            ]
            return {"type": "text", "text": ""}, deltas
        case "thinking":
            words = _words(block["thinking"])
            deltas = [{"type": "thinking_delta", "thinking": piece} for piece in words]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
            return {"type": "thinking", "thinking": "", "signature": ""}, deltas
        case "tool_use" | "server_tool_use":
            given = json.dumps(block["input"])
            cuts = range(0, len(given), 7)
            pieces = ["", *(given[cut : cut + 7] for cut in cuts)] if block["input"] else []
            deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
            return {**block, "input": {}}, deltas
        case _:
            return block, []


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]


def _of_this_turn(scenario: Scenario, body: dict[str, Any]) -> Scenario:
    """Return the scenario with the fields for where the conversation is."""
    said = 0
    for message in reversed(body.get("messages", [])):
        if message["role"] != "assistant":
            break
        said += 1
    turns = scenario.turns
    return replace(scenario, **turns[said]) if said < len(turns) else scenario


async def _event(response: Response, name: str, data: str | bytes) -> None:
    payload = data.encode() if isinstance(data, str) else data
    await response.event(payload, name)
