"""What is asked for, `Task`, and what comes out of it: `TaskStatus`, `Usage`, `Result`."""

from __future__ import annotations

import difflib
from datetime import datetime
from enum import StrEnum
from pathlib import PurePath
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from perdure.errors import InvalidTask
from perdure.schemas import short
from perdure.text import check_json, check_text, clean_json, one_line

__all__ = [
    "Attachment",
    "Message",
    "Recovery",
    "Result",
    "Task",
    "TaskConstraints",
    "TaskStatus",
    "TaskType",
    "Tool",
    "ToolCall",
    "Usage",
    "describe_invalid",
]

M = TypeVar("M", bound=BaseModel)
Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high"]

# The largest request any of the platforms takes is 32 MB; more text than that is a mistake.
MAX_TEXT = 32 * 1024 * 1024
MAX_NAME = 200


class TaskStatus(StrEnum):
    """Where a task stands. `UNKNOWN` means that there is no such task."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    __hash__ = str.__hash__  # an enumeration's own one is a call in Python, for every event

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen to the task."""
        return self in _ENDED


_ENDED = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED})


class TaskType(StrEnum):
    """What kind of work a task is. Optional; people filter and route by it."""

    CODE_GENERATION = "code_generation"
    REFACTORING = "refactoring"
    RESEARCH = "research"
    DATA_ANALYSIS = "data_analysis"
    DOCUMENTATION = "documentation"
    CODE_REVIEW = "code_review"
    SQL_DB_WORK = "sql_db_work"
    TESTING = "testing"
    DEBUGGING = "debugging"
    PLANNING = "planning"


class Recovery(StrEnum):
    """How a task goes on whose worker was lost or stopped, where its call can't be picked up.

    Picking up the very same call (re-attaching) comes first wherever the platform can do it.
    """

    RESTART = "restart"
    """Ask again from the beginning; the lost attempt's output stays in the log."""
    CONTINUE = "continue"
    """Hand the partial output back to the platform and ask for the rest."""
    FAIL = "fail"
    """End the task as failed and keep the partial output."""


def _non_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _storable(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise ValueError(
            f"is {len(text) / 1e6:.1f} million characters long; the limit is {MAX_TEXT / 1e6:.1f}"
        )
    return check_text(text)


def _path_text(value: object) -> object:
    return str(value) if isinstance(value, PurePath) else value


def _schema_of(value: object) -> object:
    """Return the JSON schema that a pydantic model class stands for; anything else as it is."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        return value.model_json_schema()
    return value  # pyright: ignore[reportUnknownVariableType] - narrowed to a class, it is one of anything


Text: TypeAlias = Annotated[str, AfterValidator(_storable)]
Name: TypeAlias = Annotated[str, Field(max_length=MAX_NAME), AfterValidator(_storable)]
NonBlankName: TypeAlias = Annotated[Name, AfterValidator(_non_blank)]
Json: TypeAlias = Annotated[Any, AfterValidator(check_json)]
JsonDict: TypeAlias = Annotated[dict[str, Any], AfterValidator(check_json)]
JsonSchema: TypeAlias = Annotated[JsonDict, BeforeValidator(_schema_of)]
StopSequence: TypeAlias = Annotated[Text, Field(min_length=1, max_length=1000)]
Labels: TypeAlias = dict[NonBlankName, Annotated[str, AfterValidator(_storable)]]


class _Frozen(BaseModel):
    """Immutable, and strict about the names of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class _Input(_Frozen):
    """A model people construct: its validation errors are one `InvalidTask` line."""

    @model_validator(mode="wrap")
    @classmethod
    def _one_line(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: ANN401
        try:
            return handler(data)
        except ValidationError as error:
            raise InvalidTask(describe_invalid(error, cls)) from None


def describe_invalid(error: ValidationError, model: type[BaseModel]) -> str:
    """Return pydantic's findings as one line that names each field and what to do about it."""
    return "; ".join(
        _describe_finding(finding, model) for finding in error.errors(include_url=False)
    )


# Most of what is found fault with came as JSON, which knows no tuples and no dictionaries.
_IN_JSON: Final = {
    "dict_type": "should be an object",
    "model_type": "should be an object",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
}


def _describe_finding(finding: Any, model: type[BaseModel]) -> str:  # noqa: ANN401
    whole = "constraints" if model is TaskConstraints else "task"
    where = short(one_line(".".join(str(part) for part in finding["loc"]))) or whole
    if finding["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(finding["loc"][-1]), model.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: there is no such field{hint}"
    what = _IN_JSON.get(finding["type"]) or (
        str(finding["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    )
    return f"{where}: {what}"


class Message(_Frozen):
    """One turn of a conversation."""

    role: Literal["user", "assistant"]
    content: Annotated[Text, AfterValidator(_non_blank)]


class TaskConstraints(_Input):
    """The bounds of a task. All of them are optional."""

    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Most tokens the platform may produce; None leaves it to the platform or adapter."""
    timeout_seconds: Annotated[float, Field(gt=0, le=7 * 86_400, allow_inf_nan=False)] = 300
    """Seconds one attempt may take before the task ends as failed, its partial output kept."""
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    model: NonBlankName | None = None
    """The platform's name of the model; None takes the adapter's default."""
    max_attempts: Annotated[int, Field(ge=1, le=100)] = 5
    """Most times a platform is asked before a retryable error ends the task."""
    recovery: Recovery = Recovery.RESTART
    """What happens after a crash, or when a worker is stopped, where the interrupted call can't be
    picked up."""
    stop_sequences: Annotated[tuple[StopSequence, ...], Field(max_length=16)] = ()
    """Texts at which the platform stops; they are not part of the output."""
    reasoning_effort: Effort | None = None
    """How much the model thinks first; None leaves it to the platform."""


class Tool(_Frozen):
    """A function that the model may ask for. perdure passes it on and calls nothing itself."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: Text = ""
    parameters: JsonSchema = Field(default_factory=lambda: {"type": "object", "properties": {}})
    """JSON schema of its arguments; a pydantic model class is turned into one."""


class ToolCall(_Frozen):
    """A call the model asked for."""

    id: str = ""
    """The platform's name of the call, to answer it by."""
    name: str
    arguments: Any = None
    """What the model gave as arguments: an object, or the text as it came where that is no JSON.
    Where all of it is no call, the whole as it came, and the name is empty."""


class Attachment(_Frozen):
    """A file that goes with a task, as it is known to the log: stored once, by its digest."""

    name: NonBlankName
    """The file's name without its folders."""
    media_type: NonBlankName
    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of the content, in hexadecimal; the key of the `blobs` table."""


class Task(_Input):
    """One thing to be done by a platform. Immutable; `model_copy(update=…)` makes a changed one."""

    type: TaskType | None = None
    prompt: Text = ""
    """What is asked. Either this or `messages`."""
    context: JsonDict = Field(default_factory=dict[str, Any])
    """Facts that go along with the prompt, by name; adapters put them before it."""
    files: tuple[Annotated[Attachment | Text, BeforeValidator(_path_text)], ...] = ()
    """Paths; `Engine.submit_task` reads them and puts `Attachment`s in their place."""
    constraints: TaskConstraints | None = None
    task_id: NonBlankName | None = None
    """Given by the engine (`platform_yyyymmdd_uuid8`) unless set."""
    priority: Annotated[int, Field(ge=0, le=10)] = 5
    """0 is served first, 10 last."""
    platform: NonBlankName | None = None
    """The platform to run on; None takes the engine's default."""
    metadata: JsonDict = Field(default_factory=dict[str, Any])
    """Yours; perdure stores it and gives it back."""
    messages: tuple[Message, ...] = ()
    """A conversation, the last turn being the user's."""
    system: Text | None = None
    fallbacks: tuple[NonBlankName, ...] = ()
    """Platforms to try, in order, when the one before has failed for good."""
    labels: Labels = Field(default_factory=dict[str, str])
    """Text by name, for filtering lists and for SQL."""
    options: JsonDict = Field(default_factory=dict[str, Any])
    """Platform-specific parameters, passed on as they are."""
    parents: tuple[NonBlankName, ...] = ()
    """Ids of the tasks this one came out of."""
    batch: NonBlankName | None = None
    key: Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_storable)] | None = (
        None
    )
    """Yours, unique in the database: a second task with the same key is not written down, and
    submitting it gives the id of the first, whatever it asks."""
    fingerprint: Annotated[str, Field(max_length=64)] | None = None
    """Digest of a batch row's content, to notice that a row was changed."""
    retry_of: NonBlankName | None = None
    """The ended task that this one runs again."""
    continue_from: NonBlankName | None = None
    """A completed task whose conversation goes on with this one's prompt: `Engine.submit_task` puts
    the earlier turns, and what went along with them, in place."""
    output_schema: JsonSchema | None = None
    """JSON schema that the output has to satisfy; a pydantic model class is turned into one. The
    output is checked against it, and the value is in `Result.parsed`."""
    tools: tuple[Tool, ...] = ()
    """Functions the model may ask for; what it asked is in `Result.tool_calls`."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.messages:
            if self.prompt:
                raise InvalidTask("prompt: give either a prompt or messages, not both")
            if self.messages[-1].role != "user":
                raise InvalidTask("messages: the last one must be the user's")
        elif not self.prompt.strip():
            raise InvalidTask("prompt: must not be empty")
        names = [tool.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise InvalidTask(f"tools: two of them have the name {name!r}")
        return self

    @property
    def limits(self) -> TaskConstraints:
        """The constraints, or their defaults."""
        return self.constraints or _NO_CONSTRAINTS

    @property
    def question(self) -> str:
        """The prompt, or the last message where there are messages."""
        return self.messages[-1].content if self.messages else self.prompt


_NO_CONSTRAINTS = TaskConstraints()


class Usage(BaseModel):
    """Tokens, as far as they are known; None means that the platform did not say.

    Input includes what was read from or written to a cache, output includes reasoning, on every
    platform alike; the parts have fields of their own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int | None = None
    cache_write_tokens: int | None = None
    reasoning_tokens: int | None = None
    raw: Annotated[dict[str, Any] | None, AfterValidator(clean_json)] = Field(
        default=None, repr=False
    )
    """What the platform said, in its own words."""

    @property
    def total_tokens(self) -> int | None:
        """Input and output together; None where neither is known."""
        if self.input_tokens is None and self.output_tokens is None:
            return None
        return (self.input_tokens or 0) + (self.output_tokens or 0)

    def __add__(self, other: Usage) -> Usage:
        """Sum field by field; what neither knows stays None. The raw form of a sum is None."""
        return Usage(
            input_tokens=_sum(self.input_tokens, other.input_tokens),
            output_tokens=_sum(self.output_tokens, other.output_tokens),
            cache_read_tokens=_sum(self.cache_read_tokens, other.cache_read_tokens),
            cache_write_tokens=_sum(self.cache_write_tokens, other.cache_write_tokens),
            reasoning_tokens=_sum(self.reasoning_tokens, other.reasoning_tokens),
        )


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else one + other


class Result(BaseModel):
    """How a task ended, put together from the log."""

    model_config = ConfigDict(frozen=True)

    task: Task
    task_id: str
    platform: str
    output: str = ""
    """The whole text of a completed task; empty for others."""
    success: bool
    error: str | None = None
    cost: float | None = None
    """US dollars over all attempts; None where the price of tokens is unknown, never 0 for that.
    An attempt of which the platform told no tokens at all doesn't count."""
    tokens_used: int | None = None
    """Input and output tokens over all attempts; None where unknown."""
    duration_seconds: float = 0.0
    """From the first attempt's start to the end."""
    metadata: dict[str, Any] = Field(default_factory=dict[str, Any])
    completed_at: datetime | None = None
    status: TaskStatus = TaskStatus.COMPLETED
    files_created: tuple[str, ...] = ()
    partial_output: str | None = None
    """What a failed or cancelled task had produced."""
    usage: Usage = Usage()
    finish_reason: str | None = None
    model: str | None = None
    error_class: str | None = None
    """The name of the error in `perdure.errors`; or `Interrupted`, where workers were lost too
    often or `recovery` is "fail"; or `AdapterFault`, where the adapter has a fault."""
    attempts: int = 0
    parsed: Any = None
    """The output as a value, where the task has an `output_schema` and the output satisfies it, as
    every answer with the `finish_reason` "stop" does."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that the model asked for."""

    def parse(self, model: type[M]) -> M:
        """Return the output as an instance of the pydantic model whose schema was asked for.

        Raises:
            ValueError: There is no such output, or the model doesn't take it; it says which.
        """
        if self.parsed is None and (reason := self._why_unparsed()):
            raise ValueError(f"{self.task_id} has no parsed output: {reason}")
        return model.model_validate(self.parsed)

    def _why_unparsed(self) -> str | None:
        """Return why `parsed` is None, and what to look at; None where the answer is `null`."""
        if self.status is not TaskStatus.COMPLETED:
            return f"it is {self.status}: see `error` and `partial_output`"
        if self.task.output_schema is None:
            return "its task asked for none: give it an `output_schema`"
        if self.finish_reason != "stop":
            return f"it ended with {self.finish_reason!r}: see `output` and `tool_calls`"
        return None if self.output.strip() == "null" else "its output is no JSON: see `output`"
