"""`perdure db backup`, `vacuum` and `upgrade`."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from invoking import Perdure
from stories import (
    NOON,
    ONE,
    asked,
    cancel,
    five_tasks,
    submit,
    tell_all,
)

from perdure.cli.files import stored_revision
from perdure.store.readonly import APPLICATION_ID, REVISION


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Five tasks, one of each status, the second run again as the fourth."""
    database.write_bytes(migrated_file.read_bytes())
    five_tasks(database)
    return database


class TestBackup:
    """`perdure db backup`."""

    def test_copies(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """The copy is a database as any other, its owner's only, and says where it stands."""
        copy = tmp_path / "copy.db"
        seal = perdure("verify").lines[0]
        ended = perdure("db", "backup", copy, "--json")
        assert ended.code == 0
        found = ended.json
        assert f"{found['position']}:{found['digest']}" == seal
        assert found["bytes"] == copy.stat().st_size
        assert copy.stat().st_mode & 0o777 == 0o600
        assert perdure("verify", "--db", copy).lines == [seal]
        assert perdure("list", "--json", "--db", copy).out == perdure("list", "--json").out
        with sqlite3.connect(copy) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        connection.close()
        assert perdure("redact", ONE, "--yes", "--db", copy).code == 0

    def test_with_what_is_in_the_wal(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """What was committed a moment ago is in it, also while others have the database open."""
        reader = sqlite3.connect(story)
        reader.execute("SELECT * FROM tasks").fetchone()
        submit(story, "demo_1", "the latest")
        copy = tmp_path / "copy.db"
        perdure("db", "backup", copy)
        assert perdure("show", "demo_1", "--db", copy, "--json").json["prompt"] == "the latest"
        reader.close()

    def test_while_others_write(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The copy is one moment's, however much is written while it is made."""
        import perdure.cli.files as room

        tell_all(story, ((f"filler_{n}", (asked("x" * 20_000),), NOON) for n in range(20)))
        monkeypatch.setattr(room, "_PAGES_A_STEP", 1)
        stop = threading.Event()
        written: list[str] = []

        def write() -> None:
            while not stop.is_set():
                written.append(f"more_{len(written)}")
                submit(story, written[-1], "y" * 5000)

        before = perdure("verify", "--json").json["position"]
        writer = threading.Thread(target=write)
        writer.start()
        try:
            copies = [tmp_path / f"copy{n}.db" for n in range(3)]
            for copy in copies:
                assert perdure("db", "backup", copy).code == 0
        finally:
            stop.set()
            writer.join()
        assert len(written) > 3
        positions = [perdure("verify", "--json", "--db", copy).json for copy in copies]
        assert all(found["ok"] for found in positions)
        assert before <= positions[0]["position"] < positions[-1]["position"]

    def test_what_is_there(self, story: Path, perdure: Perdure, tmp_path: Path) -> None:
        """A file that is there is replaced with --force only."""
        copy = tmp_path / "copy.db"
        copy.write_text("precious")
        ended = perdure("db", "backup", copy)
        assert (ended.code, ended.err.count("\n")) == (1, 1)
        assert "--force" in ended.err
        assert copy.read_text() == "precious"
        assert perdure("db", "backup", copy, "--force").code == 0
        assert perdure("verify", "--db", copy).code == 0

    def test_never_over_a_database_in_use(
        self, story: Path, perdure: Perdure, tmp_path: Path, migrated_file: Path
    ) -> None:
        """Not over the database itself, and not over one whose WAL would spoil the copy."""
        assert perdure("db", "backup", story, "--force").code == 1
        link = tmp_path / "link.db"
        link.symlink_to(story)
        assert perdure("db", "backup", link, "--force").code == 1
        other = tmp_path / "other.db"
        other.write_bytes(migrated_file.read_bytes())
        user = sqlite3.connect(other)
        user.execute("UPDATE log_head SET position = 1")
        user.commit()
        ended = perdure("db", "backup", other, "--force")
        assert ended.code == 1
        assert "in use" in ended.err
        user.close()

    @pytest.mark.parametrize("place", [".", "no/such/folder/copy.db"])
    def test_bad_places(self, story: Path, perdure: Perdure, tmp_path: Path, place: str) -> None:
        """A directory, or a folder that isn't there, is one line."""
        ended = perdure("db", "backup", tmp_path / place)
        assert (ended.code, ended.err.count("\n")) == (1, 1)

    def test_leaves_no_draft(
        self, story: Path, perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A copy that isn't finished is not left behind."""
        import perdure.cli.files as room

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(room.Reader, "one", interrupted)
        assert perdure("db", "backup", tmp_path / "copy.db").code == 130
        assert not list(tmp_path.glob("*copy.db*"))
        assert not list(tmp_path.glob(".copy*"))


class TestVacuumAndUpgrade:
    """`perdure db vacuum` and `perdure db upgrade`."""

    @pytest.mark.parametrize("full", [[], ["--full"]])
    def test_shrinks(self, story: Path, perdure: Perdure, full: list[str]) -> None:
        """Space that a redaction left is given back, and the sizes are told."""
        submit(story, "demo_1", "x" * 1_000_000)
        cancel(story, "demo_1")
        perdure("redact", "demo_1", "--yes")
        ended = perdure("db", "vacuum", *full, "--json")
        assert ended.code == 0
        found = ended.json
        assert found["bytes_before"] - found["bytes_after"] > 1_000_000
        assert found["bytes_after"] == story.stat().st_size
        assert perdure("verify").code == 0
        assert "before" in perdure("db", "vacuum").err

    def test_while_others_look(self, story: Path, perdure: Perdure) -> None:
        """Somebody who has the database open doesn't keep it from shrinking."""
        submit(story, "demo_1", "x" * 1_000_000)
        cancel(story, "demo_1")
        perdure("redact", "demo_1", "--yes")
        other = sqlite3.connect(story)
        other.execute("SELECT * FROM tasks").fetchall()
        before = story.stat().st_size
        assert perdure("db", "vacuum").code == 0
        assert story.stat().st_size < before - 1_000_000
        other.close()

    def test_up_to_date(self, story: Path, perdure: Perdure) -> None:
        """A database of today's schema is left as it is."""
        assert stored_revision(story) == REVISION
        ended = perdure("db", "upgrade")
        assert (ended.code, ended.out) == (0, "")
        assert "already" in ended.err
        assert perdure("db", "upgrade", "--json").json == {
            "before": REVISION, "after": REVISION, "put_back": [], "failed": [],
        }  # fmt: skip

    def test_from_nothing(self, database: Path, perdure: Perdure) -> None:
        """An empty file becomes a database."""
        database.touch()
        assert perdure("db", "upgrade", "--json").json == {
            "before": None, "after": REVISION, "put_back": [], "failed": [],
        }  # fmt: skip
        assert perdure("list").code == 0

    @pytest.mark.parametrize("content", ["", "no database"])
    def test_not_ours(self, database: Path, perdure: Perdure, content: str) -> None:
        """What isn't there, or is no database, is one line."""
        if content:
            database.write_text(content * 1000)
        ended = perdure("db", "upgrade")
        assert (ended.code, ended.err.count("\n")) == (1, 1)
