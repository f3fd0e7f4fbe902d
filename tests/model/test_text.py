"""Text and JSON at the border: what is let in, mended, and shown."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.text import check_json, check_text, clean_text, one_line, printable

any_text = st.text(st.characters(exclude_categories=()))
any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | st.sampled_from([-0.0, 2.0**53, 2.0**62, 2.0**63, 2**63, -(2**63), 1e300, 5e-324]),
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner) | st.tuples(inner, inner),
    max_leaves=10,
)


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and of the same types, all the way down."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(value, other[key]) for key, value in one.items())
        )
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


class TestCheckJson:
    """What was checked comes back from every database as it was."""

    @given(any_json)
    def test_what_passes_survives_a_round_trip(self, value: Any) -> None:
        """What is let in is the same, types included, after JSON was written and read."""
        try:
            checked = check_json(value)
        except ValueError:
            return
        assert same(checked, orjson.loads(orjson.dumps(checked)))
        assert same(checked, json.loads(json.dumps(checked)))
        assert check_json(checked) == checked

    @given(any_json)
    def test_what_passes_survives_numbers_that_are_decimals(self, value: Any) -> None:
        """PostgreSQL's JSONB keeps numbers as decimals; what is let in is the same afterwards."""
        try:
            checked = check_json(value)
        except ValueError:
            return
        text = orjson.dumps(checked)
        assert orjson.loads(text) == checked

        def as_jsonb(item: Any) -> Any:
            """Do to numbers what a decimal does: -0.0 and exponents are gone."""
            if isinstance(item, float):
                return float(f"{item:.400f}".rstrip("0")) if item else 0
            if isinstance(item, list):
                return [as_jsonb(inner) for inner in item]
            if isinstance(item, dict):
                return {key: as_jsonb(inner) for key, inner in item.items()}
            return item

        assert orjson.dumps(as_jsonb(checked)) == text

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e19, 2**63, -(2**63)])
    def test_numbers_that_no_database_keeps(self, value: float) -> None:
        """Numbers beyond 64 bits and numbers that are none are refused."""
        with pytest.raises(ValueError, match="holds"):
            check_json({"deep": [value]})

    @pytest.mark.parametrize("value", [0, -0.0, 2**63 - 1, -(2**63) + 1, 0.1, 1e-320, 2.0**60])
    def test_numbers_that_every_database_keeps(self, value: float) -> None:
        """All others are let in, and are equal to what was given."""
        assert check_json(value) == value

    def test_kinds_that_are_no_json(self) -> None:
        """A subclass becomes what it stands for; what stands for nothing in JSON is refused."""

        class Name(str):
            pass

        assert type(check_json(Name("x"))) is str
        with pytest.raises(ValueError, match="complex"):
            check_json(1j)


class TestText:
    """Characters that can't be stored, or that a terminal would obey."""

    @given(any_text)
    def test_checked_text_can_be_encoded(self, text: str) -> None:
        """What passes is the very same, is UTF-8 and holds no NUL; all else is refused."""
        try:
            assert check_text(text) is text
        except ValueError:
            assert "\x00" in text or any(unicodedata.category(c) == "Cs" for c in text)
        else:
            assert b"\x00" not in text.encode()

    @given(any_text)
    def test_cleaned_text_keeps_its_length(self, text: str) -> None:
        """Mending replaces one character by one, so offsets hold; good text isn't touched."""
        cleaned = clean_text(text)

        assert len(cleaned) == len(text)
        assert check_text(cleaned) == cleaned
        assert clean_text(cleaned) == cleaned
        for before, after in zip(text, cleaned, strict=True):
            assert after == before or after == "\ufffd"

    @given(any_text)
    def test_nothing_printed_is_obeyed(self, text: str) -> None:
        """No control character but newline and tab, and no surrogate, reaches a terminal."""
        shown = printable(text)

        assert not [c for c in shown if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")]
        shown.encode()
        assert printable(shown) == shown

    @given(any_text)
    def test_one_line_is_one_line(self, text: str) -> None:
        """Whatever is in it, it is at most one line, and nothing a terminal would obey."""
        assert len(one_line(text).splitlines()) <= 1
        assert printable(one_line(text)) == one_line(text)

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
            ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
            ("\x9b2J", r"\x9b2J"),
            ("a\rb", r"a\x0db"),
            ("a\r\nb\tc", "a\nb\tc"),
            ("\u202egnp.exe", r"\u202egnp.exe"),
            ("\u2066x\u2069", r"\u2066x\u2069"),
            ("\udcff", r"\udcff"),
            ("naïve 日本 👍", "naïve 日本 👍"),
        ],
    )
    def test_escapes_are_shown(self, text: str, shown: str) -> None:
        """Escape sequences and overrides of direction become visible; all else stays."""
        assert printable(text) == shown
