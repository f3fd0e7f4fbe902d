"""Output that is bound to a JSON schema: what can be asked for, and whether an answer is that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.errors import InvalidTask, OutputInvalid

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError
    from jsonschema.protocols import Validator

__all__ = ["check_schema", "parse_output"]

_MAX_PROBLEM: Final = 500
# Models that aren't held to a schema by their platform like to put JSON into a code block.
_FENCED: Final = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL | re.IGNORECASE)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise `InvalidTask` unless ``schema`` is a JSON schema to check outputs with."""
    from jsonschema.exceptions import SchemaError

    try:
        _validator(json.dumps(schema, sort_keys=True))
    except SchemaError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "its top"
        raise InvalidTask(
            f"output_schema: is no JSON schema: {_short(error.message)} (at {place})"
        ) from None


def parse_output(text: str, schema: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value that ``text`` stands for.

    Raises:
        OutputInvalid: It is no JSON, or doesn't satisfy the schema; the message says where.
    """
    from jsonschema import exceptions
    from referencing.exceptions import Unresolvable

    fenced = _FENCED.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise OutputInvalid(f"the output is no JSON: {_short(str(error))}") from None
    try:
        found = _validator(json.dumps(schema, sort_keys=True)).iter_errors(value)
        problem = cast("ValidationError | None", exceptions.best_match(found))  # pyright: ignore[reportUnknownMemberType] - the stubs leave it out
    except Unresolvable as error:
        raise OutputInvalid(f"the output can't be checked: {_short(str(error))}") from None
    except RecursionError:  # hundreds of levels, or a schema that says nothing but itself
        raise OutputInvalid(
            "the output can't be checked: it, or the schema, is nested too deep"
        ) from None
    if problem is not None:
        raise OutputInvalid(
            f"the output does not satisfy the schema: {_short(problem.message)} "
            f"(at {problem.json_path})"
        )
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


@lru_cache(maxsize=64)
def _validator(schema: str) -> Validator:
    """Return what checks values against the schema; made once for the rows of a batch."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    parsed: Any = json.loads(schema)
    kind = validator_for(parsed)
    kind.check_schema(parsed)
    # With a registry of its own, a reference to another place is an error instead of a download.
    empty: Registry[Any] = Registry()
    return kind(parsed, registry=empty)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_PROBLEM else f"{text[:_MAX_PROBLEM]} …"
