"""Rows to tasks: what a row may say, which task it is, and whether it has been changed. Pure."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, NamedTuple, cast

import orjson

from perdure.batch.reading import RawRow
from perdure.errors import InvalidTask
from perdure.ids import RETRY
from perdure.task import MAX_NAME, Task, TaskConstraints

__all__ = ["Defaults", "Row", "batch_name", "identify", "make_task", "remarks", "told_id"]

CONSTRAINTS: Final = frozenset(TaskConstraints.model_fields)
_PLAIN: Final = frozenset(
    {
        *("prompt", "messages", "platform", "system", "priority", "type", "context"),
        *("metadata", "files", "options", "fallbacks", "output_schema", "tools"),
    }
)
FIELDS: Final = _PLAIN | CONSTRAINTS | {"id", "labels", "constraints"}

# What other tools call our constraints. As a label they would do nothing, and nobody would notice.
_ALIASES: Final[Mapping[str, str]] = {
    "timeout": "timeout_seconds",
    "max_output_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_retries": "max_attempts",
    "stop": "stop_sequences",
    "effort": "reasoning_effort",
}
# Parameters that some platforms know; they are passed on in `options`.
_PARAMETERS: Final = frozenset(
    {
        *("top_p", "top_k", "seed", "stream", "tool_choice", "response_format"),
        *("frequency_penalty", "presence_penalty", "logprobs"),
    }
)
_ASKING: Final = ("prompt", "messages")
_LONGEST_ID: Final = 280
_TOLD: Final = 40
_EXACT: Final = 2**53
_NEAR: Final = 0.82
_RATHER_NEAR: Final = 0.8
# Characters of a digest that stand for a row's content: 160 bits.
_CONTENT: Final = 40


def batch_name(name: str) -> str:
    """Return ``name`` if a batch may have it.

    Raises:
        InvalidTask: It is empty, too long, can't be printed, or has a colon, which ends it in the
            keys of its rows; or it is "retry", as which keys of tasks that are run again begin.
    """
    if name == RETRY:
        raise InvalidTask(f"--name: {RETRY!r} is what perdure names retries by: give another name")
    if not name.strip() or ":" in name or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidTask(
            f"--name: a batch needs a name of at most {MAX_NAME} characters, without colons and "
            "control characters"
        )
    return name


@dataclass(frozen=True)
class Defaults:
    """What holds for every row that doesn't say otherwise.

    Attributes:
        fields: As in a row. `options` and `labels` are joined with the row's, item by item.
        suffix: Stands for the fields in fingerprints; empty where there are none.
    """

    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    suffix: str = field(init=False, default="")

    def __post_init__(self) -> None:
        given = {name: value for name, value in self.fields.items() if value not in (None, {}, ())}
        object.__setattr__(self, "fields", given)
        if given:
            object.__setattr__(self, "suffix", f":{_digest(given)[:16]}")


class Row(NamedTuple):
    """A row that says which one it is.

    Attributes:
        line: Where it begins in the input.
        id: Its own id, if it has one.
        key: Unique in the database: the batch's name and the id, or a digest of the content.
        fingerprint: Digest of the content, and of the defaults: both can be told apart in it.
        fields: What it says.
    """

    line: int
    id: str | None
    key: str
    fingerprint: str
    fields: Mapping[str, Any]


def same_content(one: str | None, other: str | None) -> bool:
    """Return whether two fingerprints are of the same content, whatever the defaults were."""
    return one is not None and other is not None and one[:_CONTENT] == other[:_CONTENT]


def identify(raw: RawRow, batch: str, defaults: Defaults) -> Row:
    """Return which row of the batch ``raw`` is.

    Raises:
        InvalidTask: It can't be read, or its id can't be one.
    """
    line, fields, error, _size = raw
    if error is not None:
        raise InvalidTask(error)
    if None in fields.values():
        fields = {name: value for name, value in fields.items() if value is not None}
    own = fields.get("id")
    if own is not None and (
        type(own) is not str or not own.strip() or len(own) > _LONGEST_ID or "\0" in own
    ):
        own = _own_id(own)
    content = _digest(fields)
    key = f"{batch}:{content if own is None else own}"
    return Row(line, own, key, content + defaults.suffix, fields)


def _own_id(own: Any) -> str:  # noqa: ANN401 - whatever a row may hold
    if isinstance(own, int) and not isinstance(own, bool):
        own = str(own)
    if not isinstance(own, str):
        raise InvalidTask("id: must be text, or a whole number of at most 64 bits")
    if not own.strip():
        raise InvalidTask("id: must not be empty; leave it out to have none")
    if len(own) > _LONGEST_ID:
        raise InvalidTask(f"id: is longer than {_LONGEST_ID} characters")
    if "\0" in own:  # databases end a text there
        raise InvalidTask("id: contains a NUL character; remove it")
    return own


def told_id(own: object) -> str | None:
    """Return a row's own id as it can be told of a row that can't be run, whatever it is.

    What is too long for an id is cut, what is no Unicode is escaped; None where it is no text.
    """
    if not isinstance(own, str):
        return None
    if len(own) > _LONGEST_ID:
        own = own[:_TOLD] + "…"
    return own.encode("utf-8", "backslashreplace").decode()


def _digest(fields: Mapping[str, Any]) -> str:
    try:
        canonical = orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    except (TypeError, ValueError) as error:  # a lone surrogate, or hundreds of levels
        raise InvalidTask(_unstorable(fields) or f"can't be stored: {error}") from None
    return hashlib.sha256(canonical).hexdigest()[:_CONTENT]


def _unstorable(fields: Mapping[str, Any]) -> str | None:
    for name, value in fields.items():
        try:
            orjson.dumps({name: value})
        except (TypeError, ValueError):
            return f"{name[:40]!a}: holds text that is no Unicode, or is nested too deep"
    return None


def make_task(row: Row, batch: str, defaults: Defaults) -> Task:
    """Return the task that a row asks for.

    Raises:
        InvalidTask: It can't be one; the message names the field and what to do about it.
    """
    fields = row.fields
    unknown = [name for name in fields if name not in FIELDS]
    for name in unknown:
        if (meant := _misspelt_constraint(name)) is not None:
            raise InvalidTask(
                f"{name}: there is no such field; did you mean {meant!r}? (A label of that name "
                "goes into 'labels'.)"
            )
    if "continue_from" in fields:
        raise InvalidTask(
            "continue_from: a row can't go on from a task: give its turns as 'messages', or use "
            "`perdure ask --continue`"
        )
    if not any(name in fields for name in _ASKING):
        raise InvalidTask(_nothing_asked(unknown))
    given = {name: value for name, value in defaults.fields.items() if name in _PLAIN}
    given |= {name: value for name, value in fields.items() if name in _PLAIN}
    given["options"] = _joined("options", defaults.fields, fields)
    return Task(
        **given,
        constraints=_constraints(fields, defaults.fields),
        labels=_labels(fields, unknown, defaults.fields),
        batch=batch,
        key=row.key,
        fingerprint=row.fingerprint,
    )


def remarks(row: Row) -> Iterator[str]:
    """Yield what is odd about a row that can be run all the same."""
    for name in row.fields:
        if name not in FIELDS:
            remark = _remark(name)
            if remark is not None:
                yield remark


@lru_cache(maxsize=1024)
def _remark(name: str) -> str | None:
    if name in _PARAMETERS:
        return (
            f"the field {name!r} is taken as a label; parameters for a platform go into 'options'"
        )
    near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=_RATHER_NEAR)
    return f"the field {name!r} is taken as a label; did you mean {near[0]!r}?" if near else None


@lru_cache(maxsize=1024)
def _misspelt_constraint(name: str) -> str | None:
    if name in _ALIASES:
        return _ALIASES[name]
    near = difflib.get_close_matches(name, CONSTRAINTS, n=1, cutoff=_NEAR)
    # "models" or "mode" may well be a label, and a remark is made of it.
    return near[0] if near and near[0] != "model" else None


def _nothing_asked(unknown: list[str]) -> str:
    for name in unknown:
        near = difflib.get_close_matches(name.lower(), _ASKING, n=1, cutoff=0.6)
        if near:
            return f"has no prompt; did you mean {near[0]!r} by {name!r}?"
    return f"has no prompt (its fields: {', '.join(map(repr, unknown[:8])) or 'none of ours'})"


def _constraints(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> TaskConstraints | None:
    nested = _object("constraints", fields)
    flat = {name: value for name, value in fields.items() if name in CONSTRAINTS}
    for name in flat.keys() & nested.keys():
        raise InvalidTask(f"{name}: is given twice, also in 'constraints'")
    common = {name: value for name, value in defaults.items() if name in CONSTRAINTS}
    joined = {**common, **nested, **flat}
    return TaskConstraints(**joined) if joined else None


def _joined(name: str, defaults: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    return _object(name, defaults) | _object(name, fields)


def _object(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    given = fields.get(name, {})
    if not isinstance(given, dict):
        raise InvalidTask(f'{name}: must be an object, as in {{"name": "value"}}')
    return cast("dict[str, Any]", given)


def _labels(
    fields: Mapping[str, Any], unknown: list[str], defaults: Mapping[str, Any]
) -> dict[str, str]:
    labels = {name: fields[name] for name in unknown} | _joined("labels", defaults, fields)
    return {name: _text(name, value) for name, value in labels.items() if value is not None}


def _text(name: str, value: Any) -> str:  # noqa: ANN401 - whatever JSON holds
    """Return a label's value as text: text as it is, anything else as its JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and (not math.isfinite(value) or abs(value) >= _EXACT):
        raise InvalidTask(f"{name}: the number is not exact in 64 bits; write it as text")
    return orjson.dumps(value).decode()
