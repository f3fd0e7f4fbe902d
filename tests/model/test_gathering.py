"""What has gathered between an adapter and the log: order, places, and the whole text."""

from __future__ import annotations

from hashlib import sha256
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.events import Chunk, ChunkKind, Event, FileCreated
from perdure.gathering import Gathering

KINDS: tuple[ChunkKind, ...] = get_args(ChunkKind)
PIECES = st.builds(
    Chunk,
    text=st.text(max_size=4),
    kind=st.sampled_from(KINDS),
    cursor=st.none() | st.integers(0, 99).map(str),
)
FILES = st.builds(FileCreated, path=st.text(min_size=1, max_size=3))


@given(st.lists(st.tuples(PIECES | FILES, st.booleans())), st.text(max_size=5))
def test_nothing_is_lost_or_moved(steps: list[tuple[Event, bool]], before: str) -> None:
    """However often it is taken: every piece in its place, in order, files in between."""
    before = before.replace("\x00", "")
    gathering = Gathering({"text": len(before)}, before, keep=True)
    taken: list[Event] = []
    for event, take in steps:
        if isinstance(event, Chunk):
            given = gathering.add_piece(event.text, event.kind, event.cursor)
            assert given == bool(event.text)
        else:
            gathering.add(event)
        if take:
            taken += gathering.take()
            assert gathering.characters == 0
    said = "".join(
        event.text for event, _ in steps if isinstance(event, Chunk) and event.kind == "text"
    ).replace("\x00", "\ufffd")
    assert gathering.text() == before + said
    taken += gathering.take()
    assert gathering.text() == before + said
    lengths = dict.fromkeys(KINDS, 0) | {"text": len(before)}
    for event in taken:
        if isinstance(event, Chunk):
            assert event.offset == lengths[event.kind]
            assert event.text
            lengths[event.kind] += len(event.text)
    assert [e for e in taken if isinstance(e, FileCreated)] == [
        e for e, _ in steps if isinstance(e, FileCreated)
    ]
    assert {kind: gathering.length(kind) for kind in KINDS} == lengths
    assert gathering.digest() == sha256((before + said).encode()).hexdigest()


@pytest.mark.parametrize("take_between", [True, False])
def test_the_cursor_goes_with_the_last_piece(take_between: bool) -> None:
    """Also one that came without text, and was given no piece to go with yet."""
    gathering = Gathering({}, "", keep=False)
    gathering.add_piece("", "text", "7")
    if take_between:
        assert gathering.take() == []
    gathering.add_piece("a", "text", None)
    gathering.add_piece("b", "reasoning", None)
    assert [(e.text, e.cursor) for e in gathering.take() if isinstance(e, Chunk)] == [
        ("a", None),
        ("b", "7"),
    ]


def test_events_without_text_count_too() -> None:
    """So that an adapter that yields nothing else has to wait for the log as well."""
    gathering = Gathering({}, "", keep=False)
    gathering.add(FileCreated(path="a"))
    one = gathering.characters
    assert one > 1
    gathering.add(FileCreated(path="a" * 1000))
    assert gathering.characters == 2 * one + 999
    gathering.take()
    assert gathering.characters == 0
