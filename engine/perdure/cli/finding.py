"""Which tasks are meant: the filters that several commands share, and ids given in part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final, TypeAlias

import typer

from perdure.cli.moments import parse_moment
from perdure.cli.options import key_values
from perdure.errors import PerdureError, TaskNotFound
from perdure.store.readonly import Reader, iso

__all__ = [
    "BatchOption",
    "FilterOptions",
    "Filters",
    "IdArgument",
    "IdsArgument",
    "Status",
    "resolve",
]

_PANEL: Final = "Which tasks"
_MOST_CANDIDATES: Final = 5


class Status(StrEnum):
    """The statuses that can be asked for. `TaskStatus` without loading pydantic for it."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


BatchOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--batch", "-b", metavar="NAME", help="Of this batch.", rich_help_panel=_PANEL),
]
IdsArgument: TypeAlias = Annotated[
    list[str],
    typer.Argument(metavar="ID...", help="Ids of tasks, or their beginnings or endings."),
]
IdArgument: TypeAlias = Annotated[
    str, typer.Argument(metavar="ID", help="A task's id, or its beginning or ending.")
]


@dataclass(frozen=True, slots=True)
class Filters:
    """Which tasks; everything left out is no restriction. `FilterOptions` says what they mean."""

    statuses: tuple[Status, ...] = ()
    platform: str | None = None
    batch: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    since: datetime | None = None
    until: datetime | None = None
    search: str | None = None
    latest: bool = False

    def where(self, reader: Reader) -> tuple[str, dict[str, object]]:
        """Return the condition on `tasks AS t` and its parameters, for queries of this reader."""
        found: dict[str, object] = {}
        parts = list(self._conditions(reader, found))
        return " AND ".join(parts) or "true", found

    def _conditions(self, reader: Reader, found: dict[str, object]) -> Iterator[str]:
        if self.statuses:
            # Spelt out, not as parameters: only then SQLite sees that a partial index serves.
            if {*self.statuses} <= {Status.FAILED, Status.CANCELLED}:
                yield "t.status IN ('failed', 'cancelled')"
            yield f"t.status IN ({', '.join(repr(str(status)) for status in self.statuses)})"
        for name, value in (("platform", self.platform), ("batch", self.batch)):
            if value is not None:
                found[name] = value
                yield f"t.{name} = :{name}"
        if self.since is not None:
            found["since"] = iso(self.since)
            yield "t.submitted_at >= :since"
        if self.until is not None:
            found["until"] = iso(self.until)
            yield "t.submitted_at < :until"
        for number, (name, value) in enumerate(self.labels.items()):
            found[f"name{number}"], found[f"value{number}"] = name, value
            yield reader.has_label(f"name{number}", f"value{number}")
        if self.latest:
            yield "NOT EXISTS (SELECT 1 FROM tasks AS again WHERE again.retry_of = t.task_id)"
        if self.search is not None:
            columns = ("t.prompt", "t.output", "t.partial_output")
            yield reader.mentions(columns, self.search, found)


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """The options that say which tasks are meant."""

    status: Annotated[
        list[Status] | None,
        typer.Option(
            "--status",
            "-s",
            metavar="STATUS",
            help="pending, running, completed, failed or cancelled; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    platform: Annotated[
        str | None,
        typer.Option(
            "--platform", "-p", metavar="NAME", help="Of this platform.", rich_help_panel=_PANEL
        ),
    ] = None
    batch: BatchOption = None
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="NAME=VALUE",
            help="With this label; repeatable, all of them count.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="WHEN",
            help="Submitted at that time or later: 2026-11-22, 2026-11-22T13:05, 13:05, 2h, 3d, "
            "yesterday.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    until: Annotated[
        str | None,
        typer.Option(
            "--until", metavar="WHEN", help="Submitted before that time.", rich_help_panel=_PANEL
        ),
    ] = None
    search: Annotated[
        str | None,
        typer.Option(
            "--search",
            metavar="TEXT",
            help="With this text in the prompt or the output, in upper or lower case.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    latest: Annotated[
        bool,
        typer.Option("--latest", help="Without tasks that were run again.", rich_help_panel=_PANEL),
    ] = False

    def filters(self) -> Filters:
        """Return what the options mean.

        Raises:
            typer.BadParameter: One of them makes no sense.
        """
        return Filters(
            statuses=tuple(dict.fromkeys(self.status or ())),
            platform=self.platform,
            batch=self.batch,
            labels=dict(key_values(self.label, "--label")),
            since=_moment(self.since, "--since"),
            until=_moment(self.until, "--until"),
            search=self.search or None,
            latest=self.latest,
        )


def _moment(text: str | None, option: str) -> datetime | None:
    try:
        return None if text is None else parse_moment(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", r"\%").replace("_", r"\_")


def resolve(reader: Reader, given: str) -> str:
    """Return the id of the one task that ``given`` stands for.

    It is a whole id, the beginning of one, its last part (the eight hexadecimal characters) or the
    beginning of that, or several last parts.

    Raises:
        TaskNotFound: There is no such task.
        PerdureError: There are several; the message names them.
    """
    if reader.one("SELECT 1 FROM streams WHERE task_id = ?", (given,)) is not None:
        return given
    candidates: list[str] = []
    for candidate in _candidates(reader, given):
        if candidate not in candidates:
            candidates.append(candidate)
        if len(candidates) > _MOST_CANDIDATES:
            break
    if not candidates:
        raise TaskNotFound(given)
    if len(candidates) > 1:
        named = ", ".join(candidates[:_MOST_CANDIDATES])
        more = " and more" if len(candidates) > _MOST_CANDIDATES else ""
        raise PerdureError(f"{given!r} is the id of several tasks: {named}{more}; give more of it")
    return candidates[0]


def _candidates(reader: Reader, given: str) -> Iterator[str]:
    if not given:
        return
    beginning = "SELECT task_id FROM streams WHERE task_id >= ? AND task_id < ? ORDER BY task_id"
    for (task_id,) in reader.rows(beginning, (given, f"{given}\U0010ffff")):
        yield task_id
    inside = r"SELECT task_id FROM streams WHERE task_id LIKE ? ESCAPE '\' ORDER BY task_id"
    for (task_id,) in reader.rows(inside, (rf"%\_{_escaped(given)}%",)):
        last = task_id.rpartition("_")[2]
        if last.startswith(given) or task_id.endswith(f"_{given}"):
            yield task_id
