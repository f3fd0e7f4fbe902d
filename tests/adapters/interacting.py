"""Calls to the scripted Gemini server, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from perdure.adapter import Call, LoadedFile, Resume
from perdure.errors import PlatformError
from perdure.events import Event
from perdure.task import Task
from perdure_adapters import GeminiAdapter
from servers.gemini import GeminiServer, Scenario

KEY = "AIza-very-secret-1234"
WAYS: dict[str, dict[str, Any]] = {
    "background": {},
    "plain": {"background": False},
    "generate": {"api": "generate"},
}
"""How the adapter asks -> how it is made."""


def a_call(
    resume: Resume | None = None,
    files: Sequence[LoadedFile] = (),
    model: str | None = None,
    **fields: Any,
) -> Call:
    """Return a call; fields of a `Scenario` go to the server, the others to the task."""
    scenario = {k: fields.pop(k) for k in list(fields) if k in Scenario.__annotations__}
    options = {**fields.pop("options", {}), **({"scenario": scenario} if scenario else {})}
    if "messages" not in fields:
        fields.setdefault("prompt", "Say hello.")
    task = Task(**fields, options=options)
    return Call(task=task, task_id="t", model=model, files=files, resume=resume)


def adapter(server: GeminiServer, way: str = "background", **how: Any) -> GeminiAdapter:
    """Return an adapter that asks the server in one of the ways."""
    return GeminiAdapter(**{"base_url": server.url, "api_key": KEY, **WAYS[way], **how})


async def run(
    server: GeminiServer,
    call: Call,
    way: str = "background",
    into: list[Event] | None = None,
    **how: Any,
) -> list[Event]:
    """Return all events of a call; with ``into``, those too that come before an error."""
    seen = into if into is not None else []
    async with adapter(server, way, **how) as asked:
        async for event in asked.run(call):
            seen.append(event)
    return seen


async def failure(
    server: GeminiServer, call: Call, way: str = "background", **how: Any
) -> PlatformError:
    """Return the error of a call that fails."""
    with pytest.raises(PlatformError) as caught:
        await run(server, call, way, **how)
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value
