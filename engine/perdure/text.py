"""Text that can be stored everywhere: what is let in, what is mended, what is shown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final, TypeAlias, Union, cast

__all__ = [
    "JsonObject",
    "JsonValue",
    "check_json",
    "check_text",
    "clean_json",
    "clean_text",
    "is_storable",
    "one_line",
    "printable",
]

JsonValue: TypeAlias = Union[bool, int, float, str, "list[JsonValue]", "dict[str, JsonValue]", None]
JsonObject: TypeAlias = dict[str, JsonValue]

# PostgreSQL stores no NUL in text, and no UTF-8 encoder takes a lone surrogate.
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
# C0 (but for tab and newline), DEL and C1: what a terminal would obey instead of show.
# Bidirectional overrides are there too: they let text pretend to be other text.
_CONTROL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LARGEST_INT: Final = 2**63 - 1
_MAX_DEPTH: Final = 64


def check_text(text: str) -> str:
    """Return ``text``, or raise ``ValueError`` naming the character that can't be stored."""
    found = _UNSTORABLE.search(text)
    if found is None:
        return text
    what = "a NUL character" if found[0] == "\x00" else "a lone surrogate (invalid UTF-8)"
    raise ValueError(f"contains {what} at character {found.start()}; remove it")


def is_storable(value: object) -> bool:
    """Return whether ``value`` is text that can be in a database, so that one can ask for it."""
    return isinstance(value, str) and _UNSTORABLE.search(value) is None


def clean_text(text: str) -> str:
    """Return ``text`` with what can't be stored replaced by U+FFFD.

    For what platforms send: an answer that was paid for is never refused for one bad character.
    """
    return text if text.isascii() and "\x00" not in text else _UNSTORABLE.sub("\ufffd", text)


def clean_json(value: object) -> object:
    """Return ``value`` with all text in it as `clean_text` leaves it; what is no JSON stays."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        members = cast("dict[object, object]", value)
        return {clean_json(key): clean_json(item) for key, item in members.items()}
    if isinstance(value, (list, tuple)):
        return [clean_json(item) for item in cast("Iterable[object]", value)]
    return value


def printable(text: str) -> str:
    r"""Return ``text`` with terminal escapes made visible (``\x1b``), newlines and tabs kept."""
    return _CONTROL.sub(_visible, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Return ``text`` on one line, with terminal escapes made visible."""
    return " ".join(printable(text).split())


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def check_json(value: object, depth: int = 0) -> JsonValue:
    """Return ``value`` in the form in which every database gives it back unchanged.

    Raises:
        ValueError: It is no JSON, or holds a number or text that can't be stored.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"is nested more than {_MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return check_text(str(value))
    if isinstance(value, int):
        if abs(value) > _LARGEST_INT:
            bits = value.bit_length() + 1
            raise ValueError(f"holds an integer of {bits} bits, beyond 64; store it as text")
        return int(value)
    if isinstance(value, float):
        return _check_float(value)
    if isinstance(value, dict):
        members = cast("dict[object, object]", value)
        return {_check_key(key): check_json(item, depth + 1) for key, item in members.items()}
    if isinstance(value, (list, tuple)):
        items = cast("Iterable[object]", value)
        return [check_json(item, depth + 1) for item in items]
    raise ValueError(f"holds a {type(value).__name__}, which is no JSON value")


def _check_float(value: float) -> int | float:
    if not math.isfinite(value):
        raise ValueError(f"holds {value}, which is no JSON number")
    # JSONB keeps numbers as decimals: a whole float beyond 2**53 and a negative zero would come
    # back as something else and break the digest.
    if abs(value) > _LARGEST_INT:
        raise ValueError(f"holds the number {value}, beyond 64 bits; store it as text")
    if value == 0 or (value.is_integer() and abs(value) >= 2**53):
        return int(value)
    return value


def _check_key(key: object) -> str:
    if not isinstance(key, str):
        raise ValueError(f"has the key {key!r}; JSON keys are text")  # noqa: TRY004 - input error
    return check_text(key)
