"""What every database must be able to do for the store: the contract behind `Database`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from perdure.errors import DatabaseIncompatible, StoreError
from perdure.store import schema
from perdure.store.readonly import Reader

if TYPE_CHECKING:  # importing it takes as long as reading thousands of events
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = [
    "HURRIED_SECONDS",
    "ONE_MIGRATION",
    "Dialect",
    "Listens",
    "News",
    "Writer",
    "alembic_config",
    "any_text",
    "origin_of",
    "refuse_old",
    "spelt_url",
    "stored_revision",
    "take_time",
    "translating",
]


# So long a database that is in trouble is waited for by those who were asked to come to an end.
HURRIED_SECONDS: Final = 5.0

# Alembic keeps what it works on in globals: of the threads of a process only one may migrate.
ONE_MIGRATION: Final = threading.Lock()


@dataclass(frozen=True, slots=True)
class News:
    """Others have committed something.

    Attributes:
        work: Whether there may be something to claim.
    """

    work: bool = True


class Listens(Protocol):
    """What hears of other processes' commits."""

    hears: bool

    async def run(self) -> None:
        """Listen until cancelled."""


class Writer(ABC):
    """The write side of a database: one connection, and what differs per dialect around it.

    Attributes:
        connection: The connection to write with.
        committing: Whether the last transaction has come as far as its commit.
        races: Whether others can write between a look and the write that follows from it.
        tells: Whether others have to be told of commits.
        hurried: Set, from any thread, when trouble isn't to be waited out for longer than
            `HURRIED_SECONDS`.
    """

    connection: Connection
    committing: bool = False
    races: ClassVar[bool] = False
    tells: ClassVar[bool] = False

    def __init__(self) -> None:
        self.hurried = threading.Event()

    @abstractmethod
    def translated(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into a `StoreError` of one line."""

    @contextmanager
    def transaction(self) -> Generator[Connection, None, None]:
        """Give the connection in a write transaction; commit at the end, roll back on an error."""
        self.committing = False
        with self.translated():
            self.ready()
            with self.begun():
                yield self.connection
                self.committing = True

    def begun(self) -> AbstractContextManager[object]:
        """Begin a transaction on the connection; commit at the end, roll back on an error."""
        return self.connection.begin()

    def ready(self) -> None:  # noqa: B027 - most never lose theirs
        """Make sure that there is a connection to begin a transaction on."""

    def now(self) -> datetime:
        """Return the time that is written into the log (UTC)."""
        return datetime.now(UTC)

    def settle(self, error: BaseException, mark: tuple[int, bytes] | None) -> bool:
        """Return whether a transaction that ended in ``error`` was committed all the same.

        Args:
            error: What `transaction` raised.
            mark: The position and the digest of the last event that was to be written.

        Returns:
            True where it was; False where it wasn't, and may be done again.

        Raises:
            BaseException: ``error``, where another try can't help.
        """
        raise error

    def undisturbed(self) -> bool:
        """Return, within a transaction, whether nobody else has written since this was asked last.

        False where that can't be known.
        """
        return False

    @abstractmethod
    def others_committed(self) -> bool:
        """Return whether another connection has committed since this was last asked."""

    def announce(self, *, work: bool) -> None:  # noqa: B027 - most have nobody to tell
        """Tell other processes that something was committed, where they can be told.

        Args:
            work: Whether there is something to claim.
        """

    @abstractmethod
    def checkpoint_if_due(self) -> None:
        """Do what has to be done from time to time between commits."""

    @abstractmethod
    def erase(self) -> bool:
        """See to it that what was overwritten is nowhere any more; returns whether it is gone."""

    @abstractmethod
    def vacuum(self, *, full: bool) -> None:
        """Give the space that nothing needs any more back.

        Args:
            full: Write everything anew, which takes as much space again while it lasts.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back."""


class Dialect(ABC):
    """One kind of database at one place.

    Attributes:
        url: Where it is.
        place: The same for people to read, without a password.
    """

    url: URL
    place: str

    @abstractmethod
    def prepare(self, *, create: bool, upgrade: bool) -> None:
        """See `Database.prepare`."""

    @abstractmethod
    def upgrade(self) -> None:
        """See `Database.upgrade`."""

    @abstractmethod
    def migration(self) -> AbstractContextManager[Connection]:
        """See `Database.migration`."""

    @abstractmethod
    def writer(self) -> Writer:
        """Open the connection to write with. Belongs to the thread that calls this."""

    def listener(
        self, on_news: Callable[[News], None], active: Callable[[], bool]
    ) -> Listens | None:
        """Return what hears of other processes' commits; None where the writer looks for them.

        Args:
            on_news: Called on the event loop.
            active: Returns whether anybody follows the log now.
        """
        return None

    @abstractmethod
    def snapshot(self) -> AbstractContextManager[Connection]:
        """See `Database.snapshot`."""

    @abstractmethod
    def readers(self) -> AsyncEngine:
        """Make the pool of connections that can't write."""

    @abstractmethod
    def size(self) -> int:
        """Return how many bytes it takes on disk."""

    @abstractmethod
    def read_only(self) -> Reader:
        """Open a plain connection that can't change anything, for people's own SQL."""

    @abstractmethod
    def translate(self) -> AbstractContextManager[None]:
        """Turn what the driver raises into a `StoreError` of one line."""

    @abstractmethod
    def pairs(self, values: Mapping[str, str]) -> sa.TableValuedAlias:
        """Return a table of ``values``, with the columns `key` and `value`, as one parameter."""

    def mentions(self, column: sa.Column[Any], text: str) -> sa.ColumnElement[bool]:
        """Return whether a column has a text in it, in upper or lower case."""
        return column.icontains(text, autoescape=True)

    @property
    def now(self) -> datetime:
        """The time by the clock that all who share the database go by (UTC)."""
        return datetime.now(UTC)

    def is_passing(self, error: BaseException) -> bool:
        """Return whether a read that failed with ``error`` may be tried again."""
        return False


def spelt_url(url: URL, *, hide_password: bool = False) -> str:
    """Return a URL as text that stands for the very same, for `parse_url` and for other programs.

    `URL.render_as_string` leaves spaces as they are, or makes them `+`, which few read as a space.
    """
    text = f"{url.drivername}://"
    if url.username is not None:
        text += quote(url.username, safe="")
        if url.password is not None:
            text += f":{'***' if hide_password else quote(str(url.password), safe='')}"
        text += "@"
    if url.host is not None:
        text += f"[{url.host}]" if ":" in url.host else url.host
    if url.port is not None:
        text += f":{url.port}"
    if url.database is not None:
        text += f"/{quote(url.database, safe='/')}"
    given = [
        f"{quote(name, safe='')}={quote(value, safe='/:,*')}"
        for name, values in sorted(url.query.items())
        for value in ((values,) if isinstance(values, str) else values)
    ]
    return f"{text}?{'&'.join(given)}" if given else text


def origin_of(error: BaseException) -> BaseException:
    """Return what the driver raised, where SQLAlchemy has wrapped it."""
    return error.orig if isinstance(error, DBAPIError) and error.orig else error


@contextmanager
def translating(
    translated: Callable[[Exception], StoreError], of_driver: type[Exception]
) -> Generator[None, None, None]:
    """Turn what the driver raises into a `StoreError` of one line. The one boundary for that.

    Args:
        translated: Makes it of such an error, which SQLAlchemy may have wrapped.
        of_driver: The driver's errors.
    """
    try:
        yield
    except StoreError:
        raise
    except IntegrityError:
        raise  # the log knows what it was doing, and decides
    except (SQLAlchemyError, of_driver) as error:
        raise translated(error) from error


def take_time(connection: Connection) -> None:
    """Let the transaction last as long as it takes, where the server would end it otherwise."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(_NO_LIMIT)


# From version 17 on.
_NO_LIMIT: Final = """
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN ('transaction_timeout', 'idle_in_transaction_session_timeout')
"""


@contextmanager
def any_text(connection: Connection) -> Generator[None, None, None]:
    """Let text that is no UTF-8, which only somebody else can have stored, come with surrogates."""
    if connection.dialect.name != "sqlite":  # the others refuse to store such text
        yield
        return
    raw: Any = connection.connection.dbapi_connection
    before, raw.text_factory = raw.text_factory, _decode_leniently
    try:
        yield
    finally:
        raw.text_factory = before


def _decode_leniently(text: bytes) -> str:
    return text.decode(errors="surrogateescape")


def alembic_config(connection: Connection) -> Any:  # noqa: ANN401 - alembic is imported lazily
    """Return alembic's configuration for migrations over ``connection``."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "perdure_migrations:")
    config.attributes["connection"] = connection
    return config


def stored_revision(connection: Connection, place: object) -> str | None:
    """Return the schema's revision; None for an empty database.

    A newer one that says that this code may use it counts as today's: it has something more, which
    this code doesn't know and leaves alone.

    Raises:
        DatabaseIncompatible: It isn't perdure's, or is newer than this code.
    """
    names = set(sa.inspect(connection).get_table_names())
    if not names - {"alembic_version"}:
        return None
    if not {"alembic_version", "log_head", "events"} <= names:
        raise DatabaseIncompatible(
            f"{place} is a database of some other program: choose another with --db"
        )
    found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    revision = str(found) if found is not None else None
    if revision != schema.REVISION and revision not in _known_revisions():
        if "compatible" in names and _may_be_used(connection):
            return schema.REVISION
        raise DatabaseIncompatible(
            f"{place} has schema {revision}, written by a newer perdure than this one "
            f"(schema {schema.REVISION}): upgrade perdure"
        )
    return revision


def _may_be_used(connection: Connection) -> bool:
    ours = sa.select(schema.compatible).where(schema.compatible.c.revision == schema.REVISION)
    return connection.execute(ours).first() is not None


def refuse_old(revision: str | None, place: object, empty: str) -> None:
    """Raise the error for a database whose schema isn't today's and may not be changed now.

    Args:
        revision: What its schema is.
        place: Where it is.
        empty: What to do where it has none.
    """
    if revision is None:
        raise DatabaseIncompatible(f"{place} is empty: {empty}")
    raise DatabaseIncompatible(
        f"{place} has schema {revision}, this perdure needs {schema.REVISION}: "
        "run `perdure db upgrade`"
    )


def _known_revisions() -> set[str]:
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", "perdure_migrations:")
    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
