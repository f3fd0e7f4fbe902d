"""`perdure export` and `stats`."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
from datetime import timedelta
from pathlib import Path

import pytest
from invoking import Perdure
from stories import (
    NOON,
    ONE,
    THREE,
    TWO,
    OnTerminal,
    asked,
    running,
    start,
    tell_all,
    three_endings,
)

from perdure.cli.records import EVENT_COLUMNS, TASK_COLUMNS
from perdure.events import Chunk, Completed


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Three tasks that ended, one way each, and one that waits."""
    database.write_bytes(migrated_file.read_bytes())
    three_endings(database)
    return database


class TestExport:
    """`perdure export`."""

    def test_tasks(self, story: Path, perdure: Perdure) -> None:
        """Every task is a line of JSON, the oldest first, with all of its columns."""
        found = [json.loads(line) for line in perdure("export").lines]
        assert [task["task_id"] for task in found][:3] == [ONE, TWO, THREE]
        assert all(tuple(task) == TASK_COLUMNS for task in found)
        assert found[0]["output"] == 'A "ledger",\nof sorts.'
        assert perdure("export", "--json").out == perdure("export").out

    def test_filters(self, story: Path, perdure: Perdure) -> None:
        """The filters are those of `list`."""
        lines = perdure("export", "--batch", "b1", "--status", "failed").lines
        assert [json.loads(line)["task_id"] for line in lines] == [TWO]

    def test_csv(self, story: Path, perdure: Perdure) -> None:
        """As CSV any reader gets the texts back."""
        rows = list(csv.DictReader(io.StringIO(perdure("export", "--csv").out)))
        assert rows[0]["output"] == 'A "ledger",\nof sorts.'
        assert tuple(rows[0]) == TASK_COLUMNS
        assert json.loads(rows[0]["labels"]) == {"team": "red"}

    def test_events(self, story: Path, perdure: Perdure) -> None:
        """With --events it is the log, in its order, gapless."""
        found = [json.loads(line) for line in perdure("export", "--events").lines]
        assert [event["position"] for event in found] == list(range(1, len(found) + 1))
        assert tuple(found[0]) == EVENT_COLUMNS
        one = [event for event in found if event["task_id"] == ONE]
        assert one == [json.loads(line) for line in perdure("log", ONE, "--json").lines]

    def test_events_of_some(self, story: Path, perdure: Perdure) -> None:
        """Filters choose the tasks whose events are written."""
        lines = perdure("export", "--events", "--platform", "other").lines
        assert {json.loads(line)["task_id"] for line in lines} == {THREE}
        rows = perdure("export", "--events", "--csv", "--platform", "other")
        assert len(list(csv.reader(io.StringIO(rows.out)))) == len(lines) + 1

    def test_to_a_file(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """A file has what stdout would have had; it is its owner's only, and CSV by its name."""
        path = tmp_path / "out.jsonl"
        ended = perdure("export", "--out", path)
        assert (ended.code, ended.out) == (0, "")
        assert "4 tasks" in ended.err
        assert path.read_text() == perdure("export").out
        assert path.stat().st_mode & 0o777 == 0o600
        perdure("export", "--out", tmp_path / "out.csv")
        assert (tmp_path / "out.csv").read_text() == perdure("export", "--csv").out
        assert perdure("export", "--out", "-").out == perdure("export").out

    def test_replaces_as_a_whole(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """A file is replaced in the end or not at all, and its link and permissions stay."""
        path, link = tmp_path / "out.jsonl", tmp_path / "link.jsonl"
        path.write_text("old")
        path.chmod(0o640)
        link.symlink_to(path)
        (tmp_path / "perdure.db").rename(tmp_path / "away.db")
        assert perdure("export", "--out", link).code == 1
        assert path.read_text() == "old"
        (tmp_path / "away.db").rename(tmp_path / "perdure.db")
        assert perdure("export", "--out", link).code == 0
        assert link.is_symlink()
        assert path.read_text() == perdure("export").out
        assert path.stat().st_mode & 0o777 == 0o640
        assert not list(tmp_path.glob(".*"))

    def test_leaves_no_draft(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """When it fails half way, what was there stays and no draft is left."""
        path = tmp_path / "out.jsonl"
        path.write_text("old")

        def full(_file: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        ended = perdure("export", "--out", path)
        assert ended.code == 1
        assert "No space left" in ended.err
        assert path.read_text() == "old"
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize("out", ["", "no/such/folder/out.jsonl"])
    def test_bad_places(self, story: Path, perdure: Perdure, tmp_path: Path, out: str) -> None:
        """A place where no file can be is told before anything is read."""
        ended = perdure("export", "--out", tmp_path / out)
        assert ended.code == 2
        assert ended.err.count("\n") == 1

    def test_to_a_device(self, story: Path, perdure: Perdure) -> None:
        """A device is written to and not replaced."""
        assert perdure("export", "--out", "/dev/null").code == 0
        assert Path("/dev/null").is_char_device()

    def test_more_than_a_page(self, database: Path, migrated_file: Path, perdure: Perdure) -> None:
        """However many rows there are, each comes once and in order."""
        from perdure.cli import exporting, paging

        database.write_bytes(migrated_file.read_bytes())
        names = [f"demo_{n:04}" for n in range(25)]
        tell_all(database, ((name, (asked("x" * 100),), NOON) for name in names))
        monkeypatch = pytest.MonkeyPatch()
        with monkeypatch.context() as patch:
            patch.setattr(exporting, "PAGE_ROWS", 4)
            patch.setattr(paging, "PAGE_ROWS", 4)
            assert [json.loads(line)["task_id"] for line in perdure("export").lines] == names
            patch.setattr(paging, "PAGE_CHARACTERS", 150)
            assert [json.loads(line)["task_id"] for line in perdure("export").lines] == names
            lines = perdure("export", "--events").lines
            assert [json.loads(line)["position"] for line in lines] == list(range(1, 26))

    def test_memory(self, database: Path, migrated_file: Path, tmp_path: Path) -> None:
        """Memory doesn't grow with what is exported: 100 MB fit through far less."""
        database.write_bytes(migrated_file.read_bytes())
        long = (asked("x" * 2_000_000),)
        tell_all(database, ((f"demo_{n:04}", long, NOON) for n in range(50)))

        def little() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (200 * 2**20, 200 * 2**20))

        process = start("export", "--out", tmp_path / "out.jsonl", preexec_fn=little)
        _out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert (tmp_path / "out.jsonl").stat().st_size > 100_000_000


class TestStats:
    """`perdure stats`."""

    def test_total(self, story: Path, perdure: Perdure) -> None:
        """Counts, tokens, cost known and unknown, and how long completed tasks ran."""
        total = json.loads(perdure("stats", "--json").lines[0])
        assert total["kind"] == "total"
        assert [total[name] for name in ("tasks", "pending", "completed")] == [4, 1, 1]
        assert [total[name] for name in ("failed", "cancelled", "running")] == [1, 1, 0]
        assert (total["input_tokens"], total["output_tokens"]) == (20, 40)
        assert total["cost_usd"] == 0.25
        assert total["unpriced_tasks"] == 2
        assert total["p50_seconds"] == total["p95_seconds"] == 2.0

    def test_groups(self, story: Path, perdure: Perdure) -> None:
        """By platform and model, by batch, by error."""
        found = [json.loads(line) for line in perdure("stats", "--json").lines]
        models = {(one["platform"], one["model"]): one for one in found if one["kind"] == "model"}
        assert {key: one["tasks"] for key, one in models.items()} == {
            ("demo", None): 2,
            ("demo", "demo-1"): 1,
            ("other", None): 1,
        }
        batches = {one["batch"]: one["tasks"] for one in found if one["kind"] == "batch"}
        assert batches == {"b1": 2, "b2": 1}
        (error,) = (one for one in found if one["kind"] == "error")
        assert error == {
            "kind": "error",
            "platform": "demo",
            "error_class": "Overloaded",
            "tasks": 1,
            "last_task_id": TWO,
            "last_error": "too busy",
        }

    def test_percentiles(self, database: Path, migrated_file: Path, perdure: Perdure) -> None:
        """Half of the tasks took no longer than p50, and 95 of 100 no longer than p95."""
        database.write_bytes(migrated_file.read_bytes())
        begun = (asked("x"), running(), Chunk(text="y"))
        done = (Completed(output_length=1),)
        names = {n: f"demo_{n}" for n in range(1, 101)}
        tell_all(database, ((name, begun, NOON) for name in names.values()))
        tell_all(database, ((names[n], done, NOON + timedelta(seconds=n)) for n in names))
        total = json.loads(perdure("stats", "--json").lines[0])
        assert (total["p50_seconds"], total["p95_seconds"]) == (50.0, 95.0)

    def test_filters(self, story: Path, perdure: Perdure) -> None:
        """The filters are those of `list`."""
        total = json.loads(perdure("stats", "--json", "--batch", "b1").lines[0])
        assert total["tasks"] == 2

    def test_for_people(self, story: Path, perdure: Perdure, on_terminal: OnTerminal) -> None:
        """The same in words and tables, also in a pipe; on a terminal it fits."""
        shown = perdure("stats").out
        for part in ("1 completed, 1 failed, 1 cancelled", "20 in, 40 out", "$0.2500", "too busy"):
            assert part in shown
        assert "unknown for 2" in shown
        assert max(map(len, on_terminal("stats", width=90).lines)) <= 90

    def test_nothing(self, story: Path, perdure: Perdure) -> None:
        """Where there is nothing it says so; programs get zeros."""
        assert "no such tasks" in perdure("stats", "--batch", "none").err
        ended = perdure("stats", "--batch", "none", "--json")
        assert ended.json["tasks"] == 0
        assert ended.json["p50_seconds"] is None
