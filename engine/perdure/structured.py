"""Output that is bound to a JSON schema: what can be asked for, and whether an answer is that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.errors import OutputInvalid
from perdure.schemas import UnusableSchema, check_schema, short, validator
from perdure.task import Task

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

__all__ = ["check_schemas", "parse_output", "read_output"]

# Models that aren't held to a schema by their platform like to put JSON into a code block.
_FENCED: Final = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


def check_schemas(task: Task) -> None:
    """Raise `InvalidTask` unless the task's schemas, of output and tools, are such."""
    if task.output_schema is not None:
        check_schema(task.output_schema)
    for place, tool in enumerate(task.tools):
        check_schema(tool.parameters, f"tools.{place}.parameters")


def read_output(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value that ``text`` stands for, whatever the schema says.

    Raises:
        OutputInvalid: It is no JSON.
    """
    fenced = _FENCED.fullmatch(text)
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise OutputInvalid(f"the output is no JSON: {short(str(error))}") from None


def parse_output(text: str, schema: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value that ``text`` stands for. Where the schema has patterns, see `checking`.

    Raises:
        OutputInvalid: It is no JSON, or doesn't satisfy the schema; the message says where.
    """
    from jsonschema import exceptions

    value = read_output(text)
    try:
        found = validator(schema).iter_errors(value)
        problem = cast("ValidationError | None", exceptions.best_match(found))  # pyright: ignore[reportUnknownMemberType] - the stubs leave it out
    except UnusableSchema as error:  # of a task that was handed in to an earlier perdure
        raise OutputInvalid.beyond_repair(
            f"the output can't be checked: its schema {error}"
        ) from None
    except RecursionError:  # hundreds of levels
        raise OutputInvalid("the output can't be checked: it is nested too deep") from None
    except Exception as error:  # noqa: BLE001 - what the schema makes the library trip over
        what = short(f"{type(error).__name__}: {error}")
        raise OutputInvalid.beyond_repair(f"the output can't be checked: {what}") from None
    if problem is not None:
        raise OutputInvalid(
            f"the output does not satisfy the schema: {short(problem.message)} "
            f"(at {short(problem.json_path)})"
        )
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
