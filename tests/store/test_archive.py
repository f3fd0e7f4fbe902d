"""Archiving: what is moved is whole in the archive, vouched for in the log, and gone from there."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.histories import Life, lives
from perdure.errors import (
    ConcurrencyError,
    DatabaseCorrupt,
    DatabaseIncompatible,
    DatabaseUnavailable,
    InvalidTransition,
    PerdureError,
    StoreError,
    TaskArchived,
)
from perdure.events import Archived, Cancelled, Chunk, Completed, Redacted, decode, encode
from perdure.lifecycle import evolve
from perdure.store import archive as archive_module
from perdure.store import archivefile
from perdure.store.archive import ArchiveReport, _parts, archive, survey
from perdure.store.claims import load_blobs
from perdure.store.database import Database
from perdure.store.gaps import Gap, joined
from perdure.store.projection import TaskFold
from perdure.store.rebuilding import compare, rebuild
from perdure.store.records import Records, read_events
from perdure.store.redaction import redact
from perdure.store.verification import VerifyReport, verify
from perdure.submission import prepare, submit
from perdure.task import Task
from store.backends import Backend, Store, opened
from store.checks import assert_sound
from store.varied import PLATFORMS, tell

LATER = datetime.now(UTC) + timedelta(days=1)
KEPT = (
    "stream_id", "task_id", "status", "platform", "model", "type", "priority", "attempts", "worker",
    "available_at", "cancel_requested", "finish_reason", "error_class", "input_tokens",
    "output_tokens", "cache_read_tokens", "cache_write_tokens", "reasoning_tokens", "cost_usd",
    "submitted_at", "started_at", "ended_at", "batch", "key", "fingerprint", "parent", "retry_of",
    "labels",
)  # fmt: skip
CONTENT = ("prompt", "output", "partial_output", "error", "files_created", "tool_calls")


def test_what_is_dropped_together() -> None:
    """Many small ones, or few that are large: whoever writes waits as long as it takes."""
    small = {f"{number:04}": 10 for number in range(1001)}
    assert [len(part) for part in _parts(small)] == [500, 500, 1]
    large = {"a": 40 * 2**20, "b": 20 * 2**20, "c": 4 * 2**20, "d": 1, "e": 2**40}
    assert list(_parts(large)) == [["a", "b", "c"], ["d", "e"]]
    assert list(_parts({})) == []


async def put_away(store: Store, file: Path, before: datetime = LATER, **how: Any) -> ArchiveReport:
    """Archive what has ended."""
    return await archive(store.log, store.database, before, file, by="me", **how)


async def archived(url: str, file: Path, before: datetime = LATER) -> ArchiveReport:
    """Archive what has ended in a database that nobody has open."""
    async with opened(url) as store:
        return await put_away(store, file, before)


async def finish(store: Store, task_id: str, text: str = "done", **task: Any) -> None:
    """Write a task down that has ended."""
    version = await store.start(task_id, **task)
    said = [Chunk(text=letter, offset=offset) for offset, letter in enumerate(text)]
    await store.log.append(task_id, [*said, Completed(output_length=len(text))], version)


def kept(backend: Backend, url: str) -> list[Any]:
    """Return what archiving leaves of the rows, to the last bit."""
    columns = ", ".join(backend.exact(name) for name in KEPT)
    return backend.query(url, f"SELECT {columns} FROM tasks ORDER BY stream_id")


def report_of(url: str | Path, expect: tuple[int, str] | None = None) -> VerifyReport:
    """Return what `verify` finds."""
    with Database(url).snapshot() as connection:
        return verify(connection, expect=expect)


def rebuilt(url: str | Path) -> int:
    """Rebuild; returns how many rows differed."""
    writer = Database(url).writer()
    try:
        with writer.transaction() as connection:
            return rebuild(connection).differed
    finally:
        writer.close()


@pytest.fixture
async def story(backend: Backend, database_url: str, tmp_path: Path) -> str:
    """The varied log: four tasks that have ended, one of them redacted, and two that live."""
    await tell(database_url, tmp_path)
    return database_url


class TestWhatIsMoved:
    """A log in which everything has happened."""

    async def test_both_are_whole(self, backend: Backend, story: str, tmp_path: Path) -> None:
        """The log keeps the rows without content, the archive has all of it; both verify."""
        before = kept(backend, story)
        rows = backend.query(story, "SELECT * FROM tasks WHERE ended_at IS NOT NULL ORDER BY 1")
        events = backend.query(
            story,
            "SELECT e.position, e.stream_id, e.version, e.type, e.data, lower(hex(e.digest)) "
            "FROM events e JOIN tasks t ON t.stream_id = e.stream_id "
            "WHERE t.ended_at IS NOT NULL ORDER BY 1",
        )
        file = tmp_path / "2026.db"
        report = await archived(story, file)
        assert (report.file, report.tasks, report.events, report.changed) == (
            file, 4, len(events), 0,
        )  # fmt: skip
        assert report.bytes == file.stat().st_size
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert [path.name for path in tmp_path.glob("*2026.db*")] == ["2026.db"]

        assert kept(backend, story) == before
        ended = ", ".join(CONTENT)
        assert set(
            backend.query(story, f"SELECT {ended} FROM tasks WHERE ended_at IS NOT NULL")
        ) == {(None,) * len(CONTENT)}
        assert backend.query(
            story, "SELECT task_id, archived FROM tasks WHERE archived IS NOT NULL ORDER BY 1"
        ) == [(name, "2026.db") for name in ("bad", "good", "secret", "stopped")]
        assert_sound(story)
        assert report_of(story).archived == len(events)
        assert rebuilt(story) == 0
        assert kept(backend, story) == before

        with closing(sqlite3.connect(file)) as copy:
            assert (
                copy.execute(
                    "SELECT position, stream_id, version, type, data, lower(hex(digest)) "
                    "FROM events ORDER BY 1"
                ).fetchall()
                == events
            )
            plain = copy.execute("SELECT task_id, output FROM tasks ORDER BY stream_id").fetchall()
        names = [row[1] for row in rows]
        assert [row[0] for row in plain] == names
        assert dict(plain)["good"] == "Héllo 👍"
        assert_sound(str(file))
        assert rebuilt(file) == 0
        found = report_of(file)
        assert found.archive_of is not None
        assert found.redacted == 4

    async def test_a_dropped_projection_comes_back(
        self, backend: Backend, story: str, tmp_path: Path
    ) -> None:
        """All rows are computed from what is left of the log, the archived ones included."""
        await archived(story, tmp_path / "a.db")
        before = backend.query(story, "SELECT * FROM tasks ORDER BY stream_id")
        with backend.shell(story) as shell:
            shell.run("DELETE FROM tasks")
        assert rebuilt(story) == len(before)
        assert backend.query(story, "SELECT * FROM tasks ORDER BY stream_id") == before

    async def test_one_event_stands_for_all(self, story: str, tmp_path: Path) -> None:
        """What is left of a stream is one event, from which its state begins."""
        await archived(story, tmp_path / "a.db")
        async with opened(story) as store:
            (left,) = await read_events(store.database, "bad")
        assert isinstance(left.event, Archived)
        assert left.version == left.event.events + 1
        assert evolve(None, left.event, left.recorded_at).version == left.version

    async def test_the_content_is_gone_from_the_file(self, sqlite: Any, tmp_path: Path) -> None:
        """Not a byte of it is left in the database, nor the place that it took."""
        url = sqlite.new()
        async with opened(url) as store:
            for number in range(300):
                await store.start(f"t{number}", prompt="Xyzzy " * 500)
                await store.log.append(f"t{number}", [Completed()], 2)
            await store.submit("waits", prompt="x")
            size = store.database.dialect.size()
            await put_away(store, tmp_path / "a.db")
            for part in sqlite.path(url).parent.glob(f"{sqlite.path(url).name}*"):
                assert b"Xyzzy" not in part.read_bytes()
            assert store.database.dialect.size() < size / 2
        assert b"Xyzzy" in (tmp_path / "a.db").read_bytes()
        assert_sound(url)

    async def test_nothing_to_do(self, story: str, tmp_path: Path) -> None:
        """Without anything to archive no file is made."""
        long_ago = datetime(2020, 1, 1, tzinfo=UTC)
        assert await archived(story, tmp_path / "a.db", long_ago) == ArchiveReport()
        assert not (tmp_path / "a.db").exists()

    async def test_survey(self, story: str, tmp_path: Path) -> None:
        """What a dry run says is what is then done."""
        with Database(story).snapshot() as connection:
            plan = survey(connection, LATER)
        report = await archived(story, tmp_path / "a.db")
        assert (plan.tasks, plan.events) == (report.tasks, report.events)
        with closing(sqlite3.connect(tmp_path / "a.db")) as copy:
            (size,) = copy.execute("SELECT sum(length(CAST(data AS BLOB))) FROM events").fetchone()
        assert plan.bytes == size

    async def test_unfinished_tasks_keep_what_they_go_on_from(
        self, store: Store, database_url: str, tmp_path: Path
    ) -> None:
        """What a pending task continues stays until that one has ended."""
        await finish(store, "first")
        await finish(store, "other")
        await store.submit("next", parents=["first"])
        with store.database.snapshot() as connection:
            assert survey(connection, LATER).tasks == 1
        assert (await put_away(store, tmp_path / "a.db")).tasks == 1
        assert await read_events(store.database, "first")
        await store.log.append("next", [Cancelled()], 1)
        assert (await put_away(store, tmp_path / "b.db")).tasks == 2
        assert_sound(database_url)

    async def test_only_what_ended_before(self, store: Store, tmp_path: Path) -> None:
        """The moment of the ending counts."""
        await finish(store, "old")
        await asyncio.sleep(0.01)
        row = await Records(store.database).find("old")
        assert row is not None
        assert row.ended_at is not None
        await finish(store, "new")
        between = row.ended_at + timedelta(microseconds=1)
        assert (await put_away(store, tmp_path / "none.db", row.ended_at)).tasks == 0
        assert (await put_away(store, tmp_path / "a.db", between)).tasks == 1
        assert (await read_events(store.database, "new"))[0].version == 1

    async def test_several_archives(
        self, backend: Backend, store: Store, database_url: str, tmp_path: Path
    ) -> None:
        """One after the other, interleaved: gaps grow together, every archive stands by itself."""
        for number in range(30):
            await store.start(f"t{number}")
        order = [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]
        for round_ in range(3):
            for number in order[round_ * 10 : round_ * 10 + 10]:
                await store.log.append(f"t{number}", [Completed()], 2)
            report = await put_away(store, tmp_path / f"{round_}.db")
            assert (report.tasks, report.events) == (10, 30)
            with store.database.snapshot() as connection:
                assert verify(connection).problems == []
                assert compare(connection).differed == 0
        for round_ in range(3):
            assert_sound(str(tmp_path / f"{round_}.db"))
        # All that is left are three times ten `archived` events, and gaps between those runs.
        assert backend.query(database_url, "SELECT DISTINCT type FROM events") == [("archived",)]
        assert backend.query(database_url, "SELECT count(*) FROM gaps") == [(3,)]
        assert rebuilt(database_url) == 0

    async def test_many_chunks(
        self, store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task of more events than are moved together is moved alone, and whole."""
        monkeypatch.setattr(archivefile, "MOST_EVENTS", 10)
        monkeypatch.setattr(archivefile, "MOST_TASKS", 3)
        for number in range(8):
            await finish(store, f"t{number}", "x" * (3 if number % 3 else 41))
        report = await put_away(store, tmp_path / "a.db")
        assert (report.tasks, report.events) == (8, 3 * 44 + 5 * 6)
        assert_sound(database_url)
        assert_sound(str(tmp_path / "a.db"))

    async def test_what_is_shared_stays(
        self, store: Store, database_url: str, tmp_path: Path
    ) -> None:
        """A file or text that a live task has too is kept for it; the last one takes it along."""
        (tmp_path / "notes.txt").write_text("notes")
        for number in range(2):
            task = Task(
                task_id=f"t{number}", prompt="?", platform="alpha", system="Be brief. " * 600,
                files=(str(tmp_path / "notes.txt"),),
            )  # fmt: skip
            ready = [prepare(task, PLATFORMS, None)]
            await store.log.write(lambda tx, ready=ready: submit(tx, ready))
        await store.log.append("t0", [Cancelled()], 1)
        report = await put_away(store, tmp_path / "a.db")
        assert (report.tasks, report.blobs) == (1, 0)
        assert (await Records(store.database).task("t1")).system == "Be brief. " * 600
        assert_sound(database_url)
        await store.log.append("t1", [Cancelled()], 1)
        assert (await put_away(store, tmp_path / "b.db")).blobs == 2
        assert_sound(database_url)
        for name, task_id in (("a.db", "t0"), ("b.db", "t1")):
            copy = Database(tmp_path / name)
            whole = await Records(copy).task(task_id)
            assert whole.system == "Be brief. " * 600
            (file,) = whole.files
            assert not isinstance(file, str)
            assert await load_blobs(copy, [file.digest]) == {file.digest: b"notes"}
            await copy.close()

    async def test_a_blob_that_is_named_meanwhile_stays(
        self,
        store: Store,
        database_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What nobody named when it was looked for, and somebody names since, is not deleted."""
        task = Task(prompt="?", platform="alpha", system="Be brief. " * 600)

        async def take_in(task_id: str) -> None:
            ready = [prepare(task.model_copy(update={"task_id": task_id}), PLATFORMS, None)]
            await store.log.write(lambda tx: submit(tx, ready))

        await take_in("t0")
        await store.log.append("t0", [Cancelled()], 1)
        look = archive_module._unnamed_blobs

        def then_somebody_names_it(database: Database) -> tuple[int, dict[str, int]]:
            found = look(database)
            assert len(found[1]) == 1
            asyncio.run_coroutine_threadsafe(take_in("t1"), loop).result()
            return found

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(archive_module, "_unnamed_blobs", then_somebody_names_it)
        assert (await put_away(store, tmp_path / "a.db")).blobs == 0
        assert (await Records(store.database).task("t1")).system == "Be brief. " * 600
        assert_sound(database_url)


class TestAsking:
    """What is said of content that isn't there any more."""

    async def test_one_line(self, story: str, tmp_path: Path) -> None:
        """Reading, following and redacting name the archive, and how to look into it."""
        await archived(story, tmp_path / "a.db")
        async with opened(story) as store:
            with pytest.raises(TaskArchived, match=r"perdure output good --db a\.db"):
                await Records(store.database).task("good")
            with pytest.raises(TaskArchived):
                _ = [event async for event in store.log.feed.follow("good")]
            with pytest.raises(TaskArchived, match=r"perdure redact good --db a\.db"):
                await store.log.write(lambda tx: redact(tx, "good", "me", None))
            record = await Records(store.database).find("good")
        assert record is not None
        assert (record.archived, record.prompt, record.cost_usd) == ("a.db", None, 0.5)
        assert len(str(TaskArchived("good", "a b.db")).splitlines()) == 1

    async def test_a_reader_half_way(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody who is still reading when a task is archived is told; nobody waits for ever."""
        monkeypatch.setattr("perdure.store.feed.PAGE", 5)
        await finish(store, "long", "x" * 40)
        reading = store.log.feed.follow("long")
        assert (await anext(reading)).version == 1
        await put_away(store, tmp_path / "a.db")
        with pytest.raises(TaskArchived):
            async with asyncio.timeout(10):
                _ = [event async for event in reading]

    async def test_its_key_is_taken(self, store: Store, tmp_path: Path) -> None:
        """What was done and archived isn't done once more."""
        task = Task(task_id="t", prompt="?", platform="alpha", key="row 1")
        ready = [prepare(task, PLATFORMS, None)]
        await store.log.write(lambda tx: submit(tx, ready))
        await store.log.append("t", [Cancelled()], 1)
        await put_away(store, tmp_path / "a.db")
        again = [prepare(task.model_copy(update={"task_id": None}), PLATFORMS, None)]
        (outcome,) = await store.log.write(lambda tx: submit(tx, again))
        assert (outcome.task_id, outcome.new) == ("t", False)  # type: ignore[union-attr]

    async def test_redacting_in_the_archive(self, story: str, tmp_path: Path) -> None:
        """Content can be removed from an archive; log and archive go on fitting together."""
        file = tmp_path / "a.db"
        await archived(story, file)
        async with opened(str(file)) as inside:
            assert await inside.log.write(lambda tx: redact(tx, "good", "me", None)) > 0
        assert b"llo \xf0\x9f\x91\x8d" not in file.read_bytes()
        assert_sound(str(file))

    async def test_nothing_new_goes_into_an_archive(self, story: str, tmp_path: Path) -> None:
        """An archive takes no tasks, and isn't archived itself."""
        file = tmp_path / "a.db"
        await archived(story, file)
        async with opened(str(file)) as inside:
            with pytest.raises(DatabaseUnavailable, match="is an archive"):
                await inside.submit("new")
            with pytest.raises(PerdureError, match="is an archive itself"):
                await put_away(inside, tmp_path / "b.db")
        assert_sound(str(file))


class TestItsPlace:
    """Where an archive can't go."""

    async def test_refused(self, story: str, tmp_path: Path) -> None:
        """A file that is there, a folder, no folder, the name of another archive: one line each."""
        (tmp_path / "there.db").write_text("mine")
        (tmp_path / "wal.db-wal").write_text("x")
        (tmp_path / "again").mkdir()
        async with opened(story) as store:
            await finish(store, "early")
            await put_away(store, tmp_path / "taken.db")
            await finish(store, "late")
            for place, says in (
                ("there.db", "is there already"),
                ("wal.db", "is there already"),
                ("again", "is a directory"),
                ("none/a.db", "no folder"),
                ("again/taken.db", "of the name taken.db"),
                (b"\xff.db".decode(errors="surrogateescape"), "no UTF-8"),
            ):
                with pytest.raises(PerdureError, match=says) as refused:
                    await put_away(store, tmp_path / place)
                assert len(str(refused.value).splitlines()) == 1
            assert await read_events(store.database, "late")
        assert (tmp_path / "there.db").read_text() == "mine"
        assert list(tmp_path.glob(".*")) == []

    async def test_somebody_was_faster(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file that came meanwhile may be the only copy of other tasks: it stays."""
        await finish(store, "t")
        prove = archivefile._prove

        def late(database: Database, stages: Any) -> None:
            prove(database, stages)
            (tmp_path / "a.db").write_text("another archive")

        monkeypatch.setattr(archivefile, "_prove", late)
        with pytest.raises(PerdureError, match="is there already"):
            await put_away(store, tmp_path / "a.db")
        assert (tmp_path / "a.db").read_text() == "another archive"
        assert list(tmp_path.glob(".*")) == []
        assert len(await read_events(store.database, "t")) == 7

    async def test_disk_full(
        self, store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there is no room for the copy the log stays as it is; nothing is left behind."""
        for number in range(20):
            await finish(store, f"t{number}", prompt="x" * 20_000)

        class Narrow(archivefile.Database):  # type: ignore[name-defined,misc]
            def writer(self) -> Any:
                writer = super().writer()
                writer.connection.exec_driver_sql("PRAGMA max_page_count = 60").close()
                writer.connection.rollback()
                return writer

        monkeypatch.setattr(archivefile, "Database", Narrow)
        with pytest.raises(DatabaseUnavailable, match="no space left") as full:
            await put_away(store, tmp_path / "a.db")
        assert len(str(full.value).splitlines()) == 1
        assert list(tmp_path.glob("*a.db*")) == []
        assert len(await read_events(store.database, "t0")) == 7
        assert_sound(database_url)


def until_gone(file: Path) -> None:
    """Wait until no draft of an archive is left."""
    limit = time.monotonic() + 60
    while list(file.parent.glob(f".{file.name}*")) and time.monotonic() < limit:
        time.sleep(0.02)


class TestMeanwhile:
    """Others work while tasks are archived."""

    async def test_redacted_in_between(
        self,
        store: Store,
        database_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A task that was redacted after it was copied is left alone and counted."""
        for name in ("one", "two", "three"):
            await finish(store, name)
        read = archive_module.read_moved
        redacted = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def change() -> None:
            await store.log.write(lambda tx: redact(tx, "two", "me", None))

        def later(file: Path, after: int) -> Any:
            found = read(file, after)
            if not redacted.is_set():
                asyncio.run_coroutine_threadsafe(change(), loop).result()
                loop.call_soon_threadsafe(redacted.set)
            return found

        monkeypatch.setattr(archive_module, "read_moved", later)
        report = await put_away(store, tmp_path / "a.db")
        assert (report.tasks, report.changed) == (2, 1)
        left = await read_events(store.database, "two")
        assert isinstance(left[-1].event, Redacted)
        assert_sound(database_url)
        assert (await put_away(store, tmp_path / "b.db")).tasks == 1
        assert_sound(database_url)

    async def test_workers_and_readers(
        self, store: Store, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tasks come, run, end and are read all the time."""
        monkeypatch.setattr(archivefile, "MOST_TASKS", 5)
        for number in range(60):
            await finish(store, f"old{number}")
        await store.start("steady")
        done = asyncio.Event()

        async def work() -> int:
            number = 0
            while not done.is_set():
                await finish(store, f"new{number}")
                await store.log.append("steady", [Chunk(text="x", offset=number)], None)
                number += 1
            return number

        async def read() -> int:
            seen = 0
            async for recorded in store.log.feed.follow("steady"):
                assert recorded.version == seen + 1
                seen = recorded.version
            return seen

        working, reading = asyncio.create_task(work()), asyncio.create_task(read())
        row = await Records(store.database).find("old59")
        assert row is not None
        assert row.ended_at is not None
        moment = row.ended_at + timedelta(microseconds=1)
        report = await put_away(store, tmp_path / "a.db", moment)
        done.set()
        written = await working
        assert written > 0
        await store.log.append("steady", [Completed(output_length=written)], None)
        assert await reading == written + 3
        assert (report.tasks, report.changed) == (60, 0)
        assert_sound(database_url)
        assert_sound(str(tmp_path / "a.db"))

    async def test_a_writer_that_remembers_more(
        self, store: Store, database_url: str, tmp_path: Path
    ) -> None:
        """A process that wrote to a task before others ended and archived it finds out, in time."""
        await store.start("t")
        async with opened(database_url) as other:
            await other.log.append("t", [Completed()], 2)
            await put_away(other, tmp_path / "a.db")
        with pytest.raises(ConcurrencyError):
            await store.log.append("t", [Chunk(text="x")], 2)
        with pytest.raises(InvalidTransition):
            await store.log.append("t", [Cancelled()], None)
        assert_sound(database_url)

    async def test_two_at_once(self, store: Store, database_url: str, tmp_path: Path) -> None:
        """Each task goes into one archive only, whoever comes first; the other one counts it."""
        for number in range(40):
            await finish(store, f"t{number}")
        async with opened(database_url) as other:
            reports = await asyncio.gather(
                put_away(store, tmp_path / "a.db"), put_away(other, tmp_path / "b.db")
            )
        assert sum(report.tasks for report in reports) == 40
        assert_sound(database_url)

    async def test_cancelled(self, store: Store, database_url: str, tmp_path: Path) -> None:
        """Whoever gives up waiting leaves no file behind, and the log as it is."""
        for number in range(20):
            await finish(store, f"t{number}")
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def slow(what: str) -> Any:
            loop.call_soon_threadsafe(begun.set)
            time.sleep(0.2)
            return archive_module._silent(what)

        working = asyncio.create_task(put_away(store, tmp_path / "a.db", stages=slow))
        await begun.wait()
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working
        await asyncio.to_thread(until_gone, tmp_path / "a.db")  # it notices that nobody waits
        assert list(tmp_path.glob("*a.db*")) == []
        assert len(await read_events(store.database, "t0")) == 7
        assert_sound(database_url)


KILLED = """
import asyncio, os, signal, sys
from datetime import datetime, UTC, timedelta
from pathlib import Path
from perdure.store import archive, archivefile, gaps
from perdure.store.database import Database
from perdure.store.log import EventLog

url, file, where, count = sys.argv[1:]
count = int(count)
archivefile.MOST_TASKS = 5

def die_in(module, name, after=False):
    was = getattr(module, name)
    def dying(*args, **kwargs):
        global count
        count -= 1
        if count < 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = was(*args, **kwargs)
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(module, name, dying)

module, name, after = {
    "copying": (archivefile, "_copy_batch", False),
    "proving": (archivefile, "_prove", False),
    "placing": (archivefile, "_synchronise", False),
    "reading": (archive, "read_moved", True),
    "appending": (archive, "_move", True),
    "opening gaps": (archive, "open_gaps", True),
    "deleting": (archive, "_delete_events", True),
    "dropping blobs": (archive, "_drop_blobs", False),
    "giving back": (archive, "_give_back", False),
}[where]
die_in(module, name, after)

async def main():
    database = Database(url)
    log = EventLog(database)
    await log.open()
    before = datetime.now(UTC) + timedelta(days=1)
    await archive.archive(log, database, before, Path(file), by="me")

asyncio.run(main())
"""


@pytest.mark.kill
@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("copying", 0), ("copying", 2), ("proving", 0), ("placing", 0), ("placing", 1),
        ("reading", 0), ("appending", 0), ("appending", 1), ("opening gaps", 1), ("deleting", 2),
        ("reading", 3), ("dropping blobs", 0), ("giving back", 0),
    ],
)  # fmt: skip
async def test_killed(
    backend: Backend, database_url: str, tmp_path: Path, where: str, count: int
) -> None:
    """Each task is whole in the log or archived in a complete file; the next archive goes on."""
    async with opened(database_url) as store:
        for number in range(20):
            await finish(store, f"t{number:02}", f"answer {number}")
        await store.submit("waits")
    before = kept(backend, database_url)
    killed = subprocess.run(  # noqa: ASYNC221 - nothing else runs
        [sys.executable, "-c", KILLED, database_url, str(tmp_path / "a.db"), where, str(count)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert kept(backend, database_url) == before
    assert_sound(database_url)
    report = await archived(database_url, tmp_path / "b.db")
    assert_sound(database_url)
    assert kept(backend, database_url) == before
    texts: dict[str, str] = {}
    for name in ("a.db", "b.db"):
        if (tmp_path / name).exists():
            assert_sound(str(tmp_path / name))
            with closing(sqlite3.connect(tmp_path / name)) as copy:
                texts |= dict(copy.execute("SELECT task_id, output FROM tasks").fetchall())
    assert texts == {f"t{number:02}": f"answer {number}" for number in range(20)}
    rows = backend.query(
        database_url, "SELECT task_id, archived FROM tasks WHERE task_id <> 'waits'"
    )
    assert sum(name == "b.db" for _, name in rows) == report.tasks
    for task_id, name in rows:
        with closing(sqlite3.connect(tmp_path / name)) as copy:
            assert copy.execute(
                "SELECT output FROM tasks WHERE task_id = ?", (task_id,)
            ).fetchone() == (texts[task_id],)


class TestDefences:
    """What the database and `verify` make of people who help themselves."""

    @pytest.fixture
    async def log(self, database_url: str, tmp_path: Path) -> str:
        """A log with three archived tasks, one that has ended since and one that runs."""
        async with opened(database_url) as store:
            for number in range(3):
                await finish(store, f"old{number}")
            await put_away(store, tmp_path / "a.db")
            await finish(store, "new")
            await store.start("busy")
        return database_url

    @staticmethod
    def problems(url: str, backend: Backend, *statements: str) -> list[str]:
        """Return what `verify` finds in a copy after these statements."""
        copy = backend.copy(url)
        with backend.shell(copy) as shell:
            for statement in statements:
                shell.run(statement)
        with Database(copy).snapshot() as connection:
            found = verify(connection).problems
            try:
                found += ["differs"] * compare(connection).differed
            except DatabaseCorrupt as error:
                found.append(str(error))
        assert all(problem.isprintable() for problem in found)
        return found

    @pytest.mark.parametrize(
        "change",
        [
            "DELETE FROM events WHERE version = 1",
            "DELETE FROM events WHERE type = 'archived'",
            "DELETE FROM events WHERE stream_id = (SELECT max(stream_id) FROM streams)",
        ],
    )
    async def test_deletions_are_refused(self, backend: Backend, log: str, change: str) -> None:
        """A gap lets nothing go that no `archived` event of its stream vouches for."""
        for prepared in (None, "UPDATE gaps SET first_position = 1, last_position = 1000"):
            if prepared:
                backend.change(log, prepared)
            before = backend.query(log, "SELECT position FROM events ORDER BY 1")
            with pytest.raises((sqlite3.IntegrityError, psycopg.Error), match=r"never.* deleted"):
                backend.change(log, change)
            assert backend.query(log, "SELECT position FROM events ORDER BY 1") == before

    async def test_forged_gaps(self, backend: Backend, log: str) -> None:
        """Every gap that isn't exactly what the `archived` events account for is found."""
        assert self.problems(log, backend) == []
        last = "(SELECT max(position) FROM events)"
        gone = "SELECT stream_id FROM streams WHERE task_id = 'new'"
        ((first, end),) = backend.query(
            log, f"SELECT min(position), max(position) FROM events WHERE stream_id IN ({gone})"
        )
        digest = f"(SELECT digest FROM events WHERE position = {end})"
        for statements in (
            ("DELETE FROM gaps",),
            ("UPDATE gaps SET digest = zeroblob(32)",),
            ("UPDATE gaps SET last_position = last_position + 1",),
            ("UPDATE gaps SET first_position = first_position + 1",),
            ("UPDATE gaps SET first_position = 5, last_position = 5",),
            (f"INSERT INTO gaps VALUES ({last} + 1, {last} + 2, zeroblob(32))",),
            (f"INSERT INTO gaps VALUES ({first}, {first}, zeroblob(32))",),
            ("INSERT INTO gaps VALUES (-5, -1, zeroblob(32))",),
            # A whole task deleted, and all that tells of it made to fit.
            (
                f"INSERT INTO gaps VALUES ({first}, {end}, {digest})",
                f"DELETE FROM events WHERE position BETWEEN {first} AND {end}",
                "DELETE FROM tasks WHERE task_id = 'new'",
                "DELETE FROM streams WHERE task_id = 'new'",
            ),
            ("UPDATE log_head SET archive_of = '1:00'",),
        ):
            assert self.problems(log, backend, *statements) != [], statements

    async def test_the_notes_themselves(self, backend: Backend, log: str) -> None:
        """An `archived` event can't be changed, taken out or put in."""
        for statements in (
            ("UPDATE events SET data = json_set(data, '$.events', 5) WHERE type = 'archived'",),
            ("UPDATE events SET data = json_set(data, '$.by', 'you') WHERE type = 'archived'",),
            ("UPDATE events SET version = version - 1 WHERE type = 'archived'",),
            ("UPDATE events SET type = 'cancelled' WHERE type = 'archived'",),
            ("DELETE FROM events WHERE type = 'archived'",),
            ("UPDATE events SET type = 'archived' WHERE type = 'chunk'",),
            ("UPDATE tasks SET archived = 'b.db' WHERE archived IS NOT NULL",),
            ("UPDATE tasks SET archived = NULL",),
            ("UPDATE tasks SET archived = 'a.db' WHERE task_id = 'new'",),
        ):
            assert self.problems(log, backend, *statements) != [], statements

    async def test_events_that_came_back(self, backend: Backend, log: str, tmp_path: Path) -> None:
        """Archived events that were put back beside their note are found."""
        with closing(sqlite3.connect(tmp_path / "a.db")) as archive_:
            rows = archive_.execute(
                "SELECT position, stream_id, version, type, schema_version, data, recorded_at, "
                "lower(hex(digest)) FROM events ORDER BY 1"
            ).fetchall()
        back = [
            "INSERT INTO events VALUES ({}, {}, {}, '{}', {}, '{}', '{}', x'{}')".format(*row)
            for row in rows
        ]
        assert self.problems(log, backend, *back, "DELETE FROM gaps") != []
        assert self.problems(log, backend, *back) != []

    async def test_expectations(self, log: str, tmp_path: Path, backend: Backend) -> None:
        """A seal at a gap's end is checked there; one inside says that it is elsewhere."""
        ((end, digest),) = backend.query(log, "SELECT last_position, lower(hex(digest)) FROM gaps")
        assert report_of(log, (end, digest)).ok
        assert not report_of(log, (end, digest)).hidden
        assert report_of(log, (end, "0" * 64)).hidden
        assert report_of(log, (end - 1, "0" * 64)).hidden
        assert not report_of(log, (end + 1, "0" * 64)).ok


class TestEvidence:
    """What is copied is proved before anything is let go."""

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            ("UPDATE events SET data = '{\"text\":\"other\"}' WHERE type = 'chunk'", "verify"),
            ("UPDATE events SET digest = zeroblob(32) WHERE version = 2", "verify"),
            ("DELETE FROM events WHERE version = 3", "verify"),
            ("UPDATE tasks SET cost_usd = 7", "rebuild"),
            ("DELETE FROM blobs", "verify"),
        ],
    )
    async def test_a_damaged_log_is_not_archived(
        self, backend: Backend, story: str, tmp_path: Path, damage: str, says: str
    ) -> None:
        """What isn't what was written stays where it is, and one line says what to do."""
        with backend.shell(story) as shell:
            shell.run(damage)
        before = backend.query(story, "SELECT position FROM events ORDER BY 1")
        with pytest.raises(StoreError, match=f"perdure {says}") as refused:
            await archived(story, tmp_path / "a.db")
        assert len(str(refused.value).splitlines()) == 1
        assert backend.query(story, "SELECT position FROM events ORDER BY 1") == before
        assert list(tmp_path.glob("*a.db*")) == []

    async def test_edited_after_it_was_copied(
        self,
        backend: Backend,
        story: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Digests that aren't those of the copy: nothing of that is deleted."""
        read = archive_module.read_moved

        def edited(file: Path, after: int) -> Any:
            with backend.shell(story) as shell:
                shell.run("UPDATE events SET digest = zeroblob(32) WHERE type = 'completed'")
            return read(file, after)

        monkeypatch.setattr(archive_module, "read_moved", edited)
        with pytest.raises(DatabaseCorrupt, match="perdure verify"):
            await archived(story, tmp_path / "a.db")
        assert backend.query(story, "SELECT count(*) FROM gaps") == [(0,)]


@given(lives(), st.booleans())
def test_a_row_without_content_is_the_same_row(life: Life, bare: bool) -> None:
    """Whatever a task went through: its row keeps all but content, and folds from one event."""
    whole = TaskFold("task", 7)
    for event in life.events:
        whole.apply((event,), LATER)
    if not whole.state.status.ended:
        return
    before = whole.new_row()._asdict()
    note = Archived(
        by="me",
        archive="a.db",
        events=whole.version,
        position=7,
        digest="",
        row=archivefile._row_left(before),  # type: ignore[arg-type]
    )
    (note_back,) = (decode(*stored) for stored in [encode(note)])
    fold = TaskFold("task", 7) if bare else whole
    fold.apply((note_back,), LATER)
    assert fold.version == len(life.events) + 1
    after = fold.new_row()._asdict()
    assert {name: after[name] for name in KEPT} == {name: before[name] for name in KEPT}
    assert [after[name] for name in CONTENT] == [None] * len(CONTENT)
    assert after["archived"] == "a.db"


async def test_up_and_down_with_history(backend: Backend, story: str, tmp_path: Path) -> None:
    """A log with history goes down to the schema before and up again; then it can be archived."""
    from store.test_migrations import migrate

    before = kept(backend, story)
    migrate(Database(story), "0002")
    with pytest.raises((sqlite3.IntegrityError, psycopg.Error), match=r"never.* deleted"):
        backend.change(story, "DELETE FROM events")
    migrate(Database(story), "0003")
    with pytest.raises((sqlite3.IntegrityError, psycopg.Error), match=r"never.* deleted"):
        backend.change(story, "DELETE FROM events")
    assert kept(backend, story) == before
    assert (await archived(story, tmp_path / "a.db")).tasks == 4
    assert_sound(story)


def test_gaps_are_joined() -> None:
    """Neighbours become one, with the digest of the last."""
    found = [Gap(7, 7, b"g"), Gap(1, 2, b"b"), Gap(3, 3, b"c"), Gap(5, 5, b"e"), Gap(6, 6, b"f")]
    assert list(joined(found)) == [Gap(1, 3, b"c"), Gap(5, 7, b"g")]
    assert list(joined([])) == []


async def test_no_way_back(backend: Backend, story: str, tmp_path: Path) -> None:
    """An older schema can't say that events are elsewhere: it isn't gone back to."""
    from store.test_migrations import migrate

    await archived(story, tmp_path / "a.db")
    for url in (story, str(tmp_path / "a.db")):
        with pytest.raises(DatabaseIncompatible, match="archive"):
            migrate(Database(url), "0002")
        assert_sound(url)
