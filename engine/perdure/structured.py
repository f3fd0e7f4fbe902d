"""Output that is bound to a JSON schema: what can be asked for, and whether an answer is that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.bounded import SECONDS, OutOfTime, find_problem
from perdure.errors import OutputInvalid
from perdure.schemas import UnusableSchema, check_schema, short, validator
from perdure.task import Task

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

__all__ = ["check_briefly", "check_schemas", "parse_output", "read_output"]

_FENCE: Final = "```"


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
    try:
        return json.loads(_unfenced(text), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise OutputInvalid(f"the output is no JSON: {short(str(error))}") from None


def parse_output(text: str, schema: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value that ``text`` stands for. It takes its time, if need be for ever.

    Raises:
        OutputInvalid: It is no JSON, or doesn't satisfy the schema; the message says where.
    """
    from jsonschema import exceptions

    value = read_output(text)

    def find() -> ValidationError | None:
        found = validator(schema).iter_errors(value)
        return cast("ValidationError | None", exceptions.best_match(found))  # pyright: ignore[reportUnknownMemberType] - the stubs leave it out

    try:
        _raise_found(find)
    except RecursionError:  # hundreds of levels
        raise OutputInvalid("the output can't be checked: it is nested too deep") from None
    return value


def check_briefly(text: str, schema: Mapping[str, Any], seconds: float = SECONDS) -> bool:
    """Check as `parse_output` does, where that takes no more than a moment.

    Returns:
        Whether it was found out that the text satisfies the schema; else it takes too long.

    Raises:
        OutputInvalid: As `parse_output`.
    """
    try:
        value = read_output(text)
        _raise_found(lambda: find_problem(value, len(text), schema, seconds))
    except OutOfTime:
        return False
    return True


def _raise_found(find: Callable[[], ValidationError | None]) -> None:
    """Raise `OutputInvalid` with what ``find`` finds, or stumbles over."""
    try:
        problem = find()
    except UnusableSchema as error:  # of a task that was handed in to an earlier perdure
        raise OutputInvalid.beyond_repair(
            f"the output can't be checked: its schema {error}"
        ) from None
    except (OutOfTime, RecursionError):
        raise
    except Exception as error:  # noqa: BLE001 - what the schema makes the library trip over
        what = short(f"{type(error).__name__}: {error}")
        raise OutputInvalid.beyond_repair(f"the output can't be checked: {what}") from None
    if problem is not None:
        raise OutputInvalid(
            f"the output does not satisfy the schema: {short(problem.message)} "
            f"(at {short(problem.json_path)})"
        )


def _unfenced(text: str) -> str:
    """Return what is in the code block that the text is, else all of it.

    Models that aren't held to a schema by their platform like to put JSON into one. By hand, since
    a regular expression with blanks at so many places may try all ways to share them out.
    """
    stripped = text.strip()
    if not (stripped.startswith(_FENCE) and stripped.endswith(_FENCE)):
        return text
    language, newline, block = stripped[len(_FENCE) :].partition("\n")
    if not newline or language.strip().lower() not in ("", "json"):
        return text
    return block.removesuffix(_FENCE).strip()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
