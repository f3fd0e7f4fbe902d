"""When a worker looks for work: at once where there is news, seldom where there is none."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime
from typing import Final

__all__ = ["CALM_SECONDS", "Pace"]

# What was just claimed is served before anybody looks for more.
CALM_SECONDS: Final = 0.02
# So long whoever is taking what is due is given to commit that.
IN_VAIN_SECONDS: Final = 0.05
# All idle workers are told of new work at the same moment; one of them can have it. So they look
# at moments drawn from as many turns as there are others, each of them longer than it takes to look
# and to claim, as far as that is known by then. Most find that it has been taken.
FIRST_TURN_SECONDS: Final = 0.01
CLAIMS_IN_A_TURN: Final = 2.0
MOST_SPREAD_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Look:
    """What looking has found: when the next task that waits is due, None where none waits."""

    due: datetime | None


class Pace:
    """What a worker believes of the work that waits, and how long it can do without looking.

    Looking takes a question, claiming the write lock. So after a claim that left nothing due, or
    without news, it looks before it claims.

    Args:
        poll_seconds: How often to look where nobody tells of work.
        lease_seconds: How often to look where somebody does, since that can get lost.
    """

    def __init__(self, poll_seconds: float, lease_seconds: float) -> None:
        self.workers = 1  # alive, ourselves among them, when last counted
        self._poll_seconds = poll_seconds
        self._lease_seconds = lease_seconds
        self._turn = FIRST_TURN_SECONDS
        self._maybe_due = True
        self._look: _Look | None = None  # as long as there was no news since
        self._in_vain = False
        self._told_with_all = False

    # -- news ------------------------------------------------------------------------------------

    @property
    def maybe_due(self) -> bool:
        """Whether something may be due, so that claiming is worth it without looking."""
        return self._maybe_due

    @property
    def has_looked(self) -> bool:
        """Whether it is known what waits."""
        return self._look is not None

    def expect_work(self) -> None:
        """Something may be due now."""
        self._maybe_due = True

    def hear_with_all(self) -> None:
        """Another process has left work, and all workers were told at this moment."""
        self._told_with_all = True

    def note_look(self, due: datetime | None, now: datetime) -> None:
        """Remember when the next task that waits is due; None where none waits."""
        self._look = _Look(due)
        if not self.is_due(now):  # what was being taken has been taken
            self._in_vain = False

    def forget_look(self) -> None:
        """Time has passed, or there was news: it is not known any more what waits."""
        self._look = None

    # -- claiming --------------------------------------------------------------------------------

    def is_due(self, now: datetime) -> bool:
        """Whether something that waits is due, by the last look."""
        due = None if self._look is None else self._look.due
        return due is not None and due <= now

    def begin_claim(self) -> None:
        """Note that a claim is made; news from here on are about what comes after it."""
        self._maybe_due = False
        self._look = None

    def end_claim(self, *, looked_first: bool, claimed: int, free: int, seconds: float) -> None:
        """Learn from a claim.

        Args:
            looked_first: Whether a look before it had found something due.
            claimed: How many tasks there were.
            free: How many there could have been.
            seconds: How long it took, the look included.
        """
        if claimed == free:
            self._maybe_due = True
        self._in_vain = looked_first and not claimed
        if looked_first:  # so long others that look see what is claimed here
            self._turn = (self._turn + CLAIMS_IN_A_TURN * seconds) / 2

    # -- waiting ---------------------------------------------------------------------------------

    def patience(self, now: datetime, *, room: bool, running: bool, hears: bool) -> float | None:
        """Return after how many seconds to look for work again, news or not; None for never.

        Args:
            now: By the clock of the database.
            room: Whether another attempt could begin.
            running: Whether attempts are running.
            hears: Whether the worker is told of everything it waits for. With nothing running its
                heartbeats look for what got lost.
        """
        wait: float | None = self._poll_seconds
        if hears:
            wait = self._lease_seconds if running else None
        if room and self._look is not None and self._look.due is not None:
            left = max(0.0, (self._look.due - now).total_seconds())
            wait = left if wait is None else min(wait, left)
        if self._in_vain and wait is not None:
            wait = max(wait, IN_VAIN_SECONDS)
        return wait

    def any_turn(self) -> float:
        """Return how many seconds to wait, so that not all workers do the same at once."""
        spread = min(MOST_SPREAD_SECONDS, self._turn * (self.workers - 1))
        return random.uniform(0, spread)  # noqa: S311 - no secret

    def turn_after_news(self) -> float:
        """Return how many seconds to leave to others that were told of the same work; once."""
        told, self._told_with_all = self._told_with_all, False
        return self.any_turn() if told else 0.0
