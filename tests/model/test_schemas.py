"""JSON schemas: which can be asked for, and which couldn't ever be checked against."""

from __future__ import annotations

from typing import Any

import pytest

from perdure import InvalidTask, Task
from perdure.schemas import check_schema, patterns

DRAFT_4 = "http://json-schema.org/draft-04/schema#"
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
DRAFT_2019 = "https://json-schema.org/draft/2019-09/schema"
NODE = {"properties": {"inner": {"items": {"$ref": "#/$defs/Node"}}}}


@pytest.mark.parametrize(
    "schema",
    [
        pytest.param({"$ref": "#/$defs/Node", "$defs": {"Node": NODE}}, id="recursive"),
        pytest.param({"properties": {"$ref": {"type": "string"}}}, id="a property's name"),
        pytest.param({"enum": [{"$ref": "#/nope"}]}, id="a value"),
        pytest.param({"$ref": "#here", "$defs": {"a": {"$anchor": "here"}}}, id="anchor"),
        pytest.param({"$ref": "y", "$id": "x://x/", "$defs": {"y": {"$id": "y"}}}, id="id"),
        pytest.param({"$ref": DRAFT_7}, id="a schema of schemas"),
        pytest.param(
            {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], "$defs": {"a": True}},
            id="twice",
        ),
        pytest.param(
            {"$dynamicAnchor": "n", "properties": {"a": {"$dynamicRef": "#n"}}}, id="dynamic"
        ),
        pytest.param(
            {"$schema": DRAFT_2019, "properties": {"a": {"$recursiveRef": "#"}}}, id="2019"
        ),
        pytest.param(
            {
                "$schema": DRAFT_7,
                "$ref": "#/definitions/a",
                "definitions": {"a": {}},
                "allOf": [{"$ref": "#/nope"}],
            },
            id="what draft 7 ignores",
        ),
        pytest.param({"$schema": DRAFT_4, "dependencies": {"a": ["b"]}}, id="draft 4"),
    ],
)
def test_what_can_be_asked_for(schema: dict[str, Any]) -> None:
    """References may lead anywhere in the schema, and to where they come from by way of a part."""
    check_schema(schema)


@pytest.mark.parametrize("reference", ["#/$defs/nope", "http://x/y", "file:///etc/passwd", "#a"])
@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_references_to_elsewhere(keyword: str, reference: str) -> None:
    """They are refused at once, for nothing is ever fetched."""
    with pytest.raises(InvalidTask, match="leads nowhere: nothing is fetched") as caught:
        check_schema({"properties": {"a": {keyword: reference}}})
    assert reference in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$dynamicAnchor": "a", "$dynamicRef": "#a"},
        {"$schema": DRAFT_2019, "$recursiveRef": "#"},
        {"$schema": DRAFT_7, "definitions": {"a": {"$ref": "#/definitions/a"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"not": {"$ref": "#"}},
        {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
        {"if": {"type": "string"}, "then": {"$ref": "#"}},
        {"dependentSchemas": {"a": {"$ref": "#"}}},
    ],
)
def test_references_in_a_circle(schema: dict[str, Any]) -> None:
    """A check would never end: it always comes back to the same schema with the same value."""
    with pytest.raises(InvalidTask, match="leads back to itself for the same value"):
        check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objekt"}, r"is no JSON schema: .* \(at type\)"),
        ({"pattern": "("}, "is no JSON schema"),
        ({"pattern": "a{1,99999999999999}"}, "repetition number is too large"),
        ({"$schema": 1}, "is no JSON schema that can be used"),
        ({"$ref": "#/title", "title": "x"}, "leads to something that is no schema"),
        ({"$ref": "#/x", "x": {"type": "nope"}}, "is no JSON schema"),
    ],
)
def test_no_schema(schema: dict[str, Any], says: str) -> None:
    """What is no JSON schema is refused on one line that names the field."""
    with pytest.raises(InvalidTask, match=f"^output_schema: .*{says}") as caught:
        check_schema(schema)
    assert "\n" not in str(caught.value)


def test_a_schema_that_is_nested_too_deep() -> None:
    """It is refused wherever it turns up."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(InvalidTask, match="output_schema: is nested more than 64 levels deep"):
        Task(prompt="x", output_schema=schema)
    with pytest.raises(InvalidTask, match="output_schema: is nested too deep"):
        check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "found"),
    [
        ({"type": "string"}, []),
        ({"properties": {"pattern": {"type": "string"}}}, []),
        ({"properties": {"a": {"anyOf": [{"pattern": "x"}]}}}, ["x"]),
        ({"patternProperties": {"^x": True}}, ["^x"]),
        ({"propertyNames": {"pattern": "x"}}, ["x"]),
    ],
)
def test_patterns_of_a_schema(schema: dict[str, Any], found: list[str]) -> None:
    """They are found wherever they are; the name of a property is none."""
    assert list(patterns(schema)) == found
