"""Calls to the scripted server of Messages, and what comes of them."""

from __future__ import annotations

from typing import Any

import pytest
from yielded import drain

from perdure.adapter import Call, LoadedFile, Resume
from perdure.errors import PlatformError
from perdure.events import Event
from perdure.task import Task
from perdure_adapters import ClaudeAdapter
from servers.messages import MessagesServer, Scenario, events

KEY = "sk-ant-very-secret-1234"

# An answer of all kinds: thoughts, text, a call of a tool.
THOUGHTS = "Let me think about the weather in Ulm."
SAID = "I'll look it up, one moment ☃."
ANSWER: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": THOUGHTS, "signature": "c2lnbmF0dXJl"},
    {"type": "text", "text": SAID},
    {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Ulm", "days": 2}},
]
RECORDED: dict[str, Any] = {"blocks": ANSWER, "stop_reason": "tool_use"}
COUNT = len(events(Scenario(**RECORDED)))


def a_call(
    model: str | None = "m",
    resume: Resume | None = None,
    files: tuple[LoadedFile, ...] = (),
    **fields: Any,
) -> Call:
    """Return a call; fields of a `Scenario` go to the server, the others to the task."""
    scenario = {k: fields.pop(k) for k in list(fields) if k in Scenario.__annotations__}
    options = {**fields.pop("options", {}), **({"scenario": scenario} if scenario else {})}
    if "messages" not in fields:
        fields.setdefault("prompt", "Say hello.")
    task = Task(**fields, options=options)
    return Call(task=task, task_id="t", model=model, resume=resume, files=files)


def an_adapter(server: MessagesServer | str, **how: Any) -> ClaudeAdapter:
    """Return an adapter to the server."""
    url = server if isinstance(server, str) else server.url
    return ClaudeAdapter(**{"base_url": url, "api_key": KEY, **how})


async def run(server: MessagesServer | str, call: Call, **how: Any) -> list[Event]:
    """Return all events of a call."""
    async with an_adapter(server, **how) as adapter:
        return await drain(adapter, call)


async def failure(server: MessagesServer | str, call: Call, **how: Any) -> PlatformError:
    """Return the error of a call that fails."""
    with pytest.raises(PlatformError) as caught:
        await run(server, call, **how)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value
