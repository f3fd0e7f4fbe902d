"""Options that say what a task is, shared by the commands that make tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

import typer

__all__ = ["BatchOption", "ConcurrencyOption", "TaskOptions", "key_values"]

_PANEL: Final = "The task"

BatchOption: TypeAlias = Annotated[
    str | None, typer.Option("--batch", "-b", metavar="NAME", help="All of this batch.")
]
ConcurrencyOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--concurrency",
        "-c",
        min=1,
        max=1000,
        metavar="N",
        help="Most tasks at the same time; default: 8.",
        show_default=False,
    ),
]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What holds for a task, or for every row of a batch that doesn't say otherwise."""

    platform: Annotated[
        str | None,
        typer.Option(
            "--platform",
            "-p",
            metavar="NAME",
            help="Who runs it; `perdure platforms` lists them.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="The platform's name of the model.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="The system prompt.", rich_help_panel=_PANEL),
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", help="Most tokens of output.", rich_help_panel=_PANEL
        ),
    ] = None
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="X", rich_help_panel=_PANEL)
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="Most time for one attempt; default: 300.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    max_attempts: Annotated[
        int | None,
        typer.Option(
            "--max-attempts",
            metavar="N",
            help="Most times a platform is asked; default: 5.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    recovery: Annotated[
        str | None,
        typer.Option(
            "--recovery",
            metavar="HOW",
            help="After a crash, where a call can't be picked up: restart, continue or fail.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="A parameter for the platform, as it is; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            metavar="NAME=VALUE",
            help="For finding it again; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    def constraints(self) -> dict[str, Any]:
        """Return the constraints that were given, by the names of their fields."""
        given = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "timeout_seconds": self.timeout,
            "max_attempts": self.max_attempts,
            "recovery": self.recovery,
        }
        return {name: value for name, value in given.items() if value is not None}

    def task_fields(self) -> dict[str, Any]:
        """Return the other fields of a task that were given.

        Raises:
            typer.BadParameter: An option or a label is no NAME=VALUE.
        """
        options = {name: _parsed(text) for name, text in key_values(self.option, "--option")}
        given = {
            "platform": self.platform,
            "system": self.system,
            "options": options,
            "labels": dict(key_values(self.label, "--label")),
        }
        return {name: value for name, value in given.items() if value}

    def check(self) -> None:
        """Raise an error where the options make no sense, whatever the task is.

        Raises:
            InvalidTask: A value isn't possible.
            UnknownPlatform: There is no such platform.
        """
        from perdure.platforms import Platforms
        from perdure.task import TaskConstraints

        TaskConstraints(**self.constraints())
        if self.platform is not None:
            Platforms().check(self.platform)


def key_values(given: Iterable[str] | None, option: str) -> list[tuple[str, str]]:
    """Return the pairs that `NAME=VALUE` stands for.

    Raises:
        typer.BadParameter: One of them has no name or no equals sign.
    """
    pairs: list[tuple[str, str]] = []
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{text!r} is no NAME=VALUE", param_hint=option)
        pairs.append((name.strip(), value))
    return pairs


def _parsed(text: str) -> Any:  # noqa: ANN401 - what JSON holds
    """Return what a value means: JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
