"""Tool calls as text: one JSON object a line, whatever the pieces."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from perdure_adapters._tools import ToolCallText

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    st.lists(
        st.tuples(st.text(), st.text(), st.dictionaries(st.text(), JSON), st.booleans()), max_size=3
    ),
    st.lists(st.integers(1, 30), min_size=1),
)
def test_each_line_is_a_call(calls: list[tuple[str, str, Any, bool]], sizes: list[int]) -> None:
    """However arguments are cut, and if they are spread over lines, each call is one line."""
    text = ToolCallText()
    written = ""
    cuts = itertools.cycle(sizes)
    for id_, name, arguments, spread in calls:
        written += text.begin(id_, name)
        rest = json.dumps(arguments, indent=2 if spread else None)
        while rest:
            cut = next(cuts)
            written += text.arguments(rest[:cut])
            rest = rest[cut:]
    written += text.close()
    assert text.close() == ""
    lines = [json.loads(line) for line in written.split("\n")[:-1]]
    assert lines == [{"id": i, "name": n, "arguments": a} for i, n, a, _ in calls]


def test_no_arguments() -> None:
    """A call whose arguments never came, or are empty, has none: an empty object."""
    text = ToolCallText()
    written = text.begin("1", "a") + text.begin("2", "b") + text.arguments(" ") + text.close()
    assert [json.loads(line)["arguments"] for line in written.splitlines()] == [{}, {}]
