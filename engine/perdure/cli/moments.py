"""Times as people write and read them: `2h`, `yesterday`, `2026-11-22 13:05`; "3 minutes ago".

What people write without a time zone is in this machine's zone, and so is what they are shown on a
terminal. What is written for programs is UTC.
"""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

__all__ = ["clock", "day_and_clock", "duration", "how_long_ago", "parse_moment"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SPAN: Final = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+")
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")


def parse_moment(text: str, now: datetime | None = None) -> datetime:
    """Return the moment that ``text`` stands for, in UTC.

    Args:
        text: A date or a moment in ISO 8601 (`2026-11-22`, `2026-11-22T13:05Z`), a time of today
            (`13:05`), a span before now (`90s`, `45m`, `2h`, `3d`, `1w`, `1d12h`, also with `ago`),
            or `now`, `today`, `yesterday` (their beginning).
        now: The present moment; None takes the clock's.

    Raises:
        ValueError: It can't be read; the message says what can.
    """
    here = (now or datetime.now(UTC)).astimezone()
    said = " ".join(text.lower().split())
    try:
        found = _parse(said, here)
    except (ValueError, OverflowError):
        found = None
    if found is None:
        raise ValueError(
            f"{text!r} is no time: give a date (2026-11-22), a moment (2026-11-22T13:05), "
            "a span before now (90s, 2h, 3d, 1w), today or yesterday"
        )
    return found


def _parse(said: str, here: datetime) -> datetime | None:
    match said:
        case "now":
            return here.astimezone(UTC)
        case "today":
            return _begin(here.date())
        case "yesterday":
            return _begin(here.date() - timedelta(days=1))
        case _:
            pass
    span = said.removesuffix("ago").replace(" ", "")
    if _SPAN.fullmatch(span):
        seconds = sum(float(n) * _UNITS[unit] for n, unit in _PART.findall(span))
        return here.astimezone(UTC) - timedelta(seconds=seconds)
    if re.fullmatch(r"\d{1,2}:\d{2}(:\d{2})?", said):
        at = time.fromisoformat(said.zfill(5))
        return datetime.combine(here.date(), at).astimezone(UTC)
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", said):
        return _begin(date.fromisoformat(said))
    return datetime.fromisoformat(said.upper()).astimezone(UTC) if "-" in said else None


def _begin(day: date) -> datetime:
    return datetime.combine(day, time()).astimezone(UTC)


def read(text: str | None) -> datetime | None:
    """Return the moment that the database has stored as ``text``; None where it is none."""
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:  # only somebody else can have written it
        return None


def clock(text: str | None, *, fraction: bool = False) -> str:
    """Return a stored moment as this machine's time of day, or as it is where it is no moment."""
    moment = read(text)
    if moment is None:
        return text or ""
    shown = moment.astimezone().isoformat(timespec="milliseconds" if fraction else "seconds")
    return shown[11:23] if fraction else shown[11:19]


def day_and_clock(text: str | None) -> str:
    """Return a stored moment as this machine's day and time of day."""
    moment = read(text)
    if moment is None:
        return text or ""
    return moment.astimezone().isoformat(sep=" ", timespec="seconds")[:19]


def how_long_ago(text: str | None, now: datetime | None = None) -> str:
    """Return how long ago a stored moment was: `12 s ago`, `3 min ago`, `2 h ago`, `5 d ago`."""
    moment = read(text)
    if moment is None:
        return ""
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    if seconds < 0:
        return f"in {_rough(-seconds)}"
    return f"{_rough(seconds)} ago"


def _rough(seconds: float) -> str:
    for size, unit in ((86_400 * 2, "d"), (3600 * 2, "h"), (120, "min")):
        if seconds >= size:
            return f"{int(seconds // {'d': 86_400, 'h': 3600, 'min': 60}[unit])} {unit}"
    return f"{int(seconds)} s"


def duration(began: str | None, ended: str | None) -> float | None:
    """Return the seconds between two stored moments; None where one is missing."""
    first, last = read(began), read(ended)
    return None if first is None or last is None else (last - first).total_seconds()
