"""Numbers as people read them: `1,204`, `$0.0123`, `1.2 s`, `4.0 MiB`. Unknown is a dash."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["UNKNOWN", "count", "dollars", "of_these", "seconds", "size", "things"]

UNKNOWN: Final = "-"


def count(number: int | None) -> str:
    """Return a number with its thousands apart."""
    return UNKNOWN if number is None else f"{number:,}"


def things(number: int, name: str) -> str:
    """Return `1 event`, `1,204 events`: a number of things whose plural ends in s."""
    return f"{number:,} {name}" if number == 1 else f"{number:,} {name}s"


def dollars(amount: float | None) -> str:
    """Return US dollars: to the cent from one dollar on, else with three figures that count."""
    if amount is None:
        return UNKNOWN
    if amount == 0 or abs(amount) >= 1:
        return f"${amount:,.2f}"
    digits = 4
    while abs(amount) * 10 ** (digits - 2) < 1 and digits < 12:
        digits += 1
    return f"${amount:.{digits}f}"


def seconds(length: float | None) -> str:
    """Return a length of time: `340 ms`, `1.2 s`, `2 min 5 s`, `3 h 7 min`."""
    if length is None:
        return UNKNOWN
    if length < 0:
        return f"-{seconds(-length)}"
    if length < 1:
        return f"{round(length * 1000)} ms"
    if length < 60:
        return f"{length:.1f} s"
    minutes, rest = divmod(round(length), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def size(octets: int) -> str:
    """Return a size in bytes in the unit that fits: `812 bytes`, `4.0 MiB`."""
    if octets < 1024:
        return f"{octets} bytes"
    amount = float(octets)
    units = iter(("KiB", "MiB", "GiB"))
    while True:
        amount, unit = amount / 1024, next(units)
        if amount < 1024 or unit == "GiB":
            return f"{amount:,.1f} {unit}"


def of_these(parts: Iterable[tuple[int, str]]) -> str:
    """Return `3 completed, 1 failed`: what there is any of."""
    return ", ".join(f"{number:,} {name}" for number, name in parts if number)
