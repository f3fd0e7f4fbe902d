"""A directory before and after: what counts as new or changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from perdure_adapters import _workspace
from perdure_adapters._workspace import Look, Workspace, look


def a_workspace(directory: Path, **fields: int) -> Workspace:
    """Return one that has looked at the directory as it is."""
    return Workspace(directory, "work", since=0, before=look(directory), **fields)


def names(workspace: Workspace) -> list[str]:
    """Return the paths of what is new."""
    return [file.path for file in workspace.news()]


def test_a_new_file_has_its_size_and_digest(tmp_path: Path) -> None:
    """A file is named by the directory's name and its place in it."""
    workspace = a_workspace(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "new.txt").write_bytes(b"hello")
    (file,) = workspace.news()
    assert (file.path, file.size) == ("work/a/b/new.txt", 5)
    assert file.digest == hashlib.sha256(b"hello").hexdigest()


def test_changed_files_are_told_and_others_are_not(tmp_path: Path) -> None:
    """Changed in place, replaced by another one; neither untouched nor deleted ones."""
    for name in ("changed", "deleted", "replaced", "same"):
        (tmp_path / name).write_text("before")
    workspace = a_workspace(tmp_path)
    (tmp_path / "changed").write_text("after!")
    os.utime(tmp_path / "changed", ns=(1, 1))
    (tmp_path / "deleted").unlink()
    (tmp_path / "other").write_text("before")
    (tmp_path / "other").rename(tmp_path / "replaced")
    assert names(workspace) == ["work/changed", "work/replaced"]


def test_a_second_look_tells_only_what_is_new_since_the_first(tmp_path: Path) -> None:
    """What was told is known; what changes again is told again."""
    workspace = a_workspace(tmp_path)
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    assert names(workspace) == ["work/a", "work/b"]
    assert names(workspace) == []
    (tmp_path / "b").write_text("22")
    assert names(workspace) == ["work/b"]


def test_git_links_and_pipes_are_left_out(tmp_path: Path) -> None:
    """No file of git's, nothing that a link leads to, nothing that would have to be waited for."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    directory = tmp_path / "work"
    directory.mkdir()
    workspace = a_workspace(directory)
    (directory / ".git").mkdir()
    (directory / ".git" / "index").write_text("x")
    (directory / "link").symlink_to(outside / "secret")
    (directory / "folder").symlink_to(outside)
    (directory / "round").symlink_to(directory)
    os.mkfifo(directory / "pipe")
    (directory / "real").write_text("x")
    assert names(workspace) == ["work/real"]


def test_a_file_that_became_a_link_is_not_read(tmp_path: Path) -> None:
    """Between the look and the reading it may be replaced: a link isn't followed."""
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "secret")
    assert _workspace._read(tmp_path / "link")[1] is None
    assert _workspace._read(tmp_path / "gone") == (None, None)
    os.mkfifo(tmp_path / "pipe")
    assert _workspace._read(tmp_path / "pipe") == (None, None)


def test_what_cant_be_read_is_named_without_a_digest(tmp_path: Path) -> None:
    """An unreadable file is told with its size, an unreadable folder left out."""
    workspace = a_workspace(tmp_path)
    (tmp_path / "closed").write_text("hello")
    (tmp_path / "closed").chmod(0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("x")
    (tmp_path / "folder").chmod(0)
    try:
        told = {file.path: file for file in workspace.news()}
    finally:
        (tmp_path / "folder").chmod(0o700)
    assert told["work/closed"].size == 5
    if os.geteuid() != 0:  # nothing is closed to root
        assert told["work/closed"].digest is None
        assert "work/folder/inside" not in told


def test_a_large_file_has_no_digest(tmp_path: Path) -> None:
    """Its size is told; reading it all would take too long."""
    workspace = a_workspace(tmp_path)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(_workspace._MOST_BYTES + 1)
    (told,) = workspace.news()
    assert (told.size, told.digest) == (_workspace._MOST_BYTES + 1, None)


def test_names_that_are_no_utf8_can_be_written_down(tmp_path: Path) -> None:
    """Such a name is told with its bytes spelt out."""
    workspace = a_workspace(tmp_path)
    (tmp_path / os.fsdecode(b"\xff\x00".replace(b"\x00", b"x"))).write_text("x")
    assert names(workspace) == ["work/\\xffx"]


def test_only_so_many_files_are_looked_at(tmp_path: Path) -> None:
    """A huge directory is looked at from its top as far as the bound goes, and that is said."""
    for number in range(20):
        (tmp_path / f"f{number:02}").write_text("x")
    assert look(tmp_path).whole
    seen = look(tmp_path, most=10)
    assert not seen.whole
    assert len(seen.files) <= 10
    workspace = Workspace(tmp_path, "work", since=time.time_ns(), before=seen, most=10)
    time.sleep(0.02)  # for the clock of the file system, which goes in steps
    (tmp_path / "f00").write_text("changed")
    assert names(workspace) == ["work/f00"]
    assert workspace.note is not None
    assert "10 files" in workspace.note


def test_only_so_many_files_are_told(tmp_path: Path) -> None:
    """An agent that unpacks an archive doesn't fill the log; that there was more is said."""
    workspace = a_workspace(tmp_path)
    for number in range(_workspace._MOST_REPORTED + 5):
        (tmp_path / f"{number}").touch()
    assert len(workspace.news()) == _workspace._MOST_REPORTED
    assert workspace.note is not None
    assert workspace.news() == []


def test_without_a_look_before_the_times_decide(tmp_path: Path) -> None:
    """What the system saw changed since then counts, whatever the file says of itself."""
    (tmp_path / "old").write_text("x")
    (tmp_path / "old2").write_text("x")
    time.sleep(0.02)  # for the clock of the file system, which goes in steps
    since = time.time_ns()
    time.sleep(0.02)
    (tmp_path / "new").write_text("x")
    os.utime(tmp_path / "new", ns=(1, 1))
    (tmp_path / "old2").write_text("y")
    assert names(Workspace(tmp_path, "work", since=since, before=None)) == ["work/new", "work/old2"]


def test_a_directory_that_is_gone_is_empty(tmp_path: Path) -> None:
    """The agent may remove the directory itself."""
    assert look(tmp_path / "gone") == Look({}, {}, whole=True)
