"""Reading what a server sent, by name and with suspicion: anything may be missing, or wrong."""

from __future__ import annotations

import re
from typing import Any, Final, cast

from perdure.text import check_json

__all__ = ["count_in", "list_in", "raw_form", "text_in", "value_in"]


_NO_MODEL: Final = object()
# No number of tokens; a sum of some of them still is one that can be stored.
_MOST: Final = 1 << 60
_DIGITS: Final = re.compile("[0-9]{1,18}")


def value_in(holder: object, name: str) -> object:
    """Return what a JSON object, or what an SDK made of it, has of that name.

    A model of pydantic takes 2 µs to say that it has none, which is asked of every piece of every
    answer: so its fields, and what came without a field, are looked at as the dicts they are.
    """
    if isinstance(holder, dict):
        return cast("dict[str, object]", holder).get(name)
    fields: dict[str, object] | None = getattr(holder, "__dict__", None)
    if fields is None:  # a text, a number, a list
        return None
    if name in fields:
        return fields[name]
    more: object = getattr(holder, "__pydantic_extra__", _NO_MODEL)
    if more is not _NO_MODEL:
        return cast("dict[str, object]", more).get(name) if more else None
    return getattr(holder, name, None)


def text_in(holder: object, name: str) -> str:
    """Return a text; empty where it is none."""
    value = value_in(holder, name)
    return value if isinstance(value, str) else ""


def list_in(holder: object, name: str) -> list[object]:
    """Return a list; empty where it is none."""
    value = value_in(holder, name)
    return cast("list[object]", value) if isinstance(value, list) else []


def count_in(holder: object, name: str) -> int | None:
    """Return a whole number from 0 on, also where it was sent as a text; None where it is none."""
    value = value_in(holder, name)
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    elif isinstance(value, str):
        value = int(value) if _DIGITS.fullmatch(value) else None
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return value if 0 <= value < _MOST else None


def raw_form(usage: object) -> dict[str, Any] | None:
    """Return the tokens in the server's own words; None where they can't be stored."""
    plain, dump = usage, getattr(usage, "model_dump", None)
    try:
        if dump is not None:
            plain = dump(mode="json", exclude_unset=True, warnings=False)
        if not isinstance(plain, dict):
            return None
        return cast("dict[str, Any]", check_json(cast("object", plain)))
    except ValueError:  # a number no database takes: the counts are what matters
        return None
