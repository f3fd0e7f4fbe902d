"""`perdure db …`: the database as a file. Upgrade its schema, copy it, shrink it."""

from __future__ import annotations

import os
import secrets
import sqlite3
from pathlib import Path
from typing import Annotated

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.figures import size
from perdure.cli.progress import progress
from perdure.cli.session import Session
from perdure.cli.terminal import complain, say, show_json
from perdure.errors import DatabaseUnavailable, PerdureError
from perdure.store.readonly import REVISION, Reader, on_server, reading_errors, refuse_missing

__all__ = ["backup", "size_on_disk", "stored_revision", "upgrade", "vacuum"]

# Between two steps a backup looks whether it was interrupted; the snapshot is one all the time.
_PAGES_A_STEP = 2048


def stored_revision(path: Path) -> str | None:
    """Return the revision of the schema in a file; None where there is no schema of ours."""
    with reading_errors(path), Reader(path) as reader:
        known = reader.one("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")
        row = reader.one("SELECT version_num FROM alembic_version") if known else None
        return None if row is None else str(row[0])


def size_on_disk(path: Path) -> int:
    """Return how many bytes a database takes, with what is still in its WAL."""
    wal = path.with_name(path.name + "-wal")
    return sum(part.stat().st_size for part in (path, wal) if part.exists())


def upgrade(session: Session) -> int:
    """Bring the database's schema up to that of this perdure.

    On a file, commands that write do so by themselves; those that only look ask for it. A
    PostgreSQL database is set up and upgraded by this command only; any number at once is fine.
    Triggers, unique indexes and views that are missing, or were changed, are put back.
    """
    from perdure.store.defences import mend

    database = session.database()
    if not on_server(session.url):
        refuse_missing(database.path)
    before = database.revision()
    database.upgrade()
    mended = mend(database)
    place = database.dialect.place
    if session.json:
        show_json(
            {"before": before, "after": REVISION, "put_back": mended.back, "failed": mended.failed}
        )
    elif before == REVISION:
        say(f"{place} has schema {REVISION} already.")
    else:
        say(f"{place} has schema {REVISION} now; it had {before or 'none'}.")
    for what in mended.back:
        say(f"Put back: {what}.")
    for failure in mended.failed:
        complain(failure)
    return ExitCode.FATAL if mended.failed else ExitCode.OK


# -- backup --------------------------------------------------------------------------------------


def backup(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the copy goes.")],
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file.")] = False,
) -> None:
    """Copy the database as it is at one moment, while others go on writing.

    The copy is a database as any other: --db FILE looks at it. It is checked before it is put in
    its place, and readable by its owner only.
    """
    if on_server(session.url):
        raise PerdureError(
            "a database on a server is backed up with its own tools: pg_dump for a copy, "
            "continuous archiving for every commit; docs/deploy.md shows both"
        )
    with Reader.open(session.url) as reader:
        target = Path(os.path.realpath(file.expanduser()))
        _refuse_target(reader.path, target, force=force)
        draft = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.part")
        try:
            position, digest = _copy(reader, draft)
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
    octets = target.stat().st_size
    if session.json:
        show_json({"file": target, "bytes": octets, "position": position, "digest": digest})
    else:
        say(f"{file} is a copy of {reader.path} up to position {position:,}: {size(octets)}")


def _refuse_target(source: Path, target: Path, *, force: bool) -> None:
    if target.is_dir():
        raise PerdureError(f"{target} is a directory: name a file for the backup")
    if not target.parent.is_dir():
        raise PerdureError(f"there is no folder {target.parent} for the backup")
    if not target.exists():
        return
    if target.samefile(source):
        raise PerdureError(f"{target} is the database itself: name another file for the backup")
    wal = target.with_name(target.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        # SQLite would take what is in there for the newest part of the new file.
        raise PerdureError(f"{target} is a database in use ({wal.name}): name another file")
    if not force:
        raise PerdureError(f"{target} is there already: --force replaces it")


def _copy(reader: Reader, draft: Path) -> tuple[int, str]:
    """Copy one state of the database, check the copy, and return its position and digest."""
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with reading_errors(draft), progress("copying pages") as step:
        copy = sqlite3.connect(draft)
        try:
            # Our own transaction: without it the copy would begin anew whenever somebody writes.
            reader.connection.execute("BEGIN")
            reader.one("SELECT 1 FROM log_head")
            reader.connection.backup(
                copy,
                pages=_PAGES_A_STEP,
                progress=lambda _status, left, total: step(total - left, total),
                sleep=0,
            )
        finally:
            copy.close()
            reader.connection.rollback()
    with reading_errors(draft):
        copied = sqlite3.connect(f"{draft.as_uri()}?immutable=1", uri=True)
        try:
            found = copied.execute("PRAGMA quick_check(1)").fetchone()[0]
            head = copied.execute("SELECT position, lower(hex(digest)) FROM log_head").fetchone()
        finally:
            copied.close()
    if found != "ok" or head is None:
        raise DatabaseUnavailable(f"the copy of {reader.path} is damaged ({found}): not kept")
    return int(head[0]), str(head[1])


# -- vacuum --------------------------------------------------------------------------------------


def vacuum(
    session: Session,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Write the whole file anew: smallest, but takes its size again."
        ),
    ] = False,
) -> None:
    """Give space that nothing needs any more back to the disk; says the size before and after.

    Whoever writes waits meanwhile, for half a minute at most: stop the workers first where the file
    is large and all of it is written anew.
    """
    database = session.database()
    database.prepare(create=False)
    before = database.dialect.size()
    writer = database.writer()
    try:
        writer.vacuum(full=full)
    finally:
        writer.close()
    after = database.dialect.size()
    if session.json:
        show_json({"bytes_before": before, "bytes_after": after})
    else:
        say(f"{database.dialect.place}: {size(before)} before, {size(after)} now")
