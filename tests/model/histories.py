"""Strategies for events and for whole lives of tasks, made without asking the code under test.

`lives` plays what a task can go through with a model of its own, simple enough to be read; what it
yields is valid, and what comes of it can be computed from it in plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from hypothesis import strategies as st

from perdure.events import (
    EVENT_TYPES,
    Accepted,
    Archived,
    ArchivedRow,
    AttemptFailed,
    Cancelled,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    Failed,
    FileCreated,
    Interrupted,
    Redacted,
    Running,
    Submitted,
    UsageReported,
)
from perdure.task import Usage

PLATFORMS = ("alpha", "beta", "gamma")
KINDS = ("text", "reasoning", "tool_call")

words = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=8)
names = st.text("abcdefghij_0123456789", min_size=1, max_size=8)
counts = st.integers(0, 2**40)
costs = st.floats(0, 1000, allow_nan=False)
moments = st.datetimes(
    min_value=datetime(2000, 1, 1),  # noqa: DTZ001 - hypothesis adds the zone
    max_value=datetime(2100, 1, 1),  # noqa: DTZ001
    timezones=st.just(UTC),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | words | st.floats(-1e9, 1e9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
json_dicts = st.dictionaries(words, json_values, max_size=3)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return None or what the strategy gives."""
    return st.none() | strategy


usages = st.builds(
    Usage,
    input_tokens=maybe(counts),
    output_tokens=maybe(counts),
    cache_read_tokens=maybe(counts),
    cache_write_tokens=maybe(counts),
    reasoning_tokens=maybe(counts),
    raw=maybe(json_dicts),
)
plain_usages = st.builds(
    Usage, input_tokens=maybe(counts), output_tokens=maybe(counts), reasoning_tokens=maybe(counts)
)

EVENTS: dict[type[Event], st.SearchStrategy[Any]] = {
    Submitted: st.builds(
        Submitted,
        task=json_dicts
        | st.fixed_dictionaries({"constraints": json_values | st.just({"model": "m"})}),
        platforms=st.lists(st.sampled_from(PLATFORMS), max_size=4).map(tuple),
        blobs=st.dictionaries(words, words, max_size=2),
    ),
    Running: st.builds(
        Running,
        attempt=st.integers(0, 3),
        worker=st.sampled_from(["w", "v"]),
        platform=st.sampled_from([*PLATFORMS, "elsewhere"]),
        model=maybe(words),
        mode=st.sampled_from(["restart", "continue", "reattach"]),
    ),
    Accepted: st.builds(
        Accepted,
        response_id=maybe(words),
        request_id=maybe(words),
        model=maybe(words),
        reattachable=st.booleans(),
        cursor=maybe(words),
        note=maybe(words),
    ),
    Chunk: st.builds(
        Chunk,
        text=words,
        kind=st.sampled_from(KINDS),
        offset=st.integers(-1, 3),
        cursor=maybe(words),
        length=maybe(st.integers(0, 3)),
    ),
    UsageReported: st.builds(UsageReported, usage=usages),
    FileCreated: st.builds(FileCreated, path=words, size=maybe(counts), digest=maybe(words)),
    AttemptFailed: st.builds(
        AttemptFailed,
        attempt=st.integers(0, 3),
        error_class=words,
        message=words,
        status=maybe(st.integers(0, 999)),
        request_id=maybe(words),
        retryable=st.booleans(),
        retry_after=maybe(costs),
        next=st.sampled_from(["retry", "fallback", "reattach", "repair"]),
        retry_at=moments,
        usage=maybe(usages),
        cost_usd=maybe(costs),
    ),
    Interrupted: st.builds(
        Interrupted,
        worker=st.sampled_from(["w", "v"]),
        attempt=st.integers(0, 3),
        reason=st.sampled_from(["worker_lost", "handed_back"]),
        outcome=st.sampled_from(["unknown", "reattachable"]),
        next=st.sampled_from(["restart", "continue", "reattach", "fail", "cancel"]),
        usage=maybe(usages),
        cost_usd=maybe(costs),
    ),
    CancelRequested: st.builds(CancelRequested, by=words, reason=maybe(words)),
    Completed: st.builds(
        Completed,
        finish_reason=words,
        platform_finish_reason=maybe(words),
        usage=maybe(usages),
        cost_usd=maybe(costs),
        price_version=maybe(words),
        output_length=st.integers(-1, 3),
        output_digest=maybe(words),
    ),
    Failed: st.builds(
        Failed,
        error_class=words,
        message=words,
        status=maybe(st.integers(0, 999)),
        request_id=maybe(words),
        attempts=st.integers(-1, 5),
        output_length=st.integers(-1, 3),
        usage=maybe(usages),
        cost_usd=maybe(costs),
        price_version=maybe(words),
    ),
    Cancelled: st.builds(
        Cancelled,
        by=maybe(words),
        reason=maybe(words),
        output_length=st.integers(-1, 3),
        usage=maybe(usages),
        cost_usd=maybe(costs),
        price_version=maybe(words),
    ),
    Redacted: st.builds(
        Redacted,
        by=words,
        reason=maybe(words),
        tombstones=st.dictionaries(st.integers(1, 9).map(str), words, max_size=3),
    ),
    Archived: st.builds(
        Archived,
        by=words,
        archive=names,
        events=st.integers(-1, 5),
        position=counts,
        digest=words,
        row=st.builds(
            ArchivedRow,
            status=st.sampled_from(["completed", "failed", "cancelled"]),
            platform=st.sampled_from(PLATFORMS),
            available_at=moments,
            cancel_requested=st.booleans(),
            input_tokens=maybe(counts),
            output_tokens=maybe(counts),
            cost_usd=maybe(costs),
            submitted_at=moments,
            ended_at=moments,
            key=maybe(words),
            labels=st.dictionaries(words, words, max_size=2),
        ),
    ),
}
assert set(EVENTS) == set(EVENT_TYPES.values())

any_event: st.SearchStrategy[Event] = st.one_of(*EVENTS.values())


@dataclass
class Call:
    """One call of a platform: an attempt, and those that re-attached to it."""

    usage: Usage | None = None
    cost: float | None = None
    settled: bool = False


@dataclass
class Life:
    """What has happened to a task, and what it comes to."""

    steps: list[tuple[Event, ...]] = field(default_factory=list)
    status: str = "pending"
    platforms: tuple[str, ...] = PLATFORMS
    platform: str = ""
    model: str | None = None
    attempt: int = 0
    worker: str | None = None
    mode: str = "restart"
    reattachable: bool = False
    cancelling: bool = False
    texts: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    error_class: str | None = None
    error: str | None = None
    finish_reason: str | None = None

    @property
    def events(self) -> list[Event]:
        """All events, in order."""
        return [event for step in self.steps for event in step]

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen."""
        return self.status in ("completed", "failed", "cancelled")

    @property
    def text(self) -> str:
        """The output so far."""
        return self.texts.get("text", "")

    def sum(self, name: str) -> int | None:
        """Return the tokens of one kind over all calls; None where no call knows."""
        known = [
            count
            for call in self.calls
            if call.usage is not None and (count := getattr(call.usage, name)) is not None
        ]
        return sum(known) if known else None

    @property
    def cost(self) -> float | None:
        """US dollars over all settled calls; None if a call that used tokens has no price."""
        total: float | None = None
        for call in self.calls:
            if not call.settled:
                continue
            if call.cost is not None:
                total = (total or 0.0) + call.cost
            elif call.usage is not None and call.usage.total_tokens is not None:
                return None
        return total

    def settle(self, usage: Usage | None, cost: float | None) -> None:
        """The present call has ended."""
        call = self.calls[-1]
        call.usage = usage or call.usage
        call.cost, call.settled = cost, True


Draw = Callable[[st.SearchStrategy[Any]], Any]


def submitted(
    task: dict[str, Any] | None = None, platforms: tuple[str, ...] = PLATFORMS
) -> Submitted:
    """Return the beginning of a task."""
    return Submitted(task={"prompt": "Hello?"} if task is None else task, platforms=platforms)


def _run(life: Life, draw: Draw) -> None:
    life.attempt += 1
    life.status, life.worker = "running", f"worker_{draw(st.integers(1, 3))}_{life.attempt}"
    life.model = draw(maybe(names))
    if life.mode == "restart":
        life.texts.clear()
        life.files.clear()
    if life.mode != "reattach":
        life.calls.append(Call())
        life.reattachable = False
    event = Running(
        attempt=life.attempt,
        worker=life.worker,
        platform=life.platform,
        model=life.model,
        mode=life.mode,  # type: ignore[arg-type]
    )
    life.steps.append((event,))


def _accept(life: Life, draw: Draw) -> None:
    event = draw(EVENTS[Accepted])
    life.reattachable = event.reattachable
    life.model = event.model or life.model
    life.steps.append((event,))


def _chunks(life: Life, draw: Draw) -> None:
    events: list[Event] = []
    for _ in range(draw(st.integers(1, 3))):
        kind, text = draw(st.sampled_from(KINDS)), draw(words)
        before = life.texts.get(kind, "")
        events.append(Chunk(text=text, kind=kind, offset=len(before), cursor=draw(maybe(names))))
        life.texts[kind] = before + text
    life.steps.append(tuple(events))


def _report(life: Life, draw: Draw) -> None:
    life.calls[-1].usage = draw(usages)
    life.steps.append((UsageReported(usage=life.calls[-1].usage),))


def _create_file(life: Life, draw: Draw) -> None:
    event = draw(EVENTS[FileCreated])
    if event.path not in life.files:
        life.files.append(event.path)
    life.steps.append((event,))


def _request_cancel(life: Life, draw: Draw) -> None:
    if not life.cancelling:
        life.cancelling = True
        life.steps.append((draw(EVENTS[CancelRequested]),))


def _spend(life: Life, draw: Draw) -> dict[str, Any]:
    spent = {"usage": draw(maybe(usages)), "cost_usd": draw(maybe(costs))}
    life.settle(usage=spent["usage"], cost=spent["cost_usd"])
    return spent


def _fail_attempt(life: Life, draw: Draw) -> None:
    more = life.platforms.index(life.platform) + 1 < len(life.platforms)
    ways = ["retry", "repair"] + ["fallback"] * more + ["reattach"] * life.reattachable
    following = draw(st.sampled_from(ways))
    event = AttemptFailed(
        attempt=life.attempt,
        error_class=draw(names),
        message=draw(words),
        retryable=draw(st.booleans()),
        next=following,
        retry_at=draw(moments),
        **({} if following == "reattach" else _spend(life, draw)),
    )
    if following == "fallback":
        life.platform = life.platforms[life.platforms.index(life.platform) + 1]
        life.model = None
    life.mode = "reattach" if following == "reattach" else "restart"
    life.status, life.worker = "pending", None
    life.error_class, life.error = event.error_class, event.message
    life.steps.append((event,))


def _interrupt(life: Life, draw: Draw) -> None:
    ways = ["restart", "continue", "fail", "cancel"] + ["reattach"] * life.reattachable
    following = draw(st.sampled_from(ways))
    spent = {} if following == "reattach" else _spend(life, draw)
    event = Interrupted(
        worker=life.worker or "",
        attempt=life.attempt,
        reason=draw(st.sampled_from(["worker_lost", "handed_back"])),
        outcome="reattachable" if life.reattachable else "unknown",
        next=following,
        **spent,
    )
    life.status, life.worker = "pending", None
    life.mode = following if following in ("continue", "reattach") else "restart"
    endings: tuple[Event, ...] = ()
    if following in ("fail", "cancel"):
        endings = (_end(life, draw, "failed" if following == "fail" else "cancelled"),)
    life.steps.append((event, *endings))


def _end(life: Life, draw: Draw, how: str) -> Event:
    """Return the ending, and settle what was not settled."""
    spent: dict[str, Any] = {}
    if life.status == "running":
        spent = _spend(life, draw)
    elif life.calls and not life.calls[-1].settled:  # a call that would have been picked up again
        life.settle(None, None)
    life.status, life.worker = how, None
    if how == "completed":
        life.error_class = life.error = None
        life.finish_reason = draw(st.sampled_from(["stop", "length"]))
        return Completed(finish_reason=life.finish_reason, output_length=len(life.text), **spent)
    if how == "failed":
        life.error_class, life.error = draw(names), draw(words)
        return Failed(
            error_class=life.error_class,
            message=life.error,
            attempts=life.attempt,
            output_length=len(life.text),
            **spent,
        )
    return Cancelled(by=draw(maybe(names)), output_length=len(life.text), **spent)


def _ending(how: str) -> Callable[[Life, Draw], None]:
    def end(life: Life, draw: Draw) -> None:
        life.steps.append((_end(life, draw, how),))

    return end


WHILE_PENDING = (_run, _run, _run, _run, _ending("cancelled"), _ending("failed"))
WHILE_RUNNING = (
    _accept, _chunks, _chunks, _chunks, _report, _create_file, _request_cancel,
    _fail_attempt, _interrupt, _ending("completed"), _ending("failed"), _ending("cancelled"),
)  # fmt: skip


@st.composite
def lives(
    draw: Draw,
    task: st.SearchStrategy[dict[str, Any]] | None = None,
    most: int = 14,
    finish: bool = False,
) -> Life:
    """What may happen to a task.

    Args:
        draw: Given by hypothesis.
        task: The task as it is stored.
        most: Steps at most.
        finish: Go on to an ending.
    """
    platforms = tuple(draw(st.permutations(PLATFORMS)))[: draw(st.integers(1, 3))]
    first = Submitted(
        task={"prompt": "Hello?"} if task is None else draw(task), platforms=platforms
    )
    constraints = first.task.get("constraints") or {}
    life = Life(
        steps=[(first,)],
        platforms=platforms,
        platform=platforms[0],
        model=constraints.get("model"),
    )
    for _ in range(draw(st.integers(0, most))):
        if life.ended:
            break
        step = draw(st.sampled_from(WHILE_RUNNING if life.status == "running" else WHILE_PENDING))
        step(life, draw)
    if finish and not life.ended:
        how = ["completed", "failed", "cancelled"] if life.status == "running" else ["cancelled"]
        _ending(draw(st.sampled_from(how)))(life, draw)
    assert not math.isnan(life.cost or 0.0)
    return life
