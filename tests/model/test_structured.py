"""Output that is bound to a schema: what may be asked for, and what is an answer."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import pytest
from pydantic import BaseModel

from perdure import InvalidTask, OutputInvalid, Task
from perdure.schemas import check_schema
from perdure.structured import check_schemas, parse_output, read_output

NEWLINES = "\n" * 5000
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


@pytest.mark.parametrize("reference", ["http://127.0.0.1:9/schema.json", "#", "#/$defs/nope"])
def test_a_schema_that_was_let_in_by_an_earlier_version(reference: str) -> None:
    """It is the schema that is wrong, so that no other answer is asked for."""
    with pytest.raises(OutputInvalid, match="can't be checked: its schema") as caught:
        parse_output("{}", {"$ref": reference})
    assert not caught.value.repairable


def test_no_schema_of_a_tool() -> None:
    """A tool's arguments are described by a schema as well, which has to be one."""
    task = Task(
        prompt="?",
        tools=[{"name": "f"}, {"name": "g", "parameters": {"type": "nope"}}],  # type: ignore[arg-type]
    )
    with pytest.raises(InvalidTask, match=r"tools\.1\.parameters: is no JSON schema"):
        check_schemas(task)


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
    ("text", "value"),
    [
        ("```json\n[1]\n```", [1]),
        ("\n ``` JSON \n\n\u00a0[1]\n\n ```\n", [1]),
        ("```\n[1]```", [1]),
        ("[1]", [1]),
        ("```python\n[1]\n```", None),
        ("```[1]```", None),
        ("```", None),
        ("```json\n[1]", None),
        (f"```json{NEWLINES}[1]{NEWLINES}```", [1]),
        (f"```json{NEWLINES}[1]{NEWLINES}``", None),
    ],
    ids=count(),
)
def test_code_blocks(text: str, value: Any) -> None:
    """What is in one counts, in any spelling; blanks take no time, however many there are."""
    began = time.monotonic()
    if value is None:
        with pytest.raises(OutputInvalid, match="is no JSON"):
            read_output(text)
    else:
        assert read_output(text) == value
    assert time.monotonic() - began < 5  # a regular expression took minutes for 5,000


def test_what_has_no_bottom_is_an_invalid_output() -> None:
    """It is the model that is wrong there, and not the worker."""
    schema = {"properties": {"a": {"$ref": "#"}}}
    check_schema(schema)
    with pytest.raises(OutputInvalid, match="nested too deep") as caught:
        parse_output('{"a":' * 900 + "1" + "}" * 900, schema)
    assert caught.value.repairable
