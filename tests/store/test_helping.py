"""Other processes help to read a long log: the same comes out, whatever becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from perdure.errors import DatabaseCorrupt
from perdure.events import Cancelled, Chunk
from perdure.store import helping
from perdure.store.database import Database
from perdure.store.helping import NO_HELP, Helpers, helpers_for
from perdure.store.rebuilding import compare, rebuild
from perdure.store.redaction import redact
from perdure.store.schema import streams
from perdure.store.verification import VerifyReport, verify
from store.backends import Backend, opened, running, submitted, write
from store.test_rebuild import bits
from store.varied import tell

TASKS = 60


@pytest.fixture(autouse=True)
def worth_helping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short logs in many parts, and processors enough, are worth two helpers."""
    monkeypatch.setattr(helping, "MANY_EVENTS", 0)
    monkeypatch.setattr(helping, "_processors", lambda: 3)
    monkeypatch.setattr("perdure.store.scanning.PAGE", 20)


@pytest.fixture
def log(database_url: str) -> str:
    """A log of many tasks, which take turns."""
    steps = [(submitted(key="k"), running()), (Chunk(text="x"),), (Cancelled(output_length=1),)]
    histories = [
        (f"t{n}", [(submitted(key=f"k{n}"), running()), *steps[1 : 1 + n % 3]])
        for n in range(TASKS)
    ]
    asyncio.run(write(database_url, *histories))
    return database_url


@contextlib.contextmanager
def helped(url: str) -> Generator[tuple[Connection, Helpers], None, None]:
    """Give a snapshot, and helpers that see the same."""
    database = Database(url)
    with database.snapshot() as connection, helpers_for(database, connection) as helpers:
        assert helpers is not NO_HELP
        yield connection, helpers


def rebuilt(url: str, *, with_help: bool = True) -> int:
    """Rebuild as `perdure rebuild` does; returns how many rows differed."""
    database = Database(url)
    writer = database.writer()
    try:
        with writer.transaction() as connection, helpers_for(database, connection) as helpers:
            return rebuild(connection, helpers=helpers if with_help else NO_HELP).differed
    finally:
        writer.close()


def name(connection: Connection, stream_id: int) -> tuple[str | None, int]:
    """Return the name of a stream, and who looked."""
    of = sa.select(streams.c.task_id).where(streams.c.stream_id == stream_id)
    return connection.scalar(of), os.getpid()


def stumble(connection: Connection, part: int) -> int:
    """Do a part; some can't be done."""
    if part % 4 == 3:
        raise DatabaseCorrupt(f"part {part}")
    return part


class TestEach:
    """Parts, shared out."""

    def test_in_order(self, log: str) -> None:
        """What was found comes in the order of the parts, and more than one process has looked."""
        with helped(log) as (connection, helpers):
            parts = [1, *range(2, 400)]
            found = list(helpers.each(connection, name, parts))
        assert [part for part, _ in found] == parts
        assert found[0][1][0] == "t0"
        assert len({who for _, (_, who) in found}) > 1

    def test_the_first_error(self, log: str) -> None:
        """What is raised is what the first part that can't be done raises, whoever had it."""
        with helped(log) as (connection, helpers):
            with pytest.raises(DatabaseCorrupt, match=r"^part 3$"):
                list(helpers.each(connection, stumble, range(40)))
            assert list(helpers.each(connection, stumble, [0, 1, 2])) == [(0, 0), (1, 1), (2, 2)]

    def test_helpers_that_are_lost(self, log: str) -> None:
        """Killed in the middle, they are not missed."""
        with helped(log) as (connection, helpers):
            found: list[int] = []
            for part, _ in helpers.each(connection, name, range(400)):
                found.append(part)
                if len(found) == 40:
                    for child in active_children():
                        child.kill()
                        child.join()
            assert found == list(range(400))
            again = helpers.each(connection, name, range(5))
            assert {who for _, (_, who) in again} == {os.getpid()}

    def test_helpers_that_cannot_read(self, log: str, tmp_path: Path) -> None:
        """Where they get no connection, all is done without them."""
        nowhere = make_url(f"sqlite:///{tmp_path / 'none' / 'nothing.db'}")
        pool = ProcessPoolExecutor(2, get_context("spawn"), helping._begin, (nowhere,))
        with pool, Database(log).snapshot() as connection:
            found = list(Helpers(pool, 2).each(connection, name, range(50)))
        assert {who for _, (_, who) in found} == {os.getpid()}

    def test_short_logs(self, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """For a short log, or with one processor, nobody is called."""
        database = Database(log)
        with database.snapshot() as connection:
            monkeypatch.setattr(helping, "MANY_EVENTS", 10_000)
            with helpers_for(database, connection) as helpers:
                assert helpers is NO_HELP
            monkeypatch.setattr(helping, "MANY_EVENTS", 0)
            monkeypatch.setattr(helping, "_processors", lambda: 1)
            with helpers_for(database, connection) as helpers:
                assert helpers is NO_HELP


class TestRebuild:
    """Rows that somebody has changed, looked at by several."""

    def test_damage(self, backend: Backend, log: str) -> None:
        """All is mended, also where rows far apart hold each other's unique values."""
        before = bits(backend, log)
        assert rebuilt(log) == 0
        with backend.shell(log) as shell:
            shell.run("DELETE FROM tasks WHERE stream_id % 7 = 0")
            shell.run("UPDATE tasks SET priority = 9 WHERE stream_id % 5 = 0")
            for one, other in ((1, 53), (20, 21), (58, 2)):
                for to, of in (
                    ("aside", f"k{one}"),
                    (f"k{one}", f"k{other}"),
                    (f"k{other}", "aside"),
                ):
                    shell.run(f"UPDATE tasks SET key = '{to}' WHERE key = '{of}'")
        with helped(log) as (connection, helpers):
            alone = compare(connection)
            assert compare(connection, helpers=helpers) == alone
        assert rebuilt(log) == alone.differed > 10
        assert bits(backend, log) == before
        assert rebuilt(log, with_help=False) == 0

    def test_a_log_that_cannot_be_folded(self, backend: Backend, log: str) -> None:
        """Where a helper finds the log broken, nothing is changed."""
        with backend.shell(log) as shell:
            shell.drop_defences()
            shell.run("UPDATE tasks SET priority = 9 WHERE task_id = 't1'")
            shell.run("DELETE FROM events WHERE type = 'chunk'")
        before = bits(backend, log)
        with pytest.raises(DatabaseCorrupt, match=r"^t2 version 4"):
            rebuilt(log)
        assert bits(backend, log) == before


class TestVerify:
    """A chain that several walk along."""

    def both(self, url: str) -> VerifyReport:
        """Return what is found, alone and with help alike."""
        with helped(url) as (connection, helpers):
            alone = verify(connection)
            assert verify(connection, helpers=helpers) == alone
        return alone

    def test_everything(self, database_url: str, tmp_path: Path) -> None:
        """A log in which everything has happened, with redactions across stretches, verifies."""
        asyncio.run(tell(database_url, tmp_path))
        report = self.both(database_url)
        assert report.ok
        assert report.redacted == 4

    def test_damage(self, backend: Backend, log: str) -> None:
        """What was changed is found, wherever it is."""
        with backend.shell(log) as shell:
            shell.drop_defences()
            shell.run("UPDATE events SET version = version + 5 WHERE position % 17 = 0")
            shell.run("UPDATE streams SET version = 9 WHERE task_id = 't30'")
        report = self.both(log)
        assert len(report.problems) > 5
        assert any("t30" in problem for problem in report.problems)

    def test_what_is_redacted_meanwhile(self, log: str) -> None:
        """Helpers who see content gone that was still there don't make it a problem."""
        database = Database(log)
        with database.snapshot() as connection:
            before = verify(connection)
            asyncio.run(self.forget(log, "t2"))  # before any helper has begun
            with helpers_for(database, connection) as helpers:
                assert verify(connection, helpers=helpers) == before
                assert compare(connection, helpers=helpers).differed == 0
        assert before.ok
        assert self.both(log).redacted > 0

    async def forget(self, url: str, task_id: str) -> None:
        """Redact a task."""
        async with opened(url) as store:
            await store.log.write(lambda tx: redact(tx, task_id, "me", "it was secret"))


ORPHANING = """
import sys, time
from perdure.store import helping
from perdure.store.database import Database
from perdure.store.schema import streams
import sqlalchemy as sa
def look(connection, part):
    return connection.scalar(sa.select(sa.func.count()).select_from(streams))
helping.MANY_EVENTS, helping._processors = 0, lambda: 3
if __name__ == "__main__":
    database = Database(sys.argv[1])
    with database.snapshot() as connection, helping.helpers_for(database, connection) as helpers:
        found = helpers.each(connection, look, range(10_000_000))
        for part, _ in found:
            if part == 100:
                print("working", flush=True)
"""


def test_helpers_end_with_whom_they_help(log: str, tmp_path: Path) -> None:
    """Whoever asked is killed, and no helper is left, nor the file of one held open."""
    script = tmp_path / "script.py"
    script.write_text(ORPHANING, encoding="utf-8")
    asking = subprocess.Popen(
        [sys.executable, str(script), log], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert asking.stdout is not None
        assert asking.stdout.readline() == b"working\n"
        asking.send_signal(signal.SIGKILL)
        # Helpers have the pipe as well: it is at its end once all are gone.
        assert asyncio.run(asyncio.wait_for(asyncio.to_thread(asking.stdout.read), 60)) == b""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(asking.pid, signal.SIGKILL)
        asking.communicate()
