"""Decisions about what happens next, as pure functions: what to write down, given what is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from perdure.errors import InvalidConfig, OutputInvalid, PlatformError, TimeLimitExceeded
from perdure.events import AttemptFailed, Cancelled, Event, Failed, Interrupted
from perdure.lifecycle import TaskState
from perdure.task import Recovery, Usage
from perdure.text import clean_text

__all__ = ["RetryPolicy", "after_failure", "after_interruption", "cancelled"]

# A year: whatever is longer is a mistake, and too long for dates in the end.
LONGEST_WAIT_SECONDS: Final = 366 * 86_400.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again.

    Attributes:
        base_seconds: The first wait, at most; each further one may be twice as long.
        cap_seconds: No wait is longer, unless the platform asks for it.
        retry_after_cap_seconds: The longest a platform may make us wait.
        max_repairs: How often an answer that isn't what was asked for may be handed back.
        max_interruptions: A task whose workers are lost that often ends as failed: it may be what
            kills them.

    Raises:
        InvalidConfig: A number is none that can be followed; the message names the field.
    """

    base_seconds: float = 1.0
    cap_seconds: float = 60.0
    retry_after_cap_seconds: float = 600.0
    max_interruptions: int = 50
    max_repairs: int = 1

    def __post_init__(self) -> None:
        for name in ("base_seconds", "cap_seconds", "retry_after_cap_seconds"):
            value: object = getattr(self, name)
            number = -1 if isinstance(value, bool) or not isinstance(value, (int, float)) else value
            if not 0 <= number <= LONGEST_WAIT_SECONDS:
                raise InvalidConfig(
                    f"RetryPolicy.{name} has to be a number of seconds from 0 to "
                    f"{LONGEST_WAIT_SECONDS:.0f}, not {value!r}"
                )
        for name, least in (("max_interruptions", 1), ("max_repairs", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InvalidConfig(
                    f"RetryPolicy.{name} has to be a whole number, {least} or more, not {value!r}"
                )

    def wait(self, failures: int, retry_after: float | None, chance: float) -> float:
        """Return how many seconds to wait after the ``failures``-th failure in a row.

        Exponential with full jitter (M. Brooker, "Exponential Backoff And Jitter", 2015), never
        earlier than the platform asked for.

        Args:
            failures: 1 for the first.
            retry_after: Seconds the platform asked to wait.
            chance: A random number from 0 to 1.
        """
        backoff = chance * min(self.cap_seconds, self.base_seconds * 2.0 ** min(failures - 1, 30))
        if retry_after is None or math.isnan(retry_after):
            return backoff
        return min(max(retry_after, 0.0), self.retry_after_cap_seconds) + 0.1 * backoff


@dataclass(frozen=True, slots=True)
class Spent:
    """What an attempt has used, as far as it is known."""

    usage: Usage | None = None
    cost_usd: float | None = None
    price_version: str | None = None


def after_failure(
    state: TaskState,
    error: PlatformError,
    *,
    max_attempts: int,
    policy: RetryPolicy,
    now: datetime,
    chance: Callable[[], float],
    spent: Spent,
    output_length: int,
) -> Event:
    """Return what an attempt's error leads to: another try, the next platform, or the end."""
    error_class = type(error).__name__
    message = clean_text(error.message) or error_class  # an error's text may hold anything
    request_id = None if error.request_id is None else clean_text(error.request_id)
    # The time limit is the task's, not the platform's. Each attempt has all of it, but nobody who
    # has waited for so long waits for as long again. And so is the schema that nothing can be
    # checked against.
    no_help = isinstance(error, TimeLimitExceeded) or _beyond_repair(error)
    last = state.platform == state.platforms[-1] or no_help
    following = _following(state, error, max_attempts, policy)
    if following == "fallback" and last:
        return Failed(
            error_class=error_class,
            message=message,
            status=error.status,
            request_id=request_id,
            attempts=state.attempt,
            output_length=output_length,
            usage=spent.usage,
            cost_usd=spent.cost_usd,
            price_version=spent.price_version,
        )
    wait = 0.0
    if error.retryable and following != "fallback":
        wait = policy.wait(state.failures + 1, error.retry_after, chance())
    if following == "reattach":  # it is paid for once, when it ends
        spent = Spent()
    return AttemptFailed(
        attempt=state.attempt,
        error_class=error_class,
        message=message,
        status=error.status,
        request_id=request_id,
        retryable=error.retryable,
        retry_after=error.retry_after,
        next=following,
        retry_at=now + timedelta(seconds=wait),
        usage=spent.usage,
        cost_usd=spent.cost_usd,
    )


def _following(
    state: TaskState, error: PlatformError, max_attempts: int, policy: RetryPolicy
) -> Literal["retry", "fallback", "reattach", "repair"]:
    if state.failures + 1 >= max_attempts:
        return "fallback"
    if _beyond_repair(error):
        return "fallback"
    if isinstance(error, OutputInvalid) and state.repairs < policy.max_repairs:
        return "repair"
    if not error.retryable:
        return "fallback"
    alive = state.accepted is not None and state.accepted.reattachable
    return "reattach" if alive and not error.response_over else "retry"


def _beyond_repair(error: PlatformError) -> bool:
    return isinstance(error, OutputInvalid) and not error.repairable


def after_interruption(
    state: TaskState,
    constraints: Mapping[str, Any],
    *,
    policy: RetryPolicy,
    handed_back: bool = False,
    asked: bool = True,
    spent: Spent | None = None,
) -> Sequence[Event]:
    """Return what becomes of a running task whose worker is gone or gives it back.

    Args:
        state: Where it stands.
        constraints: Those of the task, as they are stored.
        policy: When to give up.
        handed_back: Whether its worker gives it back, and nothing was lost.
        asked: Whether the platform may have been asked; else it can be as if for the first time.
        spent: What the attempt has used, where its worker can still say; else it is what the log
            says, and its price is unknown, as its outcome is.
    """
    reattachable = state.accepted is not None and state.accepted.reattachable
    recovery = Recovery(constraints.get("recovery", Recovery.RESTART))
    used = spent or Spent(state.usage)
    # What was handed back lost no worker: it doesn't count.
    losses = state.interruptions + (not handed_back)
    worn_out = not handed_back and losses >= policy.max_interruptions

    def interrupted(following: Any) -> Interrupted:  # noqa: ANN401 - one of Interrupted.next
        paid = following != "reattach"  # else it is paid for once, when it ends
        return Interrupted(
            worker=state.worker or "",
            attempt=state.attempt,
            reason="handed_back" if handed_back else "worker_lost",
            outcome="reattachable" if reattachable else "unknown",
            next=following,
            usage=used.usage if paid else None,
            cost_usd=used.cost_usd if paid else None,
        )

    if state.cancel is not None:
        return interrupted("cancel"), cancelled(state, used, state.length())
    if worn_out or (recovery is Recovery.FAIL and asked and not reattachable):
        message = _lost_too_often(losses, policy) if worn_out else _not_again(handed_back)
        failed = Failed(
            error_class="Interrupted",
            message=message,
            attempts=state.attempt,
            output_length=state.length(),
            usage=used.usage,
            cost_usd=used.cost_usd,
            price_version=used.price_version,
        )
        return interrupted("fail"), failed
    if reattachable:
        return (interrupted("reattach"),)
    if recovery is Recovery.CONTINUE and state.length() > 0:
        return (interrupted("continue"),)
    return (interrupted("restart"),)


def _lost_too_often(losses: int, policy: RetryPolicy) -> str:
    return (
        f"its workers were lost {losses} times, and {policy.max_interruptions} is the limit: it "
        "may be what kills them; `perdure log ID` shows when that was"
    )


def _not_again(handed_back: bool) -> str:
    how = "was handed back by its worker, which was stopped" if handed_back else "lost its worker"
    return (
        f"it {how} in the middle of a call, whose outcome is unknown, and its constraints say "
        "recovery = fail: look at `perdure log ID`, then run it again with `perdure retry ID`"
    )


def cancelled(state: TaskState, spent: Spent, output_length: int) -> Cancelled:
    """Return the ending of a task whose cancellation was asked for."""
    return Cancelled(
        by=state.cancel.by if state.cancel else None,
        reason=state.cancel.reason if state.cancel else None,
        output_length=output_length,
        usage=spent.usage,
        cost_usd=spent.cost_usd,
        price_version=spent.price_version,
    )
