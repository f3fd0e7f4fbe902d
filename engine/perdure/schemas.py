"""JSON schemas that can be asked for: each can be checked against, here and without an end.

Outputs are checked when they are paid for, so what is wrong with a schema has to be found before:
references that lead nowhere, or round in a circle. Nothing is ever fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, Final, cast

from perdure.errors import InvalidTask

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

__all__ = ["UnusableSchema", "check_schema", "ignores_siblings", "patterns", "short", "validator"]

_MAX_PROBLEM: Final = 500
_PATTERNS: Final = ("pattern", "patternProperties")
_REFERENCES: Final = ("$ref", "$dynamicRef", "$recursiveRef")
# What is in these is held against the same value as the schema around them, not against a part.
_SAME_VALUE: Final = ("not", "if", "then", "else")
_SAME_VALUE_EACH: Final = ("allOf", "anyOf", "oneOf")
_SAME_VALUE_NAMED: Final = ("dependentSchemas", "dependencies")


class UnusableSchema(ValueError):
    """Nothing can be checked against the schema; the message says why, and what to do."""


def check_schema(schema: Mapping[str, Any], field: str = "output_schema") -> None:
    """Raise `InvalidTask`, which names the field, unless values can be checked with ``schema``."""
    try:
        validator(schema)
    except UnusableSchema as error:
        raise InvalidTask(f"{field}: {error}") from None


def validator(schema: Mapping[str, Any]) -> Validator:
    """Return what checks values against the schema; made once for the rows of a batch.

    Raises:
        UnusableSchema: It is no JSON schema, or has references that can't be followed.
    """
    from jsonschema.exceptions import SchemaError

    try:
        return _validator(json.dumps(schema, sort_keys=True))
    except UnusableSchema:
        raise
    except SchemaError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "its top"
        problem = f"is no JSON schema: {short(error.message)} (at {short(place)})"
    except RecursionError:
        problem = "is nested too deep: give parts of it names under '$defs', and refer to those"
    except Exception as error:  # noqa: BLE001 - the library trips over values of a strange kind
        problem = f"is no JSON schema that can be used: {short(f'{type(error).__name__}: {error}')}"
    raise UnusableSchema(problem)


def patterns(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regular expressions of the schema; what only looks like one as well."""
    waiting: list[object] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            members = cast("dict[str, object]", part)
            pattern, named = (members.get(name) for name in _PATTERNS)
            if isinstance(pattern, str):
                yield pattern
            if isinstance(named, dict):
                yield from cast("dict[str, object]", named)
            waiting += members.values()
        elif isinstance(part, list):
            waiting += cast("list[object]", part)


def ignores_siblings(kind: type[Validator]) -> bool:
    """Return whether what stands beside a reference doesn't count, as in earlier drafts."""
    from referencing.jsonschema import DRAFT3, DRAFT4, DRAFT6, DRAFT7

    return _specification(kind) in (DRAFT3, DRAFT4, DRAFT6, DRAFT7)


def _specification(kind: type[Validator]) -> Any:  # noqa: ANN401 - of the library
    from referencing.jsonschema import specification_with

    return specification_with(cast("Any", kind.META_SCHEMA)["$schema"])


def short(text: str) -> str:
    """Return ``text`` on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_PROBLEM else f"{text[:_MAX_PROBLEM]} …"


@lru_cache(maxsize=64)
def _validator(schema: str) -> Validator:
    from jsonschema.validators import validator_for
    from referencing import Registry

    parsed: Any = json.loads(schema)
    kind = validator_for(parsed)
    kind.check_schema(parsed)
    _check_references(parsed, kind)
    # With a registry of its own, a reference to another place is an error instead of a download.
    empty: Registry[Any] = Registry()
    return kind(parsed, registry=empty)


def _check_references(schema: Any, kind: type[Validator]) -> None:  # noqa: ANN401 - any JSON value
    """Raise `UnusableSchema` unless all references lead to schemas, and none round in a circle."""
    from jsonschema_specifications import REGISTRY  # type: ignore[import-untyped]

    specification = _specification(kind)
    alone = ignores_siblings(kind)
    root = specification.create_resource(schema)
    waiting: list[tuple[Any, Any]] = [(root, REGISTRY.resolver_with_root(root))]
    same_value: dict[int, set[int]] = {}
    names: dict[tuple[int, int], str] = {}
    while waiting:
        resource, resolver = waiting.pop()
        part = resource.contents
        if not isinstance(part, dict) or id(cast("object", part)) in same_value:
            continue
        members = cast("dict[str, Any]", part)
        here = id(members)
        same_value[here] = set()
        for keyword in _REFERENCES:
            reference = members.get(keyword)
            if keyword not in kind.VALIDATORS or not isinstance(reference, str):
                continue
            found = _follow(resolver, reference, kind)
            target = id(found.contents)
            same_value[here].add(target)
            names[here, target] = reference
            waiting.append((specification.create_resource(found.contents), found.resolver))
        if alone and "$ref" in members:
            continue
        same_value[here].update(map(id, _of_same_value(members)))
        waiting.extend((inner, resolver.in_subresource(inner)) for inner in resource.subresources())
    _check_circles(same_value, names)


def _follow(resolver: Any, reference: str, kind: type[Validator]) -> Any:  # noqa: ANN401 - of the library
    from jsonschema.validators import validator_for
    from referencing.exceptions import Unresolvable

    try:
        found = resolver.lookup(reference)
    except (Unresolvable, ValueError):
        raise UnusableSchema(
            f"the reference {short(reference)!r} leads nowhere: nothing is fetched, so what it "
            "names has to be in the schema itself, as under '$defs'"
        ) from None
    contents = cast("object", found.contents)
    if not isinstance(contents, (dict, bool)):
        raise UnusableSchema(
            f"the reference {short(reference)!r} leads to something that is no schema"
        )
    if isinstance(contents, dict):  # which need not stand where schemas do
        schema = cast("dict[str, Any]", contents)
        validator_for(schema, default=kind).check_schema(schema)
    return found


def _of_same_value(members: Mapping[str, Any]) -> Iterator[object]:
    for name in _SAME_VALUE:
        yield members.get(name)
    for name in _SAME_VALUE_EACH:
        each = members.get(name)
        if isinstance(each, list):
            yield from cast("list[object]", each)
    for name in _SAME_VALUE_NAMED:
        named = members.get(name)
        if isinstance(named, dict):
            yield from cast("dict[str, object]", named).values()


def _check_circles(
    same_value: Mapping[int, set[int]], names: Mapping[tuple[int, int], str]
) -> None:
    try:
        TopologicalSorter(same_value).prepare()
    except CycleError as error:
        circle = cast("list[int]", error.args[1])  # each is where the one after it leads to
        steps = zip(circle[1:], circle, strict=False)
        name = next(names[step] for step in steps if step in names)
        raise UnusableSchema(
            f"the reference {short(name)!r} leads back to itself for the same value, so a check "
            "would never end: refer to it from inside 'properties' or 'items'"
        ) from None
