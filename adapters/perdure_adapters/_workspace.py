"""A directory before and after: which files are new or changed. It blocks; call it in a thread.

Symbolic links are not followed, nor counted: what they lead to may lie outside. `.git` is left out.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from perdure.events import FileCreated
from perdure.text import clean_text

__all__ = ["Look", "Stamp", "Workspace", "look"]

_IGNORED: Final = frozenset({".git"})
_MOST_ENTRIES: Final = 50_000
"""How many files and folders are looked at; half a second's work."""
_MOST_REPORTED: Final = 1_000
"""How many files one attempt names in the log."""
_MOST_BYTES: Final = 256 * 1024 * 1024
"""Larger files are named without a digest."""
_PIECE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stamp:
    """What can be seen of a file without reading it.

    Attributes:
        size: Bytes.
        modified: When its content was changed last, in nanoseconds; programs can set this.
        inode: Which file it is; another one may have been put in its place.
    """

    size: int
    modified: int
    inode: int


@dataclass(frozen=True, slots=True)
class Look:
    """What was in a directory at one moment.

    Attributes:
        files: Path within the directory -> stamp.
        touched: Path -> when the system noted the last change of the file, in nanoseconds.
        whole: Whether that is all; False where there was more than is looked at.
    """

    files: Mapping[str, Stamp]
    touched: Mapping[str, int]
    whole: bool


def look(directory: Path, most: int = _MOST_ENTRIES) -> Look:
    """Return the regular files below ``directory``, those near its top first.

    What can't be read is left out.

    Args:
        directory: Where to begin.
        most: How many files and folders to look at.
    """
    files: dict[str, Stamp] = {}
    touched: dict[str, int] = {}
    folders = [""]
    for folder in folders:  # it grows meanwhile
        for entry in _entries(directory / folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if len(files) + len(folders) > most:
                return Look(files, touched, whole=False)
            try:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    continue
                seen = entry.stat(follow_symlinks=False)
            except OSError:  # it is gone again
                continue
            if stat.S_ISREG(seen.st_mode):
                files[path] = Stamp(seen.st_size, seen.st_mtime_ns, seen.st_ino)
                touched[path] = seen.st_ctime_ns
    return Look(files, touched, whole=True)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if e.name not in _IGNORED), key=lambda e: e.name)
    except OSError:
        return []


class Workspace:
    """The directory of one attempt; knows what was there before and what was told since.

    Args:
        directory: The directory.
        named: How the task calls it; the files are named by it.
        since: Nanoseconds since 1970: where it isn't known what was there before, a file counts
            that the system saw changed since.
        before: The look before the work began; None where it began in another process.
        most: How many files and folders to look at.
    """

    def __init__(
        self,
        directory: Path,
        named: str,
        *,
        since: int,
        before: Look | None,
        most: int = _MOST_ENTRIES,
    ) -> None:
        self._directory = directory
        self._named = named
        self._since = since
        self._whole = before is not None and before.whole
        self._known: dict[str, Stamp] = {} if before is None else dict(before.files)
        self._most = most
        self._reported = 0
        self._seconds = 0.0
        self._looked_at = -float("inf")
        self.note: str | None = None
        """What to know about the last look, where it didn't see everything."""

    @property
    def due(self) -> bool:
        """Whether another look on the way is worth its time."""
        pause = max(1.0, 20 * self._seconds)
        return time.monotonic() - self._looked_at >= pause

    def news(self) -> list[FileCreated]:
        """Return the files that are new or changed since the last look, in the order of names."""
        began = time.monotonic()
        now = look(self._directory, self._most)
        written = sorted(
            path for path, stamp in now.files.items() if self._is_news(path, stamp, now)
        )
        self._known.update((path, now.files[path]) for path in written)
        told = written[: max(0, _MOST_REPORTED - self._reported)]
        self._reported += len(told)
        if len(told) < len(written):
            self.note = f"more than {_MOST_REPORTED} files were written; the rest is not named here"
        elif not now.whole:
            self.note = f"only {self._most} files and folders of the directory were looked at"
        found = [self._described(path) for path in told]
        self._looked_at = time.monotonic()
        self._seconds = self._looked_at - began
        return [event for event in found if event is not None]

    def _is_news(self, path: str, stamp: Stamp, now: Look) -> bool:
        known = self._known.get(path)
        if known is not None:
            return known != stamp
        return self._whole or now.touched[path] >= self._since

    def _described(self, path: str) -> FileCreated | None:
        size, digest = _read(self._directory / path)
        if size is None:
            return None
        # Names needn't be UTF-8; what is written down has to be.
        shown = os.fsencode(Path(self._named) / path).decode("utf-8", "backslashreplace")
        return FileCreated(path=clean_text(shown), size=size, digest=digest)


def _read(path: Path) -> tuple[int | None, str | None]:
    """Return a file's size and SHA-256; without the latter where it can't be read or is too large.

    The size is None where it is no file any more.
    """
    try:
        size = path.lstat().st_size
    except OSError:
        return None, None
    try:
        # Something else may have taken its place: a link isn't followed, a pipe not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return size, None
    with os.fdopen(handle, "rb", buffering=0) as file:
        seen = os.fstat(handle)
        if not stat.S_ISREG(seen.st_mode):
            return None, None
        if seen.st_size > _MOST_BYTES:
            return seen.st_size, None
        total, digest = 0, hashlib.sha256()
        try:
            while total <= _MOST_BYTES and (piece := file.read(_PIECE)):
                total += len(piece)
                digest.update(piece)
        except OSError:
            return seen.st_size, None
    return total, digest.hexdigest() if total <= _MOST_BYTES else None
