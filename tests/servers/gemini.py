"""A Gemini server that does what the request's `scenario` tells it to: Interactions and generate.

It stands on the same ground as the chat server: an event loop in a thread of its own, a free port
of the loopback interface. Interactions in the background go on without a listener, and whoever
comes back with the id of the last event gets what came after it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from servers.chat import ChatServer, Response, Seen

TEXT = "Hello from a server, with a snowman ☃ and two lines.\nThis is the second."
THOUGHTS = ("Let me ", "think.")
USAGE = {
    "total_input_tokens": 7,
    "total_output_tokens": 12,
    "total_thought_tokens": 3,
    "total_cached_tokens": 2,
    "total_tokens": 22,
}
GENERATE_USAGE = {
    "promptTokenCount": 7,
    "candidatesTokenCount": 12,
    "thoughtsTokenCount": 3,
    "cachedContentTokenCount": 2,
    "totalTokenCount": 22,
}


@dataclass(frozen=True)
class Scenario:
    """How one request is answered."""

    text: str = TEXT
    """Streamed word by word."""
    thoughts: tuple[str, ...] = THOUGHTS
    calls: tuple[dict[str, Any], ...] = ()
    """Function calls: `id`, `name`, `pieces` of the arguments, or `arguments` at once."""
    end: str | None = None
    """Interactions: the last status. Generate: the finish reason. Empty: none is sent."""
    usage: bool = True
    usage_everywhere: bool = False
    """Also with every step and chunk."""
    raw: list[Any] | None = None
    """These events instead of everything above; text is sent as it is."""
    blocked: str | None = None
    """Generate: the prompt is blocked for this reason."""
    cut_after: int | None = None
    """Stop after so many events; picked up streams aren't cut."""
    cut: Literal["clean", "abort", "reset"] = "clean"
    malformed_after: int | None = None
    error_after: int | None = None
    """Send `error` as an event after so many events."""
    error: dict[str, Any] | None = None
    stall_after: int | None = None
    """Say nothing more after so many events; in the background, generate nothing more."""
    delay: float = 0.0
    """Seconds between events."""
    first_delay: float = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: str | None = None
    """The whole body, instead of a stream."""
    background: Literal["yes", "refused"] = "yes"
    forgotten: bool = False
    """The interaction can't be found by whoever comes back to it."""
    fails_in_the_end: bool = False
    """With the error event the interaction itself has failed."""


class Interaction:
    """An interaction, its events as they come about."""

    def __init__(self, id_: str, scenario: Scenario, model: str) -> None:
        self.id = id_
        self.scenario = scenario
        self.model = model
        self.status = "in_progress"
        self.events: list[str] = []
        self.over = False
        self.news = asyncio.Event()

    def add(self, event: str) -> None:
        """Let another event have happened."""
        self.events.append(event)
        self.news.set()
        self.news = asyncio.Event()

    async def generate(self) -> None:
        """Produce all events, at their pace, whoever listens."""
        for index, event in enumerate(interaction_events(self.scenario, self.id, self.model)):
            if self.scenario.delay:
                await asyncio.sleep(self.scenario.delay)
            if index == self.scenario.stall_after:
                await asyncio.Event().wait()
            if index == self.scenario.error_after and self.scenario.fails_in_the_end:
                self.finish("failed")
                return
            self.add(event)
        self.finish(self.scenario.end or "completed")

    def finish(self, status: str) -> None:
        """End it."""
        self.status, self.over = status, True
        self.news.set()

    async def follow(self, last_event_id: str | None, replays: str = "") -> AsyncIterator[str]:
        """Yield the events after one of them, those to come too, and what the server replays."""
        index = 0
        if last_event_id is not None and replays != "all":
            ids = [json.loads(event).get("event_id") for event in self.events]
            index = ids.index(last_event_id) + (replays != "last")
        if replays == "created" and index > 1:
            yield self.events[0]
        while True:
            news = self.news
            while index < len(self.events):
                yield self.events[index]
                index += 1
            if self.over:
                return
            await news.wait()


class GeminiServer(ChatServer):
    """The server; a context manager.

    Attributes:
        generations: How many answers were begun: what somebody would have to pay for.
        interactions: All interactions, by id.
        cancelled: Ids of those that were cancelled.
        picked_up: The `last_event_id` of all that came back, in order.
        replays: What they are told though they know it: `all`, the `last` event, or `created`.
        no_stream: What they get instead of a stream, as a whole; empty for a stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generations = 0
        self.interactions: dict[str, Interaction] = {}
        self.cancelled: list[str] = []
        self.picked_up: list[str | None] = []
        self.replays = ""
        self.no_stream = ""
        self._generating: dict[str, asyncio.Task[None]] = {}

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def asked(self) -> list[Seen]:
        """The requests for an answer."""
        return [
            seen
            for seen in self.seen
            if seen.method == "POST"
            and (seen.path.endswith("/interactions") or ":streamGenerateContent" in seen.path)
        ]

    def wait_until_over(self, id_: str, seconds: float = 5) -> None:
        """Wait until an interaction has generated all it will."""
        latest = time.monotonic() + seconds
        while not self.interactions[id_].over:
            assert time.monotonic() < latest, f"{id_} still goes on"
            time.sleep(0.005)

    async def _main(self) -> None:
        await super()._main()
        for task in self._generating.values():
            task.cancel()
        await asyncio.gather(*self._generating.values(), return_exceptions=True)

    async def _answer(self, response: Response, seen: Seen) -> bool:
        parts = urlsplit(seen.path)
        words = parts.path.strip("/").split("/")[1:]  # without the API version
        if words[:1] == ["interactions"] and len(words) > 1:
            return await self._again(response, seen, words, parse_qs(parts.query))
        scenario = Scenario(**seen.body.pop("scenario", {}))
        await asyncio.sleep(scenario.first_delay)
        if scenario.background == "refused" and seen.body.get("background"):
            refusal = _error(400, "INVALID_ARGUMENT", "background=true is not supported here")
            return await response.whole(400, refusal)
        if scenario.body is not None or scenario.status != 200:
            body = scenario.body or json.dumps({"error": scenario.error})
            return await response.whole(scenario.status, body, scenario.headers)
        if words == ["interactions"]:
            return await self._interact(response, scenario, seen)
        if words[0] == "models" and words[-1].endswith(":streamGenerateContent"):
            self.generations += 1
            model = words[-1].partition(":")[0]
            source = _paced(generate_events(scenario, model), scenario.delay)
            return await self._stream(response, scenario, source)
        return await response.whole(404, _error(404, "NOT_FOUND", "no such path"))

    async def _interact(self, response: Response, scenario: Scenario, seen: Seen) -> bool:
        self.generations += 1
        id_ = f"int_{self.generations}"
        model = seen.body.get("model", "m")
        found = self.interactions[id_] = Interaction(id_, scenario, model)
        if not seen.body.get("background"):
            source = _paced(interaction_events(scenario, id_, model), scenario.delay)
            return await self._stream(response, scenario, source)
        self._generating[id_] = asyncio.create_task(found.generate())
        return await self._stream(response, scenario, found.follow(None))

    async def _again(
        self, response: Response, seen: Seen, words: list[str], query: dict[str, list[str]]
    ) -> bool:
        """Answer what is asked about an interaction that there is."""
        found = self.interactions.get(words[1])
        if found is None or found.scenario.forgotten:
            return await response.whole(404, _error(404, "NOT_FOUND", f"{words[1]} not found"))
        if words[2:] == ["cancel"]:
            self.cancelled.append(found.id)
            self._generating[found.id].cancel()
            found.finish("cancelled")
        elif query.get("stream") == ["true"]:
            cursor = query.get("last_event_id", [None])[0]
            self.picked_up.append(cursor)
            if self.no_stream:
                return await response.whole(200, self.no_stream)
            return await self._stream(response, Scenario(), found.follow(cursor, self.replays))
        steps: list[Any] = []
        known = {"id": found.id, "status": found.status, "model": found.model, "steps": steps}
        return await response.whole(200, json.dumps(known))

    async def _stream(
        self, response: Response, scenario: Scenario, source: AsyncIterator[str]
    ) -> bool:
        await response.begin(scenario.headers)
        index = 0
        while True:
            if index == scenario.stall_after:
                await asyncio.Event().wait()
            if index == scenario.error_after:
                await response.event(json.dumps(scenario.error))
            if index == scenario.malformed_after:
                await response.event('{"event_type":"step.delta","index":0,"candidates":[{"del')
            if index == scenario.cut_after:
                break
            event = await anext(source, None)
            if event is None:
                break
            await response.event(event)
            index += 1
        if index == scenario.cut_after and scenario.cut != "clean":
            response.drop(reset=scenario.cut == "reset")
            return False
        return await response.end()


async def _paced(events: list[str], delay: float) -> AsyncIterator[str]:
    for event in events:
        if delay:
            await asyncio.sleep(delay)
        yield event


def _error(code: int, status: str, message: str) -> str:
    return json.dumps({"error": {"code": code, "status": status, "message": message}})


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]


def interaction_events(scenario: Scenario, id_: str = "int_1", model: str = "m") -> list[str]:
    """Return the data of all events of an interaction."""
    if scenario.raw is not None:
        return [event if isinstance(event, str) else json.dumps(event) for event in scenario.raw]
    lean = {"id": id_, "model": model, "object": "interaction"}
    found: list[dict[str, Any]] = [
        {"event_type": "interaction.created", "interaction": {**lean, "status": "in_progress"}},
        {
            "event_type": "interaction.status_update",
            "interaction_id": id_,
            "status": "in_progress",
        },
    ]
    index = 0
    if scenario.thoughts:
        summary = [
            {"type": "thought_summary", "content": {"type": "text", "text": piece}}
            for piece in scenario.thoughts
        ]
        signature = {"type": "thought_signature", "signature": "c2ln"}
        found += _step(index, {"type": "thought"}, [*summary, signature])
        index += 1
    if scenario.text:
        pieces = [{"type": "text", "text": piece} for piece in _words(scenario.text)]
        found += _step(index, {"type": "model_output"}, pieces)
        index += 1
    for call in scenario.calls:
        step = {
            "type": "function_call",
            "id": call["id"],
            "name": call["name"],
            "arguments": call.get("arguments", {}),
        }
        pieces = [{"type": "arguments_delta", "arguments": p} for p in call.get("pieces", ())]
        found += _step(index, step, pieces)
        index += 1
    if scenario.usage_everywhere:
        stops = [event for event in found if event["event_type"] == "step.stop"]
        for tokens, event in enumerate(stops, start=1):
            event["usage"] = {"total_input_tokens": 7, "total_output_tokens": tokens}
    status = scenario.end if scenario.end is not None else "completed"
    if status:
        interaction = {**lean, "status": status}
        if scenario.usage:
            interaction["usage"] = USAGE
        found.append({"event_type": "interaction.completed", "interaction": interaction})
    return [json.dumps({**event, "event_id": f"e-{n}~{id_}"}) for n, event in enumerate(found)]


def _step(index: int, step: dict[str, Any], deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"event_type": "step.start", "index": index, "step": step},
        *({"event_type": "step.delta", "index": index, "delta": delta} for delta in deltas),
        {"event_type": "step.stop", "index": index},
    ]


def generate_events(scenario: Scenario, model: str = "m") -> list[str]:
    """Return the data of all chunks of a generated content."""
    if scenario.raw is not None:
        return [event if isinstance(event, str) else json.dumps(event) for event in scenario.raw]
    lean = {"responseId": "resp-1", "modelVersion": model}
    if scenario.blocked is not None:
        feedback = {"promptFeedback": {"blockReason": scenario.blocked}}
        return [json.dumps({**lean, **feedback, "usageMetadata": {"promptTokenCount": 7}})]
    parts: list[dict[str, Any]] = [{"text": piece, "thought": True} for piece in scenario.thoughts]
    parts += [{"text": piece} for piece in _words(scenario.text)] if scenario.text else []
    for call in scenario.calls:
        arguments = call.get("arguments") or json.loads("".join(call.get("pieces", ())) or "{}")
        known = {"id": call["id"], "name": call["name"], "args": arguments}
        parts.append({"functionCall": known})
    found: list[dict[str, Any]] = []
    for part in parts or [{"text": ""}]:
        content = {"role": "model", "parts": [part]}
        found.append({**lean, "candidates": [{"index": 0, "content": content}]})
    if scenario.usage_everywhere:
        for tokens, chunk in enumerate(found):
            chunk["usageMetadata"] = {"promptTokenCount": 7, "candidatesTokenCount": tokens}
    end = scenario.end if scenario.end is not None else "STOP"
    if end:
        found[-1]["candidates"][0]["finishReason"] = end
    if scenario.usage:
        found[-1]["usageMetadata"] = GENERATE_USAGE
    return [json.dumps(chunk) for chunk in found]
