"""What commands that look do with a database that isn't as it should be."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from invoking import Perdure
from stories import complete, submit

TASK = "demo_20261120_aaaa1111"

LOOKING = [
    ["list"],
    ["list", "--json"],
    ["show", TASK],
    ["log", TASK],
    ["tail", TASK],
    ["output", TASK],
    ["sql"],
    ["sql", "SELECT 1 FROM tasks"],
    ["export"],
    ["stats"],
    ["verify"],
    ["rebuild"],
    ["redact", TASK, "--yes"],
    ["db", "backup", "copy.db"],
    ["db", "vacuum"],
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)


def nothing(_path: Path, _migrated: Path) -> None:
    """No file at all."""


def directory(path: Path, _migrated: Path) -> None:
    """A directory."""
    path.mkdir()


def text_file(path: Path, _migrated: Path) -> None:
    """A file that is no database."""
    path.write_text("Dear diary,\n" * 1000)


def foreign(path: Path, _migrated: Path) -> None:
    """Another program's database."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE tasks (id INTEGER)")
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.execute("INSERT INTO alembic_version VALUES ('0001')")
    connection.close()


def newer(path: Path, migrated: Path) -> None:
    """A database that a later perdure wrote."""
    shutil.copy(migrated, path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("DELETE FROM compatible")
    connection.close()


def damaged(path: Path, migrated: Path) -> None:
    """A database with its pages overwritten."""
    shutil.copy(migrated, path)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * (path.stat().st_size - 100))


@pytest.mark.parametrize("command", LOOKING, ids=" ".join)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (nothing, "there is no database"),
        (directory, "is a directory"),
        (text_file, "is not a database"),
        (foreign, "some other program"),
        (newer, "newer perdure"),
        (damaged, "is damaged"),
    ],
)
def test_unusable(
    database: Path,
    migrated_file: Path,
    perdure: Perdure,
    make: Callable[[Path, Path], None],
    says: str,
    command: list[str],
) -> None:
    """Each is one clear line and exit code 1; nothing is written, nothing created."""
    make(database, migrated_file)
    before = database.read_bytes() if database.is_file() else None
    ended = perdure(*command)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert says in ended.err
    assert str(database) in ended.err
    assert (database.read_bytes() if database.is_file() else None) == before
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize("command", LOOKING[:11], ids=" ".join)
def test_empty_file(database: Path, perdure: Perdure, command: list[str]) -> None:
    """A file with nothing in it is not taken for a log without tasks, and stays empty."""
    database.touch()
    ended = perdure(*command)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert "is empty" in ended.err
    assert database.stat().st_size == 0


@pytest.mark.parametrize("command", [["list"], ["verify"], ["doctor"]], ids=" ".join)
@pytest.mark.parametrize(
    "url", ["mysql://host/db", "sqlite://", "sqlite:///:memory:", "://", "  "], ids=repr
)
def test_unusable_urls(perdure: Perdure, command: list[str], url: str) -> None:
    """A URL that perdure can't use is one line."""
    ended = perdure(*command, "--db", url)
    assert ended.code in (1, 2)
    if command != ["doctor"]:
        assert ended.out == ""
        assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    "command", [["list"], ["verify"], ["submit", "--prompt", "x"]], ids=" ".join
)
@pytest.mark.parametrize(
    "url",
    [
        *("postgresql://me:sesame@[bad/x", "postgresql://[::1/sesame", "postgresql://:sesame:/x"),
        *("postgresql://me:sesame@h:port/x", "postgres//me:sesame@h/x", "Postgresql:me:sesame@h/x"),
        "postgresql://me@h/x?nonsense=sesame",
    ],
)
def test_misspelt_urls(perdure: Perdure, command: list[str], url: str) -> None:
    """They aren't shown, as a password may be in them, nor are they taken for files."""
    ended = perdure(*command, "--db", url)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.count("\n") == 1
    assert "can't be read: give a file's path" in ended.err
    assert "sesame" not in ended.err


def test_names_that_look_a_bit_like_urls(tmp_path: Path, perdure: Perdure) -> None:
    """What merely begins like a server's is a file."""
    assert (
        perdure("submit", "--prompt", "x", "-p", "demo", "--db", tmp_path / "postgres.db").code == 0
    )
    missing = perdure("list", "--db", "sqlite://x.db")
    assert "three slashes" in missing.err


def test_named_by_url(database: Path, migrated_file: Path, perdure: Perdure) -> None:
    """A URL names the same file as its path."""
    shutil.copy(migrated_file, database)
    submit(database, TASK, "x")
    assert perdure("list", "--db", f"sqlite:///{database}").out == perdure("list").out


def test_writers_are_not_waited_for(database: Path, migrated_file: Path, perdure: Perdure) -> None:
    """While somebody holds the write lock, looking goes on."""
    shutil.copy(migrated_file, database)
    submit(database, TASK, "x")
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    holder.execute("DELETE FROM tasks")
    for command in (["list"], ["show", TASK], ["log", TASK], ["stats"], ["verify"], ["doctor"]):
        ended = perdure(*command)
        assert ended.code == 0, ended.err
        assert ended.out
    holder.execute("ROLLBACK")
    holder.close()


class TestReadOnly:
    """A user who may read the database and not write: tests may run as root, so it is another."""

    @pytest.fixture
    def place(self, migrated_file: Path) -> Iterator[Path]:
        """A database with a task in a folder that the user can't write to."""
        import tempfile

        folder = Path(tempfile.mkdtemp(prefix="perdure-read-only-"))
        database = folder / "perdure.db"
        shutil.copy(migrated_file, database)
        submit(database, TASK, "What is a log?")
        complete(database, TASK, "A ledger.")
        database.chmod(0o444)
        folder.chmod(0o555)
        yield database
        folder.chmod(0o755)
        shutil.rmtree(folder)

    def run(self, place: Path, tmp_path: Path, command: list[str]) -> tuple[int, str, str]:
        """Run a command line as a user without rights; returns its exit code, stdout and stderr."""
        warm = tmp_path / "warm.db"
        shutil.copy(place, warm)
        warm.chmod(0o600)
        ended = subprocess.run(
            [sys.executable, "-c", _AS_NOBODY, warm, place, *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            cwd="/",
            # Coverage can't be written down by who may not write.
            env={k: v for k, v in os.environ.items() if not k.startswith("COV")},
        )
        return ended.returncode, ended.stdout, ended.stderr

    @pytest.mark.parametrize(
        "command",
        [["list"], ["show", TASK], ["output", TASK], ["tail", TASK], ["stats"], ["export"]],
        ids=" ".join,
    )
    def test_looking(self, place: Path, tmp_path: Path, command: list[str]) -> None:
        """Looking needs no right to write, and leaves nothing behind."""
        code, out, err = self.run(place, tmp_path, command)
        assert (code, err) == (0, "")
        assert out
        assert [found.name for found in place.parent.iterdir()] == [place.name]

    def test_verifying(self, place: Path, tmp_path: Path) -> None:
        """Who is given a copy to check it can do so."""
        code, out, err = self.run(place, tmp_path, ["verify"])
        assert code == 0, err
        assert "All is well" in err
        assert out
        assert [found.name for found in place.parent.iterdir()] == [place.name]

    def test_health(self, place: Path, tmp_path: Path) -> None:
        """That nothing can be run here is a warning; nothing is broken."""
        code, out, err = self.run(place, tmp_path, ["doctor"])
        assert "writing\twarning" in out
        assert "broken" not in out
        assert (code, err) == (0, "")

    @pytest.mark.parametrize(
        "command", [["rebuild"], ["redact", TASK, "--yes"], ["db", "vacuum"]], ids=" ".join
    )
    def test_writing(self, place: Path, tmp_path: Path, command: list[str]) -> None:
        """Writing is refused in one line that says why."""
        code, out, err = self.run(place, tmp_path, command)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert "can't be written to" in err


# Root may do everything, and nobody may not even read root's Python: so it is loaded first, by
# running the command once on a copy, and the rights are given up then.
_AS_NOBODY = """
import contextlib, io, os, sys
from perdure.cli.main import run
warm, place, *command = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    run([*command, "--db", warm])
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
sys.exit(run([*command, "--db", place]))
"""
