"""What adapters yielded, looked at; the same for every platform."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.adapter import Adapter, Call
from perdure.events import Accepted, Chunk, Completed, Event


def text_of(events: Sequence[Event], kind: str = "text") -> str:
    """Return the joined text of one kind."""
    return "".join(e.text for e in events if isinstance(e, Chunk) and e.kind == kind)


def accepted_of(events: Sequence[Event]) -> Accepted:
    """Return how the platform accepted it, which has to be told first."""
    assert isinstance(events[0], Accepted)
    return events[0]


def end_of(events: Sequence[Event]) -> Completed:
    """Return the last event, which has to be the end."""
    assert isinstance(events[-1], Completed)
    return events[-1]


async def drain(adapter: Adapter, call: Call, into: list[Event] | None = None) -> list[Event]:
    """Read a call to its end; with ``into``, those events too that come before an error."""
    seen = into if into is not None else []
    async for event in adapter.run(call):
        seen.append(event)
    return seen
