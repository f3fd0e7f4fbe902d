"""The documentation of the command line is that of the program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
from typer.main import get_command

from perdure.cli.main import app

PAGE: Final = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
EVERYWHERE: Final = {"--db", "--json", "--help"}


def commands() -> dict[str, set[str]]:
    """Return name -> the long options of each command of the program."""
    found: dict[str, set[str]] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        children = getattr(command, "commands", None)
        if children:
            for name, child in children.items():
                walk(child, (*path, name))
            return
        options = [
            next(name for name in parameter.opts if name.startswith("--"))
            for parameter in command.params
            if any(name.startswith("--") for name in parameter.opts)
        ]
        found[" ".join(path)] = set(options) - EVERYWHERE

    walk(get_command(app), ())
    return found


def documented() -> dict[str, set[str]]:
    """Return name -> the options of each command on the page."""
    groups = {
        "and those of a task": options_of(paragraph("The options of a task:")),
        "those that choose tasks": options_of(paragraph("The options that choose tasks:")),
    }
    found: dict[str, set[str]] = {}
    for name, options in re.findall(r"^\| `([a-z ]+)` \| [^|]*\| ([^|]*)\|$", PAGE, re.MULTILINE):
        named = options_of(options)
        for words, group in groups.items():
            if words in options:
                named |= group
        found[name] = named
    return found


def paragraph(begin: str) -> str:
    """Return the paragraph of the page that begins so."""
    return PAGE[PAGE.index(begin) :].split("\n\n")[0]


def options_of(text: str) -> set[str]:
    """Return the options that a text names."""
    return set(re.findall(r"--[a-z-]+", text))


def test_every_command_is_documented() -> None:
    """No command is missing on the page, and none is there that isn't in the program."""
    assert set(documented()) == set(commands())


@pytest.mark.parametrize("name", sorted(commands()))
def test_its_options_are_documented(name: str) -> None:
    """The options named on the page are those of the program."""
    assert documented()[name] == commands()[name]
