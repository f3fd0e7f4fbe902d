"""Files that somebody names: what is no regular file, or has no end, holds nobody up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from harness import FAST, count_events

from perdure import Engine, InvalidTask, Task
from perdure.cli.main import run
from perdure.testing import ScriptedAdapter

# Far more than it takes to refuse a file.
AT_ONCE = 5.0


@pytest.fixture
def pipe(tmp_path: Path) -> Generator[Path, None, None]:
    """A named pipe; whoever reads it waits, though not for ever."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    held = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(held, b"x")
    letting_go = threading.Timer(2 * AT_ONCE, os.close, (held,))
    letting_go.start()
    yield path
    letting_go.cancel()
    letting_go.join()
    with contextlib.suppress(OSError):
        os.close(held)


async def refusal(db: Any, path: Path) -> str:
    """Return what is said about a task with this file."""
    async with Engine.open(db, adapters=[ScriptedAdapter()], settings=FAST) as engine:
        handing_in = engine.submit_task(Task(prompt="Read.", files=(path,)))
        with pytest.raises(InvalidTask) as caught:
            await asyncio.wait_for(handing_in, AT_ONCE)
    assert count_events(db) == 0
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestAttached:
    """Files that go along with a task."""

    async def test_a_pipe(self, db: Any, pipe: Path) -> None:
        """It isn't even opened, so nobody waits for what it may never bring."""
        said = await refusal(db, pipe)
        assert said.startswith(f"files: can't read {pipe}: it is a pipe, and no file")

    async def test_a_link_to_a_pipe(self, db: Any, pipe: Path) -> None:
        """It is what it leads to."""
        (pipe.parent / "link").symlink_to(pipe)
        assert "it is a pipe" in await refusal(db, pipe.parent / "link")

    async def test_a_pipe_that_nobody_writes_to(self, db: Any, tmp_path: Path) -> None:
        """Opening it alone would wait for ever."""
        os.mkfifo(tmp_path / "quiet")
        assert "it is a pipe" in await refusal(db, tmp_path / "quiet")

    async def test_what_takes_the_place_of_a_file(
        self, db: Any, pipe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look at a file and its opening it may have become something else."""
        real = Path.stat

        def before(path: Path, **how: Any) -> os.stat_result:
            found = real(path, **how)
            if path != pipe:
                return found
            return os.stat_result((stat.S_IFREG | 0o600, *found[1:]))

        monkeypatch.setattr(Path, "stat", before)
        assert "it is a pipe" in await refusal(db, pipe)

    async def test_a_device(self, db: Any) -> None:
        """What it brings has no end, or is nothing."""
        assert "it is a device, and no file" in await refusal(db, Path(os.devnull))

    async def test_a_socket(self, db: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is nothing to be read from its name."""
        monkeypatch.chdir(tmp_path)  # its name may not be long
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
            listening.bind("socket")
            assert "it is a socket, and no file" in await refusal(db, Path("socket"))

    async def test_a_folder(self, db: Any, tmp_path: Path) -> None:
        """It holds files, and is none."""
        assert "it is a directory, and no file" in await refusal(db, tmp_path)

    async def test_one_that_is_too_large(self, db: Any, tmp_path: Path) -> None:
        """It isn't read to find out."""
        with (tmp_path / "large").open("wb") as file:
            file.truncate(40 * 2**20)
        said = await refusal(db, tmp_path / "large")
        assert "it has 40.0 MB, and the limit is 32 MB" in said

    async def test_one_that_grows_meanwhile(
        self, db: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What comes while it is read counts, and is not read without an end."""
        growing = tmp_path / "log"
        growing.write_bytes(b"x")
        read = os.read
        pieces = 0

        def slow(descriptor: int, most: int) -> bytes:
            nonlocal pieces
            found = read(descriptor, most)
            if found.strip(b"x") == b"" and growing.exists():
                pieces += 1
                assert pieces < 100
                with growing.open("ab") as file:
                    file.write(b"x" * 2**20)
            return found

        monkeypatch.setattr(os, "read", slow)
        said = await refusal(db, growing)
        growing.unlink()
        assert "it has more than 32 MB" in said
        assert pieces > 30


def complaints(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines on stderr that say what went wrong."""
    return [line for line in capsys.readouterr().err.splitlines() if "can't read" in line]


class TestCommands:
    """The ways in of the command line: one line each, and the exit code that fits."""

    def test_ask(
        self,
        pipe: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """The command line makes no sense."""
        database = ("--db", str(tmp_path / "perdure.db"))
        assert run(["ask", "x", "-p", "demo", "--file", str(pipe), *database]) == 2
        (said,) = complaints(capsys)
        assert said.startswith(f"perdure: files: can't read {pipe}: it is a pipe, and no file")

    def test_a_row(self, pipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """It is named with its line; the others are run."""
        rows = tmp_path / "rows.jsonl"
        fields = [{"prompt": "a"}, {"prompt": "b", "files": [str(pipe)]}, {"prompt": "c"}]
        rows.write_text("".join(json.dumps(row) + "\n" for row in fields))
        assert run(["run", str(rows), "-p", "demo", "--db", str(tmp_path / "perdure.db")]) == 3
        (said,) = complaints(capsys)
        assert "line 2: files: can't read" in said

    @pytest.mark.parametrize("option", ["--schema", "--tools"])
    def test_options(self, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """What they name is looked at more than once, so it has to be a file, too."""
        database = ("--db", str(tmp_path / "perdure.db"))
        assert run(["ask", "x", "-p", "demo", option, "/dev/zero", *database]) == 2
        (said,) = complaints(capsys)
        assert f"{option}: can't read /dev/zero: it is a device, and no file" in said

    @pytest.mark.parametrize("command", [("list",), ("ask", "x", "-p", "demo")])
    def test_a_database(
        self, command: tuple[str, ...], pipe: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """SQLite would read a pipe and never come back."""
        assert run([*command, "--db", str(pipe)]) == 1
        assert f"{pipe} is a pipe: give the path of a file" in capsys.readouterr().err

    def test_a_configuration_without_an_end(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Neither is that read into all memory; an empty device is an empty configuration."""
        monkeypatch.setenv("PERDURE_CONFIG", "/dev/zero")
        assert run(["platforms"]) == 2
        assert complaints(capsys) == ["perdure: can't read /dev/zero: it has more than 1 MB"]
        monkeypatch.setenv("PERDURE_CONFIG", os.devnull)
        assert run(["platforms"]) == 0
