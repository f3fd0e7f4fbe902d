"""The event catalogue: one frozen model per type, how they are encoded, and upcasters.

An event says what happened; its envelope (`RecordedEvent`) says where in the log. The engine adds
the envelope. Adapters yield `Accepted`, `Chunk`, `UsageReported`, `FileCreated` and, as the last,
`Completed`; there is no second vocabulary.

What is stored is canonical JSON: keys sorted, no spaces, nothing that is None. Those bytes are what
the digest covers, so the form is part of the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from hashlib import sha256
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple, TypeAlias, cast

import orjson
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from perdure.errors import DatabaseCorrupt, DatabaseIncompatible
from perdure.task import Usage
from perdure.text import clean_text
from perdure.unchecked import unchecked

__all__ = [
    "ENDINGS",
    "EVENT_TYPES",
    "LOOK_CLOSER",
    "Accepted",
    "Archived",
    "ArchivedRow",
    "AttemptFailed",
    "CancelRequested",
    "Cancelled",
    "Chunk",
    "Completed",
    "EncodedEvent",
    "Event",
    "Failed",
    "FileCreated",
    "Interrupted",
    "RecordedEvent",
    "Redacted",
    "Running",
    "Submitted",
    "UsageReported",
    "chain_digest",
    "chain_link",
    "decode",
    "decode_text",
    "encode",
    "encode_data",
    "is_redacted",
    "link_tail",
    "micros_of",
]

ChunkKind: TypeAlias = Literal["text", "reasoning", "tool_call"]
StartMode: TypeAlias = Literal["restart", "continue", "reattach"]
# A platform's own word: a character that no database takes must not cost the answer, or the worker.
Word: TypeAlias = Annotated[str, AfterValidator(clean_text)]


class Event(BaseModel):
    """What all events have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    type: ClassVar[str]
    schema_version: ClassVar[int] = 1
    ends_task: ClassVar[bool] = False


class Submitted(Event):
    """A task was accepted. Written by the engine, always the first of its stream."""

    type: ClassVar[str] = "submitted"

    task: dict[str, Any]
    """The whole task as JSON, but for the long texts that `blobs` names."""
    platforms: tuple[str, ...]
    """The platforms to try, in order."""
    blobs: dict[str, str] = Field(default_factory=dict[str, str])
    """Place in the task (`system`, `messages.0`, `context.manual`) -> SHA-256 of its text."""


class Running(Event):
    """A worker claimed the task. Committed before the platform is called."""

    type: ClassVar[str] = "running"

    attempt: int
    """1 for the first."""
    worker: str
    platform: str
    model: str | None = None
    mode: StartMode = "restart"
    """`restart`: the output begins anew. `continue`, `reattach`: it goes on where it was."""


class Accepted(Event):
    """The platform named its response. Written by adapters."""

    type: ClassVar[str] = "accepted"

    response_id: Word | None = None
    request_id: Word | None = None
    model: Word | None = None
    """The model that is really used."""
    reattachable: bool = False
    """Whether a lost connection to this response can be taken up again."""
    cursor: Word | None = None
    note: Word | None = None
    """Something to know about this attempt, such as a feature the platform refused."""


class Chunk(Event):
    """A piece of output. Written by adapters, gathered by the worker."""

    type: ClassVar[str] = "chunk"

    text: str
    kind: ChunkKind = "text"
    offset: int = 0
    """Characters of this kind before this piece. The worker fills it in."""
    cursor: Word | None = None
    """Where the platform's stream goes on after this piece."""
    length: int | None = None
    """Characters there were, where the text was redacted."""

    @staticmethod
    def piece(text: str, kind: ChunkKind = "text") -> Chunk:
        """Return ``Chunk(text=text, kind=kind)`` in half the time: nothing is looked at.

        For adapters that know that what they have is a text; there is one for each delta.
        """
        values = {"text": text, "kind": kind, "offset": 0, "cursor": None, "length": None}
        return unchecked(Chunk, values, {"text", "kind"})


class UsageReported(Event):
    """Tokens of this attempt known so far; the last one counts. Written by adapters."""

    type: ClassVar[str] = "usage"

    usage: Usage


class FileCreated(Event):
    """The platform wrote a file. Written by adapters."""

    type: ClassVar[str] = "file_created"

    path: Word
    size: int | None = None
    """Bytes."""
    digest: Word | None = None
    """SHA-256, in hexadecimal."""


class AttemptFailed(Event):
    """An attempt failed and another one follows at `retry_at`."""

    type: ClassVar[str] = "attempt_failed"

    attempt: int
    error_class: str
    message: str
    status: int | None = None
    request_id: str | None = None
    retryable: bool
    retry_after: float | None = None
    """Seconds the platform asked to wait."""
    next: Literal["retry", "fallback", "reattach", "repair"]
    """`retry`: asked anew. `fallback`: the next platform is. `reattach`: the very same response is
    picked up where it was. `repair`: the answer is handed back with what is wrong with it."""
    retry_at: datetime
    usage: Usage | None = None
    cost_usd: float | None = None


class Interrupted(Event):
    """The worker was lost, or handed the task back; the task waits for the next one."""

    type: ClassVar[str] = "interrupted"

    worker: str
    """The worker that had the task."""
    attempt: int
    reason: Literal["worker_lost", "handed_back"]
    outcome: Literal["unknown", "reattachable"]
    """What is known of the attempt: `unknown` means that the platform may have finished it."""
    next: StartMode | Literal["fail", "cancel"]
    usage: Usage | None = None
    cost_usd: float | None = None


class CancelRequested(Event):
    """Somebody asked for the end of a running task."""

    type: ClassVar[str] = "cancel_requested"

    by: str
    reason: str | None = None


class Completed(Event):
    """The task is done. Adapters give the reasons and the usage, the worker the rest."""

    type: ClassVar[str] = "completed"
    ends_task: ClassVar[bool] = True

    finish_reason: Word = "stop"
    """`stop`, `length`, `tool_calls`, `content_filter`: the same words on every platform."""
    platform_finish_reason: Word | None = None
    usage: Usage | None = None
    """Tokens of the last attempt."""
    cost_usd: float | None = None
    """US dollars of the last attempt; None where unknown."""
    price_version: str | None = None
    output_length: int = 0
    """Characters."""
    output_digest: str | None = None
    """SHA-256 of the output in UTF-8, in hexadecimal."""


class Failed(Event):
    """The task failed for good."""

    type: ClassVar[str] = "failed"
    ends_task: ClassVar[bool] = True

    error_class: str
    message: str
    status: int | None = None
    request_id: str | None = None
    attempts: int
    output_length: int = 0
    usage: Usage | None = None
    cost_usd: float | None = None
    price_version: str | None = None


class Cancelled(Event):
    """The task was cancelled; what was there is kept."""

    type: ClassVar[str] = "cancelled"
    ends_task: ClassVar[bool] = True

    by: str | None = None
    reason: str | None = None
    output_length: int = 0
    usage: Usage | None = None
    cost_usd: float | None = None
    price_version: str | None = None


class Redacted(Event):
    """Content was removed from this stream. It can follow an ending.

    It names the tombstones it left and their digests, so that nothing else can pass for one.
    """

    type: ClassVar[str] = "redacted"

    by: str
    reason: str | None = None
    tombstones: dict[str, str]
    """Version in this stream -> SHA-256 of the tombstone that stands there now."""


class ArchivedRow(BaseModel):
    """What a task's row in `tasks` says once its content is elsewhere; named as the columns are."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    status: Literal["completed", "failed", "cancelled"]
    platform: str
    model: str | None = None
    type: str | None = None
    priority: int = 5
    attempts: int = 0
    available_at: datetime
    cancel_requested: bool = False
    finish_reason: str | None = None
    error_class: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    cost_usd: float | None = None
    submitted_at: datetime
    started_at: datetime | None = None
    ended_at: datetime
    batch: str | None = None
    key: str | None = None
    fingerprint: str | None = None
    parent: str | None = None
    retry_of: str | None = None
    labels: dict[str, str] = Field(default_factory=dict[str, str])


class Archived(Event):
    """The stream's earlier events were moved into another file; nothing follows.

    Whoever folds the stream begins with this event: it holds what they came to. It vouches for the
    file as well: `digest` is that of the events as they stood here.
    """

    type: ClassVar[str] = "archived"

    by: str
    archive: str
    """The file's name, without its folder."""
    events: int
    """How many were moved: the versions from 1 to this one."""
    position: int
    """The position of the first of them, which stays the key of the stream."""
    digest: str
    """SHA-256, in hexadecimal, over the `digest`s of the moved events, one after the other."""
    row: ArchivedRow
    """What `tasks` goes on saying about the task."""


EVENT_TYPES: Final[Mapping[str, type[Event]]] = {
    model.type: model
    for model in (
        Submitted,
        Running,
        Accepted,
        Chunk,
        UsageReported,
        FileCreated,
        AttemptFailed,
        Interrupted,
        CancelRequested,
        Completed,
        Failed,
        Cancelled,
        Redacted,
        Archived,
    )
}
ENDINGS: Final = tuple(name for name, model in EVENT_TYPES.items() if model.ends_task)


class RecordedEvent(NamedTuple):
    """An event with its place in the log.

    Attributes:
        position: Place in the whole log: 1, 2, 3 … without gaps, in the order of commits.
        task_id: The stream.
        version: Place in the stream: 1, 2, 3 … without gaps.
        event: What happened.
        recorded_at: When it was written down (UTC).
    """

    position: int
    task_id: str
    version: int
    event: Event
    recorded_at: datetime


class EncodedEvent(NamedTuple):
    """An event as it is stored."""

    type: str
    schema_version: int
    data: bytes
    """Canonical JSON."""


def canonical(data: object) -> bytes:
    """Return the one JSON text that stands for ``data``: sorted keys, no spaces, UTF-8."""
    return orjson.dumps(data, option=orjson.OPT_SORT_KEYS)


def encode(event: Event) -> EncodedEvent:
    """Return the stored form of ``event``."""
    return EncodedEvent(event.type, event.schema_version, encode_data(event))


def encode_data(event: Event) -> bytes:
    """Return the canonical JSON of ``event``."""
    if type(event) is Chunk and event.cursor is None and event.length is None:  # most of all events
        return canonical({"kind": event.kind, "offset": event.offset, "text": event.text})
    if type(event) in _PLAIN:
        plain = {name: value for name, value in vars(event).items() if value is not None}
        usage: Usage | None = plain.get("usage")
        if usage is not None:
            plain["usage"] = usage.model_dump(mode="json", exclude_none=True, warnings=False)
    else:
        plain = event.model_dump(mode="json", exclude_none=True, warnings=False)
    return canonical(plain)


# Most of all events. All of their fields but the usage are JSON as they are, and asking pydantic
# for it takes four times as long.
_PLAIN: Final[frozenset[type[Event]]] = frozenset(
    (
        *(Submitted, Running, Accepted, Chunk, UsageReported, CancelRequested),
        *(Completed, Failed, Cancelled),
    )
)


Upcaster: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]

# (type, schema version) -> what turns its data into that of the next schema version.
UPCASTERS: Final[dict[tuple[str, int], Upcaster]] = {}

# What stands in for content that `redact` removed, where a field can't be absent.
_REDACTED_FIELDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "submitted": {"task": {}},
    "chunk": {"text": ""},
    "failed": {"message": ""},
    "attempt_failed": {"message": ""},
    "file_created": {"path": ""},
}


# What to do about what is stored and can't be what was written.
LOOK_CLOSER: Final = "run `perdure verify`"


def decode(type_: str, schema_version: int, data: str | bytes) -> Event:
    """Return the event that was stored, brought up to today's schema.

    Raises:
        DatabaseIncompatible: A newer perdure wrote it.
        DatabaseCorrupt: It can't be what was written.
    """
    model = EVENT_TYPES.get(type_)
    if type(schema_version) is not int:  # SQLite lets somebody else put anything anywhere
        raise DatabaseCorrupt(
            f"an event {type_!r} is unreadable (its schema version is {schema_version!r:.80}): "
            f"{LOOK_CLOSER}"
        )
    if model is None or schema_version > model.schema_version:
        raise DatabaseIncompatible(
            f"the log has an event {type_!r} of schema version {schema_version}, which this "
            "perdure does not know: upgrade perdure"
        )
    try:
        plain = orjson.loads(data)
        if "redacted" in plain:
            plain = {**_REDACTED_FIELDS.get(type_, {}), **plain}
            del plain["redacted"]
        for version in range(schema_version, model.schema_version):
            plain = UPCASTERS[type_, version](plain)
        # Not `model_validate`, which takes half as long again to come to the same.
        event: Event = model.__pydantic_validator__.validate_python(plain)
    except (ValidationError, orjson.JSONDecodeError, KeyError, TypeError) as error:
        problem = str(error).splitlines()[0]
        raise DatabaseCorrupt(
            f"an event {type_!r} is unreadable ({problem}): {LOOK_CLOSER}"
        ) from None
    return event


def is_redacted(data: str) -> bool:
    """Return whether the content of a stored event was removed, and a digest left in its place."""
    if '"redacted":' not in data:
        return False
    try:
        plain: object = orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return isinstance(plain, dict) and "redacted" in plain  # and not somewhere in the content


def decode_text(schema_version: int, data: str | bytes) -> tuple[int, str] | None:
    """Return offset and text of a chunk of text and no more, as most of all events are.

    For who reads a whole log: making an event of it takes as long as all the rest. Whatever else
    it is, also what can't be read, is None, and `decode` has to look at it.
    """
    try:
        plain: Any = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    if schema_version != 1 or not isinstance(plain, dict):
        return None
    fields = cast("dict[str, Any]", plain)
    if fields.keys() != _TEXT_FIELDS:
        return None
    offset, text = fields["offset"], fields["text"]
    if fields["kind"] != "text" or type(offset) is not int or type(text) is not str:
        return None
    return offset, text


_TEXT_FIELDS: Final = frozenset({"kind", "offset", "text"})

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def chain_digest(
    previous: bytes,
    position: int,
    task_id: str,
    version: int,
    type_: str,
    schema_version: int,
    recorded_at: datetime,
    data_digest: bytes,
) -> bytes:
    """Return the SHA-256 that ties an event to all events before it.

    ``previous`` is the digest of the event at ``position - 1``, empty for the first;
    ``data_digest`` is the SHA-256 of the canonical JSON of the event's data.
    """
    tail = link_tail(type_, schema_version, micros_of(recorded_at))
    return chain_link(previous, position, task_id, version, tail, data_digest)


def micros_of(moment: datetime) -> int:
    """Return the microseconds from 1970 to ``moment``, which is how a digest covers it."""
    return (moment - _EPOCH) // _MICROSECOND


@lru_cache(maxsize=256)
def link_tail(type_: str, schema_version: int, micros: int) -> str:
    """Return what `chain_link` wants to know of an event's type and moment.

    Made once for the many events of one transaction, as it takes longer than all the rest.
    """
    return f"\n{type_}\n{schema_version}\n{micros}\n"


def chain_link(
    previous: bytes, position: int, task_id: str, version: int, tail: str, data_digest: bytes
) -> bytes:
    """Return the same as `chain_digest`; ``tail`` is made by `link_tail`."""
    place = f"{position}\n{task_id}\n{version}{tail}".encode()
    return sha256(previous + place + data_digest).digest()
