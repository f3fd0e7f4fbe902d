"""The model people construct: its names and defaults, and what it says to what it can't accept."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import RootModel, ValidationError

from perdure.errors import InvalidTask, PerdureError
from perdure.task import (
    MAX_TEXT,
    Attachment,
    Message,
    Recovery,
    Result,
    Task,
    TaskConstraints,
    TaskStatus,
    TaskType,
    Usage,
)


def nested(depth: int) -> list[Any]:
    """Return lists in lists."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circle() -> dict[str, Any]:
    """Return a dict that holds itself."""
    value: dict[str, Any] = {}
    value["self"] = value
    return value


class TestNamesAndDefaults:
    """What the project grew out of is the floor: callers written for it keep working."""

    def test_a_task_needs_only_a_prompt(self) -> None:
        """All fields but the prompt have the defaults that early callers rely on."""
        task = Task(prompt="Hello")

        assert task.prompt == "Hello"
        assert task.type is None
        assert task.context == {}
        assert list(task.files) == []
        assert task.constraints is None
        assert task.task_id is None
        assert task.priority == 5
        assert task.platform is None
        assert task.metadata == {}

    def test_defaults_are_not_shared(self) -> None:
        """Two tasks never share one default dict."""
        assert Task(prompt="a").metadata is not Task(prompt="b").metadata
        assert Task(prompt="a").context is not Task(prompt="b").context

    def test_constraints(self) -> None:
        """Constraints default to five minutes and nothing else."""
        constraints = TaskConstraints()

        assert constraints.max_tokens is None
        assert constraints.timeout_seconds == 300
        assert constraints.temperature is None
        assert constraints.model is None
        assert constraints.recovery is Recovery.RESTART
        assert Task(prompt="x").limits == constraints

    def test_status(self) -> None:
        """There are six statuses, and exactly three of them are ends."""
        assert {status.value for status in TaskStatus} == {
            "pending", "running", "completed", "failed", "cancelled", "unknown",
        }  # fmt: skip
        assert {status.value for status in TaskStatus if status.ended} == {
            "completed", "failed", "cancelled",
        }  # fmt: skip

    def test_types(self) -> None:
        """There are ten types of tasks."""
        assert [kind.value for kind in TaskType] == [
            "code_generation", "refactoring", "research", "data_analysis", "documentation",
            "code_review", "sql_db_work", "testing", "debugging", "planning",
        ]  # fmt: skip

    def test_result(self) -> None:
        """A result has the floor's fields and defaults; an unknown cost is None and not 0."""
        result = Result(
            task=Task(prompt="x"), task_id="t", platform="demo", output="text", success=True
        )

        assert result.status is TaskStatus.COMPLETED
        assert result.error is None
        assert result.cost is None
        assert result.tokens_used is None
        assert result.duration_seconds >= 0
        assert result.metadata == {}
        assert result.completed_at is None
        assert list(result.files_created) == []
        assert result.partial_output is None

    def test_tasks_are_values(self) -> None:
        """A task can't be changed, and equal content is an equal task."""
        task = Task(prompt="x", labels={"a": "b"})

        with pytest.raises(ValidationError, match="frozen"):
            task.prompt = "y"  # type: ignore[misc]
        assert task == Task(prompt="x", labels={"a": "b"})
        assert task.model_copy(update={"priority": 1}).priority == 1
        assert pickle.loads(pickle.dumps(task)) == task  # noqa: S301 - our own

    def test_paths_are_accepted_as_files(self) -> None:
        """A file may be named by a path object."""
        assert Task(prompt="x", files=[Path("a/b.txt")]).files == ("a/b.txt",)  # type: ignore[arg-type]

    def test_the_question_of_a_conversation_is_its_last_message(self) -> None:
        """`question` is the prompt, or the last message."""
        turns = (
            Message(role="user", content="one"),
            Message(role="assistant", content="two"),
            Message(role="user", content="three"),
        )
        assert Task(messages=turns).question == "three"
        assert Task(prompt="four").question == "four"


SURROGATE = "\ud800"

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "prompt: must not be empty"),
    "empty prompt": ({"prompt": ""}, "prompt: must not be empty"),
    "blank prompt": ({"prompt": " \n\t"}, "prompt: must not be empty"),
    "no text": ({"prompt": None}, "prompt"),
    "bytes that are no UTF-8": ({"prompt": b"\xff"}, "prompt"),
    "NUL": ({"prompt": "a\x00b"}, "prompt: contains a NUL character at character 1"),
    "surrogate": ({"prompt": SURROGATE}, "prompt: contains a lone surrogate"),
    "50 MB": ({"prompt": "x" * 50_000_000}, "prompt: is 50.0 million characters long"),
    "50 MB of system": ({"prompt": "x", "system": "x" * 50_000_000}, "system: is 50.0 million"),
    "NUL in system": ({"prompt": "x", "system": "\x00"}, "system: contains a NUL"),
    "NUL in a label": ({"prompt": "x", "labels": {"a": "\x00"}}, "labels.a: contains a NUL"),
    "NUL in a label's name": ({"prompt": "x", "labels": {"\x00": "a"}}, "contains a NUL"),
    "number as a label": ({"prompt": "x", "labels": {"a": 5}}, "labels.a"),
    "blank label": ({"prompt": "x", "labels": {" ": "a"}}, "must not be empty"),
    "NUL in the key": ({"prompt": "x", "key": "\x00"}, "key: contains a NUL"),
    "empty key": ({"prompt": "x", "key": ""}, "key"),
    "long key": ({"prompt": "x", "key": "k" * 501}, "key"),
    "surrogate in metadata": ({"prompt": "x", "metadata": {"a": SURROGATE}}, "metadata: contains"),
    "surrogate as a name": ({"prompt": "x", "metadata": {SURROGATE: 1}}, "metadata: contains"),
    "number as a name": ({"prompt": "x", "metadata": {1: 1}}, "metadata"),
    "NaN": ({"prompt": "x", "metadata": {"a": float("nan")}}, "metadata: holds nan"),
    "infinity": ({"prompt": "x", "options": {"a": [float("inf")]}}, "options: holds inf"),
    "huge float": ({"prompt": "x", "options": {"a": 1e300}}, "options: holds the number"),
    "huge integer": (
        {"prompt": "x", "context": {"a": 2**63}},
        "context: holds an integer of 65 bits",
    ),
    "absurd integer": (
        {"prompt": "x", "context": {"a": 10**5000}},
        "context: holds an integer of 16611 bits",
    ),
    "deep nesting": ({"prompt": "x", "metadata": {"a": nested(100_000)}}, "metadata: is nested"),
    "a circle": ({"prompt": "x", "metadata": circle()}, "metadata: is nested"),
    "bytes in metadata": ({"prompt": "x", "metadata": {"a": b"x"}}, "metadata: holds a bytes"),
    "a date in metadata": (
        {"prompt": "x", "metadata": {"a": datetime(2026, 1, 1, tzinfo=UTC)}},
        "metadata: holds a datetime",
    ),
    "an object": ({"prompt": "x", "metadata": {"a": object()}}, "metadata: holds a object"),
    "misspelt field": ({"prompt": "x", "platfrom": "demo"}, "did you mean 'platform'?"),
    "unknown field": ({"prompt": "x", "zzz": 1}, "zzz: there is no such field"),
    "newline in a field": ({"prompt": "x", "a\n\x1b[31mb": 1}, "there is no such field"),
    "newline in a label": ({"prompt": "x", "labels": {"a\nb": 5}}, "labels.a"),
    "priority below": ({"prompt": "x", "priority": -1}, "priority"),
    "priority above": ({"prompt": "x", "priority": 11}, "priority"),
    "half a priority": ({"prompt": "x", "priority": 4.5}, "priority"),
    "absurd priority": ({"prompt": "x", "priority": 10**5000}, "priority"),
    "unknown type": ({"prompt": "x", "type": "cooking"}, "type: should be 'code_generation'"),
    "blank platform": ({"prompt": "x", "platform": " "}, "platform: must not be empty"),
    "long platform": ({"prompt": "x", "platform": "p" * 201}, "platform"),
    "blank fallback": ({"prompt": "x", "fallbacks": ["demo", ""]}, "fallbacks.1"),
    "blank id": ({"prompt": "x", "task_id": ""}, "task_id"),
    "files as text": ({"prompt": "x", "files": "notes.txt"}, "files"),
    "prompt and messages": (
        {"prompt": "x", "messages": [{"role": "user", "content": "y"}]},
        "prompt: give either a prompt or messages, not both",
    ),
    "last turn is not the user's": (
        {"messages": [{"role": "assistant", "content": "y"}]},
        "messages: the last one must be the user's",
    ),
    "unknown role": ({"messages": [{"role": "system", "content": "y"}]}, "messages.0.role"),
    "blank message": ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content"),
    "misspelt turn": (
        {"messages": [{"role": "user", "content": "y", "nmae": 1}]},
        "messages.0.nmae: there is no such field",
    ),
    "constraints as a number": (
        {"prompt": "x", "constraints": 5},
        "constraints: should be an object",
    ),
    "tools as an object": ({"prompt": "x", "tools": {}}, "tools: should be a list"),
    "a tool as a number": ({"prompt": "x", "tools": [1]}, "tools.0: should be an object"),
    "a schema as a list": (
        {"prompt": "x", "output_schema": []},
        "output_schema: should be an object",
    ),
    "misspelt constraint": (
        {"prompt": "x", "constraints": {"max_token": 5}},
        "max_token: there is no such field; did you mean 'max_tokens'?",
    ),
    "misspelt timeout": (
        {"prompt": "x", "constraints": {"timeout": 5}},
        "did you mean 'timeout_seconds'?",
    ),
    "no tokens": ({"prompt": "x", "constraints": {"max_tokens": 0}}, "max_tokens"),
    "negative tokens": ({"prompt": "x", "constraints": {"max_tokens": -5}}, "max_tokens"),
    "absurd tokens": ({"prompt": "x", "constraints": {"max_tokens": 10**9}}, "max_tokens"),
    "no time": ({"prompt": "x", "constraints": {"timeout_seconds": 0}}, "timeout_seconds"),
    "negative time": ({"prompt": "x", "constraints": {"timeout_seconds": -1}}, "timeout_seconds"),
    "years": ({"prompt": "x", "constraints": {"timeout_seconds": 1e9}}, "timeout_seconds"),
    "NaN seconds": (
        {"prompt": "x", "constraints": {"timeout_seconds": float("nan")}},
        "timeout_seconds",
    ),
    "endless": (
        {"prompt": "x", "constraints": {"timeout_seconds": float("inf")}},
        "timeout_seconds",
    ),
    "cold": ({"prompt": "x", "constraints": {"temperature": -0.1}}, "temperature"),
    "hot": ({"prompt": "x", "constraints": {"temperature": 2.1}}, "temperature"),
    "NaN degrees": ({"prompt": "x", "constraints": {"temperature": float("nan")}}, "temperature"),
    "blank model": ({"prompt": "x", "constraints": {"model": ""}}, "model"),
    "no attempts": ({"prompt": "x", "constraints": {"max_attempts": 0}}, "max_attempts"),
    "unknown recovery": (
        {"prompt": "x", "constraints": {"recovery": "retry"}},
        "recovery: should be 'restart', 'continue' or 'fail'",
    ),
}


class TestBadInput:
    """What can't be accepted is refused in one line that names the field."""

    @pytest.mark.parametrize(("fields", "says"), INVALID.values(), ids=INVALID)
    def test_one_line(self, fields: dict[str, Any], says: str) -> None:
        """Every invalid task is one `InvalidTask` of one readable line that names what is wrong."""
        with pytest.raises(InvalidTask) as refused:
            Task(**fields)

        line = str(refused.value)
        assert says in line
        assert len(line.splitlines()) == 1
        assert line.isprintable()
        assert len(line) < 500

    def test_all_findings_are_told_at_once(self) -> None:
        """Who made three mistakes hears of three."""
        with pytest.raises(InvalidTask) as refused:
            Task(prompt="x", priority=99, platform=" ", zzz=1)  # type: ignore[call-arg]

        assert str(refused.value).count("; ") == 2

    def test_the_largest_text_is_accepted(self) -> None:
        """The limit itself is still allowed."""
        assert len(Task(prompt="x" * MAX_TEXT).prompt) == MAX_TEXT

    def test_constraints_by_themselves(self) -> None:
        """Constraints made on their own are refused in the same way."""
        with pytest.raises(InvalidTask, match="did you mean 'temperature'"):
            TaskConstraints(temperatur=1.0)  # type: ignore[call-arg]

    @given(
        st.dictionaries(
            st.sampled_from([*Task.model_fields, "nonsense", "a\nb"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
                lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
                max_leaves=5,
            ),
            max_size=4,
        )
    )
    def test_whatever_is_given(self, fields: dict[str, Any]) -> None:
        """Any input makes a task, or one `InvalidTask` line; nothing else ever comes out."""
        try:
            task = Task(**fields)
        except InvalidTask as refused:
            assert len(str(refused).splitlines()) == 1  # noqa: PT017 - either outcome is fine
        else:
            # What was accepted survives the way through JSON.
            stored = task.model_dump_json(exclude_defaults=True)
            assert Task.model_validate_json(stored) == task

    def test_invalid_tasks_are_perdures_errors(self) -> None:
        """`except PerdureError` catches them; pydantic's own error never gets out."""
        with pytest.raises(PerdureError):
            Task.model_validate({"prompt": []})
        with pytest.raises(PerdureError):
            Task.model_validate("text")


class TestUsage:
    """Tokens, where None means that nobody knows."""

    def test_sums_keep_what_is_unknown(self) -> None:
        """What neither side knows stays None; what one side knows counts."""
        one = Usage(input_tokens=1, reasoning_tokens=None)
        other = Usage(input_tokens=2, output_tokens=5)

        total = one + other

        assert total.input_tokens == 3
        assert total.output_tokens == 5
        assert total.reasoning_tokens is None
        assert total.raw is None

    def test_total(self) -> None:
        """The total is input and output; None, and not 0, where neither is known."""
        assert Usage().total_tokens is None
        assert Usage(cache_read_tokens=5).total_tokens is None
        assert Usage(input_tokens=0).total_tokens == 0
        assert Usage(input_tokens=3, output_tokens=4, reasoning_tokens=2).total_tokens == 7

    @given(st.lists(st.none() | st.integers(0, 10**9), min_size=1, max_size=5))
    def test_order_does_not_matter(self, counts: list[int | None]) -> None:
        """Sums are the same in any order."""
        parts = [Usage(input_tokens=count) for count in counts]
        forth = sum(parts, Usage())
        back = sum(reversed(parts), Usage())
        known = [count for count in counts if count is not None]

        assert forth == back
        assert forth.input_tokens == (sum(known) if known else None)


class MaybeNumber(RootModel[int | None]):
    """A number, or nothing."""


class TestParsing:
    """A result's output as a model."""

    def result(self, schema: dict[str, Any] | None, **fields: Any) -> Result:
        """Return a result of a task with that schema."""
        task = Task(prompt="Which?", output_schema=schema)
        given = {"platform": "demo", "success": True, "finish_reason": "stop", **fields}
        return Result(task=task, task_id="demo_1", **given)

    def test_a_value(self) -> None:
        """It becomes an instance of the model; `null`, a value like any other, too."""
        schema = {"type": ["integer", "null"]}
        assert self.result(schema, output="7", parsed=7).parse(MaybeNumber).root == 7
        assert self.result(schema, output=" null\n").parse(MaybeNumber).root is None

    @pytest.mark.parametrize(
        ("schema", "fields", "reason"),
        [
            (None, {"output": "null"}, "its task asked for none: give it an `output_schema`"),
            ({}, {"output": ""}, "its output is no JSON: see `output`"),
            (
                {},
                {"output": "I won't.", "finish_reason": "content_filter"},
                "it ended with 'content_filter': see `output` and `tool_calls`",
            ),
            (
                {},
                {"success": False, "status": TaskStatus.FAILED, "partial_output": "null"},
                "it is failed: see `error` and `partial_output`",
            ),
        ],
    )
    def test_no_value(self, schema: Any, fields: dict[str, Any], reason: str) -> None:
        """It is said why there is none, and what to look at."""
        with pytest.raises(ValueError, match="no parsed output") as caught:
            self.result(schema, **fields).parse(MaybeNumber)
        assert str(caught.value) == f"demo_1 has no parsed output: {reason}"


def test_an_attachment_names_its_content() -> None:
    """An attachment has the digest of its content, and nothing that is none."""
    with pytest.raises(ValidationError):
        Attachment(name="a.txt", media_type="text/plain", size=1, digest="no digest")


def test_a_message_is_short_however_long_a_name_is() -> None:
    """It stands on one line of a terminal, and in the results of a batch."""
    with pytest.raises(InvalidTask) as refused:
        Task(prompt="x", labels={"n" * 100_000: ""})
    assert len(str(refused.value)) < 1000
