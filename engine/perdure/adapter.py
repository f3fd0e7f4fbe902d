"""What the engine asks of a platform.

An adapter turns one `Call` into events and keeps no state of its own about it::

    async def run(self, call):
        yield Accepted(response_id="resp_1", model="m-1")  # as soon as the platform names it
        yield Chunk(text="Hel")  # offsets are the engine's business
        yield Chunk(text="lo")
        yield UsageReported(usage=Usage(input_tokens=3))  # where it is told on the way
        yield Completed(finish_reason="stop", usage=Usage(input_tokens=3, output_tokens=2))

The rules, held by `perdure.testing.AdapterContract`:

* `Completed` is the last thing, and only after the platform's own end marker; a stream that merely
  stops is `StreamTruncated`.
* Errors are raised, as a `PlatformError`; retrying is the engine's, so SDK retries are off.
* Cancelling the task that iterates closes the connection; `CancelledError` is never swallowed.
* With `call.resume` of mode `reattach` the very same response goes on after `call.resume.cursor`.
  An error that ends that response says so (`response_over`), or it would be picked up again.
* Events are perdure's own, as validation makes them: what the log couldn't give back fails the
  task, and so does a class derived from them that has fields of its own. Anything else that is
  raised is an `AdapterFault`.
* Nothing blocks the event loop, which all tasks share. Whatever else an adapter does wrong costs
  its own task only (`perdure.containment`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from perdure.events import Event
from perdure.task import Attachment, Task

__all__ = ["Adapter", "Call", "Capabilities", "LoadedFile", "Resume"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a platform can do, as `perdure platforms` and the documentation show it.

    Attributes:
        streaming: Output arrives in pieces.
        reattach: An interrupted call can be picked up where it was.
        cancel: Cancelling stops the platform's work, not only our reading.
        files: Kinds of files that can go along: `text`, `image`, `pdf`.
        usage_on_the_way: Tokens are known before the end.
        reasoning: Reasoning is streamed.
        tools: Tool definitions are passed through.
        schema: The output can be bound to a JSON schema.
    """

    streaming: bool = True
    reattach: bool = False
    cancel: bool = True
    files: frozenset[Literal["text", "image", "pdf"]] = frozenset()
    usage_on_the_way: bool = False
    reasoning: bool = False
    tools: bool = False
    schema: bool = False


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """An attachment with its content."""

    attachment: Attachment
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Resume:
    """How an interrupted task goes on.

    Attributes:
        mode: `reattach` to the response ``response_id`` after ``cursor``; `continue` from the
            partial output with a new call; `repair` an answer that is not what was asked for.
        output: The text so far, or the answer to be repaired.
        problem: What is wrong with that answer.
        response_id: The platform's name of the interrupted response.
        cursor: Where its stream goes on.
    """

    mode: Literal["reattach", "continue", "repair"]
    output: str = field(default="", repr=False)
    response_id: str | None = None
    cursor: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt at a task, as an adapter gets it.

    Attributes:
        task: The task, its long texts in place.
        task_id: Its id.
        attempt: 1 for the first.
        model: The model to use; None leaves it to the adapter.
        files: The attachments, in the task's order.
        resume: How to go on, where this isn't a new beginning.
    """

    task: Task
    task_id: str
    attempt: int = 1
    model: str | None = None
    files: Sequence[LoadedFile] = ()
    resume: Resume | None = None


@runtime_checkable
class Adapter(Protocol):
    """A platform, seen from the engine.

    Attributes:
        platform: Its name: lower-case letters, digits and underscores.
        capabilities: What it can do.
        default_model: Used where a task names none; None leaves it to the platform. It is asked
            for whenever tasks are claimed.
        prices: The provider's name in the price table (`genai-prices`), or None where calls
            cost nothing that could be known.
    """

    @property
    def platform(self) -> str: ...  # noqa: D102 - described above
    @property
    def capabilities(self) -> Capabilities: ...  # noqa: D102
    @property
    def default_model(self) -> str | None: ...  # noqa: D102
    @property
    def prices(self) -> str | None: ...  # noqa: D102

    def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yield what happens to ``call``, as it happens."""
        ...

    async def stop(self, response_id: str) -> None:
        """Stop a response that goes on without us listening, where the platform has such."""
        ...

    async def close(self) -> None:
        """Give back connections and whatever else is held. May be called more than once."""
        ...
