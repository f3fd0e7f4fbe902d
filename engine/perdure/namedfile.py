"""Files that somebody has named: what is there may be no file, or more than fits into memory."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["other_than_file", "read_file"]

_PIECE: Final = 2**20
_OTHERS: Final = {
    stat.S_IFDIR: "directory",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


def other_than_file(found: os.stat_result) -> str | None:
    """Return what it is instead of a regular file, as in "a pipe"; None where it is one."""
    if stat.S_ISREG(found.st_mode):
        return None
    return f"a {_OTHERS.get(stat.S_IFMT(found.st_mode), 'device')}"


def read_file(path: Path, most: int, *, regular: bool = True) -> bytes:
    """Return what a file holds. Blocks.

    Args:
        path: Where it is.
        most: How many bytes it may hold; a whole number of MB.
        regular: Whether it has to be a regular file. A pipe can keep its reader waiting for ever,
            so it isn't waited for; where pipes are welcome, it is.

    Raises:
        OSError: It can't be read, is none, or holds more; `strerror` says so.
    """
    if regular:  # before it is opened: to some devices, that is a command
        _require_regular(path.stat(), path)
    # What has become a pipe meanwhile would be waited for without O_NONBLOCK.
    descriptor = os.open(path, os.O_RDONLY | (os.O_NONBLOCK if regular else 0))
    try:
        found = os.fstat(descriptor)
        if regular:
            _require_regular(found, path)
        if found.st_size > most:
            raise _too_large(f"{found.st_size / 2**20:.1f} MB, and the limit is", most, path)
        data = bytearray()
        while piece := os.read(descriptor, min(_PIECE, most + 1 - len(data))):
            data += piece
            if len(data) > most:  # it grows, or has no end
                raise _too_large("more than", most, path)
        return bytes(data)
    finally:
        os.close(descriptor)


def _require_regular(found: os.stat_result, path: Path) -> None:
    if (other := other_than_file(found)) is not None:
        raise OSError(
            errno.EINVAL,
            f"it is {other}, and no file: name a file",
            str(path),
        )


def _too_large(how: str, most: int, path: Path) -> OSError:
    return OSError(errno.EFBIG, f"it has {how} {most // 2**20} MB", str(path))
