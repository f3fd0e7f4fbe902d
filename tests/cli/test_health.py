"""`perdure doctor` and `platforms`."""

from __future__ import annotations

import json
import sqlite3
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from invoking import Ended, Perdure
from stories import (
    NOON,
    OnTerminal,
    asked,
    five_tasks,
    submit,
    tell_all,
)

from perdure.store.database import Database
from perdure.store.liveness import register_worker
from perdure.store.readonly import REVISION
from perdure.store.transaction import FoldCache, Transaction


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Five tasks, one of each status, the second run again as the fourth."""
    database.write_bytes(migrated_file.read_bytes())
    five_tasks(database)
    return database


def findings(ended: Ended) -> dict[str, Any]:
    """Return what the doctor found, by name."""
    return {found["name"]: found for found in map(json.loads, ended.lines)}


class TestDoctor:
    """`perdure doctor`."""

    def test_healthy(self, story: Path, perdure: Perdure) -> None:
        """Everything is looked at, and nothing is broken."""
        story.chmod(0o600)
        ended = perdure("doctor", "--json")
        assert ended.code == 0
        found = findings(ended)
        names = "python sqlite database permissions disk schema journal integrity log workers tasks"
        assert {*names.split(), "perdure", "demo", "compatible"} <= {*found}
        assert found["python"]["value"].startswith(sys.version.split()[0])
        assert sqlite3.sqlite_version in found["sqlite"]["value"]
        assert str(story) in found["database"]["value"]
        assert found["permissions"]["state"] == "ok"
        assert found["schema"]["value"] == REVISION
        assert not [one for one in found.values() if one["state"] == "broken"]

    @pytest.mark.parametrize(
        ("version", "state"), [((3, 51, 2), "note"), ((3, 51, 3), "ok"), ((3, 40, 1), "note")]
    )
    def test_wal_reset_race(
        self,
        story: Path,
        perdure: Perdure,
        monkeypatch: pytest.MonkeyPatch,
        version: tuple[int, int, int],
        state: str,
    ) -> None:
        """An SQLite with the WAL-reset race is named, and why perdure stays clear of it."""
        monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
        found = findings(perdure("doctor", "--json"))["sqlite"]
        assert found["state"] == state
        assert ("write lock" in (found["hint"] or "")) == (state == "note")

    def test_permissions(self, story: Path, perdure: Perdure) -> None:
        """A database that others may read is warned of."""
        story.chmod(0o644)
        ended = perdure("doctor", "--json")
        found = findings(ended)["permissions"]
        assert ended.code == 0
        assert found["state"] == "warning"
        assert "chmod 600" in found["hint"]

    def test_not_there_yet(self, database: Path, perdure: Perdure) -> None:
        """The default database that no task has created yet is nothing broken."""
        ended = perdure("doctor", "--json")
        assert ended.code == 0
        assert findings(ended)["database"]["state"] == "note"
        assert not database.exists()

    def test_a_default_platform_that_is_none(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All that names no platform itself would fail."""
        config = tmp_path / "perdure.toml"
        config.write_text('platform = "dmo"\n')
        monkeypatch.setenv("PERDURE_CONFIG", str(config))
        ended = perdure("doctor", "--json")
        assert ended.code == 1
        assert "did you mean 'demo'" in findings(ended)["default"]["value"]

    def test_named_and_not_there(self, perdure: Perdure, tmp_path: Path) -> None:
        """One that was named has to be there."""
        ended = perdure("doctor", "--json", "--db", tmp_path / "typo.db")
        assert ended.code == 1
        assert findings(ended)["database"]["state"] == "broken"

    @pytest.mark.parametrize("kind", ["directory", "text", "foreign", "newer", "damaged"])
    def test_broken(self, database: Path, migrated_file: Path, perdure: Perdure, kind: str) -> None:
        """What is no usable database is broken: exit code 1, and the rest is still looked at."""
        match kind:
            case "directory":
                database.mkdir()
            case "text":
                database.write_text("Dear diary,\n" * 999)
            case "foreign":
                with sqlite3.connect(database) as connection:
                    connection.execute("CREATE TABLE x (y)")
                connection.close()
            case "newer":
                database.write_bytes(migrated_file.read_bytes())
                with sqlite3.connect(database) as connection:
                    connection.execute("UPDATE alembic_version SET version_num = '9999'")
                    connection.execute("DELETE FROM compatible")
                connection.close()
            case _:
                database.write_bytes(migrated_file.read_bytes()[:100] + b"\xa5" * 90_000)
        ended = perdure("doctor", "--json")
        assert ended.code == 1
        assert ended.err == ""
        assert [one for one in findings(ended).values() if one["state"] == "broken"]
        assert "demo" in findings(ended)

    def test_damaged_page(self, story: Path, perdure: Perdure) -> None:
        """A page that was overwritten is found by the quick check."""
        tell_all(story, ((f"demo_{n}", (asked("x" * 1000),), NOON) for n in range(200)))
        with sqlite3.connect(story) as connection:
            root = connection.execute(
                "SELECT rootpage FROM sqlite_master WHERE type = 'index' AND tbl_name = 'events'"
            ).fetchone()[0]
            size = connection.execute("PRAGMA page_size").fetchone()[0]
        connection.close()
        with story.open("r+b") as file:
            file.seek((root - 1) * size + 40)
            file.write(b"\xff" * 400)
        ended = perdure("doctor", "--json")
        assert ended.code == 1
        assert findings(ended)["integrity"]["state"] == "broken"

    def test_workers(self, story: Path, perdure: Perdure) -> None:
        """Workers alive and lost, and tasks that nobody runs."""
        found = findings(perdure("doctor", "--json"))
        assert found["workers"]["state"] == "warning"  # of worker_1 there is only a running task
        assert found["tasks"]["value"] == "1 pending, 1 running"
        writer = Database(story).writer()
        with writer.transaction() as connection:
            register_worker(Transaction(connection, FoldCache(), lambda: datetime.now(UTC)), "here")
            gone = Transaction(connection, FoldCache(), lambda: NOON - timedelta(days=1))
            register_worker(gone, "gone")
        writer.close()
        found = findings(perdure("doctor", "--json"))
        assert found["workers"]["value"] == "1 alive, 2 lost"
        submit(story, "demo_1", "x")
        assert findings(perdure("doctor", "--json"))["tasks"]["value"] == "2 pending, 1 running"

    def test_keys_are_not_shown(
        self, story: Path, perdure: Perdure, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever keys are set, none is in what it says."""
        monkeypatch.setenv("PERDURE_COMPATIBLE_BASE_URL", "http://user:hunter2@host:1/v1")
        monkeypatch.setenv("PERDURE_COMPATIBLE_API_KEY", "sk secret")
        for command in ("doctor", "platforms"):
            for form in ([], ["--json"]):
                ended = perdure(command, *form)
                assert "hunter2" not in ended.out
                assert "secret" not in ended.out

    def test_for_people(self, story: Path, perdure: Perdure, on_terminal: OnTerminal) -> None:
        """In a pipe four fields; on a terminal what to do is below."""
        assert {line.count("\t") for line in perdure("doctor").lines} == {3}
        shown = on_terminal("doctor").out
        assert "ok       demo" in shown


class TestPlatforms:
    """`perdure platforms`."""

    def test_what_is_missing(
        self, perdure: Perdure, monkeypatch: pytest.MonkeyPatch, on_terminal: OnTerminal
    ) -> None:
        """A platform that can't be used says what to install or set; no database is needed."""
        for name in ("PERDURE_COMPATIBLE_BASE_URL", "OPENAI_BASE_URL"):
            monkeypatch.delenv(name, raising=False)
        ended = perdure("platforms", "--json")
        assert ended.code == 0
        found = {one["platform"]: one for one in map(json.loads, ended.lines)}
        assert found["demo"]["usable"] is True
        assert found["demo"]["default_model"] == "demo-1"
        assert "streaming" in found["demo"]["abilities"]
        assert found["compatible"]["usable"] is False
        assert "PERDURE_COMPATIBLE_BASE_URL" in found["compatible"]["problem"]
        assert {line.count("\t") for line in perdure("platforms").lines} == {4}
        assert "compatible: " in on_terminal("platforms").out

    def test_usable(self, perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> None:
        """With its address set it can be used."""
        monkeypatch.setenv("PERDURE_COMPATIBLE_BASE_URL", "http://127.0.0.1:1/v1")
        lines = perdure("platforms", "--json").lines
        found = {one["platform"]: one for one in map(json.loads, lines)}
        assert found["compatible"] == {**found["compatible"], "usable": True, "problem": None}

    def test_broken_platform(self, perdure: Perdure, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that can't even be loaded doesn't hide the others."""
        from importlib.metadata import EntryPoint

        from perdure import platforms as room

        points = [
            EntryPoint("broken", "no_such_module:Adapter", room.GROUP),
            EntryPoint("demo", "perdure_adapters.demo:DemoAdapter", room.GROUP),
        ]
        monkeypatch.setattr(room, "entry_points", lambda **_: points)
        found = [json.loads(line) for line in perdure("platforms", "--json").lines]
        assert [one["usable"] for one in found] == [False, True]
        assert "no_such_module" in found[0]["problem"]
