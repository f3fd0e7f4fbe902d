"""Other processes help to read a long log: the same comes out, whatever becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sqlalchemy as sa
from sqlalchemy import Connection

from perdure.errors import DatabaseCorrupt, InvalidConfig
from perdure.events import Cancelled, Chunk
from perdure.store import helping
from perdure.store.database import Database
from perdure.store.helping import NO_HELP, VARIABLE, Helpers, helpers_for
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


def await_them(helpers: Helpers, count: int = 2) -> None:
    """Return once so many helpers are ready."""
    latest = time.monotonic() + 60
    while len(helpers._able) < count:
        assert time.monotonic() < latest
        time.sleep(0.01)


@contextlib.contextmanager
def helped(url: str) -> Generator[tuple[Connection, Helpers], None, None]:
    """Give a snapshot, and helpers that see the same."""
    database = Database(url)
    with database.snapshot() as connection, helpers_for(database, connection) as helpers:
        await_them(helpers)
        yield connection, helpers


def rebuilt(url: str, *, with_help: bool = True) -> int:
    """Rebuild as `perdure rebuild` does; returns how many rows differed."""
    database = Database(url)
    writer = database.writer()
    try:
        with writer.transaction() as connection, helpers_for(database, connection) as helpers:
            await_them(helpers)
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
                    for helper in helpers._started:
                        helper._process.kill()
            assert found == list(range(400))
            again = helpers.each(connection, name, range(5))
            assert {who for _, (_, who) in again} == {os.getpid()}

    def test_one_that_is_lost(self, log: str) -> None:
        """The other one goes on."""
        with helped(log) as (connection, helpers):
            helpers._started[0]._process.kill()
            found = list(helpers.each(connection, name, range(400)))
            assert [part for part, _ in found] == list(range(400))
            assert len(helpers._able) == 1

    def test_one_that_hangs(self, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who doesn't answer is not waited for longer than a part may take."""
        monkeypatch.setattr(helping, "OVERDUE_SECONDS", 0.5)
        with helped(log) as (connection, helpers):
            for helper in helpers._started:
                helper._process.send_signal(signal.SIGSTOP)
            found = list(helpers.each(connection, name, range(20)))
        assert [part for part, _ in found] == list(range(20))
        assert {who for _, (_, who) in found} == {os.getpid()}

    def test_helpers_that_cannot_read(self, log: str, tmp_path: Path) -> None:
        """Where they get no connection, all is done without them."""
        helpers = Helpers(2, str(tmp_path / "none" / "nothing.db"))
        try:
            await_them(helpers)
            with Database(log).snapshot() as connection:
                found = list(helpers.each(connection, name, range(50)))
        finally:
            helpers.close()
        assert {who for _, (_, who) in found} == {os.getpid()}

    def test_helpers_that_cannot_be_started(
        self, log: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the system gives no more processes, all is done without them."""
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        database = Database(log)
        with database.snapshot() as connection, helpers_for(database, connection) as helpers:
            found = list(helpers.each(connection, name, range(50)))
        assert {who for _, (_, who) in found} == {os.getpid()}

    def test_no_more_threads(self, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is no thread for a helper, there is no helper, and none is left behind."""
        popen = subprocess.Popen
        started: list[subprocess.Popen[bytes]] = []

        def noted(*command: Any, **how: Any) -> subprocess.Popen[bytes]:
            started.append(popen(*command, **how))
            return started[-1]

        def refuse(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(subprocess, "Popen", noted)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        helpers = Helpers(2, log)
        assert helpers._started == []
        assert [process.returncode for process in started] == [-signal.SIGKILL] * 2

    def test_interrupted_while_asking(self, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who goes on after Ctrl-C gets no answer to what was asked before."""
        with helped(log) as (connection, helpers):
            with monkeypatch.context() as patched:
                patched.setattr(helping._Helper, "_tell", mock.Mock(side_effect=KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    list(helpers.each(connection, stumble, [0, 1, 2]))
            assert list(helpers.each(connection, stumble, [4, 5, 6])) == [(4, 4), (5, 5), (6, 6)]
            assert len(helpers._able) == 1

    def test_short_logs(self, log: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """For a short log, with one processor, or where nobody wants it, nobody is called."""
        database = Database(log)
        with database.snapshot() as connection:
            monkeypatch.setattr(helping, "MANY_EVENTS", 10_000)
            with helpers_for(database, connection) as helpers:
                assert helpers is NO_HELP
            monkeypatch.setattr(helping, "MANY_EVENTS", 0)
            monkeypatch.setenv(VARIABLE, "0")
            with helpers_for(database, connection) as helpers:
                assert helpers is NO_HELP
            for rubbish in ("two", "-1", "1.5", "9" * 5000):
                monkeypatch.setenv(VARIABLE, rubbish)
                with (
                    pytest.raises(InvalidConfig, match=VARIABLE),
                    helpers_for(database, connection),
                ):
                    pass
            monkeypatch.delenv(VARIABLE)
            monkeypatch.setattr(helping, "_processors", lambda: 1)
            with helpers_for(database, connection) as helpers:
                assert helpers is NO_HELP

    def test_what_a_container_may_use(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A share of the processors counts as so many whole ones, and as one at least."""
        monkeypatch.undo()
        monkeypatch.setattr(helping, "_QUOTA", tmp_path / "cpu.max")
        without = helping._processors()
        assert without >= 1
        for said, count in (("max 100000", without), ("50000 100000", 1), ("", without)):
            (tmp_path / "cpu.max").write_text(said, encoding="ascii")
            assert helping._processors() == count


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
                await_them(helpers)
                assert verify(connection, helpers=helpers) == before
                assert compare(connection, helpers=helpers).differed == 0
        assert before.ok
        assert self.both(log).redacted > 0

    async def forget(self, url: str, task_id: str) -> None:
        """Redact a task."""
        async with opened(url) as store:
            await store.log.write(lambda tx: redact(tx, task_id, "me", "it was secret"))


LOOKING = """
import os
def look(connection, part):
    return os.getpid()
"""
ORPHANING = """
import os, sys
from looking import look
from perdure.store import helping
from perdure.store.database import Database
helping.MANY_EVENTS, helping._processors = 0, lambda: 3
database = Database(sys.argv[1])
at_work = {os.getpid()}
with database.snapshot() as connection, helping.helpers_for(database, connection) as helpers:
    for _, who in helpers.each(connection, look, range(10_000_000)):
        if who not in at_work:
            at_work.add(who)
            print(who, flush=True)
"""


def test_helpers_end_with_whom_they_help(log: str, tmp_path: Path) -> None:
    """Whoever asked is killed, and no helper is left."""
    (tmp_path / "looking.py").write_text(LOOKING, encoding="utf-8")
    script = tmp_path / "script.py"
    script.write_text(ORPHANING, encoding="utf-8")
    asking = subprocess.Popen([sys.executable, str(script), log], stdout=subprocess.PIPE)
    pids: list[int] = []
    try:
        assert asking.stdout is not None
        pids.extend(int(asking.stdout.readline()) for _ in range(2))
        assert all(map(is_running, pids))
        asking.kill()
        latest = time.monotonic() + 60
        while any(map(is_running, pids)):
            assert time.monotonic() < latest
            time.sleep(0.05)
    finally:
        asking.kill()
        asking.communicate()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
