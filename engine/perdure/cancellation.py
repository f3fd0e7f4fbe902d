"""Asking for a task's end: a pending one has ended by that, a running one its owner ends."""

from __future__ import annotations

from typing import Final, NamedTuple

from perdure.errors import InvalidTransition
from perdure.events import Cancelled, CancelRequested
from perdure.store.transaction import Transaction
from perdure.task import TaskStatus

__all__ = ["Cancellation", "cancel"]


class Cancellation(NamedTuple):
    """What came of asking.

    Attributes:
        written: Whether it was written down.
        left: Platform and response of a call that goes on while nobody listens, if there is one.
    """

    written: bool
    left: tuple[str, str] | None = None


_NOTHING_DONE: Final = Cancellation(written=False)


def cancel(tx: Transaction, task_id: str, by: str, reason: str | None) -> Cancellation:
    """Cancel a task; nothing is written where it has ended, was asked to end, or doesn't exist."""
    fold = tx.fold(task_id)
    if fold is None:
        return _NOTHING_DONE
    state = fold.state
    pending = state.status is TaskStatus.PENDING
    event = (
        Cancelled(by=by, reason=reason, output_length=state.length())
        if pending
        else CancelRequested(by=by, reason=reason)
    )
    try:
        tx.append(task_id, (event,), fold.version)
    except InvalidTransition:
        return _NOTHING_DONE
    return Cancellation(written=True, left=state.open_call if pending else None)
