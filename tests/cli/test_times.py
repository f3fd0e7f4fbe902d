"""Times, numbers and widths, as people read and write them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.cli.figures import dollars, seconds, size, things
from perdure.cli.moments import clock, day_and_clock, duration, how_long_ago, parse_moment
from perdure.cli.tables import cell_width, csv_line, fit, tab_line

NOW = datetime(2026, 11, 22, 13, 5, 30, tzinfo=UTC)


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kolkata"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """This machine's time zone."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("now", timedelta()),
        ("90s", timedelta(seconds=90)),
        ("45m", timedelta(minutes=45)),
        ("2h", timedelta(hours=2)),
        ("3d", timedelta(days=3)),
        ("1w", timedelta(weeks=1)),
        ("1d12h", timedelta(days=1.5)),
        ("0.5h", timedelta(minutes=30)),
        ("2h ago", timedelta(hours=2)),
        ("1 d ago", timedelta(days=1)),
        (" 2H ", timedelta(hours=2)),
    ],
)
def test_spans(text: str, before: timedelta) -> None:
    """A span counts back from now, whatever the time zone."""
    assert parse_moment(text, NOW) == NOW - before


def test_moments_with_a_zone(zone: str) -> None:
    """A moment that names its zone is that moment everywhere."""
    expected = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
    for text in ("2026-11-22T12:00Z", "2026-11-22 12:00:00+00:00", "2026-11-22T14:00+02:00"):
        assert parse_moment(text, NOW) == expected


def test_local_times(zone: str) -> None:
    """What names no zone is this machine's time."""
    here = NOW.astimezone()
    midnight = here.replace(hour=0, minute=0, second=0)
    assert parse_moment("today", NOW) == midnight
    assert parse_moment("yesterday", NOW) == midnight - timedelta(days=1)
    assert parse_moment(f"{here:%Y-%m-%d}", NOW) == midnight
    assert parse_moment("9:30", NOW) == midnight + timedelta(hours=9, minutes=30)
    assert parse_moment(f"{here:%Y-%m-%dT%H:%M:%S}", NOW) == NOW
    assert clock("2026-11-22T13:05:30.250000Z") == f"{here:%H:%M:%S}"
    assert clock("2026-11-22T13:05:30.250000Z", fraction=True) == f"{here:%H:%M:%S}.250"
    assert day_and_clock("2026-11-22T13:05:30.250000Z") == f"{here:%Y-%m-%d %H:%M:%S}"


@pytest.mark.parametrize(
    "text",
    ["", "soon", "2h3", "h", "-2h", "2026", "2026-02-30", "12:60", "24:00", "1e9d", "9" * 20 + "d"],
)
def test_no_times(text: str) -> None:
    """What is no time is refused, with what would be one."""
    with pytest.raises(ValueError, match="2026-11-22"):
        parse_moment(text, NOW)


@given(st.text())
def test_any_text(text: str) -> None:
    """Any text is a time in UTC or refused, and nothing else."""
    try:
        found = parse_moment(text, NOW)
    except ValueError:
        return
    assert found.utcoffset() == timedelta()


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (0, "0 s ago"),
        (119, "119 s ago"),
        (120, "2 min ago"),
        (7199, "119 min ago"),
        (7200, "2 h ago"),
        (172_800, "2 d ago"),
        (-30, "in 30 s"),
    ],
)
def test_how_long_ago(before: int, said: str) -> None:
    """In the unit that says enough."""
    assert how_long_ago((NOW - timedelta(seconds=before)).isoformat(), NOW) == said


def test_what_is_no_moment() -> None:
    """What somebody else wrote in a moment's place is shown as it is."""
    assert clock("whenever") == day_and_clock("whenever") == "whenever"
    assert clock(None) == how_long_ago("whenever") == ""
    assert duration("whenever", "2026-11-22T13:05:30Z") is None


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        (dollars(None), "-"),
        (dollars(0), "$0.00"),
        (dollars(1234.5), "$1,234.50"),
        (dollars(0.25), "$0.2500"),
        (dollars(0.0123), "$0.0123"),
        (dollars(0.0000123), "$0.0000123"),
        (seconds(None), "-"),
        (seconds(0.34), "340 ms"),
        (seconds(1.25), "1.2 s"),
        (seconds(125), "2 min 5 s"),
        (seconds(3600 * 30), "30 h 0 min"),
        (seconds(-1.5), "-1.5 s"),
        (size(812), "812 bytes"),
        (size(4 * 2**20), "4.0 MiB"),
        (size(5000 * 2**30), "5,000.0 GiB"),
        (things(1, "event"), "1 event"),
        (things(1204, "event"), "1,204 events"),
    ],
)
def test_figures(shown: str, said: str) -> None:
    """Numbers have their unit; what is unknown is a dash and not 0."""
    assert shown == said


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=12),
    st.integers(1, 300),
    st.sets(st.integers(0, 11)),
)
def test_fit(wanted: list[int], room: int, kept: set[int]) -> None:
    """Widths fit, none grows, none is cut below what can be read, and the kept ones stay."""
    widths = fit(wanted, room, sorted(kept))
    if widths is None:
        floor = [w if i in kept else min(w, 8) for i, w in enumerate(wanted)]
        assert sum(floor) > room
        return
    assert sum(widths) <= max(room, 0) or widths == wanted
    assert sum(widths) in (sum(wanted), room)
    for i, (width, before) in enumerate(zip(widths, wanted, strict=True)):
        assert width <= before
        assert width == before or width >= 8
        assert i not in kept or width == before


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1))
def test_one_line_each(values: list[str]) -> None:
    """Tab-separated text has as many lines and fields as there are rows and values."""
    import csv
    import io

    line = tab_line(values)
    assert line.count("\n") == 1
    assert line.count("\t") == len(values) - 1
    back = [v.replace("\\\\", "\0") for v in line[:-1].split("\t")]
    back = [v.replace(r"\t", "\t").replace(r"\n", "\n").replace(r"\r", "\r") for v in back]
    if not any("\0" in value for value in values):
        assert [v.replace("\0", "\\") for v in back] == values
    assert next(csv.reader(io.StringIO(csv_line(values), newline=""))) == values


def test_wide_characters() -> None:
    """What takes two columns counts as two."""
    assert cell_width("abc") == 3
    assert cell_width("日本") == 4
