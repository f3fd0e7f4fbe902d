"""What a measurement is: rounds of ours and its rival, in turns, and what comes of them.

Machines differ, and so does one machine from minute to minute. So nothing is judged by itself: in
every round ours and its rival are measured one after the other, each round gives one figure (mostly
ours divided by the rival's), and the median of the rounds is what counts.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

__all__ = ["Relation", "Row", "Sample", "Target", "in_turns", "samples"]

Relation: TypeAlias = Literal["ratio", "difference", "value"]
"""How a round's figure is made: ours divided by the rival's, ours less the rival's, or ours."""

_AT_LEAST: Final = "at least"


@dataclass(frozen=True, slots=True)
class Sample:
    """One thing that was measured, once a round.

    Attributes:
        name: What.
        unit: Of the values, such as `events/s` or `ms`.
        values: One a round, in order.
    """

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the rounds."""
        return statistics.median(self.values)

    def as_json(self) -> dict[str, Any]:
        """Return it for the results file."""
        return {
            "name": self.name,
            "unit": self.unit,
            "median": rounded(self.median),
            "low": rounded(min(self.values)),
            "high": rounded(max(self.values)),
            "values": [rounded(value) for value in self.values],
        }


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure has to reach.

    Attributes:
        bound: Whether more or less is better.
        value: The bound itself.
        unit: Of the bound; `x` for ratios.
    """

    bound: Literal["at least", "at most"]
    value: float
    unit: str = "x"

    def met(self, figure: float) -> bool:
        """Return whether a figure reaches it."""
        return figure >= self.value if self.bound == _AT_LEAST else figure <= self.value

    def __str__(self) -> str:
        """Return it as people write it."""
        return f"{'≥' if self.bound == _AT_LEAST else '≤'} {self.value:g} {self.unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was compared, in few words.
        ours: Our side.
        rival: The other side, measured in the same rounds.
        relation: How the figure is made of the two.
        target: What the figure has to reach; None where it is only shown.
        note: Something to know when reading the figure.
    """

    what: str
    ours: Sample
    rival: Sample | None = None
    relation: Relation = "ratio"
    target: Target | None = None
    note: str = ""

    @property
    def figures(self) -> tuple[float, ...]:
        """One figure a round, made of what was measured within that round."""
        if self.relation == "value" or self.rival is None:
            return self.ours.values
        pairs = zip(self.ours.values, self.rival.values, strict=True)
        if self.relation == "ratio":
            return tuple(one / other for one, other in pairs)
        return tuple(one - other for one, other in pairs)

    @property
    def figure(self) -> float:
        """The median of the rounds' figures."""
        return statistics.median(self.figures)

    @property
    def unit(self) -> str:
        """The unit of the figure."""
        return "x" if self.relation == "ratio" else self.ours.unit

    def as_json(self) -> dict[str, Any]:
        """Return it for the results file."""
        figures = self.figures
        return {
            "what": self.what,
            "ours": self.ours.as_json(),
            "rival": self.rival and self.rival.as_json(),
            "relation": self.relation,
            "figure": rounded(self.figure),
            "figure_low": rounded(min(figures)),
            "figure_high": rounded(max(figures)),
            "figure_unit": self.unit,
            "target": self.target
            and {
                "bound": self.target.bound,
                "value": self.target.value,
                "unit": self.target.unit,
                "text": str(self.target),
            },
            "met": self.target and self.target.met(self.figure),
            "note": self.note,
        }


def in_turns(
    subjects: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, tuple[float, ...]]:
    """Measure every subject once a round, and return name -> one value a round.

    Each round begins with another subject, so that none always follows the same one. What one has
    left for the disk is written before the next begins, which would wait for it otherwise.
    """
    values: dict[str, list[float]] = {name: [] for name in subjects}
    names = list(subjects)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            os.sync()
            values[name].append(subjects[name]())
    return {name: tuple(measured) for name, measured in values.items()}


def samples(
    unit: str, subjects: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, Sample]:
    """Measure as `in_turns` and return name -> sample."""
    return {name: Sample(name, unit, values) for name, values in in_turns(subjects, rounds).items()}


def rounded(value: float) -> float:
    """Return ``value`` with the four digits that mean something."""
    return float(f"{value:.4g}")
