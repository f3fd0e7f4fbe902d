"""A Responses server that does what the request's `scenario` tells it to, event by event.

Beside chat completions it knows `POST /responses` in the foreground and in the background,
`GET /responses/{id}` with and without `stream` and `starting_after`, and
`POST /responses/{id}/cancel`. It counts generations: what a platform would be paid for.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from servers.chat import TEXT, ChatServer, Response, Seen
from servers.chat import Scenario as ChatScenario

USAGE = {
    "input_tokens": 7,
    "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 1},
    "output_tokens": 12,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 19,
}


@dataclass(frozen=True)
class Scenario:
    """How one request is answered."""

    text: str = TEXT
    """Streamed word by word."""
    reasoning: list[str] = field(default_factory=list[str])
    """Parts of a summary, before the text."""
    refusal: str = ""
    """Said instead of the text."""
    calls: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    """Function calls after the text: `call_id`, `name`, `arguments`."""
    end: Literal["completed", "incomplete", "failed", "cancelled"] | None = "completed"
    incomplete: str | None = "max_output_tokens"
    """The reason of an incomplete response."""
    error: dict[str, Any] | None = None
    """Of a failed response, of an `error` event, or of a status."""
    usage: dict[str, Any] | None = field(default_factory=lambda: dict(USAGE))
    raw: list[str] | None = None
    """These event data instead of everything above."""
    cut_after: int | None = None
    """Stop the first stream after so many events."""
    cut: Literal["clean", "abort", "reset"] = "clean"
    again_cut_after: int | None = None
    """Stop each stream that picks it up after so many events of its own."""
    malformed_after: int | None = None
    """Send half a JSON object in the first stream after so many events."""
    error_after: int | None = None
    """Send an `error` event in the first stream after so many events."""
    stall_after: int | None = None
    """Generate no more after so many events."""
    fails_after_error: bool = False
    """Whether the response has failed when `error_after` is sent."""
    delay: float = 0.0
    """Seconds between events."""
    first_delay: float = 0.0
    """Seconds before the response's first byte."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: str | None = None
    """The whole body, instead of a stream."""
    refuses: str | None = None
    """A 400 with these words where `background` is asked for."""
    ignores_background: bool = False
    again_status: int | None = None
    """The status of every GET for this response."""
    again_body: str | None = None
    """What every GET for this response is answered with."""
    streams_again: bool = True
    """Else a GET with `stream` is refused with a 400."""
    forgets: int = 0
    """So many events after the cursor aren't streamed again."""


class Generation:
    """One answer in the making; what it costs is spent once.

    Attributes:
        id: The response's name.
        background: Whether it goes on without a listener.
        made: How many events there are so far.
        over: Whether there will be no more.
    """

    def __init__(self, id_: str, scenario: Scenario, body: dict[str, Any]) -> None:
        self.id = id_
        self.scenario = scenario
        self.background = bool(body.get("background")) and not scenario.ignores_background
        self.events = events(scenario, body, id_, background=self.background)
        self.made = 0
        self.over = False
        self.status: str | None = None
        self._news = asyncio.Condition()

    async def generate(self) -> None:
        """Make the events, at their pace."""
        for index in range(len(self.events)):
            if self.scenario.delay:
                await asyncio.sleep(self.scenario.delay)
            if index == self.scenario.stall_after:
                await asyncio.Event().wait()
            async with self._news:
                if self.over:
                    return
                self.made = index + 1
                self._news.notify_all()
        await self.end()

    async def end(self, status: str | None = None) -> None:
        """End it, as if somebody had cancelled it if a status is given."""
        async with self._news:
            self.over = True
            self.status = status
            self._news.notify_all()

    async def event(self, index: int) -> str | None:
        """Return an event as soon as it is there; None where there is none."""
        async with self._news:
            await self._news.wait_for(lambda: self.made > index or self.over)
        return self.events[index] if index < self.made else None

    def whole(self) -> dict[str, Any]:
        """Return the response as it is now."""
        last = json.loads(self.events[-1])
        if self.status is None and self.made == len(self.events) and "response" in last:
            return dict(last["response"])
        begun = dict(json.loads(self.events[0])["response"])
        return {**begun, "status": self.status or "in_progress"}


class ResponsesServer(ChatServer):
    """The server; a context manager.

    Attributes:
        generations: Prompt -> how often an answer to it was begun.
        cancelled: Names of the responses that were cancelled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.generations: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.responses: dict[str, Generation] = {}
        self._working: set[asyncio.Task[None]] = set()

    @property
    def posts(self) -> list[Seen]:
        """The requests for a response."""
        return [s for s in self.seen if s.method == "POST" and s.path == "/v1/responses"]

    @property
    def gets(self) -> list[Seen]:
        """The requests to see or pick up a response."""
        return [s for s in self.seen if s.method == "GET" and "/responses/" in s.path]

    @property
    def working(self) -> int:
        """How many answers are in the making."""
        return sum(not task.done() for task in list(self._working))

    async def _main(self) -> None:
        await super()._main()
        for task in list(self._working):
            task.cancel()
        await asyncio.gather(*self._working, return_exceptions=True)

    async def _answer(self, response: Response, seen: Seen) -> bool:
        url = urlsplit(seen.path)
        parts = url.path.removeprefix("/v1/").split("/")
        if parts[0] != "responses":
            return await super()._answer(response, seen)
        if len(parts) == 1:
            return await self._create(response, seen)
        generation = self.responses.get(parts[1])
        if generation is None:
            return await response.whole(404, _fault("Response not found", "not_found"))
        if parts[2:] == ["cancel"]:
            self.cancelled.append(generation.id)
            if generation.over:
                return await response.whole(400, _fault("Cannot cancel a completed response"))
            await generation.end("cancelled")
            return await response.whole(200, json.dumps(generation.whole()))
        return await self._retrieve(response, generation, parse_qs(url.query))

    async def _create(self, response: Response, seen: Seen) -> bool:
        scenario = Scenario(**seen.body.pop("scenario", {}))
        await asyncio.sleep(scenario.first_delay)
        if scenario.refuses is not None and seen.body.get("background"):
            return await response.whole(400, _fault(scenario.refuses))
        if scenario.body is not None or scenario.status != 200:
            body = scenario.body or json.dumps({"error": scenario.error})
            return await response.whole(scenario.status, body, scenario.headers)
        self.generations[_question(seen.body)] += 1
        generation = Generation(f"resp_{len(self.responses) + 1}", scenario, seen.body)
        self.responses[generation.id] = generation
        making = asyncio.create_task(generation.generate())
        self._working.add(making)
        making.add_done_callback(self._working.discard)
        try:
            return await self._respond(response, generation)
        finally:
            if not generation.background:  # nobody listens any more: what for?
                making.cancel()

    async def _respond(self, response: Response, generation: Generation) -> bool:
        scenario = generation.scenario
        await response.begin(scenario.headers)
        index = 0
        while True:
            if index == scenario.error_after:
                if scenario.fails_after_error:
                    await generation.end("failed")
                await response.event(json.dumps({"type": "error", **(scenario.error or {})}))
                return await response.end()
            if index == scenario.malformed_after:
                await response.event('{"type":"response.output_text.delta","del')
            if index == scenario.cut_after:
                return await _cut(response, scenario)
            data = await generation.event(index)
            if data is None:
                return await response.end()
            await response.event(data)
            index += 1

    async def _retrieve(
        self, response: Response, generation: Generation, query: dict[str, list[str]]
    ) -> bool:
        scenario = generation.scenario
        if scenario.again_status is not None:
            return await response.whole(scenario.again_status, _fault("not now"))
        if scenario.again_body is not None:
            return await response.whole(200, scenario.again_body)
        if query.get("stream") != ["true"]:
            return await response.whole(200, json.dumps(generation.whole()))
        if not scenario.streams_again:
            return await response.whole(400, _fault("This response can't be streamed"))
        after = int(query.get("starting_after", ["-1"])[0])
        await response.begin({})
        begin = after + 1 + scenario.forgets
        for index in range(begin, len(generation.events) + 1):
            if index - begin == scenario.again_cut_after:
                return await _cut(response, scenario)
            data = await generation.event(index)
            if data is None:
                break
            await response.event(data)
        return await response.end()


async def _cut(response: Response, scenario: Scenario) -> bool:
    if scenario.cut == "clean":
        return await response.end()
    response.drop(reset=scenario.cut == "reset")
    return False


def _fault(message: str, code: str | None = None) -> str:
    fault = {"message": message, "type": "invalid_request_error", "code": code}
    return json.dumps({"error": fault})


def _question(body: dict[str, Any]) -> str:
    asked = body.get("input")
    content = asked[-1]["content"] if isinstance(asked, list) else asked
    return content if isinstance(content, str) else json.dumps(content)


def events(
    scenario: Scenario,
    body: dict[str, Any] | None = None,
    id_: str = "resp_1",
    *,
    background: bool = False,
) -> list[str]:
    """Return the data of all events of a scenario, numbered from 0 on."""
    if scenario.raw is not None:
        return scenario.raw
    writing = _Writing(scenario, body or {}, id_, background)
    return [json.dumps(event) for event in writing.events()]


class _Writing:
    def __init__(
        self, scenario: Scenario, body: dict[str, Any], id_: str, background: bool
    ) -> None:
        self._scenario = scenario
        self._body = body
        self._id = id_
        self._background = background
        self._events: list[dict[str, Any]] = []
        self._output: list[dict[str, Any]] = []

    def events(self) -> list[dict[str, Any]]:
        scenario = self._scenario
        self._add("response.created", response=self._response("in_progress"))
        self._add("response.in_progress", response=self._response("in_progress"))
        if scenario.reasoning:
            self._reason()
        if scenario.refusal:
            self._say("refusal", scenario.refusal)
        elif scenario.text:
            self._say("output_text", scenario.text)
        for call in scenario.calls:
            self._call(call)
        if scenario.end is not None:
            more: dict[str, Any] = {"output": self._output, "usage": scenario.usage}
            if scenario.end == "incomplete":
                more["incomplete_details"] = {"reason": scenario.incomplete}
            if scenario.end == "failed":
                more["error"] = scenario.error
            self._add(f"response.{scenario.end}", response=self._response(scenario.end, **more))
        return self._events

    def _add(self, kind: str, **fields: Any) -> None:
        number = len(self._events)
        self._events.append({"type": kind, "sequence_number": number, **fields})

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": 1,
            "model": self._body.get("model", "m"),
            "status": status,
            "background": self._background,
            "output": [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            **more,
        }

    def _reason(self) -> None:
        item: dict[str, Any] = {"id": "rs_1", "type": "reasoning", "summary": []}
        place = {"item_id": "rs_1", "output_index": 0}
        self._add("response.output_item.added", output_index=0, item=dict(item))
        for index, part in enumerate(self._scenario.reasoning):
            at = {**place, "summary_index": index}
            whole = {"type": "summary_text", "text": part}
            part_begun = {"type": "summary_text", "text": ""}
            self._add("response.reasoning_summary_part.added", **at, part=part_begun)
            for piece in _pieces(part):
                self._add("response.reasoning_summary_text.delta", **at, delta=piece)
            self._add("response.reasoning_summary_text.done", **at, text=part)
            self._add("response.reasoning_summary_part.done", **at, part=whole)
            item["summary"].append(whole)
        self._done(item)

    def _say(self, kind: str, text: str) -> None:
        index = len(self._output)
        name = "refusal" if kind == "refusal" else "text"
        event = "response.refusal" if kind == "refusal" else "response.output_text"
        item: dict[str, Any] = {"id": f"msg_{index}", "type": "message", "role": "assistant"}
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        begun = {**item, "status": "in_progress", "content": []}
        self._add("response.output_item.added", output_index=index, item=begun)
        self._add("response.content_part.added", **place, part={"type": kind, name: ""})
        for piece in _pieces(text):
            self._add(f"{event}.delta", **place, delta=piece)
        self._add(f"{event}.done", **place, **{name: text})
        part = {"type": kind, name: text, **({} if name == "refusal" else {"annotations": []})}
        self._add("response.content_part.done", **place, part=part)
        self._done({**item, "status": "completed", "content": [part]})

    def _call(self, call: dict[str, str]) -> None:
        index = len(self._output)
        item = {"id": f"fc_{index}", "type": "function_call", **call}
        place = {"item_id": item["id"], "output_index": index}
        self._add("response.output_item.added", output_index=index, item={**item, "arguments": ""})
        for piece in _pieces(call["arguments"]):
            self._add("response.function_call_arguments.delta", **place, delta=piece)
        whole = call["arguments"]
        self._add("response.function_call_arguments.done", **place, arguments=whole)
        self._done({**item, "status": "completed"})

    def _done(self, item: dict[str, Any]) -> None:
        self._add("response.output_item.done", output_index=len(self._output), item=item)
        self._output.append(item)


def _pieces(text: str) -> list[str]:
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + [word for word in words[-1:] if word]


__all__ = ["TEXT", "USAGE", "ChatScenario", "Generation", "ResponsesServer", "Scenario", "events"]
