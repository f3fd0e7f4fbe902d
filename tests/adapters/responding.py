"""Calls to the scripted Responses server, and what comes of them."""

from __future__ import annotations

from typing import Any

import pytest
from yielded import accepted_of, drain, text_of

from perdure.adapter import Call, Resume
from perdure.errors import PlatformError
from perdure.events import Accepted, Chunk, Completed, Event
from perdure.task import Task
from perdure_adapters import ChatGPTAdapter
from servers.responses import ResponsesServer, Scenario

KEY = "sk-very-secret-1234"
CALLS = [
    {"call_id": "call_a", "name": "look", "arguments": '{"where": "up", "far": 3}'},
    {"call_id": "call_b", "name": "wait", "arguments": ""},
]
CALL_LINES = (
    '{"id":"call_a","name":"look","arguments":{"where": "up", "far": 3}}\n'
    '{"id":"call_b","name":"wait","arguments":{}}\n'
)


def a_call(model: str | None = "m", resume: Resume | None = None, **fields: Any) -> Call:
    """Return a call; fields of a `Scenario` go to the server, the others to the task."""
    scenario = {k: fields.pop(k) for k in list(fields) if k in Scenario.__annotations__}
    options = {**fields.pop("options", {}), **({"scenario": scenario} if scenario else {})}
    files = fields.pop("loaded", ())
    if "messages" not in fields:
        fields.setdefault("prompt", "Say hello.")
    return Call(Task(**fields, options=options), "t", model=model, resume=resume, files=files)


def adapter_for(server: ResponsesServer | str, **how: Any) -> ChatGPTAdapter:
    """Return an adapter that talks to the server."""
    url = server if isinstance(server, str) else server.url
    return ChatGPTAdapter(base_url=url, **{"api_key": KEY, **how})


async def run(server: ResponsesServer | str, call: Call, **how: Any) -> list[Event]:
    """Return all events of a call."""
    async with adapter_for(server, **how) as adapter:
        return [event async for event in adapter.run(call)]


async def run_to_error(
    server: ResponsesServer | str, call: Call, **how: Any
) -> tuple[list[Event], PlatformError]:
    """Return what came before the error of a call that fails, and the error."""
    seen: list[Event] = []
    async with adapter_for(server, **how) as adapter:
        with pytest.raises(PlatformError) as caught:
            await drain(adapter, call, seen)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert not any(isinstance(event, Completed) for event in seen)
    return seen, caught.value


async def failure(server: ResponsesServer | str, call: Call, **how: Any) -> PlatformError:
    """Return the error of a call that fails."""
    return (await run_to_error(server, call, **how))[1]


def picked_up(events: list[Event]) -> Resume:
    """Return how a call goes on of which these events were kept."""
    cursors = [e.cursor for e in events if isinstance(e, Accepted | Chunk) and e.cursor]
    return Resume("reattach", text_of(events), accepted_of(events).response_id, cursors[-1])
