"""Every error perdure raises on purpose.

::

    PerdureError
    ├── InvalidTask              a task, row or option that can't be accepted as it is
    ├── InvalidConfig            `perdure.toml`, the environment or an argument can't be followed
    ├── TaskNotFound             no such task in this database
    ├── TaskArchived             the task's content was moved into an archive
    ├── UnknownPlatform          no adapter of that name is installed
    ├── EngineClosed             the engine is not open: not entered yet, or closed meanwhile
    ├── RunningLoop              a blocking call was made from inside an event loop
    ├── InvalidTransition        an event that can't follow what is already in the log
    ├── ConcurrencyError         someone else wrote to the stream first
    ├── DuplicateKey             a task with that key is already there
    ├── StoreError
    │   ├── DatabaseUnavailable  locked, full, unreachable or not writable
    │   ├── DatabaseIncompatible not ours, or of a newer perdure
    │   ├── DatabaseCorrupt      what is stored can't be what was written
    │   └── TasksUnreadable      all others were run; each of these is one of the two above
    └── PlatformError            what adapters raise; carries status, request id, retry_after
        ├── RetryableError
        │   ├── RateLimited
        │   ├── Overloaded
        │   ├── ConnectionLost
        │   ├── StreamTruncated
        │   └── PlatformTimeout
        └── FinalError
            ├── AuthenticationFailed
            ├── InvalidRequest
            ├── QuotaExhausted
            ├── ContentRefused
            ├── NotConfigured
            ├── OutputInvalid       the answer does not satisfy the task's ``output_schema``
            └── TimeLimitExceeded   an attempt took longer than the task's ``timeout_seconds``

Messages are one line each and say what happened, to what, and what to do about it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Self

from perdure.text import clean_text

__all__ = [
    "AuthenticationFailed",
    "ConcurrencyError",
    "ConnectionLost",
    "ContentRefused",
    "DatabaseCorrupt",
    "DatabaseIncompatible",
    "DatabaseUnavailable",
    "DuplicateKey",
    "EngineClosed",
    "FinalError",
    "InvalidConfig",
    "InvalidRequest",
    "InvalidTask",
    "InvalidTransition",
    "NotConfigured",
    "OutputInvalid",
    "Overloaded",
    "PerdureError",
    "PlatformError",
    "PlatformTimeout",
    "QuotaExhausted",
    "RateLimited",
    "RetryableError",
    "RunningLoop",
    "StoreError",
    "StreamTruncated",
    "TaskArchived",
    "TaskNotFound",
    "TasksUnreadable",
    "TimeLimitExceeded",
    "UnknownPlatform",
]


class PerdureError(Exception):
    """The root: ``except PerdureError`` catches everything perdure raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Let errors cross processes whose constructors take something else than a message."""
        return _revive, (type(self), self.args, vars(self))


def _revive(kind: type[PerdureError], args: tuple[Any, ...], state: dict[str, Any]) -> PerdureError:
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class InvalidTask(PerdureError):
    """A task, a row or an option can't be accepted as it is; the message names the field."""


class InvalidConfig(PerdureError):
    """`perdure.toml`, the environment or what an engine is opened with can't be followed."""


class TaskNotFound(PerdureError):
    """There is no task of that id in this database."""

    def __init__(self, task_id: str) -> None:
        super().__init__(
            f"no task {task_id!r} in this database; `perdure list` shows what is there"
        )
        self.task_id = task_id


class TaskArchived(PerdureError):
    """The task's events and content were moved into an archive; its row is still here.

    Attributes:
        task_id: The task.
        archive: The name of the archive's file.
    """

    def __init__(self, task_id: str, archive: str, command: str = "output") -> None:
        asked = shlex.join(("perdure", command, task_id, "--db", archive))
        super().__init__(f"the content of {task_id} is in the archive {archive}: `{asked}`")
        self.task_id = task_id
        self.archive = archive


class UnknownPlatform(PerdureError):
    """No adapter of that name is installed."""


class EngineClosed(PerdureError):
    """The engine or its log is not open, so it can't do what it was asked for."""


class RunningLoop(PerdureError):
    """A blocking call was made where an event loop is running; use the async form."""


class InvalidTransition(PerdureError):
    """An event that can't follow what is already in the task's stream."""


class ConcurrencyError(PerdureError):
    """The stream is not at the version the writer expected: someone else wrote first.

    Attributes:
        task_id: The stream.
        expected: The version the writer had seen.
        actual: The version the stream is at; 0 where there is no stream.
    """

    def __init__(self, task_id: str, expected: int, actual: int) -> None:
        super().__init__(f"{task_id} is at version {actual}, not at {expected}: it was changed")
        self.task_id = task_id
        self.expected = expected
        self.actual = actual


class DuplicateKey(PerdureError):
    """A task with that key is already in the database.

    Who submits through an engine doesn't meet it, but is given the id of the task that is there.

    Attributes:
        key: The key.
        task_id: The task that has it.
    """

    def __init__(self, key: str, task_id: str) -> None:
        super().__init__(
            f"the key {key!r} belongs to task {task_id}: go on with that one, or choose another key"
        )
        self.key = key
        self.task_id = task_id


class StoreError(PerdureError):
    """The database can't do its part."""


class DatabaseUnavailable(StoreError):
    """The database is locked, full, unreachable, or can't be opened for writing."""


class DatabaseIncompatible(StoreError):
    """The database isn't one of perdure's, or was written by a newer perdure."""


class DatabaseCorrupt(StoreError):
    """What is stored can't be what was written."""


class TasksUnreadable(StoreError):
    """Some tasks were left alone, since what the log has of them can't be read by this perdure.

    Attributes:
        task_ids: Which.
    """

    def __init__(self, task_ids: Sequence[str], error: StoreError) -> None:
        first, *others = task_ids
        which = f"{first} was" if not others else f"{first} and {len(others):,} more were"
        super().__init__(f"{which} left alone, all else is done: {error}")
        self.task_ids = tuple(task_ids)


class PlatformError(PerdureError):
    """Something a platform answered, or failed to answer.

    Attributes:
        message: The platform's message, on one line.
        status: The HTTP status, where there was one.
        request_id: The platform's id of the request, where it gave one.
        retry_after: Seconds the platform asked to wait, where it did.
        retryable: Whether trying the same thing again can help.
        response_over: Whether the platform's response has itself ended with this error, so that
            picking it up again would only bring the error again.
    """

    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        response_over: bool = False,
    ) -> None:
        self.message = clean_text(" ".join(message.split()))
        super().__init__(self.message)
        self.status = status
        self.request_id = request_id
        self.retry_after = retry_after
        self.response_over = response_over


class RetryableError(PlatformError):
    """Trying again can help."""

    retryable = True


class RateLimited(RetryableError):
    """Too many requests or tokens in too short a time; ``retry_after`` says how long to wait."""


class Overloaded(RetryableError):
    """The platform has a fault of its own or too much to do (5xx, 529)."""


class ConnectionLost(RetryableError):
    """The connection could not be made, or broke on the way."""


class StreamTruncated(RetryableError):
    """The stream ended without the platform's end marker, or became unreadable."""


class PlatformTimeout(RetryableError):
    """The platform did not answer in time."""


class FinalError(PlatformError):
    """Trying the same thing again can't help."""


class AuthenticationFailed(FinalError):
    """The key is missing, wrong, or not allowed to do this."""


class InvalidRequest(FinalError):
    """The platform refuses the request as it is."""


class QuotaExhausted(FinalError):
    """A spending limit or quota is used up; waiting a little won't help."""


class ContentRefused(FinalError):
    """The platform refuses to answer this content."""


class NotConfigured(FinalError):
    """The adapter lacks something on this machine: its SDK, a key, a base URL."""


class OutputInvalid(FinalError):
    """The answer does not satisfy the task's ``output_schema``, its repair included.

    Attributes:
        repairable: Whether another answer may help. It can't where the schema is at fault, so
            that no answer can be checked against it, or not in any reasonable time.
    """

    repairable: bool = True

    @classmethod
    def beyond_repair(cls, message: str) -> Self:
        """Return one that no other answer can help."""
        error = cls(message)
        error.repairable = False
        return error


class TimeLimitExceeded(FinalError):
    """An attempt took longer than the task's ``timeout_seconds``; the partial output is kept."""
