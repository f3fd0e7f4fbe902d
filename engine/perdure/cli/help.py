"""The help, in plain text and grouped by panels.

typer can draw it with rich; importing that takes longer than everything else that `perdure --help`
does, and boxes don't survive a pipe or a narrow terminal. These classes keep the groups.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["PlainCommand", "PlainGroup"]

# The parameters are `Any`: typer's older versions stand on click, its newer ones on a copy of it.

Rows = list[tuple[str, str]]


class PlainCommand(TyperCommand):
    """A command whose options are listed by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the arguments and options."""
        _write(_options(self, ctx), formatter)


class PlainGroup(TyperGroup):
    """A group of commands whose commands and options are listed by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the commands and then the options."""
        self.format_commands(ctx, formatter)
        _write(_options(self, ctx), formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the commands."""
        panels: dict[str, Rows] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            heading = getattr(command, "rich_help_panel", None) or "Commands"
            row = (name, command.get_short_help_str(limit=200))
            panels.setdefault(heading, []).append(row)
        _write(panels, formatter)


def _options(command: Any, ctx: Any) -> dict[str, Rows]:  # noqa: ANN401
    panels: dict[str, Rows] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        row = parameter.get_help_record(ctx)
        if row is None:
            continue
        if parameter.param_type_name == "argument":
            heading = "Arguments"
            # Newer versions of typer add the type; the name says what it is.
            row = (row[0].partition(" <")[0], row[1])
        else:
            panel = getattr(parameter, "rich_help_panel", None)
            heading = panel if isinstance(panel, str) else "Options"
        panels.setdefault(heading, []).append(row)
    return panels


def _write(panels: dict[str, Rows], formatter: Any) -> None:  # noqa: ANN401
    for heading, rows in panels.items():
        if not rows:
            continue
        with formatter.section(heading):
            formatter.write_dl(rows)
