"""`perdure doctor` and `perdure platforms`: is everything in order, and what can be used?"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from perdure.cli.exits import ExitCode
from perdure.cli.figures import UNKNOWN, of_these, size
from perdure.cli.files import size_on_disk, stored_revision
from perdure.cli.findings import LOG, Finding, State, of_defences, of_log
from perdure.cli.session import Session
from perdure.cli.tables import paint, tab_line, table
from perdure.cli.terminal import is_terminal, one_line, show, show_json
from perdure.config import load_config
from perdure.errors import DatabaseIncompatible, InvalidConfig, PerdureError, UnknownPlatform
from perdure.store.readonly import REVISION, Reader, on_server, path_of, refuse_missing
from perdure.text import printable

if TYPE_CHECKING:
    from perdure.adapter import Adapter
    from perdure.store.database import Database

__all__ = ["doctor", "platforms"]

# The first one without the WAL-reset race: https://sqlite.org/wal.html#walresetbug
_SAFE_SQLITE: Final = (3, 51, 3)
_LITTLE_SPACE: Final = 256 * 2**20
_LEASE_SECONDS: Final = 30
_STYLES: Final = {"ok": "completed", "note": "dim", "warning": "cancelled", "broken": "failed"}


def doctor(session: Session) -> int:
    """Check the installation and the database; says what is wrong and what to do about it.

    In a pipe tab-separated: name, ok, note, warning or broken, what was found, what to do. Exit
    code 1 where something is broken. Keys are never shown.
    """
    code = ExitCode.OK
    for finding in _examine(session):
        if finding.state == "broken":
            code = ExitCode.FATAL
        if session.json:
            show_json({name: getattr(finding, name) for name in ("name", "state", "value", "hint")})
        elif is_terminal():
            mark = paint(f"{finding.state:<8}", _STYLES[finding.state])
            sys.stdout.write(f"{mark} {finding.name:<14}{printable(finding.value)}\n")
            if finding.hint:
                sys.stdout.write(f"{'':<23}{printable(finding.hint)}\n")
        else:
            show(tab_line((finding.name, finding.state, finding.value, finding.hint or "")))
    return code


def _examine(session: Session) -> Iterator[Finding]:
    yield from _versions()
    yield from _default_platform()
    try:
        if on_server(session.url):
            from perdure.cli.serverhealth import examine_server

            yield from examine_server(session.database())
            with Reader.open(session.url) as reader:
                yield from _work(reader, session.database())
        else:
            path = path_of(session.url)
            yield from _file(path, named=session.db is not None)
            if path.is_file():
                yield from _content(path)
    except PerdureError as error:
        yield Finding("database", "broken", str(error))
    for usable in _each_platform():
        state: State = "ok" if usable.problem is None else "note"
        yield Finding(usable.name, state, f"platform, {usable.state}", usable.problem)


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        yield Finding("perdure", "ok", f"{version('perdure')}, schema {REVISION}")
    except PackageNotFoundError:
        yield Finding("perdure", "note", f"not installed, schema {REVISION}")
    yield Finding("python", "ok", f"{sys.version.split()[0]}, {sys.executable}")
    linked = f"{sqlite3.sqlite_version}, linked into Python"
    if sqlite3.sqlite_version_info >= _SAFE_SQLITE:
        yield Finding("sqlite", "ok", linked)
    else:
        yield Finding(
            "sqlite",
            "note",
            f"{linked}; before 3.51.3 a checkpoint could lose a commit (the WAL-reset race)",
            "perdure stays clear of it: it checkpoints while it holds the write lock; other "
            "programs that write to the file don't",
        )


def _file(path: Path, *, named: bool) -> Iterator[Finding]:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not path.exists() and not named:
        yield Finding("database", "note", f"{path}, not there yet: the first task creates it")
    else:
        refuse_missing(path)
        yield Finding("database", "ok", f"{path}, {size(size_on_disk(path))}")
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            hint = f"it holds people's prompts: chmod 600 {path}"
            yield Finding("permissions", "warning", f"{mode:04o}: others may read it", hint)
        else:
            yield Finding("permissions", "ok", f"{mode:04o}: only its owner may read it")
        if not (os.access(path, os.W_OK) and os.access(folder, os.W_OK)):
            hint = f"to run tasks here, this user must be able to write to it and to {folder}"
            yield Finding("writing", "warning", "the file or its folder can't be written to", hint)
    free = shutil.disk_usage(folder).free
    little = free < _LITTLE_SPACE
    yield Finding(
        "disk",
        "warning" if little else "ok",
        f"{size(free)} free in {folder}",
        "a full disk stops every task: free some space" if little else None,
    )


def _content(path: Path) -> Iterator[Finding]:
    revision = stored_revision(path)
    try:
        reader = Reader.open(path)
    except DatabaseIncompatible as error:
        yield Finding("schema", "broken", revision or "none", str(error))
        return
    yield Finding("schema", "ok", str(revision))
    from perdure.store.database import Database

    with reader:
        yield from _soundness(reader)
        yield of_defences(Database(path))
        yield from _work(reader, Database(path))


def _soundness(reader: Reader) -> Iterator[Finding]:
    mode = _value(reader, "PRAGMA journal_mode")
    if mode == "wal":
        yield Finding("journal", "ok", "WAL")
    else:
        change = f"sqlite3 {reader.path} 'PRAGMA journal_mode=WAL' changes it back"
        hint = f"readers and writers wait for each other: {change}"
        yield Finding("journal", "warning", str(mode), hint)
    found = str(_value(reader, "PRAGMA quick_check(1)"))
    if found == "ok":
        yield Finding("integrity", "ok", "SQLite's quick check found nothing")
    else:
        hint = "restore a backup; `perdure verify` says which events are touched"
        yield Finding("integrity", "broken", one_line(found), hint)
    yield of_log(reader.one(LOG))


def _value(reader: Reader, query: str) -> Any:  # noqa: ANN401 - whatever it is
    row = reader.one(query)
    return None if row is None else row[0]


def _work(reader: Reader, database: Database) -> Iterator[Finding]:
    import asyncio

    from perdure.store.liveness import look_around

    async def look() -> list[str]:
        try:
            lease = timedelta(seconds=_LEASE_SECONDS)
            return (await look_around(database, lease, database.now)).lost
        finally:
            await database.close()

    lost = asyncio.run(look())
    known = [row[0] for row in reader.rows("SELECT worker_id FROM workers")]
    alive = sum(worker not in lost for worker in known)
    if lost:
        hint = "the next `perdure worker` or `perdure run` takes their tasks over"
        yield Finding("workers", "warning", f"{alive} alive, {len(lost)} lost", hint)
    else:
        yield Finding("workers", "ok", f"{alive} alive" if alive else "none at the moment")
    pending, running = (
        int(_value(reader, f"SELECT count(*) FROM tasks WHERE status = '{status}'"))
        for status in ("pending", "running")
    )
    if pending and not alive:
        hint = "nobody runs them: `perdure worker` does"
        yield Finding("tasks", "note", of_these(((pending, "pending"), (running, "running"))), hint)
    else:
        value = of_these(((pending, "pending"), (running, "running")))
        yield Finding("tasks", "ok", value or "none pending, none running")


# -- platforms -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usable:
    """A platform, and whether it can be used on this machine."""

    name: str
    adapter: Adapter | None
    problem: str | None

    @property
    def state(self) -> str:
        """Whether it can be used, in a word."""
        return "usable" if self.problem is None else "not usable"

    @property
    def abilities(self) -> list[str]:
        """What it can do."""
        if self.adapter is None:
            return []
        can = self.adapter.capabilities
        named: Iterable[tuple[bool, str]] = (
            (can.streaming, "streaming"),
            (can.reattach, "picking up interrupted calls"),
            (can.cancel, "cancelling"),
            (can.usage_on_the_way, "usage on the way"),
            (can.reasoning, "reasoning"),
            (can.tools, "tools"),
            (can.schema, "JSON schemas"),
            *((kind in can.files, f"{kind} files") for kind in ("text", "image", "pdf")),
        )
        return [words for there, words in named if there]


def _default_platform() -> Iterator[Finding]:
    from perdure.platforms import Platforms

    try:
        named = load_config().platform
        if named is not None:
            Platforms.configured().check(named)
    except UnknownPlatform as error:
        hint = "`platform` in perdure.toml: name another one, or none"
        yield Finding("default", "broken", str(error), hint)
    except InvalidConfig:
        return  # whoever needs it next says so


def _each_platform() -> Iterator[Usable]:
    from perdure.platforms import Platforms

    found = Platforms.configured()
    for name in found.names:
        problem = found.problem(name)
        yield Usable(name, found.made.get(name), problem)


def platforms(session: Session) -> None:
    """List the platforms: usable or what to install or set, default model, what they can do.

    In a pipe tab-separated: name, usable or not usable, default model, abilities, what to do.
    """
    found = list(_each_platform())
    if session.json:
        for one in found:
            show_json(
                {
                    "platform": one.name,
                    "usable": one.problem is None,
                    "problem": one.problem,
                    "default_model": _model(one),
                    "abilities": one.abilities,
                }
            )
    elif is_terminal():
        rows = (
            (one.name, one.state, _model(one) or UNKNOWN, ", ".join(one.abilities)) for one in found
        )
        table(("PLATFORM", "STATE", "DEFAULT MODEL", "CAN DO"), rows, whole=("PLATFORM", "STATE"))
        for one in found:
            if one.problem:
                sys.stdout.write(f"\n{one.name}: {printable(one.problem)}\n")
    else:
        for one in found:
            abilities = ", ".join(one.abilities)
            show(tab_line((one.name, one.state, _model(one), abilities, one.problem or "")))


def _model(one: Usable) -> str | None:
    return one.adapter.default_model if one.adapter is not None else None
