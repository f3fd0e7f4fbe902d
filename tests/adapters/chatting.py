"""Calls to the scripted chat server, and what comes of them."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.adapter import Call, Resume
from perdure.errors import PlatformError
from perdure.events import Event
from perdure.task import Task
from perdure_adapters import CompatibleAdapter
from servers.chat import ChatServer, Scenario, events

KEY = "sk-very-secret-1234"
# Two more events follow the one with the finish reason: the usage, and `[DONE]`.
BEFORE_THE_END = len(events(Scenario())) - 3


def a_call(model: str | None = "m", resume: Resume | None = None, **fields: Any) -> Call:
    """Return a call; fields of a `Scenario` go to the server, the others to the task."""
    scenario = {k: fields.pop(k) for k in list(fields) if k in Scenario.__annotations__}
    options = {**fields.pop("options", {}), **({"scenario": scenario} if scenario else {})}
    if "messages" not in fields:
        fields.setdefault("prompt", "Say hello.")
    return Call(task=Task(**fields, options=options), task_id="t", model=model, resume=resume)


async def run(server: ChatServer | str, call: Call, **how: Any) -> list[Event]:
    """Return all events of a call."""
    url = server if isinstance(server, str) else server.url
    async with CompatibleAdapter(url, **how) as adapter:
        return [event async for event in adapter.run(call)]


async def failure(server: ChatServer | str, call: Call, **how: Any) -> PlatformError:
    """Return the error of a call that fails."""
    with pytest.raises(PlatformError) as caught:
        await run(server, call, **how)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value
