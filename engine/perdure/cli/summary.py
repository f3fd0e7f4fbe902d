"""What stands at the end of a run: how it went, where the results are, how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from perdure.cli.exits import ExitCode
from perdure.cli.figures import count, dollars, things
from perdure.cli.session import Session
from perdure.cli.terminal import one_line

if TYPE_CHECKING:
    from perdure.batch import Counts, Failures, Tally

__all__ = ["Summary", "cost"]

_MOST_FAILURES: Final = 3
_MOST_WORDS: Final = 200  # characters of an example


def cost(tally: Tally) -> str:
    """Return what it has cost, in words: what isn't known is never shown as 0."""
    if tally.unpriced == 0:
        return dollars(tally.cost_usd)
    if tally.priced == 0:
        return "cost unknown"
    return f"{dollars(tally.cost_usd)} and {tally.unpriced:,} of unknown cost"


@dataclass(frozen=True)
class Summary:
    """How a run has ended.

    Attributes:
        batch: Its name; None where it wasn't about one.
        tally: Where the tasks stand.
        counts: What came in, where rows did.
        out: Where the results are, if they were written to a file.
        failures: What failed tasks of the batch failed of.
        interrupted: Whether the user or the system ended it.
        again: The command that goes on.
    """

    batch: str | None
    tally: Tally
    again: str
    counts: Counts | None = None
    out: str | None = None
    failures: Sequence[Failures] = ()
    interrupted: bool = False

    @property
    def exit_code(self) -> ExitCode:
        """What the process should return."""
        if self.interrupted:
            return ExitCode.INTERRUPTED
        bad = self.counts.bad if self.counts is not None else 0
        unwell = self.tally.failed + self.tally.cancelled + self.tally.left + bad
        return ExitCode.SOME_FAILED if unwell else ExitCode.OK

    def as_json(self, session: Session) -> dict[str, Any]:
        """Return it for programs."""
        tally = self.tally
        return {
            "batch": self.batch,
            "database": session.shown_url,
            "out": self.out,
            "interrupted": self.interrupted,
            "rows": None if self.counts is None else asdict(self.counts),
            "tasks": {
                "pending": tally.pending,
                "running": tally.running,
                "completed": tally.completed,
                "failed": tally.failed,
                "cancelled": tally.cancelled,
            },
            "failures": [asdict(one) for one in self.failures],
            "tokens": tally.tokens,
            "cost_usd": None if tally.unpriced else tally.cost_usd,
        }

    def lines(self, session: Session) -> Iterator[str]:
        """Yield it in words."""
        tally = self.tally
        title = "" if self.batch is None else f"{self.batch}: "
        parts = [
            f"{count(tally.completed)} completed",
            f"{count(tally.failed)} failed",
            f"{count(tally.cancelled)} cancelled",
        ]
        if tally.left:
            parts.append(f"{count(tally.left)} not done")
        yield f"{title}{', '.join(parts)}; {count(tally.tokens)} tokens, {cost(tally)}"
        yield from self._about_failures()
        yield from self._about_rows()
        yield from self._how_to_go_on(session)
        yield from self._where_to_look(session)

    def _about_failures(self) -> Iterator[str]:
        for one in self.failures[:_MOST_FAILURES]:
            which = "" if one.tasks == 1 else ", such as"
            example = f"{which}: {one_line(one.example, _MOST_WORDS)}" if one.example else ""
            yield f"{count(one.tasks)} failed with {one.error_class}{example}"
        left = sum(one.tasks for one in self.failures[_MOST_FAILURES:])
        if left:
            yield f"{count(left)} failed with other errors"

    def _about_rows(self) -> Iterator[str]:
        counts = self.counts
        if counts is None:
            return
        if counts.bad:
            yield f"{things(counts.bad, 'row')} could not be run; stderr says which, and why."
        if counts.repeated:
            yield f"{things(counts.repeated, 'row')} came more than once; each runs once."
        if counts.other_defaults:
            yield (
                f"{things(counts.other_defaults, 'row')} had been submitted with other options, "
                "which they keep; another --name runs them with today's."
            )

    def _how_to_go_on(self, session: Session) -> Iterator[str]:
        if self.tally.left or self.interrupted:  # rows may be left that weren't read yet
            yield f"To go on: {self.again}"
        if (self.tally.failed or self.tally.cancelled) and self.batch is not None:
            which = [f"--{name}" for name in ("failed", "cancelled") if getattr(self.tally, name)]
            again = session.command_line("retry", "--batch", self.batch, *which)
            yield f"To run those again: {again}"

    def _where_to_look(self, session: Session) -> Iterator[str]:
        if self.out is not None and self.out != "-":
            yield f"Results{' so far' if self.tally.left else ''}: {self.out}"
        elif self.batch is not None and self.out is None:
            yield f"Results: {session.command_line('export', '--batch', self.batch)}"
        if self.batch is not None:
            name = self.batch.replace("'", "''")
            query = (
                "SELECT status, count(*) AS tasks, sum(output_tokens) AS tokens "
                f"FROM tasks WHERE batch = '{name}' GROUP BY status"
            )
            yield f"To look around: {_command(session, query)}"


def _command(session: Session, query: str) -> str:
    named = "" if session.db is None else f" --db {shlex.quote(session.shown_db)}"
    if any(character in query for character in '"$`\\!'):
        return f"perdure sql{named} {shlex.quote(query)}"
    return f'perdure sql{named} "{query}"'
