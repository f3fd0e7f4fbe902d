"""Checks against a schema that give up when their time is over, so they can be made anywhere.

A check can take longer than anybody lives, and nothing else in the process gets its turn meanwhile.
Which schemas do that, and on which values, is hard to foresee: references under `anyOf` double the
work with every level, yet almost every schema that pydantic makes has references and `anyOf`. So
the clock decides. It is looked at whenever a schema, or a part of one, is held against a value, and
for each problem on its way up. That bounds a check, since between two looks the few keywords that
are known here do no more than to walk once over what the schema says there, or over the value, to
compare or to quote it; and both are short. Other keywords, such as `pattern` and `uniqueItems`, are
not even begun, and neither is what would leave the clock behind.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.schemas import ignores_siblings, validator

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

__all__ = ["SECONDS", "OutOfTime", "find_problem"]

# Half of what is ordinary is checked in a millisecond. Nobody who follows a stream notices a pause
# as long as the one between two chunks; a process to check in takes ten times as long to start.
SECONDS: Final = 0.05
# Of text and schema: what a single step may walk over.
MOST_CHARACTERS: Final = 64 * 1024

# Keywords that walk once over their value, and find one problem at most.
_WALKS: Final = frozenset(
    {
        *("type", "enum", "const", "format", "multipleOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    }
)
# Keywords that do so as well, but for what other schemas find, or may find many problems.
_FINDS_MANY: Final = frozenset(
    {
        *("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if"),
        *("properties", "additionalProperties", "propertyNames", "required", "dependentRequired"),
        *("items", "prefixItems", "additionalItems", "contains"),
    }
)
_REFERENCES: Final = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_EACH: Final = frozenset({"allOf", "anyOf", "oneOf"})
_latest: ContextVar[float] = ContextVar("perdure_check_latest", default=math.inf)


class OutOfTime(Exception):
    """The check takes longer than it may here, or can't be told to stop."""


def find_problem(
    value: Any,  # noqa: ANN401 - any JSON value
    length: int,
    schema: Mapping[str, Any],
    seconds: float = SECONDS,
) -> ValidationError | None:
    """Return what is worst about a value; None where it satisfies the schema.

    Args:
        value: The value.
        length: The characters of the text that it was read from.
        schema: The schema.
        seconds: How long it may take; one step more than that.

    Raises:
        OutOfTime: That can't be found out here.
        UnusableSchema: Nothing can be checked against the schema.
    """
    from jsonschema import exceptions

    if length > MOST_CHARACTERS:
        raise OutOfTime
    prepared = _prepared(schema)
    if length >= prepared.too_long:
        raise OutOfTime
    token = _latest.set(time.perf_counter() + seconds)
    try:
        found = prepared.validator.iter_errors(value)
        return cast("ValidationError | None", exceptions.best_match(found))  # pyright: ignore[reportUnknownMemberType] - the stubs leave it out
    except _Overdue:
        prepared.too_long = length
        raise
    except RecursionError:  # it is deeper here, for what looks at the clock
        raise OutOfTime from None
    finally:
        _latest.reset(token)


class _Overdue(OutOfTime):
    """It is too late."""


class _Prepared:
    """A schema and what is known of it.

    Attributes:
        validator: What looks at the clock while it checks.
        too_long: The shortest text whose check has taken too long.
    """

    def __init__(self, validator: Validator, too_long: int) -> None:
        self.validator = validator
        self.too_long = too_long


def _prepared(schema: Mapping[str, Any]) -> _Prepared:
    usable = validator(schema)  # which says what is wrong with it
    return _prepare(json.dumps(schema, sort_keys=True), type(usable))


@lru_cache(maxsize=64)
def _prepare(schema: str, kind: type[Validator]) -> _Prepared:
    from referencing import Registry

    parsed: dict[str, Any] = json.loads(schema)
    parsed.pop("$schema", None)  # else a reference to the whole goes on without looking
    registry: Registry[Any] = Registry()
    made = _kind(kind)(parsed, registry=registry)
    here = len(schema) <= MOST_CHARACTERS and not _changes_kind(parsed)
    return _Prepared(made, MOST_CHARACTERS + 1 if here else 0)


def _changes_kind(schema: object) -> bool:
    """Return whether some part of it may name another kind of schema, which has no clock."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            members = cast("dict[str, object]", part)
            if "$schema" in members:
                return True
            waiting += members.values()
        elif isinstance(part, list):
            waiting += cast("list[object]", part)
    return False


@cache
def _kind(kind: type[Validator]) -> type[Validator]:
    """Return a kind of validator that checks as another one does, and looks at the clock."""
    from jsonschema import validators

    plain = cast("Mapping[str, _Keyword]", kind.VALIDATORS)
    timed: dict[str, _Keyword] = dict.fromkeys(plain, _refuse)
    timed |= {name: plain[name] for name in _WALKS & plain.keys()}
    timed |= {name: partial(_timed, plain[name], name) for name in _FINDS_MANY & plain.keys()}
    alone = ignores_siblings(kind)

    def applicable(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
        _look()
        if alone and schema.get("$ref") is not None:
            return [("$ref", schema["$ref"])]
        return [(name, said) for name, said in schema.items() if name in timed]

    made: Any = cast("Any", validators).create(
        meta_schema=kind.META_SCHEMA,
        validators=timed,
        type_checker=kind.TYPE_CHECKER,
        format_checker=kind.FORMAT_CHECKER,
        id_of=cast("Any", kind).ID_OF,
        applicable_validators=applicable,
    )
    return cast("type[Validator]", made)


_Keyword = Callable[[Any, Any, Any, Any], "Iterator[ValidationError] | None"]


def _timed(
    check: _Keyword,
    name: str,
    by: Any,  # noqa: ANN401 - of the library
    said: Any,  # noqa: ANN401 - any JSON value, as are the next two
    value: Any,  # noqa: ANN401
    schema: Any,  # noqa: ANN401
) -> Iterator[ValidationError]:
    if name in _REFERENCES and not said.startswith("#"):  # as to the schema of all schemas
        raise OutOfTime
    if name in _EACH and any(part is False for part in said):  # each would quote all of the value
        raise OutOfTime
    if name == "additionalProperties" and "patternProperties" in schema:  # which it tries as well
        raise OutOfTime
    for problem in check(by, said, value, schema) or ():
        _look()
        yield problem


def _refuse(*_what: object) -> Iterator[ValidationError]:
    raise OutOfTime


def _look() -> None:
    if time.perf_counter() > _latest.get():
        raise _Overdue
