"""What the tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest
from invoking import Ended, Perdure
from stories import OnTerminal

from perdure.cli.main import run


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database that the commands of a test use, in its own folder."""
    path = tmp_path / "perdure.db"
    monkeypatch.setenv("PERDURE_DB", str(path))
    return path


@pytest.fixture
def perdure(database: Path, capsys: pytest.CaptureFixture[str]) -> Perdure:
    """Run a command line in this process: `perdure("list", "--json")`."""

    def call(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        wrote = capsys.readouterr()
        return Ended(code, wrote.out, wrote.err)

    return call


@pytest.fixture
def on_terminal(perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> OnTerminal:
    """Run a command line whose stdout passes for a terminal: `on_terminal("list", width=40)`."""
    return OnTerminal(perdure, monkeypatch)
