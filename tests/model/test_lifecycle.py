"""The life of a task: what may follow what, and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.histories import EVENTS, PLATFORMS, Life, any_event, lives, submitted
from perdure.errors import InvalidTransition
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
from perdure.lifecycle import TaskState, evolve
from perdure.store.projection import TaskFold
from perdure.task import TaskStatus, Usage

T0 = datetime(2026, 11, 22, 13, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def fold(events: Sequence[Event]) -> TaskState:
    """Return the state after these events, one a second."""
    state: TaskState | None = None
    for number, event in enumerate(events):
        state = evolve(state, event, T0 + number * SECOND)
    assert state is not None
    return state


def running(attempt: int = 1, mode: str = "restart", **fields: Any) -> Running:
    """Return the beginning of an attempt."""
    return Running(
        **{"attempt": attempt, "worker": "w", "platform": PLATFORMS[0], "mode": mode, **fields}
    )


def attempt_failed(attempt: int = 1, following: str = "retry", **fields: Any) -> AttemptFailed:
    """Return the end of an attempt that leads to another one."""
    return AttemptFailed(
        attempt=attempt,
        error_class="Overloaded",
        message="too much to do",
        retryable=True,
        next=following,  # type: ignore[arg-type]
        retry_at=T0 + 60 * SECOND,
        **fields,
    )


def interrupted(following: str, attempt: int = 1, **fields: Any) -> Interrupted:
    """Return the loss of a worker."""
    return Interrupted(
        worker="w",
        attempt=attempt,
        reason="worker_lost",
        outcome="unknown",
        next=following,  # type: ignore[arg-type]
        **fields,
    )


def archived(events: int, status: str = "completed") -> Archived:
    """Return the note that so many events were moved elsewhere."""
    row = ArchivedRow(
        status=status,  # type: ignore[arg-type]
        platform=PLATFORMS[0],
        available_at=T0,
        submitted_at=T0,
        ended_at=T0,
        input_tokens=3,
        cost_usd=0.5,
    )
    return Archived(by="me", archive="a.db", events=events, position=1, digest="0" * 64, row=row)


REATTACHABLE = Accepted(response_id="r1", reattachable=True, cursor="c0", model="m-1")

STATES: dict[str, list[Event]] = {
    "nothing": [],
    "pending": [submitted()],
    "running": [submitted(), running()],
    "completed": [submitted(), running(), Completed()],
    "failed": [submitted(), running(), Failed(error_class="X", message="x", attempts=1)],
    "cancelled": [submitted(), Cancelled()],
}
SAMPLES: dict[str, Event] = {
    event.type: event
    for event in (
        submitted(),
        running(),
        Accepted(),
        Chunk(text="x"),
        UsageReported(usage=Usage(input_tokens=1)),
        FileCreated(path="a.txt"),
        attempt_failed(),
        interrupted("restart"),
        CancelRequested(by="me"),
        Completed(),
        Failed(error_class="X", message="x", attempts=1),
        Cancelled(),
        Redacted(by="me", tombstones={}),
    )
}
ENDED = {"redacted", "archived"}
MAY_FOLLOW: dict[str, set[str]] = {
    "nothing": {"submitted", "archived"},
    "pending": {"running", "failed", "cancelled"},
    "running": {
        "accepted", "chunk", "usage", "file_created", "attempt_failed", "interrupted",
        "cancel_requested", "completed", "failed", "cancelled",
    },
    "completed": ENDED,
    "failed": ENDED,
    "cancelled": ENDED,
}  # fmt: skip


class TestWhatMayFollowWhat:
    """The table of the life of a task."""

    @pytest.mark.parametrize("before", STATES)
    @pytest.mark.parametrize("name", EVENT_TYPES)
    def test_table(self, before: str, name: str) -> None:
        """An event is accepted in exactly the states that the table says."""
        events = STATES[before]
        if name == "archived" and before == "nothing":
            assert fold([archived(5)]).version == 6  # what came before is elsewhere
            return
        ended = before if before in ("completed", "failed", "cancelled") else "completed"
        happened = SAMPLES.get(name) or archived(len(events), ended)
        if name in MAY_FOLLOW[before]:
            assert fold([*events, happened]).version == len(events) + 1
        else:
            with pytest.raises(InvalidTransition):
                fold([*events, happened])

    @pytest.mark.parametrize(
        "then",
        [archived(4), archived(3), Redacted(by="me", tombstones={})],
        ids=["archived", "archived as before", "redacted"],
    )
    def test_nothing_follows_archived(self, then: Event) -> None:
        """What is in an archive doesn't change any more."""
        with pytest.raises(InvalidTransition):
            fold([*STATES["completed"], archived(3), then])

    @pytest.mark.parametrize("wrong", [archived(2), archived(4), archived(3, "failed")])
    def test_archived_is_of_all_that_was_there(self, wrong: Event) -> None:
        """It says how many events there were, and how they ended."""
        with pytest.raises(InvalidTransition):
            fold([*STATES["completed"], wrong])

    def test_archived_stands_for_what_it_replaces(self) -> None:
        """The state is the same whether the events before are still there or not."""
        note = archived(3)
        assert fold([*STATES["completed"], note]) == fold([note])

    @settings(max_examples=200)
    @given(st.lists(any_event, max_size=20))
    def test_total(self, events: list[Event]) -> None:
        """Any event in any state advances by one version or is refused; nothing else happens."""
        state = evolve(None, submitted(), T0)
        for event in events:
            try:
                after = evolve(state, event, T0)
            except InvalidTransition as refused:
                assert len(str(refused).splitlines()) == 1  # noqa: PT017 - either is fine
                continue
            assert after.version == state.version + 1
            assert not state.status.ended or isinstance(event, Redacted | Archived)
            state = after

    @given(lives(), any_event)
    def test_total_after_a_whole_life(self, life: Life, event: Event) -> None:
        """The same wherever a real history has led."""
        state = fold(life.events)
        try:
            after = evolve(state, event, T0)
        except InvalidTransition:
            return
        assert after.version == state.version + 1

    @given(EVENTS[Submitted])
    def test_total_for_any_task(self, event: Submitted) -> None:
        """Whatever a task holds, it begins a life or is refused."""
        if event.platforms:
            assert evolve(None, event, T0).version == 1
        else:
            with pytest.raises(InvalidTransition):
                evolve(None, event, T0)

    @given(any_event)
    def test_total_at_the_beginning(self, event: Event) -> None:
        """The same for the first event, whatever task it holds."""
        try:
            state = evolve(None, event, T0)
        except InvalidTransition:
            assert not isinstance(event, Submitted) or not event.platforms
        else:
            if isinstance(event, Archived):
                assert (state.version, state.status) == (event.events + 1, event.row.status)
            else:
                assert (state.version, state.status) == (1, TaskStatus.PENDING)

    @settings(max_examples=300)
    @given(lives())
    def test_a_life_folds_to_what_it_came_to(self, life: Life) -> None:
        """Every valid history is accepted, and its state says what plain counting says."""
        state = fold(life.events)

        assert state.version == len(life.events)
        assert state.status == life.status
        assert state.platform == life.platform
        assert state.attempt == life.attempt
        assert state.worker == life.worker
        assert state.model == life.model
        assert (state.error_class, state.error) == (life.error_class, life.error)
        assert state.finish_reason == life.finish_reason
        assert (state.cancel is not None) == life.cancelling
        assert list(state.files) == life.files
        for kind in ("text", "reasoning", "tool_call"):
            assert state.length(kind) == len(life.texts.get(kind, ""))  # type: ignore[arg-type]
        assert state.total_cost == life.cost
        for name in ("input", "output", "cache_read", "cache_write", "reasoning"):
            assert getattr(state.total_usage, f"{name}_tokens") == life.sum(f"{name}_tokens")

    @given(lives())
    def test_folding_changes_nothing_before(self, life: Life) -> None:
        """States are values: folding on leaves earlier states as they were."""
        states: list[TaskState] = []
        copies: list[str] = []
        state: TaskState | None = None
        for event in life.events:
            state = evolve(state, event, T0)
            states.append(state)
            copies.append(repr(state))
        assert [repr(one) for one in states] == copies

    @pytest.mark.parametrize(
        ("events", "says"),
        [
            ([submitted(), running(2)], "attempt 2 can't follow attempt 0"),
            ([submitted(), running(), attempt_failed(2)], "attempt 2 can't fail in attempt 1"),
            ([submitted(), running(platform="elsewhere")], "elsewhere"),
            ([submitted(), running(mode="reattach")], "nothing to re-attach to"),
            ([submitted(), running(), interrupted("restart", 2)], "does not own attempt 1"),
            (
                [submitted(), running(worker="other"), interrupted("restart")],
                "w does not own attempt 1",
            ),
            ([submitted(), running(), Chunk(text="x", offset=1)], "at 1 can't follow 0 characters"),
            ([submitted(), running(), Completed(output_length=1)], "1 characters can't follow 0"),
            (
                [submitted(), running(), *[CancelRequested(by="me")] * 2],
                "it was requested before",
            ),
            (
                [submitted(platforms=PLATFORMS[:1]), running(), attempt_failed(1, "fallback")],
                "no platform to fall back to",
            ),
            ([submitted(platforms=())], "names no platform"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_does_not_fit(self, events: list[Event], says: str) -> None:
        """An event that is possible here but doesn't fit what was before is refused, and why."""
        if len(events) > 1:
            fold(events[:-1])
        with pytest.raises(InvalidTransition, match=says):
            fold(events)


class TestOutput:
    """How long the output is, and where it begins anew."""

    def test_kinds_are_counted_apart(self) -> None:
        """Offsets count the characters of one kind."""
        state = fold([
            submitted(), running(), Chunk(text="ab"), Chunk(text="why", kind="reasoning"),
            Chunk(text="👍", offset=2), Chunk(text="!", kind="reasoning", offset=3),
        ])  # fmt: skip
        assert state.length() == 3
        assert state.length("reasoning") == 4
        assert state.length("tool_call") == 0

    @pytest.mark.parametrize(("mode", "length"), [("restart", 0), ("continue", 2), ("reattach", 2)])
    def test_a_new_attempt(self, mode: str, length: int) -> None:
        """A restart begins the output anew; going on and re-attaching keep it."""
        state = fold([
            submitted(), running(), REATTACHABLE, Chunk(text="ab", cursor="c1"),
            FileCreated(path="a.txt"), interrupted(mode), running(2, mode),
        ])  # fmt: skip
        assert state.length() == length
        assert state.files == (("a.txt",) if length else ())
        assert state.cursor == ("c1" if mode == "reattach" else None)
        assert (state.accepted is not None) == (mode == "reattach")

    def test_output_is_kept_between_attempts(self) -> None:
        """What an attempt produced stays until another one begins anew, even when cancelled."""
        events = [submitted(), running(), Chunk(text="ab"), attempt_failed()]
        assert fold(events).length() == 2
        assert fold([*events, Cancelled(output_length=2)]).length() == 2

    def test_a_tombstone_counts_what_it_stood_for(self) -> None:
        """A redacted chunk has no text any more, and still its length."""
        state = fold([
            submitted(), running(), Chunk(text="", length=5), Chunk(text="x", offset=5),
            Completed(output_length=6), Redacted(by="me", tombstones={}),
        ])  # fmt: skip
        assert state.length() == 6
        assert state.redacted


def used(tokens: int | None, cost: float | None = None) -> dict[str, Any]:
    """Return what an attempt used."""
    usage = None if tokens is None else Usage(input_tokens=tokens)
    return {"usage": usage, "cost_usd": cost}


class TestUsageAndCost:
    """Sums over attempts, where None means unknown and never 0."""

    @pytest.mark.parametrize(
        ("first", "second", "tokens", "cost"),
        [
            (used(1, 0.5), used(2, 0.25), 3, 0.75),
            (used(1, 0.5), used(2, None), 3, None),
            (used(1, None), used(2, 0.25), 3, None),
            (used(None, None), used(2, 0.25), 2, 0.25),
            (used(1, 0.5), used(None, None), 1, 0.5),
            (used(None), used(None), None, None),
            (used(0, 0.0), used(0, 0.0), 0, 0.0),
            (used(1, 0.0), used(None), 1, 0.0),
        ],
    )
    def test_two_attempts(
        self, first: dict[str, Any], second: dict[str, Any], tokens: int | None, cost: float | None
    ) -> None:
        """Tokens add up; a cost is known only if every attempt that used tokens has one."""
        state = fold([
            submitted(), running(), attempt_failed(**first), running(2), Completed(**second),
        ])  # fmt: skip
        assert state.total_usage.input_tokens == tokens
        assert state.total_cost == cost

    def test_the_last_report_counts(self) -> None:
        """Reports on the way replace each other; an ending without usage keeps the last one."""
        state = fold([
            submitted(), running(), UsageReported(usage=Usage(input_tokens=5)),
            UsageReported(usage=Usage(input_tokens=9)), Cancelled(),
        ])  # fmt: skip
        assert state.total_usage.input_tokens == 9
        assert state.total_cost is None

    def test_a_lost_attempt_counts(self) -> None:
        """What a lost worker had used is added to what the next attempt uses."""
        state = fold([
            submitted(), running(), UsageReported(usage=Usage(output_tokens=5)),
            interrupted("restart"), running(2), Completed(usage=Usage(output_tokens=7), cost_usd=1),
        ])  # fmt: skip
        assert state.total_usage.output_tokens == 12
        assert state.total_cost is None

    def test_a_call_that_is_picked_up_again_counts_once(self) -> None:
        """Re-attaching keeps the call's tokens; it is paid for when it ends."""
        state = fold([
            submitted(), running(), REATTACHABLE, UsageReported(usage=Usage(output_tokens=5)),
            interrupted("reattach"), running(2, "reattach"),
        ])  # fmt: skip
        assert state.total_usage.output_tokens == 5
        assert state.usage == Usage(output_tokens=5)

        ended = evolve(state, Completed(usage=Usage(output_tokens=8), cost_usd=0.5), T0)
        assert ended.total_usage.output_tokens == 8
        assert ended.total_cost == 0.5

    def test_a_call_that_is_never_picked_up_again(self) -> None:
        """Its tokens count, and nobody knows what they cost."""
        state = fold([
            submitted(), running(), attempt_failed(**used(1, 0.5)),
            running(2), REATTACHABLE, UsageReported(usage=Usage(input_tokens=5)),
            interrupted("reattach", 2), Cancelled(),
        ])  # fmt: skip
        assert state.total_usage.input_tokens == 6
        assert state.total_cost is None


class TestAttempts:
    """Whose turn it is, and when."""

    def test_back_off(self) -> None:
        """After a failed attempt the task waits until `retry_at`, owned by nobody."""
        state = fold([submitted(), running(), attempt_failed()])

        assert state.status is TaskStatus.PENDING
        assert state.available_at == T0 + 60 * SECOND
        assert (state.worker, state.failures, state.attempt) == (None, 1, 1)

    def test_fallback(self) -> None:
        """A fall-back moves to the next platform and forgets the model and the failures there."""
        state = fold([
            submitted(), running(model="m"), attempt_failed(), running(2), attempt_failed(2),
            running(3), attempt_failed(3, "fallback"),
        ])  # fmt: skip
        assert state.platform == PLATFORMS[1]
        assert (state.failures, state.model, state.attempt) == (0, None, 3)

    def test_interruptions_are_counted(self) -> None:
        """Lost workers are counted apart from failures, and a lost task may begin at once."""
        state = fold([submitted(), running(), interrupted("restart")])

        assert (state.interruptions, state.failures) == (1, 0)
        assert state.available_at == T0 + 2 * SECOND

    def test_times(self) -> None:
        """The start is the first attempt's; the end is the ending's."""
        state = fold([submitted(), running(), attempt_failed(), running(2), Completed()])

        assert state.submitted_at == T0
        assert state.started_at == T0 + SECOND
        assert state.ended_at == T0 + 4 * SECOND

    def test_success_forgets_errors(self) -> None:
        """A completed task has no error, whatever its attempts went through."""
        state = fold([submitted(), running(), attempt_failed(), running(2), Completed()])
        assert (state.error, state.error_class) == (None, None)

    def test_the_model_really_used(self) -> None:
        """The task's wish counts until a platform says what it took."""
        wish = submitted({"prompt": "x", "constraints": {"model": "wish"}})
        assert fold([wish]).model == "wish"
        assert fold([wish, running(model="wish"), Accepted(model="taken")]).model == "taken"
        assert fold([wish, running(model="wish"), Accepted()]).model == "wish"


@given(
    before=st.sampled_from(["nothing", "pending", "running", "with text", "completed"]),
    pieces=st.lists(st.tuples(st.integers(-1, 1), st.text(max_size=4)), min_size=1, max_size=5),
    looks=st.booleans(),
)
def test_chunks_of_text_are_counted(
    before: str, pieces: list[tuple[int, str]], looks: bool
) -> None:
    """A fold that only counts them comes to the same state and text, and takes no others."""
    events: list[Event] = [] if before == "nothing" else [submitted()]
    if before not in ("nothing", "pending"):
        events.append(running())
    if before == "with text":
        events += [Chunk(text="hm", kind="reasoning"), Chunk(text="so")]
    if before == "completed":
        events.append(Completed())
    state: TaskState | None = None
    counting = TaskFold("task", 1)
    for event in events:
        state = evolve(state, event, T0)
        counting.apply_one(event, T0)
    length = 0 if state is None else state.length()
    text = counting.text
    for slip, piece in pieces:
        try:
            state = evolve(state, Chunk.model_construct(text=piece, offset=length + slip), T0)
        except InvalidTransition:
            assert not counting.apply_text(length + slip, piece)
            with pytest.raises(InvalidTransition):
                counting.apply((Chunk.model_construct(text=piece, offset=length + slip),), T0)
        else:
            assert counting.apply_text(length + slip, piece)
            length += len(piece)
            text += piece
        assert counting.version == (0 if state is None else state.version)
        if looks and state is not None:
            assert counting.state == state
    assert counting.text == text
    if state is not None:
        assert counting.state == state
