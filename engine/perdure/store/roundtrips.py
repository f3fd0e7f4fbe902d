"""How statements go to a PostgreSQL server, so that few answers are waited for.

Each answer that is waited for is a way to the server and back: half a millisecond to another room,
and on the same machine a wait for the interpreter's lock. So a transaction is begun by the message
that brings its first question, and what it writes is sent without waiting, with the commit after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg
from sqlalchemy.exc import IntegrityError

__all__ = ["RoundTrips"]

# After so many characters it is looked whether they were taken: a great many aren't to wait.
MOST_UNANSWERED: Final = 1_000_000
# The first PostgreSQL that ends a transaction which takes too long, whatever it waits for. Older
# ones don't count how long they wait for what follows in a pipeline, or after one: whoever stopped
# there would keep everybody waiting.
FIRST_TO_END: Final = 17_00_00

Parameters = Mapping[str, Any]


class RoundTrips:
    """What is sent on one connection.

    What the server refuses of that which was only sent is raised by whatever is done next on the
    connection, at the latest by `commit`.

    Args:
        raw: The driver's connection, in its mode of autocommit.
        beginning: What begins a transaction; the last column of its last answer is the time.
        on_skew: Called whenever a transaction has begun, with how far the server's clock is ahead
            of ours. What the transaction waits for, such as locks, isn't part of that.
    """

    def __init__(
        self,
        raw: psycopg.Connection[Any],
        beginning: str,
        on_skew: Callable[[timedelta], None],
    ) -> None:
        self._raw: Final = raw
        self._beginning: Final = beginning
        self._on_skew: Final = on_skew
        self._begins = False
        self._now: datetime | None = None
        self._pipelines: Final = (
            raw.info.server_version >= FIRST_TO_END and psycopg.Pipeline.is_supported()
        )
        self._pipeline: ExitStack | None = None
        self._unanswered = 0

    @property
    def now(self) -> datetime:
        """The time by the server's clock when the transaction was begun."""
        if self._now is None:
            self.sync()
        assert self._now is not None  # noqa: S101 - whoever has no transaction has no time
        return self._now

    def begin(self) -> None:
        """Begin a transaction, with whatever is sent next."""
        self._begins, self._now = True, None

    def ask(self, *statements: tuple[str, Parameters | None]) -> psycopg.Cursor[Any]:
        """Execute statements and return a cursor at the answer of the last one.

        Raises:
            IntegrityError: The database refuses what was to be written, now or before.
            psycopg.Error: Whatever else goes wrong.
        """
        self._end_pipeline()
        if len(statements) == 1 and not self._begins:
            ((sql, parameters),) = statements
            return self._execute(sql, parameters)
        # Several in one message are taken as text only, with the values in it.
        quoting = psycopg.ClientCursor(self._raw)
        texts = [quoting.mogrify(sql.encode(), parameters) for sql, parameters in statements]
        if not self._begins:
            return self._execute(";\n".join(texts)).set_result(-1)
        self._begins = False
        sent = datetime.now(UTC)
        cursor = self._execute(";\n".join([self._beginning, *texts]))
        (*_settings, now) = cursor.set_result(-1 - len(texts)).fetchall()[0]
        self._now = now
        self._on_skew(now - sent)
        return cursor.set_result(-1)

    def send(self, sql: str, parameters: Parameters | None) -> None:
        """Execute a statement whose answer nobody needs, without waiting where that is well.

        Raises:
            IntegrityError: The database refuses what was to be written, now or before.
            psycopg.Error: Whatever else goes wrong.
        """
        if self._begins or not self._pipelines:
            self.ask((sql, parameters))
            return
        size = _size(parameters)
        if self._unanswered + size > MOST_UNANSWERED:
            self._end_pipeline()
        self._unanswered += size
        self._send(sql, parameters)

    def sync(self) -> None:
        """Have everything done that was asked for so far.

        Raises:
            IntegrityError: The database refuses what was to be written.
            psycopg.Error: Whatever else goes wrong.
        """
        self._end_pipeline()
        if self._begins:
            self.ask()

    def commit(self) -> None:
        """Commit what was sent, if there is anything that wasn't waited for.

        Raises:
            IntegrityError: The database refuses what was to be written.
            psycopg.Error: Whatever else goes wrong.
        """
        if self._pipeline is not None:
            self._send("COMMIT", None)
            self._end_pipeline()
        self._begins = False  # where nothing was sent, nothing was begun

    def drop(self) -> None:
        """Forget what is under way: it will be rolled back."""
        self._begins = False
        with suppress(psycopg.Error, IntegrityError):
            self._end_pipeline()

    def _send(self, sql: str, parameters: Parameters | None) -> None:
        if self._pipeline is None:
            self._pipeline = ExitStack()
            self._pipeline.enter_context(self._raw.pipeline())
        try:
            self._raw.execute(sql.encode(), parameters)
        except psycopg.Error as error:
            self._end_pipeline(error)

    def _end_pipeline(self, refused: psycopg.Error | None = None) -> None:
        pipeline, self._pipeline, self._unanswered = self._pipeline, None, 0
        if pipeline is None:
            return
        try:
            pipeline.close()
        except psycopg.Error as error:
            refused = refused or error  # what goes wrong after the first comes of it
        if isinstance(refused, psycopg.IntegrityError):
            raise IntegrityError(None, None, refused) from refused
        if refused is not None:
            raise refused

    def _execute(self, sql: str, parameters: Parameters | None = None) -> psycopg.Cursor[Any]:
        try:
            return self._raw.execute(sql.encode(self._raw.info.encoding), parameters)
        except psycopg.IntegrityError as error:
            raise IntegrityError(None, None, error) from error


def _size(parameters: Parameters | None) -> int:
    return sum(
        len(value) for value in (parameters or {}).values() if isinstance(value, (str, bytes))
    )
