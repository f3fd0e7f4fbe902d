"""What can be set on the `demo` platform, and the journal of its calls."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypedDict

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from perdure import errors
from perdure.errors import InvalidRequest, PlatformError
from perdure.task import describe_invalid

__all__ = ["DemoKeywords", "DemoOptions", "Journal", "error_named"]

# The errors that stand for one thing each; the categories above them do not.
_ERRORS: Final[Mapping[str, type[PlatformError]]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, PlatformError) and not kind.__subclasses__()
}


def error_named(name: str) -> type[PlatformError]:
    """Return the platform error of that name, such as `Overloaded`."""
    return _ERRORS[name]


def _known_error(name: str) -> str:
    if name not in _ERRORS:
        raise ValueError(f"must be one of {', '.join(sorted(_ERRORS))}")
    return name


Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10_000_000)]


class DemoKeywords(TypedDict, total=False):
    """The options as keyword arguments; `DemoOptions` says what they mean."""

    words: int
    chunk_words: int
    first_delay: float
    delay: float
    text: str | None
    reasoning: str | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    fail: str | None
    fail_after: int
    fail_attempts: int | None
    retry_after: float | None
    truncate_after: int | None
    stall_after: int | None
    reattach: bool
    journal: str | None


class DemoOptions(BaseModel):
    """How the demonstration goes: length, speed, and what goes wrong."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    words: Annotated[int, Field(ge=1, le=10_000_000)] = 80
    """Length of the text, in words."""
    chunk_words: Annotated[int, Field(ge=1, le=10_000_000)] = 4
    """Words in one chunk."""
    first_delay: Seconds = 0.0
    """Seconds before the first chunk."""
    delay: Seconds = 0.0
    """Seconds between chunks."""
    text: str | None = None
    """Say exactly this instead of a demonstration text."""
    reasoning: str | None = None
    """Stream this as reasoning, before the text."""
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"] = "stop"
    fail: Annotated[str, AfterValidator(_known_error)] | None = None
    """Fail with the error of this name, such as `Overloaded`."""
    fail_after: Count = 0
    """Chunks before failing."""
    fail_attempts: Count | None = None
    """Misbehave (fail, truncate, stall) only in the task's first so many attempts; None: in all."""
    retry_after: Seconds | None = None
    """Seconds that the failure asks to wait."""
    truncate_after: Count | None = None
    """End the stream without an end marker after so many chunks."""
    stall_after: Count | None = None
    """Say nothing more after so many chunks, until cancelled."""
    reattach: bool = False
    """Be a platform whose interrupted calls can be picked up."""
    journal: Annotated[str, Field(min_length=1)] | None = None
    """A file to which every call appends a line of JSON at its beginning and one at its end."""

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> DemoOptions:
        """Return the options, the later layers overriding the earlier.

        Raises:
            InvalidRequest: One is unknown, or its value isn't possible.
        """
        merged = {name: value for layer in layers for name, value in layer.items()}
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise InvalidRequest(f"demo: {describe_invalid(error, cls)}") from None


class Journal:
    """What the platform itself saw: who called it, when each call began and how it ended.

    It belongs to the platform's side, so that tests can hold the log against it, from any process.
    """

    def __init__(self, path: str | None) -> None:
        self._path = path

    def write(self, **entry: object) -> None:
        """Append ``entry`` as a line, in one write, so that processes don't mix theirs."""
        if self._path is None:
            return
        line = json.dumps(entry, ensure_ascii=True) + "\n"
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise InvalidRequest(
                f"demo: journal: {self._path!r} can't be written ({error})"
            ) from None
