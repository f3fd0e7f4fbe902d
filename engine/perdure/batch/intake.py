"""Rows into the log, in groups: the new ones submitted, the known ones left as they are."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import sqlalchemy as sa

from perdure.batch.reading import RawRow
from perdure.batch.rows import (
    Defaults,
    Row,
    identify,
    make_task,
    remarks,
    same_content,
    told_id,
)
from perdure.batch.runs import Run, find_unsettled, select_where
from perdure.batch.source import gather
from perdure.engine import Engine
from perdure.errors import InvalidTask, PerdureError
from perdure.ids import retry_key
from perdure.store.database import Database
from perdure.store.schema import log_head, tasks
from perdure.task import Task

__all__ = ["Counts", "Intake", "Taken"]

_MOST_REMARKS: Final = 20
_PLACES: Final = sa.select(tasks.c.stream_id)

_OTHER_CONTENT: Final = (
    "the batch already has a row of this id with other content, and keeps it; "
    "give the row another id, or run it under another --name"
)
_LIKE_A_BAD_ROW: Final = (
    "line {} has the same id with other content, and can't be run: give this row another id"
)


class Taken(NamedTuple):
    """What became of one row of the input.

    Attributes:
        line: Where it begins.
        id: Its own id, if it has one.
        key: The key of its task; None where it can't be run.
        problem: Why it can't.
    """

    line: int
    id: str | None
    key: str | None
    problem: str | None


@dataclass(slots=True)
class Counts:
    """What came in.

    Attributes:
        rows: All of them.
        new: Submitted now.
        retried: Submitted now, as a new run of a row that had failed or was cancelled.
        known: In the database already.
        repeated: The same as one that came before it in this input.
        other_defaults: Known or repeated, and submitted with other defaults than today's.
        bad: They can't be run.
    """

    rows: int = 0
    new: int = 0
    retried: int = 0
    known: int = 0
    repeated: int = 0
    other_defaults: int = 0
    bad: int = 0


class _BadRow(NamedTuple):
    line: int
    id: str | None
    problem: str


_Identified: TypeAlias = Row | _BadRow


class Intake:
    """Takes the rows of one batch in.

    Args:
        engine: Where they go.
        batch: The batch's name.
        defaults: What holds for rows that don't say otherwise.
        retry: Run rows again whose latest run failed or was cancelled.
        on_taken: Called with what became of rows, group by group in the order of the input.
        on_remark: Called, once each, with what is odd about rows that can be run all the same.
    """

    def __init__(
        self,
        engine: Engine,
        batch: str,
        defaults: Defaults | None = None,
        *,
        retry: bool = False,
        on_taken: Callable[[Sequence[Taken]], None] = lambda _taken: None,
        on_remark: Callable[[str], None] = lambda _remark: None,
    ) -> None:
        self.counts = Counts()
        self._engine = engine
        self._batch = batch
        self._defaults = defaults or Defaults()
        self._retry = retry
        self._on_taken = on_taken
        self._on_remark = on_remark
        self._remarks: set[str] = set()
        self._began_at = 0
        self._ours: list[tuple[int, int]] = []

    async def take(self, rows: Iterator[RawRow]) -> None:
        """Take all rows in, as they come.

        Raises:
            InvalidTask: The input makes no sense as a whole.
            StoreError: The database can't do its part; what was taken before is safe.
        """
        self._began_at = await _head(self._engine.database)
        async with aclosing(gather(rows, self._identify)) as groups:
            async for group in groups:
                await self._take_group(group)

    def _identify(self, raw: RawRow) -> _Identified:
        try:
            return identify(raw, self._batch, self._defaults)
        except InvalidTask as error:
            return _BadRow(raw.line, told_id(raw.fields.get("id")), str(error))

    async def _take_group(self, group: Sequence[_Identified]) -> None:
        firsts = _firsts(group)
        if len(firsts) < len(group):  # what can't be run must not speak for those of the same id
            group = self._without_bad_ones(group, firsts)
            firsts = _firsts(group)
        database = self._engine.database
        fingerprints = {key: row.fingerprint for key, row in firsts.items()}
        unsettled = await find_unsettled(database, fingerprints, self._began_at)
        self.counts.known += len(firsts) - len(unsettled)
        problems = await self._decide({key: (firsts[key], unsettled[key]) for key in unsettled})
        if len(firsts) == len(group) and not problems:  # as most are, so be quick about it
            taken = [Taken(row.line, row.id, key, None) for key, row in firsts.items()]
        else:
            taken = [self._taken(row, firsts, problems) for row in group]
        self.counts.rows += len(taken)
        self.counts.bad += sum(one.problem is not None for one in taken)
        self._on_taken(taken)

    def _without_bad_ones(
        self, group: Sequence[_Identified], firsts: Mapping[str, Row]
    ) -> list[_Identified]:
        """Return the group with what can't be run told apart where several rows have one key."""
        several = {row.key for row in group if isinstance(row, Row) and row is not firsts[row.key]}
        found: list[_Identified] = []
        for row in group:
            if isinstance(row, Row) and row.key in several:
                try:
                    make_task(row, self._batch, self._defaults)
                except InvalidTask as error:
                    found.append(_BadRow(row.line, row.id, str(error)))
                    continue
            found.append(row)
        return found

    async def _decide(self, rows: Mapping[str, tuple[Row, Run | None]]) -> dict[str, str]:
        """Submit what is to be run; returns key -> problem for what can't be."""
        wanted: dict[str, Task] = {}
        problems: dict[str, str] = {}
        for key, (row, run) in rows.items():
            if run is None or self._is_retried(run):
                try:
                    wanted[key] = self._make_task(row, run)
                except InvalidTask as error:
                    problems[key] = str(error)
            elif not self._is_known(row, run):
                problems[key] = _OTHER_CONTENT
        outcomes = await self._engine.submit_tasks(wanted.values()) if wanted else []
        raced: dict[str, str] = {}
        new: list[str] = []
        for (key, task), outcome in zip(wanted.items(), outcomes, strict=True):
            if isinstance(outcome, PerdureError):
                problems[key] = str(outcome)
                continue
            if not outcome.new:
                raced[key] = rows[key][0].fingerprint
                continue
            new.append(outcome.task_id)
            if task.retry_of is None:
                self.counts.new += 1
            else:
                self.counts.retried += 1
        await self._note_ours(new)
        if raced:  # another process has submitted them in the same moment
            for key, run in (await find_unsettled(self._engine.database, raced, 0)).items():
                if run is not None and not self._is_known(rows[key][0], run):
                    problems[key] = _OTHER_CONTENT
        return problems

    async def _note_ours(self, new: Sequence[str]) -> None:
        """Note which places in the log this group has got: one range, as it was one commit."""
        if new:
            database = self._engine.database
            places = await select_where(database, _PLACES, tasks.c.task_id, (new[0], new[-1]))
            ordered = sorted(place[0] for place in places)
            self._ours.append((ordered[0], ordered[-1]))

    def _is_ours(self, run: Run) -> bool:
        """Return whether a run was submitted for this very input, and not before or by others."""
        index = bisect_right(self._ours, (run.stream_id, sys.maxsize)) - 1
        return index >= 0 and run.stream_id <= self._ours[index][1]

    # -- one row ---------------------------------------------------------------------------------

    def _is_known(self, row: Row, run: Run) -> bool:
        """Return whether a run that is in the database is one of this very row."""
        if run.fingerprint != row.fingerprint:
            if not same_content(run.fingerprint, row.fingerprint):
                return False
            self.counts.other_defaults += 1
        if self._is_ours(run):  # the same as a row that came some groups ago
            self.counts.repeated += 1
        else:
            self.counts.known += 1
        return True

    def _taken(
        self, row: _Identified, firsts: Mapping[str, Row], problems: Mapping[str, str]
    ) -> Taken:
        if isinstance(row, _BadRow):
            return Taken(row.line, row.id, None, row.problem)
        problem = problems.get(row.key)
        first = firsts[row.key]
        if row is not first:
            if not same_content(row.fingerprint, first.fingerprint):
                problem = _OTHER_CONTENT if problem is None else _LIKE_A_BAD_ROW.format(first.line)
            elif problem is None:
                self.counts.repeated += 1
        return Taken(row.line, row.id, None if problem else row.key, problem)

    def _is_retried(self, run: Run) -> bool:
        # What has failed since this input began was run for it, or for somebody else who retries.
        return self._retry and run.unsuccessful and run.stream_id <= self._began_at

    def _make_task(self, row: Row, before: Run | None) -> Task:
        task = make_task(row, self._batch, self._defaults)
        for remark in remarks(row):
            self._remark(remark)
        if before is None:
            return task
        # The row as it is today: what made it fail may be what was changed.
        link = {"retry_of": before.task_id, "key": retry_key(before.task_id)}
        return task.model_copy(update=link)

    def _remark(self, remark: str) -> None:
        if remark not in self._remarks and len(self._remarks) < _MOST_REMARKS:
            self._remarks.add(remark)
            self._on_remark(remark)


def _firsts(group: Sequence[_Identified]) -> dict[str, Row]:
    """Return key -> the first row that has it."""
    found: dict[str, Row] = {}
    for row in group:
        if isinstance(row, Row):
            found.setdefault(row.key, row)
    return found


async def _head(database: Database) -> int:
    """Return the position of the last event in the log."""
    (row,) = await database.rows(sa.select(log_head.c.position))
    return int(row["position"])
