"""A file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from perdure.errors import InvalidTask

__all__ = ["WholeFile"]

# What is written holds people's prompts, as the database does.
_OWNER_ONLY = 0o600
# How a database of SQLite begins, and what the files beside it are called.
_SQLITE = b"SQLite format 3\0"
_PARTS = ("-wal", "-shm", "-journal")


class WholeFile:
    """A file that is written beside its place and put there in the end.

    Used as a context manager; an error, or a crash, leaves what was at its place as it was. A pipe
    or a device is written to directly. A new file is readable by its owner only, one that is
    replaced keeps its permissions.

    Args:
        path: Its place; a link stays a link.
    """

    def __init__(self, path: Path) -> None:
        place = path.expanduser()
        # Before links are followed: that of a pipe, such as /dev/stdout, leads nowhere.
        self._direct = place.exists() and not place.is_file()
        self.path = place if self._direct else Path(os.path.realpath(place))
        self.draft = self.path.with_name(f".{self.path.name[:80]}.{secrets.token_hex(4)}.part")
        self._file: IO[bytes] | None = None

    @staticmethod
    def check(path: Path, option: str, database: Path | None = None) -> None:
        """Raise `InvalidTask` where nothing could be written in the end, or something be lost.

        Args:
            path: The file's place.
            option: What names it on the command line.
            database: The one in use, which may not be there yet. No database is ever replaced.
        """
        place = path.expanduser()
        folder = place.resolve().parent
        if place.is_dir():
            raise InvalidTask(f"{option}: {path} is a directory; name a file")
        if not folder.is_dir():
            raise InvalidTask(f"{option}: there is no folder {folder}")
        if not place.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise InvalidTask(f"{option}: {folder} can't be written to")
        real = Path(os.path.realpath(place))
        ours = None if database is None else Path(os.path.realpath(database))
        for candidate in (real, *_databases_of(real)):
            if candidate == ours or _is_database(candidate):
                raise InvalidTask(
                    f"{option}: {path} is a database, or a part of one; name another file"
                )

    def __enter__(self) -> Self:
        """Begin the draft."""
        if self._direct:
            self._file = self.path.open("wb")
            return self
        mode = self.path.stat().st_mode & 0o777 if self.path.exists() else _OWNER_ONLY
        descriptor = os.open(self.draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        self._file = os.fdopen(descriptor, "wb")
        return self

    def write(self, data: bytes) -> None:
        """Write some more."""
        if self._file is None:
            raise ValueError("the file isn't open")
        with self._named():
            self._file.write(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put it in its place; after an error, leave nothing behind."""
        if self._file is None:
            return
        try:
            with self._named(), self._file as file:
                if error is None and not self._direct:
                    file.flush()
                    os.fsync(file.fileno())
            if error is None and not self._direct:
                self.draft.replace(self.path)
        finally:
            if not self._direct:
                with contextlib.suppress(OSError):
                    self.draft.unlink()

    @contextlib.contextmanager
    def _named(self) -> Generator[None]:
        """Have an error say which file it is about: that of a full disk doesn't by itself."""
        try:
            yield
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def _databases_of(path: Path) -> list[Path]:
    """Return the database that a file would be a part of, going by its name."""
    parts = [part for part in _PARTS if path.name.endswith(part) and path.name != part]
    return [path.with_name(path.name.removesuffix(part)) for part in parts]


def _is_database(path: Path) -> bool:
    if not path.is_file():
        return False
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(_SQLITE)) == _SQLITE
    return False
