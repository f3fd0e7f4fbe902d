"""Options that say what a task is, shared by the commands that make tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer

from perdure.namedfile import read_file

__all__ = ["BatchOption", "ConcurrencyOption", "TaskOptions", "key_values"]

_PANEL: Final = "The task"
_MOST_BYTES: Final = 32 * 2**20

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
        float | None,
        typer.Option(
            "--temperature",
            metavar="X",
            help="How freely the model chooses its words: 0 to 2; some models refuse it.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="SECONDS",
            help="Most time for one attempt, waiting included; default: 300.",
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
            help="After a crash or stop, where no call can be picked up: restart, continue, fail.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    effort: Annotated[
        str | None,
        typer.Option(
            "--effort",
            metavar="LEVEL",
            help="How much the model thinks first: none, minimal, low, medium or high.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="Where the platform stops; repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    schema: Annotated[
        Path | None,
        typer.Option(
            "--schema",
            metavar="FILE",
            help="A JSON schema that the output has to satisfy; it is checked.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    tools: Annotated[
        Path | None,
        typer.Option(
            "--tools",
            metavar="FILE",
            help="A JSON list of functions the model may ask for: name, description, parameters.",
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
            "reasoning_effort": self.effort,
            "stop_sequences": self.stop or None,
        }
        return {name: value for name, value in given.items() if value is not None}

    def task_fields(self) -> dict[str, Any]:
        """Return the other fields of a task that were given.

        Raises:
            typer.BadParameter: An option or a label is no NAME=VALUE, or a file holds no JSON.
        """
        options = {name: _parsed(text) for name, text in key_values(self.option, "--option")}
        given = {
            "platform": self.platform,
            "system": self.system,
            "options": options or None,
            "labels": dict(key_values(self.label, "--label")) or None,
            "output_schema": _json_file(self.schema, "--schema"),
            "tools": _json_file(self.tools, "--tools"),
        }
        return {name: value for name, value in given.items() if value is not None}

    def check(self, *, runs_here: bool = False) -> None:
        """Raise an error where the options make no sense, whatever the task is.

        Args:
            runs_here: Whether the platform has to be usable on this machine, too: ten thousand
                tasks that all fail for want of a key help nobody.

        Raises:
            InvalidTask: A value isn't possible.
            UnknownPlatform: There is no such platform.
            NotConfigured: The platform lacks something on this machine.
        """
        from perdure.platforms import Platforms
        from perdure.structured import check_schemas
        from perdure.task import Task, TaskConstraints

        TaskConstraints(**self.constraints())
        if self.schema is not None or self.tools is not None:
            check_schemas(Task(prompt="-", **self.task_fields()))
        if self.platform is not None:
            platforms = Platforms.configured()
            platforms.check(self.platform)
            if runs_here:
                usable: Any = getattr(platforms.get(self.platform), "check", None)
                if usable is not None:  # adapters of others need not have it
                    usable()


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


def _json_file(path: Path | None, option: str) -> Any:  # noqa: ANN401 - what JSON holds
    if path is None:
        return None
    try:
        return json.loads(read_file(path, _MOST_BYTES).decode("utf-8"))
    except OSError as error:
        problem = f"can't read {path}: {error.strerror}"
    except ValueError as error:
        problem = f"{path} is no JSON: {error}"
    except RecursionError:
        problem = f"{path} is nested too deep"
    raise typer.BadParameter(problem, param_hint=option)


def _parsed(text: str) -> Any:  # noqa: ANN401 - what JSON holds
    """Return what a value means: JSON where it is some, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
