"""OpenAI's rules for schemas that the model is held to strictly, as a pure function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, cast

__all__ = ["is_strict"]

_MOST_LEVELS: Final = 10
_MOST_PROPERTIES: Final = 5000
_MOST_CHOICES: Final = 1000

# Whatever isn't here (`oneOf`, `default`, `minLength` …) is refused with a 400.
_KEYWORDS: Final = frozenset(
    {
        *("$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "definitions"),
        *("description", "enum", "exclusiveMaximum", "exclusiveMinimum", "format", "items"),
        *("maxItems", "maximum", "minItems", "minimum", "multipleOf", "pattern", "properties"),
        *("required", "title", "type"),
    }
)
_FORMATS: Final = frozenset(
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uuid"}
)


def is_strict(schema: Mapping[str, Any]) -> bool:
    """Return whether ``schema`` may be sent with `strict`, which binds the model to it.

    The root is an object; every object requires all of its properties and allows no others; and
    only the keywords are used that OpenAI's "Structured Outputs" support. Any other schema is
    sent without `strict`: a hint to the model, and perdure checks the answer all the same.
    """
    if schema.get("type") != "object" or "anyOf" in schema:
        return False
    counter = _Counter()
    return counter.allows(schema, 0)


class _Counter:
    """Walks through one schema and counts what there may be only so much of."""

    def __init__(self) -> None:
        self._properties = 0
        self._choices = 0

    def allows(self, schema: object, level: int) -> bool:
        """Return whether this part of the schema keeps the rules."""
        if not isinstance(schema, Mapping):  # `true` and `false` are schemas too, elsewhere
            return False
        fields = cast("Mapping[str, Any]", schema)
        if not fields.keys() <= _KEYWORDS or level > _MOST_LEVELS:
            return False
        if "$ref" in fields:  # nothing may stand beside it
            return len(fields) == 1 and str(fields["$ref"]).startswith("#")
        return (
            self._has_kind(fields)
            and self._allows_object(fields)
            and all(self.allows(part, level) for part in _definitions(fields))
            and all(self.allows(part, level + 1) for part in _parts(fields))
            and self._properties <= _MOST_PROPERTIES
            and self._choices <= _MOST_CHOICES
        )

    def _has_kind(self, fields: Mapping[str, Any]) -> bool:
        """Return whether it is said what kind of value it is, as has to be said everywhere."""
        choices = fields.get("enum")
        self._choices += len(cast("list[object]", choices)) if isinstance(choices, list) else 0
        named = fields.get("format")
        if named is not None and named not in _FORMATS:
            return False
        if fields.get("type") == "array" and "items" not in fields:
            return False
        return any(name in fields for name in ("type", "anyOf", "enum", "const"))

    def _allows_object(self, fields: Mapping[str, Any]) -> bool:
        kind = fields.get("type")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            return "properties" not in fields
        properties = fields.get("properties", {})
        required = fields.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            return False
        names = cast("Mapping[str, object]", properties).keys()
        self._properties += len(names)
        return fields.get("additionalProperties") is False and set(names) == set(
            cast("list[object]", required)
        )


def _definitions(fields: Mapping[str, Any]) -> list[object]:
    found: list[object] = []
    for name in ("$defs", "definitions"):
        found += _values(fields.get(name))
    return found


def _parts(fields: Mapping[str, Any]) -> list[object]:
    found = _values(fields.get("properties"))
    if "items" in fields:
        found.append(fields["items"])
    either = fields.get("anyOf")
    if isinstance(either, list):
        found += cast("list[object]", either)
    return found


def _values(holder: object) -> list[object]:
    return (
        list(cast("Mapping[str, object]", holder).values()) if isinstance(holder, Mapping) else []
    )
