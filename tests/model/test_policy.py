"""Decisions: given what is known, when something happens, then this is written down."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.histories import Life, lives
from perdure.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ContentRefused,
    FinalError,
    InvalidConfig,
    InvalidRequest,
    NotConfigured,
    OutputInvalid,
    Overloaded,
    PlatformError,
    PlatformTimeout,
    QuotaExhausted,
    RateLimited,
    RetryableError,
    StreamTruncated,
    TimeLimitExceeded,
)
from perdure.events import (
    Accepted,
    AttemptFailed,
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Interrupted,
    UsageReported,
)
from perdure.lifecycle import TaskState, evolve
from perdure.policy import RetryPolicy, Spent, after_failure, after_interruption, cancelled
from perdure.task import TaskStatus, Usage

NOW = datetime(2026, 11, 22, 13, 0, tzinfo=UTC)
SPENT = Spent(Usage(input_tokens=3), 0.5, "prices 1")

FINAL = [
    AuthenticationFailed, InvalidRequest, QuotaExhausted, ContentRefused, NotConfigured,
    TimeLimitExceeded, FinalError,
]  # fmt: skip
RETRYABLE = [
    RateLimited, Overloaded, ConnectionLost, StreamTruncated, PlatformTimeout, RetryableError,
]  # fmt: skip


def running(**fields: Any) -> TaskState:
    """Return a task that is running its first attempt."""
    state = TaskState(
        version=2,
        status=TaskStatus.RUNNING,
        platforms=("alpha", "beta"),
        platform="alpha",
        submitted_at=NOW,
        available_at=NOW,
        attempt=1,
        worker="w",
    )
    return state._replace(**fields)


def fail(state: TaskState, error: PlatformError, **fields: Any) -> Event:
    """Return what an error leads to."""
    given_: dict[str, Any] = {
        "max_attempts": 5, "policy": RetryPolicy(), "now": NOW, "chance": lambda: 1.0,
        "spent": SPENT, "output_length": 7, **fields,
    }  # fmt: skip
    return after_failure(state, error, **given_)


class TestAfterFailure:
    """Given a running task, when its attempt fails, then it is tried again, elsewhere, or ends."""

    @pytest.mark.parametrize("kind", RETRYABLE)
    def test_retryable(self, kind: type[PlatformError]) -> None:
        """An error that may pass leads to another try on the same platform."""
        event = fail(running(), kind("busy", status=503, request_id="r1"))

        assert event == AttemptFailed(
            attempt=1,
            error_class=kind.__name__,
            message="busy",
            status=503,
            request_id="r1",
            retryable=True,
            next="retry",
            retry_at=NOW + timedelta(seconds=1),
            usage=SPENT.usage,
            cost_usd=0.5,
        )

    @pytest.mark.parametrize("kind", [kind for kind in FINAL if kind is not TimeLimitExceeded])
    def test_final_with_another_platform(self, kind: type[PlatformError]) -> None:
        """An error that won't pass leads to the next platform, at once."""
        event = fail(running(), kind("no"))

        assert isinstance(event, AttemptFailed)
        assert (event.next, event.retry_at, event.retryable) == ("fallback", NOW, False)

    @pytest.mark.parametrize("kind", FINAL)
    def test_final_on_the_last_platform(self, kind: type[PlatformError]) -> None:
        """On the last platform it ends the task, with all that is known about it."""
        event = fail(running(platform="beta", attempt=3), kind("no", status=400, request_id="r1"))

        assert event == Failed(
            error_class=kind.__name__,
            message="no",
            status=400,
            request_id="r1",
            attempts=3,
            output_length=7,
            usage=SPENT.usage,
            cost_usd=0.5,
            price_version="prices 1",
        )

    def test_out_of_time(self) -> None:
        """Who has waited that long for one platform isn't made to wait for another."""
        assert isinstance(fail(running(), TimeLimitExceeded("300 s")), Failed)

    @pytest.mark.parametrize(
        ("failures", "most", "then"),
        [(0, 1, "fallback"), (0, 2, "retry"), (3, 5, "retry"), (4, 5, "fallback")],
    )
    def test_attempts_run_out(self, failures: int, most: int, then: str) -> None:
        """`max_attempts` counts the attempts on one platform; then it is the next one's turn."""
        event = fail(running(failures=failures), Overloaded("busy"), max_attempts=most)
        assert isinstance(event, AttemptFailed)
        assert event.next == then

    def test_attempts_run_out_on_the_last_platform(self) -> None:
        """With no platform left the task ends."""
        assert isinstance(fail(running(platform="beta", failures=4), Overloaded("busy")), Failed)

    @pytest.mark.parametrize(
        ("reattachable", "over", "then"),
        [(True, False, "reattach"), (True, True, "retry"), (False, False, "retry")],
    )
    def test_a_response_that_is_still_there(
        self, reattachable: bool, over: bool, then: str
    ) -> None:
        """It is picked up, and paid for when it ends, unless it ended with the error itself."""
        state = running(accepted=Accepted(response_id="r", reattachable=reattachable))
        event = fail(state, ConnectionLost("cut", response_over=over))
        assert isinstance(event, AttemptFailed)
        assert event.next == then
        assert (event.usage is None) == (then == "reattach")
        assert evolve(state, event, NOW).next_mode == (
            "reattach" if then == "reattach" else "restart"
        )

    def test_a_final_error_of_a_response_that_is_still_there(self) -> None:
        """Picking it up would not help."""
        state = running(platform="beta", accepted=Accepted(response_id="r", reattachable=True))
        assert isinstance(fail(state, InvalidRequest("no")), Failed)

    def test_an_invalid_answer(self) -> None:
        """It is handed back once; if it is invalid again, that is the end on this platform."""
        event = fail(running(platform="beta"), OutputInvalid("no JSON"))
        assert isinstance(event, AttemptFailed)
        assert event.next == "repair"
        after = evolve(running(platform="beta"), event, NOW)
        assert (after.repairs, after.repairing, after.next_mode) == (1, True, "restart")
        assert isinstance(fail(running(platform="beta", repairs=1), OutputInvalid("no")), Failed)
        elsewhere = fail(running(repairs=1), OutputInvalid("no"))
        assert isinstance(elsewhere, AttemptFailed)
        assert elsewhere.next == "fallback"

    def test_beyond_repair(self) -> None:
        """Where the schema is at fault, neither the platform nor another one is asked again."""
        event = fail(running(), OutputInvalid.beyond_repair("it can't be checked"))
        assert isinstance(event, Failed)

    def test_no_attempts_left_for_a_repair(self) -> None:
        """A repair is an attempt, too."""
        event = fail(running(platform="beta"), OutputInvalid("no"), max_attempts=1)
        assert isinstance(event, Failed)

    def test_errors_without_words(self) -> None:
        """An error without a message is named by its class."""
        event = fail(running(platform="beta"), InvalidRequest(""))
        assert isinstance(event, Failed)
        assert event.message == "InvalidRequest"

    @given(lives().filter(lambda life: life.status == "running"), st.booleans(), st.integers(1, 3))
    def test_always_fits(self, life: Life, final: bool, most: int) -> None:
        """Whatever has happened before, the decision can be written down."""
        state = _fold(life)
        error = InvalidRequest("no") if final else Overloaded("busy")
        event = fail(state, error, max_attempts=most, output_length=state.length())
        after = evolve(state, event, NOW)
        assert after.status in (TaskStatus.PENDING, TaskStatus.FAILED)


def _fold(life: Life) -> TaskState:
    state: TaskState | None = None
    for event in life.events:
        state = evolve(state, event, NOW)
    assert state is not None
    return state


class TestWaiting:
    """How long until the next try."""

    @pytest.mark.parametrize(
        ("failures", "longest"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (100, 60), (10**6, 60)]
    )
    def test_exponential(self, failures: int, longest: float) -> None:
        """The longest wait doubles up to the cap; chance takes a part of it."""
        policy = RetryPolicy()
        assert policy.wait(failures, None, 1.0) == longest
        assert policy.wait(failures, None, 0.5) == longest / 2
        assert policy.wait(failures, None, 0.0) == 0

    @pytest.mark.parametrize(
        ("asked", "least"),
        [(30.0, 30), (0.0, 0), (-5.0, 0), (1e9, 600), (float("inf"), 600), (float("nan"), 0)],
    )
    def test_what_the_platform_asks_for(self, asked: float, least: float) -> None:
        """Never earlier than asked for, a little spread, and never longer than the cap."""
        wait = RetryPolicy().wait(1, asked, 0.5)
        assert least <= wait <= least + 0.5

    @given(st.integers(1, 10**9), st.none() | st.floats(), st.floats(0, 1))
    def test_always_sensible(self, failures: int, asked: float | None, chance: float) -> None:
        """Whatever a platform says, the wait is a time between now and the caps."""
        wait = RetryPolicy().wait(failures, asked, chance)
        assert 0 <= wait <= 606
        assert NOW + timedelta(seconds=wait) >= NOW

    @given(st.none() | st.floats())
    def test_an_absurd_answer_is_written_down(self, asked: float | None) -> None:
        """Whatever `Retry-After` says, the failure can be decided and stored."""
        from perdure.events import decode, encode

        event = fail(running(), RateLimited("slow", retry_after=asked))
        assert isinstance(decode(*encode(event)), AttemptFailed)

    @pytest.mark.parametrize("field", ["base_seconds", "cap_seconds", "retry_after_cap_seconds"])
    @pytest.mark.parametrize("value", [-1, -0.001, float("inf"), float("nan"), 1e12, "1", True])
    def test_no_wait(self, field: str, value: Any) -> None:
        """What is no wait, or one without an end, is refused when the policy is made."""
        with pytest.raises(InvalidConfig, match=f"RetryPolicy.{field} .* not {value!r}"):
            RetryPolicy(**{field: value})

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("max_interruptions", value) for value in (0, -1, 1.5, float("inf"), "2", True)),
            *(("max_repairs", value) for value in (-1, 0.5, None, False)),
        ],
    )
    def test_no_number(self, field: str, value: Any) -> None:
        """Neither are counts that are none."""
        with pytest.raises(InvalidConfig, match=f"RetryPolicy.{field} .* not {value!r}"):
            RetryPolicy(**{field: value})

    def test_the_least(self) -> None:
        """Not to wait at all is a policy, and to repair nothing."""
        policy = RetryPolicy(0, 0.0, 0, max_interruptions=1, max_repairs=0)
        assert policy.wait(3, 10.0, 1.0) == 0


REATTACHABLE = Accepted(response_id="r1", reattachable=True)


class TestAfterInterruption:
    """Given a running task, when its worker is lost, then it goes on by what is possible."""

    @pytest.mark.parametrize(
        ("accepted", "recovery", "length", "then"),
        [
            (None, None, 0, "restart"),
            (None, "restart", 5, "restart"),
            (None, "continue", 5, "continue"),
            (None, "continue", 0, "restart"),
            (Accepted(response_id="r1"), "restart", 5, "restart"),
            (REATTACHABLE, None, 5, "reattach"),
            (REATTACHABLE, "restart", 5, "reattach"),
            (REATTACHABLE, "continue", 5, "reattach"),
            (REATTACHABLE, "fail", 5, "reattach"),
        ],
    )
    def test_goes_on(
        self, accepted: Accepted | None, recovery: str | None, length: int, then: str
    ) -> None:
        """Picking up the very same call comes first; then what the constraints say."""
        state = running(accepted=accepted, lengths={"text": length})
        constraints = {} if recovery is None else {"recovery": recovery}
        (event,) = after_interruption(state, constraints, policy=RetryPolicy())

        assert event == Interrupted(
            worker="w",
            attempt=1,
            reason="worker_lost",
            outcome="reattachable" if then == "reattach" else "unknown",
            next=then,  # type: ignore[arg-type]
        )

    @pytest.mark.parametrize(
        ("handed_back", "says"), [(True, "it was handed back"), (False, "it lost its worker")]
    )
    def test_fails(self, *, handed_back: bool, says: str) -> None:
        """With recovery = fail it ends, and says truly why, and what can be done about it."""
        state = running(lengths={"text": 5})
        lost, end = after_interruption(
            state, {"recovery": "fail"}, policy=RetryPolicy(), handed_back=handed_back
        )

        assert isinstance(lost, Interrupted)
        assert (lost.next, lost.outcome) == ("fail", "unknown")
        assert isinstance(end, Failed)
        assert (end.error_class, end.attempts, end.output_length) == ("Interrupted", 1, 5)
        assert end.message.startswith(says)
        for part in (
            "whose outcome is unknown",
            "recovery = fail",
            "`perdure log ID`",
            "`perdure retry ID`",
        ):
            assert part in end.message

    @pytest.mark.parametrize(
        ("fields", "recovery", "then"),
        [
            ({}, "restart", "restart"),
            ({"lengths": {"text": 5}}, "continue", "continue"),
            ({}, "fail", "fail"),
            ({"cancel": CancelRequested(by="me")}, "restart", "cancel"),
            ({"accepted": REATTACHABLE, "cancel": CancelRequested(by="me")}, "restart", "cancel"),
        ],
    )
    def test_what_was_spent(self, fields: dict[str, Any], recovery: str, then: str) -> None:
        """A worker that hands back says what the attempt has used, and it is counted once."""
        state = running(usage=Usage(output_tokens=1), **fields)
        events = after_interruption(
            state, {"recovery": recovery}, policy=RetryPolicy(), handed_back=True, spent=SPENT
        )
        first, *endings = events
        assert isinstance(first, Interrupted)
        assert (first.next, first.usage, first.cost_usd) == (then, SPENT.usage, 0.5)
        for end in endings:
            assert isinstance(end, (Cancelled, Failed))
            assert (end.usage, end.cost_usd, end.price_version) == (SPENT.usage, 0.5, "prices 1")
        for event in events:
            state = evolve(state, event, NOW)
        assert (state.total_usage, state.total_cost) == (SPENT.usage, 0.5)

    def test_what_a_lost_worker_spent(self) -> None:
        """It is what the log says; the price of a call whose outcome is unknown is unknown."""
        used = Usage(input_tokens=2, output_tokens=1)
        (event,) = after_interruption(running(usage=used), {}, policy=RetryPolicy())
        assert isinstance(event, Interrupted)
        assert (event.usage, event.cost_usd) == (used, None)
        assert evolve(running(usage=used), event, NOW).total_cost is None

    def test_a_call_that_goes_on_is_not_paid_for_yet(self) -> None:
        """It is when it ends."""
        (event,) = after_interruption(
            running(accepted=REATTACHABLE), {}, policy=RetryPolicy(), handed_back=True, spent=SPENT
        )
        assert isinstance(event, Interrupted)
        assert (event.next, event.usage, event.cost_usd) == ("reattach", None, None)

    def test_was_being_cancelled(self) -> None:
        """A task whose cancellation was asked for ends as cancelled, by whom and why."""
        state = running(
            cancel=CancelRequested(by="me", reason="wrong"),
            accepted=REATTACHABLE,
            usage=Usage(output_tokens=3),
            lengths={"text": 5},
        )
        lost, end = after_interruption(state, {}, policy=RetryPolicy())

        assert isinstance(lost, Interrupted)
        assert lost.next == "cancel"
        assert isinstance(end, Cancelled)
        assert (end.by, end.reason, end.output_length) == ("me", "wrong", 5)

    def test_kills_its_workers(self) -> None:
        """A task whose workers are lost too often ends, even if its call could be picked up."""
        policy = RetryPolicy(max_interruptions=3)
        assert len(after_interruption(running(interruptions=1), {}, policy=policy)) == 1
        state = running(interruptions=2, accepted=REATTACHABLE)
        _lost, end = after_interruption(state, {}, policy=policy)
        assert isinstance(end, Failed)
        assert "lost 3 times, and 3 is the limit" in end.message
        assert "`perdure log ID`" in end.message

    def test_handed_back(self) -> None:
        """A task that was handed back goes on in the same way, and says that nothing was lost."""
        (event,) = after_interruption(running(), {}, policy=RetryPolicy(), handed_back=True)
        assert isinstance(event, Interrupted)
        assert event.reason == "handed_back"

    def test_handing_back_wears_nothing_out(self) -> None:
        """However often it was handed back, a task isn't taken for what kills workers."""
        policy = RetryPolicy(max_interruptions=2)
        state = running()
        for _ in range(3):
            (event,) = after_interruption(state, {}, policy=policy, handed_back=True)
            state = evolve(state, event, NOW)._replace(status=TaskStatus.RUNNING, worker="w")
        assert len(after_interruption(state, {}, policy=policy)) == 1

    @given(
        lives().filter(lambda life: life.status == "running"),
        st.sampled_from(["restart", "continue", "fail"]),
        st.booleans(),
    )
    def test_always_fits(self, life: Life, recovery: str, handed_back: bool) -> None:
        """Whatever has happened before, the decision can be written down, and nobody owns it."""
        state = _fold(life)
        for event in after_interruption(
            state, {"recovery": recovery}, policy=RetryPolicy(), handed_back=handed_back
        ):
            state = evolve(state, event, NOW)
        assert state.status is not TaskStatus.RUNNING
        assert state.worker is None


class TestCancelled:
    """Given a task whose cancellation was asked for, its ending says by whom and what there was."""

    def test_ending(self) -> None:
        """The ending has who asked, why, the length of the partial output and what was spent."""
        state = evolve(running(), CancelRequested(by="me", reason="wrong"), NOW)
        state = evolve(state, UsageReported(usage=Usage(input_tokens=1)), NOW)

        assert cancelled(state, SPENT, 9) == Cancelled(
            by="me",
            reason="wrong",
            output_length=9,
            usage=SPENT.usage,
            cost_usd=0.5,
            price_version="prices 1",
        )

    def test_nobody_asked(self) -> None:
        """Ending what runs, without anybody's request, names nobody."""
        assert cancelled(running(), Spent(), 0) == Cancelled()
