"""Output that is bound to a schema: what may be asked for, and what is an answer."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from perdure import InvalidTask, OutputInvalid, Task
from perdure.structured import check_schema, parse_output

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer", "minimum": 0}},
    "required": ["name"],
}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Bonn", "people": 3}',
        ' {"name": "Bonn", "people": 3}\n',
        '```json\n{"name": "Bonn", "people": 3}\n```',
        '```\n{"name": "Bonn",\n "people": 3}\n```\n',
    ],
)
def test_a_valid_answer(text: str) -> None:
    """White space and a code block around the JSON are no part of it."""
    assert parse_output(text, CITY) == {"name": "Bonn", "people": 3}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no JSON"),
        ("Bonn", "is no JSON"),
        ('{"name": "Bonn"', "is no JSON"),
        ('{"name": NaN}', "NaN is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "'name' is a required property (at $)"),
        ('{"name": "Bonn", "people": -1}', "(at $.people)"),
        ('Here it is:\n```json\n{"name": "Bonn"}\n```', "is no JSON"),
    ],
)
def test_an_invalid_answer(text: str, says: str) -> None:
    """The error says, on one line, what is wrong and where."""
    with pytest.raises(OutputInvalid) as caught:
        parse_output(text, CITY)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_reference_is_never_fetched() -> None:
    """A schema that refers to another place leads to an error, not to a download."""
    with pytest.raises(OutputInvalid, match="can't be checked"):
        parse_output("{}", {"$ref": "http://127.0.0.1:9/schema.json"})


def test_no_schema() -> None:
    """What is no JSON schema is refused where the task is handed in."""
    with pytest.raises(InvalidTask, match=r"output_schema: is no JSON schema: .* \(at type\)"):
        check_schema({"type": "objekt"})
    check_schema(CITY)


def test_a_model_stands_for_its_schema() -> None:
    """A pydantic model class may be given instead, for the output and for a tool's arguments."""

    class City(BaseModel):
        name: str

    task = Task(
        prompt="?",
        output_schema=City,  # type: ignore[arg-type]
        tools=[{"name": "look_up", "parameters": City}],  # type: ignore[arg-type]
    )
    assert task.output_schema == City.model_json_schema()
    assert task.tools[0].parameters == City.model_json_schema()


def test_tools_have_different_names() -> None:
    """Two functions of one name could not be told apart."""
    with pytest.raises(InvalidTask, match="two of them have the name 'f'"):
        Task(prompt="?", tools=[{"name": "f"}, {"name": "f"}])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schema", "output"),
    [
        ({"$ref": "#"}, "{}"),
        ({"properties": {"a": {"$ref": "#"}}}, '{"a":' * 900 + "1" + "}" * 900),
    ],
)
def test_what_has_no_bottom_is_an_invalid_output(schema: dict[str, Any], output: str) -> None:
    """It is the model, or the schema, that is wrong there, and not the worker."""
    with pytest.raises(OutputInvalid, match="nested too deep"):
        parse_output(output, schema)
