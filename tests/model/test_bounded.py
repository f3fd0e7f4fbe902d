"""Checks that give up when their time is over: what they say, and that they do give up."""

from __future__ import annotations

import json
import time
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from perdure import OutputInvalid
from perdure.bounded import MOST_CHARACTERS, OutOfTime, find_problem
from perdure.schemas import UnusableSchema, check_schema, validator
from perdure.structured import check_briefly, parse_output

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"
DRAFT_2020 = "https://json-schema.org/draft/2020-12/schema"
ENDLESS = "(a+)+$"
# Far more than any step takes, and far less than what they would take without an end.
PATIENCE = 5.0


def doubled(depth: int) -> dict[str, Any]:
    """Return a schema that is checked twice for the same value on each of its levels."""
    named: dict[str, Any] = {
        f"level{n}": {"allOf": [{"$ref": f"#/$defs/level{n + 1}"}] * 2} for n in range(depth)
    }
    return {"$defs": {**named, f"level{depth}": {"type": "string"}}, "$ref": "#/$defs/level0"}


BRANCH: dict[str, Any] = {"properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["x"]}
BRANCHING: dict[str, Any] = {"$defs": {"n": {"anyOf": [BRANCH] * 3}}, "$ref": "#/$defs/n"}
MANY = "[" + ",".join("1" * 30_000) + "]"
NAMES = [f"name{n}" for n in range(2000)]


LONG: list[tuple[dict[str, Any], str]] = [
    (BRANCHING, '{"c":' * 20 + "{}" + "}" * 20),
    ({"$schema": DRAFT_2020, **BRANCHING}, '{"c":' * 20 + "{}" + "}" * 20),
    (doubled(40), '"x"'),
    ({"allOf": [{"items": {"type": "integer"}}] * 500}, MANY),
    ({"allOf": [{"items": {}}] * 500}, MANY),
    ({"allOf": [{"type": "string"}] * 2000}, MANY),
    ({"anyOf": [False] * 2000}, MANY),
    ({"items": {f"note{n}": 1 for n in range(3000)}}, MANY),
    ({"items": {"required": NAMES}}, json.dumps([{}] * 10_000)),
    ({"items": {"enum": NAMES}}, MANY),
    ({"contains": {"allOf": [{"type": "string"}] * 2000}}, MANY),
]


@pytest.mark.parametrize(("schema", "text"), LONG, ids=count())
def test_it_gives_up(schema: dict[str, Any], text: str) -> None:
    """However a schema manages to take long, it is noticed within a step."""
    check_schema(schema)
    began = time.monotonic()
    assert not check_briefly(text, schema)
    assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"pattern": ENDLESS}, "a" * 40 + "!"),
        ({"$schema": DRAFT_7, "items": {"pattern": ENDLESS}}, ["a" * 40 + "!"]),
        ({"patternProperties": {ENDLESS: {}}}, {"a" * 40 + "!": 1}),
        ({"additionalProperties": False, "patternProperties": {ENDLESS: {}}}, {"a" * 40 + "!": 1}),
        ({"propertyNames": {"pattern": ENDLESS}}, {"a" * 40 + "!": 1}),
        ({"uniqueItems": True}, [{"a": n} for n in range(4000)]),
        ({"unevaluatedProperties": False}, {"a": 1}),
        ({"not": {"$schema": DRAFT_2020, "pattern": ENDLESS}}, "a" * 40 + "!"),
        ({"items": {"$ref": "#"}, "$schema": DRAFT_2020, "pattern": ENDLESS}, ["a" * 40 + "!"]),
        ({"$ref": DRAFT_2020}, {"required": [str(n) for n in range(100)]}),
        ({}, "a" * MOST_CHARACTERS),
        ({"title": "x" * MOST_CHARACTERS}, 1),
    ],
    ids=count(),
)
def test_what_is_not_even_begun(schema: dict[str, Any], value: Any) -> None:
    """A step that can take long by itself, or would lead out of sight."""
    check_schema(schema)
    began = time.monotonic()
    assert not check_briefly(json.dumps(value), schema)
    assert time.monotonic() - began < PATIENCE


def test_patterns_that_are_not_reached_are_no_obstacle() -> None:
    """It counts what is to be done, not what a schema could lead to."""
    schema = {"properties": {"a": {"type": "integer"}, "b": {"pattern": ENDLESS}}}
    assert check_briefly('{"a": 1}', schema)
    assert not check_briefly('{"b": "a"}', schema)


def test_what_took_too_long_is_not_tried_again() -> None:
    """Longer texts don't hold anybody up for a second time; shorter ones have their chance."""
    schema = {"type": "array", "items": {"title": "tried before", "type": "integer"}}
    assert check_briefly("[1]", schema, 60.0)
    assert not check_briefly("[1, 2]", schema, 0.0)
    assert not check_briefly("[1, 2, 3]", schema, 60.0)
    assert check_briefly("[1]", schema, 60.0)


class Address(BaseModel):
    """A part that others refer to."""

    street: str
    number: int | None = None


class Person(BaseModel):
    """As answers are asked for: references, and what may be absent."""

    name: str
    address: Address | None = None
    others: list[Address] = []
    friend: Person | None = None


def test_what_pydantic_makes_is_checked_here() -> None:
    """With references, to itself as well, and choices, while it is of a reasonable size."""
    home = Address(street="Rathausgasse")
    person = Person(name="Ada", address=home, others=[home] * 3)
    text = Person(name="Eva", friend=person, others=[home] * 5).model_dump_json()
    assert check_briefly(text, Person.model_json_schema(), 60.0)
    with pytest.raises(OutputInvalid, match="'name' is a required property"):
        check_briefly('{"friend": {}}', {**Person.model_json_schema(), "title": "once more"}, 60.0)


def _some(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    """Return lists without `False`, which would quote the value once for each time."""
    return st.lists(inner.filter(lambda one: one is not False), min_size=1, max_size=3)


_schemas = st.recursive(
    st.sampled_from(
        [
            *({}, {"type": "integer"}, {"type": ["string", "null"]}, {"enum": [1, "a", None]}),
            *({"const": 0}, {"minimum": 1}, {"maxLength": 1}, {"required": ["a"]}, {"minItems": 2}),
            *({"maxProperties": 1}, {"$ref": "#/$defs/d"}, {"multipleOf": 2}, True, False),
        ]
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from("ab"), inner).map(lambda named: {"properties": named}),
        inner.map(lambda one: {"items": one, "additionalProperties": one}),
        _some(inner).map(lambda each: {"anyOf": each}),
        _some(inner).map(lambda each: {"oneOf": each, "type": "array"}),
        _some(inner).map(lambda each: {"allOf": each}),
        st.tuples(inner, inner).map(lambda two: {"if": two[0], "then": two[1], "else": False}),
        inner.map(lambda one: {"not": one}),
        inner.map(lambda one: {"contains": one, "propertyNames": one}),
    ),
    max_leaves=8,
)
_values = st.recursive(
    st.sampled_from([None, True, 0, 1, 2.5, "", "a", "ab"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)


@given(_schemas, _values, st.sampled_from([None, DRAFT_7, DRAFT_2019, DRAFT_2020]))
def test_it_says_the_same(inner: Any, value: Any, draft: str | None) -> None:
    """Where it comes to an end, it is the very end that an unbounded check comes to."""
    schema: dict[str, Any] = {"allOf": [inner], "$defs": {"d": {"type": "string"}}}
    if draft is not None:
        schema["$schema"] = draft
    text = json.dumps(value)
    found: list[str | None] = []
    for check in (lambda: parse_output(text, schema), lambda: check_briefly(text, schema, 60.0)):
        try:
            assert check() is not False
            found.append(None)
        except OutputInvalid as invalid:
            found.append(invalid.message)
    assert found[0] == found[1]


def test_problems_are_those_of_the_library() -> None:
    """They have a place and a message, as ever."""
    problem = find_problem({"a": "x"}, 10, {"properties": {"a": {"type": "integer"}}})
    assert problem is not None
    assert (problem.json_path, problem.message) == ("$.a", "'x' is not of type 'integer'")


def test_unusable_schemas() -> None:
    """They are found here as well."""
    with pytest.raises(UnusableSchema, match="leads nowhere"):
        find_problem(1, 1, {"$ref": "#/nowhere"})


def test_too_deep_to_be_checked_here() -> None:
    """Where what looks at the clock needs too many levels, somebody else has a look."""
    schema = {"properties": {"a": {"$ref": "#"}}}
    deep: Any = 1
    for _ in range(290):
        deep = {"a": deep}
    with pytest.raises(OutOfTime):
        find_problem(deep, 0, schema)


def test_the_plain_validator_is_left_alone() -> None:
    """Checks without an end know nothing of the clock."""
    schema = {"items": {"pattern": "^a"}}
    assert not check_briefly('["a"]', schema)
    assert validator(schema).is_valid(["a"])
