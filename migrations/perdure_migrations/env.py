"""How alembic reaches the database: on the connection it is given, or by `PERDURE_DB`."""

from __future__ import annotations

import os

from alembic import context
from sqlalchemy import Connection

from perdure.store.schema import metadata


def _run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


def _main() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        _run(given)
        return
    # From the `alembic` command: the same database, opened in the same way, as everything else.
    from perdure.store.database import Database

    with Database(os.environ["PERDURE_DB"]).migration() as connection:
        _run(connection)


_main()
