"""docs/platforms.md says of the platforms what the adapters say of themselves."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from perdure.adapter import Adapter

PAGE = Path(__file__).parents[2] / "docs" / "platforms.md"
COLUMNS = (
    *("platform", "streaming", "pick-up", "cancel", "files", "schema", "tools", "reasoning"),
    *("usage on the way", "default model"),
)


def adapters() -> list[Adapter]:
    """Return the built-in platforms as they are without any setting."""
    found: list[Any] = [e.load()() for e in entry_points(group="perdure.platforms")]
    ours = [one for one in found if type(one).__module__.startswith("perdure_adapters.")]
    return sorted(ours, key=lambda adapter: adapter.platform)


def table() -> str:
    """Return what each platform can do, as Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for adapter in adapters():
        can = adapter.capabilities
        files = ", ".join(kind for kind in ("text", "image", "pdf") if kind in can.files)
        abilities = (can.streaming, can.reattach, can.cancel)
        others = (can.schema, can.tools, can.reasoning, can.usage_on_the_way)
        rows.append(
            (
                f"`{adapter.platform}`",
                *map(_yes, abilities),
                files,
                *map(_yes, others),
                f"`{adapter.default_model}`" if adapter.default_model else "the server's first",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _yes(able: bool) -> str:
    return "yes" if able else "no"


def test_the_table_is_that_of_the_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every platform that comes with perdure has its row, and the row is true."""
    for variable in ("CLAUDE", "CHATGPT", "GEMINI", "COMPATIBLE", "CLAUDE_CODE"):
        monkeypatch.delenv(f"PERDURE_{variable}_MODEL", raising=False)
    page = PAGE.read_text("utf-8")
    begin, end = "<!-- platforms: begin -->\n", "\n<!-- platforms: end -->"
    assert page.partition(begin)[2].partition(end)[0] == table()
