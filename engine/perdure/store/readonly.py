"""Reading a database with nothing but the standard library.

For commands that look something up and leave: starting SQLAlchemy and pydantic takes most of a
second, the query itself a few milliseconds. The connection can't write, so looking never locks
anybody out, and what people may look at is what they may open. It knows the tables by their public
names and nothing of what events mean.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self, cast

from perdure.config import load_config
from perdure.errors import (
    DatabaseCorrupt,
    DatabaseIncompatible,
    DatabaseUnavailable,
    PerdureError,
    StoreError,
)
from perdure.namedfile import other_than_file

__all__ = [
    "APPLICATION_ID",
    "BUSY_SECONDS",
    "IN_MEMORY",
    "LONGEST_LEASE",
    "REVISION",
    "UNREADABLE_URL",
    "VIEWS",
    "Reader",
    "default_database",
    "describe_error",
    "file_at",
    "immutable",
    "iso",
    "lease_of",
    "mentions",
    "on_server",
    "open_read_only",
    "path_of",
    "reading_errors",
    "refuse_missing",
    "text_of",
]

# The migration this code is written for. A constant, since asking alembic costs most of a second.
REVISION: Final = "0005"
# Seconds: a year. A moment that is later by it is still one.
LONGEST_LEASE: Final = 31_536_000

# "perd", in the header of every SQLite file that is ours.
APPLICATION_ID: Final = 0x70657264

VIEWS: Final = ("attempts", "batches", "task_events", "task_output", "usage_daily")

BUSY_SECONDS: Final = 30.0

UNREADABLE_URL: Final = (
    "the database URL can't be read: give a file's path, sqlite:///FILE or "
    "postgresql://USER@HOST/NAME"
)
"""What is said of a URL with a mistake in it, which isn't shown, as a password may be in it."""
IN_MEMORY: Final = (
    "a database in memory is gone with the process: give a file, as in sqlite:///perdure.db"
)
# The beginning of a server's URL that isn't quite one.
_MISSPELT: Final = re.compile(r"postgres(ql)?(\+\w+)?(:|//)", re.IGNORECASE)

Parameters = Mapping[str, object] | Sequence[object]

# So often (in steps of SQLite's machine) Python gets to see that Ctrl-C was pressed.
_STEPS: Final = 100_000
_OURS: Final = frozenset({"alembic_version", "log_head", "events"})


class Reader:
    """A connection that can't change anything. Use it as a context manager.

    Text that is no UTF-8, which only somebody else can have written, comes with surrogates.

    Attributes:
        dialect: The kind of database.
        path: The database's file; where it is on a server, its name for messages.
        connection: The plain connection, in autocommit mode: each query sees the latest commit.
    """

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connection = open_read_only(path)
        self._data_version = self._read_data_version()

    @classmethod
    def open(cls, url: str | os.PathLike[str]) -> Reader:
        """Open a database of today's schema.

        Args:
            url: A file's path, `sqlite:///FILE` or `postgresql://…`.

        Raises:
            DatabaseUnavailable: It isn't there, or can't be opened.
            DatabaseIncompatible: It isn't perdure's, is still empty, or of another schema.
        """
        if on_server(url):
            from perdure.store.database import Database

            Database(url)  # says what is wrong with it, and whether the driver is there
            from perdure.store.postgresql_reader import PostgresqlReader

            return PostgresqlReader(url)
        path = path_of(url)
        refuse_missing(path)
        with reading_errors(path):
            reader = cls(path)
            try:
                reader._check()
            except BaseException:
                reader.close()
                raise
        return reader

    def _check(self) -> None:
        names = {row[0] for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found = self.one("SELECT version_num FROM alembic_version") if names >= _OURS else None
        if found is None or found[0] != REVISION:
            # Telling what it is instead needs the migrations, which take a second to load.
            from perdure.store.database import Database

            Database(self.path).prepare(create=False, upgrade=False)

    def rows(self, sql: str, parameters: Parameters = ()) -> Iterator[sqlite3.Row]:
        """Yield the rows of a query as they are found.

        Raises:
            StoreError: The database can't be read.
        """
        with reading_errors(self.path):
            for row in self.connection.execute(sql, parameters):  # noqa: UP028 - see below
                yield row
            # `yield from` would close the cursor of a reader that is closed half way: an error.

    def one(self, sql: str, parameters: Parameters = ()) -> sqlite3.Row | None:
        """Return the first row of a query; None where there is none."""
        return next(self.rows(sql, parameters), None)

    def changed(self) -> bool:
        """Return whether anything was committed since this was last asked; takes microseconds."""
        with reading_errors(self.path):
            seen = self._read_data_version()
        changed = seen != self._data_version
        self._data_version = seen
        return changed

    def _read_data_version(self) -> int:
        return int(self.connection.execute("PRAGMA data_version").fetchone()[0])

    def hexed(self, column: str) -> str:
        """Return the SQL for bytes in hexadecimal."""
        return f"lower(hex({column}))"

    def seconds(self, begin: str, end: str) -> str:
        """Return the SQL for the seconds from one moment to another."""
        return f"(julianday({end}) - julianday({begin})) * 86400"

    def has_label(self, name: str, value: str) -> str:
        """Return the condition that `tasks AS t` has a label; the arguments name parameters."""
        return (
            "EXISTS (SELECT 1 FROM json_each(t.labels) AS label "
            f"WHERE label.key = :{name} AND label.value = :{value})"
        )

    def mentions(self, columns: Sequence[str], text: str, found: dict[str, object]) -> str:
        """Return the condition that a column has a text in it, in upper or lower case.

        Args:
            columns: Where to look.
            text: What for.
            found: Gets the condition's parameters.
        """
        if text.isascii():
            escaped = re.sub(r"([\\%_])", r"\\\1", text)
            found["search"] = f"%{escaped}%"
            return "(" + " OR ".join(rf"{c} LIKE :search ESCAPE '\'" for c in columns) + ")"
        # SQLite knows upper and lower case of ASCII letters only.
        found["search"] = text.casefold()
        self.connection.create_function("perdure_mentions", 2, mentions, deterministic=True)
        return "(" + " OR ".join(f"perdure_mentions({c}, :search)" for c in columns) + ")"

    def close(self) -> None:
        """Give the connection back."""
        self.connection.close()

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def mentions(stored: object, sought: str) -> bool:
    """Return whether a stored text has a text in it, which is given as `casefold` makes it."""
    return isinstance(stored, str) and sought in stored.casefold()


def lease_of(seconds: object, usual: timedelta) -> timedelta:
    """Return for how long a worker's sign of life holds.

    Args:
        seconds: What its row says; what can't be, as only somebody else can have written it, counts
            as nothing.
        usual: For workers that don't say it.
    """
    if not isinstance(seconds, (int, float)) or not 0 < seconds <= LONGEST_LEASE:
        return usual
    return timedelta(seconds=seconds)


def iso(moment: datetime) -> str:
    """Return ``moment`` as it is stored: `2026-11-22T13:05:00.123456Z`, which sorts as text."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")[:26] + "Z"


def default_database() -> str:
    """Return the database that is used where none is named.

    `PERDURE_DB`, else what `perdure.toml` says, else one per user.

    Raises:
        InvalidConfig: `perdure.toml` can't be read.
    """
    named = os.environ.get("PERDURE_DB") or load_config().database
    if named:
        return named
    from platformdirs import user_data_path

    return str(user_data_path("perdure", appauthor=False) / "perdure.db")


def path_of(url: str | os.PathLike[str]) -> Path:
    """Return the file that a path or a `sqlite:///` URL stands for.

    Raises:
        DatabaseIncompatible: It is a URL that perdure can't use, or no name of a file.
    """
    text = text_of(url)
    if "://" not in text:
        if _MISSPELT.match(text):  # and not shown: there may be a password in it
            raise DatabaseIncompatible(UNREADABLE_URL)
        return file_at(text)
    from perdure.store.database import parse_url  # URLs have rules; few people write one

    return Path(str(parse_url(text).database))


def text_of(url: str | os.PathLike[str]) -> str:
    """Return what names a database, as text.

    Raises:
        DatabaseIncompatible: It is neither text nor a path, or has a NUL in it.
    """
    text = cast("object", url)  # it may be anything, where nobody checks types
    with contextlib.suppress(TypeError):
        text = cast("object", os.fspath(url))
    if not isinstance(text, str):
        raise DatabaseIncompatible(
            f"a database is named by text or a path, not by {type(url).__name__}: give a file's "
            "path, sqlite:///FILE or postgresql://USER@HOST/NAME"
        )
    if "\0" in text or ("://" in text and "%00" in text):
        raise DatabaseIncompatible("the database's name has a NUL in it: no file or server has one")
    return text


def file_at(path: str) -> Path:
    """Return the file that a path stands for.

    Raises:
        DatabaseIncompatible: It begins with a `~` that means nobody, or is what SQLite takes for a
            database in memory.
    """
    try:
        file = Path(path).expanduser()
    except RuntimeError:
        raise DatabaseIncompatible(f"{path}: there is no such user's home: give a path") from None
    if str(file) == ":memory:":
        raise DatabaseIncompatible(IN_MEMORY)
    return file


def on_server(url: str | os.PathLike[str]) -> bool:
    """Return whether a URL names a database on a server, not a file."""
    return text_of(url).partition("://")[0].partition("+")[0] in ("postgresql", "postgres")


def refuse_missing(path: Path) -> None:
    """Raise `DatabaseUnavailable` where there is no file at ``path``, or no regular one."""
    if not path.exists():
        raise DatabaseUnavailable(
            f"there is no database at {path}: name one with --db or PERDURE_DB, "
            "or run a task to create it"
        )
    if (other := other_than_file(path.stat())) is not None:  # a pipe has no end
        raise DatabaseUnavailable(f"{path} is {other}: give the path of a file")


def open_read_only(path: Path) -> sqlite3.Connection:
    """Open a file for reading, also where nobody may write. What can't be read is `sqlite3`'s."""
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        return _prepared(uri)
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname == "SQLITE_READONLY_ROLLBACK":
            _roll_back(path)
            return _prepared(uri)
        if not immutable(path):
            raise
        return _prepared(f"{uri}&immutable=1")


def _roll_back(path: Path) -> None:
    """Undo what a process left half done that died before the file had its WAL.

    SQLite does so by itself wherever it may write, and nobody could read before.
    """
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    finally:
        connection.close()


def immutable(path: Path) -> bool:
    """Return whether a file can be read only as one that nobody changes.

    SQLite keeps an index beside a database in WAL mode. Where it can't be created (a backup on a
    read-only disk) the file can be read all the same, as long as nobody writes to it.
    """
    wal = path.with_name(path.name + "-wal")
    return not os.access(path.parent, os.W_OK) and os.access(path, os.R_OK) and not wal.exists()


def _prepared(uri: str) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        connection.text_factory = _text
        connection.execute("PRAGMA query_only = ON")
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()  # opens the file
        connection.set_progress_handler(_go_on, _STEPS)
    except BaseException:
        connection.close()
        raise
    return connection


def _text(stored: bytes) -> str:
    return stored.decode(errors="surrogateescape")


def _go_on() -> int:
    # Being called is enough: Python raises KeyboardInterrupt here, and SQLite ends the query.
    return 0


@contextlib.contextmanager
def reading_errors(path: Path) -> Generator[None, None, None]:
    """Turn what `sqlite3` raises into a `StoreError` of one line, an interrupt back into itself."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorname", None) == "SQLITE_INTERRUPT":
            raise KeyboardInterrupt from None
        raise describe_error(str(error), path) from error
    except UnicodeEncodeError:
        raise PerdureError("what was asked for is no UTF-8: nothing here is like it") from None


def describe_error(message: str, path: Path) -> StoreError:
    """Return the error for what SQLite said about the database at ``path``."""
    what = " ".join(message.split())
    lower = what.lower()
    if "locked" in lower or "busy" in lower:
        return DatabaseUnavailable(
            f"{path} is locked by another process for more than {BUSY_SECONDS:.0f} s: "
            "end what holds it and try again"
        )
    if "full" in lower:
        return DatabaseUnavailable(f"no space left for {path}: free some and run again")
    if "not a database" in lower:
        return DatabaseIncompatible(f"{path} is not a database: choose another file with --db")
    if "malformed" in lower or "corrupt" in lower:
        return DatabaseCorrupt(
            f"{path} is damaged ({what}): restore a backup, or see perdure doctor"
        )
    if "readonly" in lower or "read-only" in lower:
        return DatabaseUnavailable(f"{path} can't be written to: check its owner and permissions")
    if "unable to open" in lower:
        return DatabaseUnavailable(f"can't open {path}: check the path and its permissions")
    return DatabaseUnavailable(f"{path}: {what}")
