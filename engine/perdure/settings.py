"""How a worker works: how much at once, how often it shows itself, what it does after errors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from perdure.appending import Timing
from perdure.errors import InvalidConfig
from perdure.policy import RetryPolicy
from perdure.store.readonly import LONGEST_LEASE

__all__ = ["WorkerSettings"]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How a worker works.

    Attributes:
        concurrency: Most attempts at the same time.
        heartbeat_seconds: How often a worker shows that it is alive.
        lease_seconds: A worker that hasn't shown itself for so long has lost its tasks, to whoever
            looks. One whose process on this host is gone has lost them at once. More than
            `heartbeat_seconds`.
        poll_seconds: How often an idle worker looks for tasks of other processes, where it isn't
            told of them.
        retry: What happens after errors.
        timing: How attempts are paced.
    """

    concurrency: int = 8
    heartbeat_seconds: float = 5.0
    lease_seconds: float = 30.0
    poll_seconds: float = 0.5
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        """Refuse what would make a worker hang, or lose its tasks while it lives.

        Raises:
            InvalidConfig: The message names the field.
        """
        if type(self.concurrency) is not int:
            raise InvalidConfig(f"concurrency: give a whole number, not {self.concurrency!r:.80}")
        if self.concurrency < 1:
            raise InvalidConfig(f"concurrency: {self.concurrency} attempts: give 1 or more")
        for name in ("heartbeat_seconds", "lease_seconds", "poll_seconds"):
            seconds: object = getattr(self, name)
            if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
                raise InvalidConfig(f"{name}: give seconds, not {seconds!r:.80}")
            if not 0 < seconds < math.inf:
                raise InvalidConfig(f"{name}: {seconds:g} s: give more than 0 s")
            if seconds > LONGEST_LEASE:
                raise InvalidConfig(f"{name}: {seconds:g} s: give {LONGEST_LEASE} s or less")
        if self.lease_seconds <= self.heartbeat_seconds:
            raise InvalidConfig(
                f"lease_seconds: {self.lease_seconds:g} s: give more than heartbeat_seconds, "
                f"{self.heartbeat_seconds:g} s, best a few times as much"
            )
