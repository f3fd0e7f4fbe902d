"""Where rows come from: a file or stdin, read by a thread of its own and handed over in groups."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Final, Generic, TypeVar

from perdure.batch.reading import Layout, RawRow, detect_layout, read_rows
from perdure.errors import InvalidTask

__all__ = ["Source", "gather", "open_source"]

T = TypeVar("T")

GROUP_ROWS: Final = 1000
GROUP_BYTES: Final = 4 * 2**20
# The rows of a slow pipe don't wait for each other for longer.
GATHER_SECONDS: Final = 0.1
_BUFFER: Final = 2**18


@dataclass(frozen=True, slots=True)
class Source:
    """An input of rows, not opened yet.

    Attributes:
        name: What to call it.
        batch: What its batch is called, unless the user says otherwise.
        path: Where it is; None for stdin.
    """

    name: str
    batch: str
    path: Path | None

    def rows(
        self, layout: Layout | None = None, remark: Callable[[str], None] = lambda _text: None
    ) -> Generator[RawRow, None, None]:
        """Yield its rows. Blocks where the input does.

        Raises:
            InvalidTask: It can't be read as rows at all.
        """
        with BufferedReader(self.open(), _BUFFER) as stream:
            detected = detect_layout(self.name, stream.peek(4096))
            yield from read_rows(stream, layout or detected, name=self.name, remark=remark)

    def reads(self, place: Path) -> bool:
        """Return whether it is read from the file at ``place``, if there is one."""
        try:
            given = os.fstat(0) if self.path is None else self.path.stat()
            return os.path.samestat(given, place.expanduser().stat())
        except (OSError, RuntimeError):  # closed, gone, or of a user that there isn't
            return False

    def open(self) -> FileIO:
        """Open it; whoever calls this closes it.

        Raises:
            InvalidTask: It can't be read.
        """
        if self.path is None:
            # Not sys.stdin: a thread that still reads it would keep the process from ending.
            return FileIO(0, closefd=False)
        try:
            return FileIO(self.path)
        except OSError as error:
            raise InvalidTask(f"can't read {self.name}: {error.strerror}") from None


def open_source(path: str) -> Source:
    """Return the input at ``path``; `-` is stdin.

    Raises:
        InvalidTask: It can't be read.
    """
    if path == "-":
        return Source("stdin", "stdin", None)
    place = Path(path).expanduser()
    try:
        regular = stat.S_ISREG(place.stat().st_mode)
    except OSError as error:
        raise InvalidTask(f"can't read {path}: {error.strerror}") from None
    if not regular and not place.is_dir():  # a pipe, which can be opened only once
        return Source(path, "stdin", place)
    source = Source(path, _batch_of(place), place)
    source.open().close()  # where it can't be read, this is the time to say so
    return source


def _batch_of(path: Path) -> str:
    return path.name.removesuffix(path.suffix).replace(":", "-") or "batch"


async def gather(
    rows: Iterator[RawRow], make: Callable[[RawRow], T]
) -> AsyncGenerator[list[T], None]:
    """Yield what ``make`` makes of the rows, in groups, as they come; both work in a thread."""
    gathering = _Gathering(rows, make)
    try:
        while True:
            group, more = await gathering.take()
            if group:
                yield group
            if not more:
                return
    finally:
        gathering.abandon()


class _Gathering(Generic[T]):
    """A thread that reads ahead by one group."""

    def __init__(self, rows: Iterator[RawRow], make: Callable[[RawRow], T]) -> None:
        self._rows = rows
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._lock = threading.Lock()
        self._room = threading.Event()
        self._group: list[T] = []
        self._bytes = 0
        self._done = False
        self._abandoned = False
        self._error: BaseException | None = None
        threading.Thread(target=self._read, name="perdure-rows", daemon=True).start()

    @property
    def _ready(self) -> bool:
        return self._done or len(self._group) >= GROUP_ROWS or self._bytes >= GROUP_BYTES

    def _read(self) -> None:
        try:
            for raw in self._rows:
                item = self._make(raw)
                with self._lock:
                    self._group.append(item)
                    self._bytes += raw.size
                    gathered = len(self._group)
                if gathered == 1 or gathered >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
                    self._tell()
                    self._wait_for_room()
                    if self._abandoned:
                        return
        except BaseException as error:  # noqa: BLE001 - raised where the rows are taken
            self._error = error
        self._done = True
        self._tell()

    def _wait_for_room(self) -> None:
        while self._ready and not self._abandoned:
            self._room.wait()
            self._room.clear()

    def _tell(self) -> None:
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            self._loop.call_soon_threadsafe(self._news.set)

    async def take(self) -> tuple[list[T], bool]:
        """Return the next group, and whether there may be more."""
        await self._wait()
        if not self._ready:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GATHER_SECONDS):
                    while not self._ready:
                        await self._wait()
        with self._lock:
            done = self._done
            group, self._group, self._bytes = self._group, [], 0
        self._room.set()
        if done:
            self._news.set()  # for whoever asks again
            if not group and self._error is not None:
                raise self._error
        return group, not done or self._error is not None

    async def _wait(self) -> None:
        await self._news.wait()
        self._news.clear()

    def abandon(self) -> None:
        """Let the thread end as soon as it can."""
        self._abandoned = True
        self._room.set()
