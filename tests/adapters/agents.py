"""What the tests of Claude Code share: a stage with a directory, a program, and what it did."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from perdure import Event, Task
from perdure.adapter import Call, Resume
from perdure_adapters import ClaudeCodeAdapter
from perdure_adapters._agent_process import process_started
from servers.agent import install, runs

KEY = "sk-ant-a-key-of-the-tests"


@dataclass(frozen=True)
class Stage:
    """A folder with the program, and the directory it works in."""

    home: Path
    directory: Path

    @classmethod
    def at(cls, folder: Path) -> Stage:
        """Return a new one below ``folder``."""
        stage = cls(folder / "program", folder / "work")
        stage.home.mkdir()
        stage.directory.mkdir()
        install(stage.home)
        return stage

    @property
    def runs(self) -> list[dict[str, Any]]:
        """What is known of the processes so far."""
        return runs(self.home)

    @property
    def alive(self) -> list[int]:
        """The processes that are still there."""
        return [run["pid"] for run in self.runs if process_started(run["pid"]) is not None]

    def wait_until_gone(self, seconds: float = 5) -> None:
        """Wait until no process is left."""
        latest = time.monotonic() + seconds
        while self.alive:
            assert time.monotonic() < latest, f"{self.alive} are still there"
            time.sleep(0.01)

    def adapter(self, **arguments: Any) -> ClaudeCodeAdapter:
        """Return an adapter that runs the program in the directory."""
        given: dict[str, Any] = {"directory": self.directory, "api_key": KEY}
        return ClaudeCodeAdapter(**({"cli_path": self.home / "claude"} | given | arguments))


def scenario(*steps: dict[str, Any], **more: Any) -> str:
    """Return the prompt that makes the program take these steps."""
    return json.dumps({"steps": steps, **more})


def a_call(prompt: str = "Say hello.", *, resume: Resume | None = None, **fields: Any) -> Call:
    """Return a call of a task."""
    return Call(task=Task(prompt=prompt, **fields), task_id="t", resume=resume)


async def events_of(adapter: ClaudeCodeAdapter, call: Call) -> list[Event]:
    """Return all events of a call that succeeds."""
    return [event async for event in adapter.run(call)]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let adapters wait less for a program that is deaf to being asked and will be killed."""
    monkeypatch.setattr("perdure_adapters._agent_client._INTERRUPTED", 0.1)
    monkeypatch.setattr("perdure_adapters._agent_client._TERMINATED", 0.5)
    monkeypatch.setattr("perdure_adapters._agent_process._TERMINATED", 0.5)


def kill(pid: int) -> None:
    """Kill a process of the program's."""
    os.kill(pid, 9)
