"""Writing: shared commits, expected versions, and what happens when the database can't."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

from perdure import submission
from perdure.errors import (
    ConcurrencyError,
    DuplicateKey,
    EngineClosed,
    InvalidTask,
    InvalidTransition,
    PerdureError,
)
from perdure.events import (
    Cancelled,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    Failed,
    Submitted,
    UsageReported,
)
from perdure.platforms import Platforms
from perdure.store import log as log_module
from perdure.store.database import Database, Writer
from perdure.store.log import EventLog
from perdure.store.redaction import redact
from perdure.store.transaction import Transaction
from perdure.store.verification import verify
from perdure.submission import prepare, submit
from perdure.task import Task, Usage
from perdure.testing import ScriptedAdapter
from store.backends import Backend, Store, opened, running, submitted, write
from store.checks import assert_sound, everything, gapless, held
from store.children import children, run


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every write transaction."""
    counted: list[int] = []
    transaction = Writer.transaction

    @contextmanager
    def counting(self: Writer) -> Generator[Any, None, None]:
        with transaction(self) as connection:
            yield connection
        counted.append(1)

    monkeypatch.setattr(Writer, "transaction", counting)
    return counted


class TestGroupCommit:
    """Many callers, one transaction; each of them gets what is its own."""

    async def test_a_commit_is_shared(self, store: Store, commits: list[int]) -> None:
        """Whoever asks while a commit is under way shares the next one."""
        with held(store):
            waiting = [asyncio.create_task(store.submit(f"task_{number}")) for number in range(100)]
            await asyncio.sleep(0)
        assert await asyncio.gather(*waiting) == [1] * 100
        assert len(commits) <= 3  # the one that was held, theirs, and of some who came before it

    async def test_one_turn_of_the_event_loop(self, store: Store, commits: list[int]) -> None:
        """What is handed in without waiting in between is one transaction, also where none runs."""
        waiting = [store.log.append(f"task_{number}", (submitted(),), 0) for number in range(100)]
        assert await asyncio.gather(*waiting) == [1] * 100
        assert len(commits) == 1

    async def test_more_than_fit_in_one(
        self, store: Store, commits: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A great many are parted, and all of them are written."""
        monkeypatch.setattr(log_module, "MAX_BATCH", 30)
        waiting = [store.log.append(f"task_{number}", (submitted(),), 0) for number in range(100)]
        assert await asyncio.gather(*waiting) == [1] * 100
        assert len(commits) == 4

    async def test_one_after_another(self, store: Store, commits: list[int]) -> None:
        """Who waits for each append gets a commit for each."""
        for number in range(5):
            await store.submit(f"task_{number}")
        assert len(commits) == 5

    async def test_a_conflict_is_its_callers(self, store: Store, commits: list[int]) -> None:
        """Of a shared commit, only the caller whose stream has moved fails; the rest is written."""
        await store.start("moved")
        del commits[:]
        with held(store):
            attempts = [
                store.log.append("moved", [Chunk(text="x")], 1),
                store.log.append("good_1", [submitted()], 0),
                store.log.append("moved", [Cancelled()], 9),
                store.log.append("good_2", [submitted()], 0),
                store.log.append("moved", [Chunk(text="x")], 2),
            ]
        outcomes = await asyncio.gather(*attempts, return_exceptions=True)

        assert [type(outcome) for outcome in outcomes] == [
            ConcurrencyError, int, ConcurrencyError, int, int,
        ]  # fmt: skip
        assert len(commits) <= 2

    async def test_appends_of_one_transaction_see_each_other(self, store: Store) -> None:
        """Two appends to one stream in one commit: the second must expect what the first made."""
        await store.start("task")
        with held(store):
            waiting = [
                asyncio.ensure_future(store.log.append("task", [Chunk(text="ab")], 2)),
                asyncio.ensure_future(store.log.append("task", [Chunk(text="c", offset=2)], 3)),
                asyncio.ensure_future(store.log.append("task", [Chunk(text="d", offset=2)], 3)),
            ]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert outcomes[:2] == [3, 4]
        assert isinstance(outcomes[2], ConcurrencyError)

    async def test_work_that_breaks_breaks_alone(self, store: Store) -> None:
        """What fails with no error of ours fails its caller only, and the writer goes on."""

        def broken(tx: Transaction) -> None:
            tx.append("half", [submitted()], 0)
            raise ZeroDivisionError

        with held(store):
            waiting = [
                asyncio.create_task(store.submit("before")),
                asyncio.ensure_future(store.log.write(broken)),
                asyncio.create_task(store.submit("after")),
            ]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)

        assert outcomes[0] == outcomes[2] == 1
        assert isinstance(outcomes[1], ZeroDivisionError)
        assert await store.submit("half") == 1

    @pytest.mark.parametrize("kind", [RuntimeError, StopIteration, KeyError, MemoryError])
    async def test_the_writer_survives(self, store: Store, kind: type[Exception]) -> None:
        """Whatever a piece of work raises, its caller is told, and the next one is served."""

        def work(_tx: Transaction) -> None:
            raise kind("x")

        with pytest.raises((kind, RuntimeError)):
            await asyncio.wait_for(store.log.write(work), 20)
        assert await store.submit("task") == 1

    async def test_what_the_database_refuses(self, backend: Backend, database_url: str) -> None:
        """Where the database itself refuses one row, one caller hears of it; the others' commit."""
        await write(database_url, ("task", [(submitted(),), (Cancelled(),)]))
        with backend.shell(database_url) as shell:
            shell.run("UPDATE streams SET version = 1")  # so that the log takes it for pending
            shell.run("DELETE FROM events WHERE version = 2")
            shell.run("UPDATE log_head SET position = 0")  # so that the next position is taken
        async with opened(database_url) as store:
            with held(store):
                waiting = [asyncio.create_task(store.submit(f"t{n}")) for n in range(2)]
                await asyncio.sleep(0)
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, PerdureError)
                assert "perdure verify" in str(outcome)
                assert len(str(outcome).splitlines()) == 1

    async def test_alone(self, store: Store, commits: list[int]) -> None:
        """Work that takes long has a transaction of its own."""
        with held(store):
            waiting = [
                asyncio.ensure_future(store.log.write(lambda tx: tx, alone=alone))
                for alone in (False, True, False)
            ]
            await asyncio.sleep(0)
        first, second, third = await asyncio.gather(*waiting)
        assert first is third
        assert first is not second


class TestExpectedVersions:
    """Who may write is decided by the version they have seen."""

    async def test_new_streams(self, store: Store) -> None:
        """0 means that there is no such stream yet."""
        assert await store.log.append("task", [submitted(), running()], 0) == 2
        with pytest.raises(ConcurrencyError) as refused:
            await store.log.append("task", [submitted()], 0)
        assert (refused.value.task_id, refused.value.expected, refused.value.actual) == (
            "task", 0, 2,
        )  # fmt: skip

    @pytest.mark.parametrize("expected", [1, 3, -1])
    async def test_moved_streams(self, store: Store, expected: int) -> None:
        """Any other version than the present one is refused, earlier and later alike."""
        await store.start("task")
        with pytest.raises(ConcurrencyError):
            await store.log.append("task", [Chunk(text="x")], expected)
        assert await store.log.append("task", [Chunk(text="x")], 2) == 3

    async def test_streams_that_are_not_there(self, store: Store) -> None:
        """A version of a stream that doesn't exist is refused; without one it must begin there."""
        with pytest.raises(ConcurrencyError):
            await store.log.append("task", [Cancelled()], 1)
        with pytest.raises(InvalidTransition):
            await store.log.append("task", [Cancelled()], None)

    async def test_any_version(self, store: Store) -> None:
        """None writes at whatever version there is, as long as it may follow."""
        await store.start("task")
        assert await store.log.append("task", [CancelRequested(by="me")], None) == 3
        with pytest.raises(InvalidTransition):
            await store.log.append("task", [CancelRequested(by="me")], None)

    @pytest.mark.parametrize("expected", [0, 2, None])
    async def test_nothing_to_append(
        self, store: Store, backend: Backend, database_url: str, expected: int | None
    ) -> None:
        """Appending no events changes nothing, and still holds the caller to the version."""
        task_id = "task" if expected != 0 else "other"
        await store.start("task")
        before = everything(backend, database_url)
        version = await store.log.append(task_id, [], expected)
        assert version == (2 if task_id == "task" else 0)
        with pytest.raises(ConcurrencyError):
            await store.log.append("task", [], 1)
        assert everything(backend, database_url) == before


class TestRefused:
    """What is refused leaves no trace."""

    @pytest.mark.parametrize(
        "events",
        [
            [Completed()],
            [running(2)],
            [Chunk(text="x"), Chunk(text="y", offset=5)],
            [Chunk(text="x"), Completed(output_length=1), Cancelled()],
            [UsageReported(usage=Usage()), submitted()],
        ],
        ids=lambda events: ",".join(event.type for event in events),
    )
    async def test_invalid_transitions(
        self, store: Store, backend: Backend, database_url: str, events: list[Event]
    ) -> None:
        """Of events that can't follow, not even those before the one at fault are written."""
        await store.log.append("task", [submitted()], 0)
        if events[0].type not in ("completed", "running"):
            await store.log.append("task", [running()], 1)
        before = everything(backend, database_url)

        with pytest.raises(InvalidTransition):
            await store.log.append("task", events, None)
        assert everything(backend, database_url) == before
        assert_sound(database_url)

    async def test_the_stream_goes_on_after_a_refusal(self, store: Store) -> None:
        """A refused append changes nothing of what the writer knows, in the same commit either."""
        await store.start("task")
        with held(store):
            waiting = [
                asyncio.ensure_future(store.log.append("task", events, 2))
                for events in (
                    [Chunk(text="abc"), Chunk(text="gap", offset=9)],
                    [Chunk(text="ab")],
                )
            ]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(outcomes[0], InvalidTransition)
        assert outcomes[1] == 3
        assert await store.log.append("task", [Completed(output_length=2)], 3) == 4

    async def test_a_second_ending(self, store: Store) -> None:
        """A task that has ended takes no other ending."""
        await store.start("task")
        await store.log.append("task", [Completed()], 2)
        for ending in (Completed(), Failed(error_class="X", message="x", attempts=1), Cancelled()):
            with pytest.raises(InvalidTransition):
                await store.log.append("task", [ending], 3)


class TestKeys:
    """A key belongs to one task."""

    async def test_taken(self, store: Store) -> None:
        """A second task with a key is refused and told whose it is."""
        await store.submit("first", key="row 1")
        with pytest.raises(DuplicateKey) as refused:
            await store.submit("second", key="row 1")
        assert (refused.value.key, refused.value.task_id) == ("row 1", "first")
        assert await store.submit("second", key="row 2") == 1

    async def test_taken_in_the_same_commit(self, store: Store) -> None:
        """Of two in one transaction the first gets it."""
        with held(store):
            waiting = [asyncio.create_task(store.submit(f"t{n}", key="row 1")) for n in range(3)]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert outcomes[0] == 1
        assert [type(outcome) for outcome in outcomes[1:]] == [DuplicateKey] * 2

    async def test_taken_by_another_process(self, database_url: str) -> None:
        """What another process has written counts."""
        async with opened(database_url) as one, opened(database_url) as other:
            await one.submit("first", key="row 1")
            with pytest.raises(DuplicateKey):
                await other.submit("second", key="row 1")

    async def test_not_taken_by_what_was_refused(self, store: Store) -> None:
        """A task that was refused doesn't keep its key, in the same commit either."""
        nowhere = Submitted(task={"prompt": "x", "key": "row 1"}, platforms=())
        with held(store):
            waiting = [
                asyncio.ensure_future(store.log.append("bad", [nowhere], 0)),
                asyncio.create_task(store.submit("good", key="row 1")),
            ]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(outcomes[0], InvalidTransition)
        assert outcomes[1] == 1

    async def test_stays_taken(self, store: Store) -> None:
        """The end of a task doesn't free its key."""
        await store.submit("task", key="row 1")
        await store.log.append("task", [Cancelled()], 1)
        with pytest.raises(DuplicateKey):
            await store.submit("other", key="row 1")


class TestSubmitting:
    """Tasks as they come in: ids, keys and long texts."""

    platforms = Platforms([ScriptedAdapter(platform="demo")])

    def prepare(self, **fields: Any) -> Any:
        """Return a task that is ready to be written down."""
        return prepare(Task(**{"prompt": "x", **fields}), self.platforms, "demo")

    async def test_ids_that_collide(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """An id that is taken is drawn again, against the database and within one commit."""
        drawn = iter(["a", "a", "b", "a", "b", "a", "c"])
        monkeypatch.setattr(submission, "generate_task_id", lambda _platform: next(drawn))
        await store.submit("a")

        ready = [self.prepare() for _ in range(2)]
        assert [one.task_id for one in ready] == ["a", "a"]
        outcomes = await store.log.write(lambda tx: submit(tx, ready))

        assert [outcome.task_id for outcome in outcomes] == ["b", "c"]
        assert all(outcome.new for outcome in outcomes)

    async def test_ids_that_were_given(self, store: Store) -> None:
        """An id that was chosen by hand and is taken is an error of that task only."""
        ready = [self.prepare(task_id="mine"), self.prepare(task_id="mine"), self.prepare()]
        outcomes = await store.log.write(lambda tx: submit(tx, ready))

        assert outcomes[0].task_id == "mine"
        assert isinstance(outcomes[1], InvalidTask)
        assert outcomes[2].new

    @pytest.mark.parametrize("crowded", [False, True])
    async def test_the_same_task_again(self, store: Store, crowded: bool) -> None:
        """An id that is taken is the error, though its key is too, whatever else is written."""
        await store.submit("mine", key="k")
        await store.submit("taken")
        with held(store):
            again = store.log.write(lambda tx: submit(tx, [self.prepare(task_id="mine", key="k")]))
            other = store.log.append("taken" if crowded else "free", [submitted()], 0)
        (outcome,) = await again
        assert isinstance(outcome, InvalidTask)
        (found,) = await asyncio.gather(other, return_exceptions=True)
        assert isinstance(found, ConcurrencyError) if crowded else found == 1

    async def test_an_expected_beginning(self, store: Store) -> None:
        """Who expects a new stream is told of the version it is at, whatever it would append."""
        await store.submit("task")
        for events in ([running()], [submitted()], []):
            with pytest.raises(ConcurrencyError):
                await store.log.append("task", events, 0)

    async def test_known_keys(self, store: Store) -> None:
        """A task whose key is known is not written again; the answer is the task that has it."""
        ready = [self.prepare(key="k", task_id="first"), self.prepare(key="k")]
        outcomes = await store.log.write(lambda tx: submit(tx, ready))
        again = await store.log.write(lambda tx: submit(tx, ready[1:]))

        assert [(o.task_id, o.new) for o in (*outcomes, *again)] == [
            ("first", True), ("first", False), ("first", False),
        ]  # fmt: skip

    async def test_a_long_system_prompt_is_kept_once(
        self, store: Store, backend: Backend, database_url: str
    ) -> None:
        """A text of 4 KiB that many tasks share is stored once, over several commits."""
        system = "Sei gründlich. " * 1000
        for _ in range(3):
            ready = [self.prepare(system=system) for _ in range(20)]
            await store.log.write(lambda tx, ready=ready: submit(tx, ready))

        assert backend.query(database_url, "SELECT count(*), sum(size) FROM blobs") == [
            (1, len(system.encode()))
        ]
        ((longest,),) = backend.query(
            database_url, "SELECT max(length(CAST(data AS TEXT))) FROM events"
        )
        assert longest < 300

    async def test_short_texts_stay_in_the_event(
        self, store: Store, backend: Backend, database_url: str
    ) -> None:
        """Below 4 KiB, counted in bytes of UTF-8, a text stays where it is."""
        ready = [self.prepare(system="x" * 4095), self.prepare(system="ü" * 2048)]
        await store.log.write(lambda tx: submit(tx, ready))
        assert backend.query(database_url, "SELECT size FROM blobs") == [(4096,)]

    async def test_a_file_is_stored_once(
        self, store: Store, backend: Backend, database_url: str, tmp_path: Any
    ) -> None:
        """The same content under two names, in two tasks, is one blob."""
        for name in ("a.txt", "b.md"):
            (tmp_path / name).write_text("content")
        ready = [
            self.prepare(files=[str(tmp_path / "a.txt"), str(tmp_path / "b.md")]),
            self.prepare(files=[str(tmp_path / "b.md")]),
        ]
        await store.log.write(lambda tx: submit(tx, ready))
        assert backend.query(database_url, "SELECT size, data FROM blobs") == [(7, b"content")]

    async def test_a_task_that_is_refused_leaves_no_blob(
        self, store: Store, backend: Backend, database_url: str
    ) -> None:
        """The texts of a task whose key is known are not stored."""
        await store.log.write(lambda tx: submit(tx, [self.prepare(key="k")]))
        ready = [self.prepare(key="k", system="y" * 5000)]
        await store.log.write(lambda tx: submit(tx, ready))
        assert backend.query(database_url, "SELECT count(*) FROM blobs") == [(0,)]


class TestOrder:
    """Positions and versions have no gaps, whoever writes."""

    async def test_many_producers(self, backend: Backend, database_url: str) -> None:
        """Fifty streams at once, in one process."""

        async def one(number: int) -> None:
            task_id = f"task_{number}"
            version = await store.start(task_id)
            for offset in range(10):
                version = await store.log.append(task_id, [Chunk(text="x", offset=offset)], version)
            await store.log.append(task_id, [Completed(output_length=10)], version)

        async with opened(database_url) as store:
            await asyncio.gather(*(one(number) for number in range(50)))
        assert gapless(backend, database_url) == {f"task_{n}": 13 for n in range(50)}
        assert_sound(database_url)

    def test_two_processes(self, backend: Backend, database_url: str) -> None:
        """Two processes with twenty streams each, on one database."""
        run(*(("produce", database_url, name, 20, 10) for name in "ab"))
        expected = {f"{name}_{number}": 13 for name in "ab" for number in range(20)}
        assert gapless(backend, database_url) == expected
        assert_sound(database_url)

    async def test_one_stream_in_two_processes(self, backend: Backend, database_url: str) -> None:
        """Both append to one stream: each version is acknowledged to exactly one."""
        await write(database_url, ("task", [(submitted(), running())]))
        found = run(*[("append_chunks", database_url, "task", 40)] * 2)
        assert sorted(version for versions in found for version in versions) == list(range(3, 83))
        assert gapless(backend, database_url) == {"task": 82}
        assert_sound(database_url)


class TestCache:
    """The writer keeps folds, and never trusts one that is out of date."""

    async def test_another_writer(self, database_url: str) -> None:
        """After another connection's append, the old version conflicts and the new one fits."""
        async with opened(database_url) as one, opened(database_url) as other:
            await one.start("task")
            await one.log.append("task", [Chunk(text="ab")], 2)
            await other.log.append("task", [Chunk(text="cd", offset=2)], 3)

            with pytest.raises(ConcurrencyError):
                await one.log.append("task", [Chunk(text="ef", offset=2)], 3)
            assert await one.log.append("task", [Chunk(text="ef", offset=4)], 4) == 5
            assert await other.log.append("task", [Completed(output_length=6)], 5) == 6
            with pytest.raises(InvalidTransition):
                await one.log.append("task", [Cancelled()], None)
        assert_sound(database_url)

    async def test_another_process(self, database_url: str) -> None:
        """The same with a process of its own."""
        async with opened(database_url) as store:
            await store.start("task")
            with children(("end", database_url, "task")) as (child,):
                child.go()
                assert await asyncio.to_thread(child.result) == 3
            with pytest.raises(ConcurrencyError):
                await store.log.append("task", [Chunk(text="x")], 2)

    async def test_after_a_rollback(self, store: Store, database_url: str) -> None:
        """What a transaction had folded in before it was rolled back is forgotten."""

        def broken(tx: Transaction) -> None:
            tx.append("task", [Chunk(text="abc")], 2)
            raise ZeroDivisionError

        async with opened(database_url) as other:
            await store.start("task")
            with pytest.raises(ZeroDivisionError):
                await store.log.write(broken)
            # At the very version that was never committed there is something else now.
            assert await other.log.append("task", [Chunk(text="ab")], 2) == 3
            assert await store.log.append("task", [Chunk(text="c", offset=2)], 3) == 4
            assert await store.log.append("task", [Completed(output_length=3)], 4) == 5
        assert_sound(database_url)

    async def test_more_streams_than_are_kept(
        self, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A stream whose fold was dropped is folded again from the log."""
        small = log_module.FoldCache(2)
        monkeypatch.setattr(log_module, "FoldCache", lambda: small)
        async with opened(database_url) as store:
            for number in range(5):
                await store.start(f"t{number}")
            for offset in range(3):
                for number in range(5):
                    await store.log.append(f"t{number}", [Chunk(text="x", offset=offset)], None)
            for number in range(5):
                await store.log.append(f"t{number}", [Completed(output_length=3)], 5)
        assert_sound(database_url)

    async def test_ended_tasks_are_not_kept(self, store: Store) -> None:
        """Nobody needs the fold of an ended task any more."""
        await store.start("task")
        await store.log.append("task", [Completed()], 2)

        def look(tx: Transaction) -> Any:
            return tx._cache.get("task")

        assert await store.log.write(look) is None


class TestWaiting:
    """Callers that are cancelled, and logs that are closed."""

    async def test_a_cancelled_caller(self, database_url: str) -> None:
        """A caller that is cancelled while it waits loses nothing, and locks nobody out."""
        async with opened(database_url) as store, opened(database_url) as other:
            with held(store):
                waiting = [asyncio.create_task(store.submit(f"t{n}")) for n in range(20)]
                await asyncio.sleep(0)
                for task in waiting[::2]:
                    task.cancel()
                await asyncio.sleep(0)
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(o) for o in outcomes] == [asyncio.CancelledError, int] * 10

            assert await asyncio.wait_for(other.submit("another"), 20) == 1
            for number in range(20):  # it was on its way, and arrived
                with pytest.raises(ConcurrencyError):
                    await store.submit(f"t{number}")
        assert_sound(database_url)

    async def test_cancelled_again_and_again(self, database_url: str) -> None:
        """Cancelled at whatever moment, each append is there or not, and the next one works."""
        acknowledged = set()
        async with opened(database_url) as store:
            for number in range(60):
                task = asyncio.create_task(store.submit(f"t{number}"))
                for _ in range(number % 6):
                    await asyncio.sleep(0)
                task.cancel()
                if await asyncio.gather(task, return_exceptions=True) == [1]:
                    acknowledged.add(f"t{number}")
            await store.submit("last")
        with Database(database_url).snapshot() as connection:
            assert verify(connection).tasks >= len(acknowledged) + 1
        assert_sound(database_url)

    async def test_closing_writes_what_waits(self, backend: Backend, database_url: str) -> None:
        """What was asked for before `close` is written, and its callers are told."""
        async with opened(database_url) as store:
            with held(store):
                waiting = [asyncio.create_task(store.submit(f"t{n}")) for n in range(50)]
                await asyncio.sleep(0)
                closing = asyncio.create_task(store.log.close())
                await asyncio.sleep(0)
            await closing
            assert await asyncio.gather(*waiting) == [1] * 50
        assert len(gapless(backend, database_url)) == 50

    async def test_closed(self, store: Store) -> None:
        """A closed log takes nothing, says so, and may be closed again."""
        await store.log.close()
        with pytest.raises(EngineClosed):
            await store.submit("task")
        await store.log.close()

    async def test_never_opened(self, database_url: str) -> None:
        """A log that wasn't opened takes nothing."""
        with pytest.raises(EngineClosed):
            await log_module.EventLog(Database(database_url)).append("task", [submitted()], 0)

    async def test_a_writer_that_is_gone(
        self, backend: Backend, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Were the writer thread ever to end by itself, nobody would wait for it for ever."""

        def broken(_self: Writer) -> bool:
            raise ZeroDivisionError("by zero")

        monkeypatch.setattr(backend.writer, "others_committed", broken)
        await store.submit("task")
        following = asyncio.create_task(anext(store.log.feed.follow("task", 1)))

        async def submit_on_and_on() -> None:
            for number in itertools.count():
                await store.submit(f"another_{number}")

        with pytest.raises(PerdureError, match="by zero"):
            await asyncio.wait_for(submit_on_and_on(), 20)
        with pytest.raises(PerdureError, match="by zero"):
            await asyncio.wait_for(following, 20)


async def test_redacting_is_written_like_all_else(store: Store, database_url: str) -> None:
    """Work that changes rows beside the log is part of the transaction."""
    await store.start("task")
    await store.log.append("task", [Completed()], 2)
    assert await store.log.write(lambda tx: redact(tx, "task", "me", None), alone=True) == 1
    assert_sound(database_url)


class _Stubborn:
    """Somebody who listens, and to whom the first cancellation gets lost."""

    hears = False

    def __init__(self) -> None:
        self.cancelled = 0

    async def run(self) -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                if self.cancelled > 1:
                    raise


async def test_closing_though_a_cancellation_gets_lost(database_url: str) -> None:
    """A driver that loses a cancellation is cancelled again, and not waited for for ever."""
    database = Database(database_url)
    stubborn = _Stubborn()
    database.dialect.listener = lambda _on_news, _active: stubborn  # type: ignore[method-assign]
    log = EventLog(database)
    await log.open()
    log.on_work(lambda: None)
    await asyncio.sleep(0)  # it begins to listen
    async with asyncio.timeout(60):
        await log.close()
    assert stubborn.cancelled == 2
    await database.close()
