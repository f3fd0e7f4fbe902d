"""The log is the only truth: rows and views come back from it, equal to the last bit."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from model.histories import KINDS, Life, lives, maybe, names, words
from perdure.errors import DatabaseCorrupt, TaskNotFound
from perdure.events import (
    AttemptFailed,
    Cancelled,
    Chunk,
    Completed,
    Event,
    Failed,
    Interrupted,
    RecordedEvent,
    Running,
)
from perdure.store import sqlite as sqlite_module
from perdure.store.content import separate
from perdure.store.database import Database
from perdure.store.projection import ChangingColumns, TaskRow
from perdure.store.rebuilding import compare, rebuild
from perdure.store.records import Records, read_events
from perdure.store.redaction import redact
from perdure.store.schema import tasks
from perdure.store.verification import verify
from perdure.task import Message, Task, TaskConstraints, Usage
from store.backends import AllBackends, Backend, Rows, opened, running, submitted, tell_all, write
from store.varied import tell

BATCHES = ("batch a", "batch b")


@st.composite
def stored_tasks(draw: Any) -> dict[str, Any]:
    """Tasks as they are stored: with everything a row takes from them."""
    fields: dict[str, Any] = {
        "labels": draw(st.dictionaries(names, words, max_size=2)),
        "priority": draw(st.integers(0, 10)),
        "batch": draw(maybe(st.sampled_from(BATCHES))),
        "fingerprint": draw(maybe(names)),
        "parents": tuple(draw(st.lists(names, max_size=2))),
        "type": draw(maybe(st.sampled_from(["research", "testing"]))),
        "constraints": draw(maybe(names.map(lambda name: TaskConstraints(model=name)))),
        "metadata": draw(st.dictionaries(words, words, max_size=1)),
    }
    if draw(st.booleans()):
        fields["prompt"] = "?" + draw(words)
    else:
        fields["messages"] = (
            Message(role="assistant", content="!" + draw(words)),
            Message(role="user", content="?" + draw(words)),
        )
    plain, _, _ = separate(Task(**fields))
    return plain


@st.composite
def stories(draw: Any) -> list[Life]:
    """Several tasks' lives, some of them keyed, and some of them retries of earlier ones."""
    told: list[Life] = []
    for number in range(draw(st.integers(1, 5))):
        life = draw(lives(stored_tasks(), most=12, finish=draw(st.booleans())))
        task = life.events[0].task  # type: ignore[attr-defined]
        if draw(st.booleans()):
            task["key"] = f"key {number}"
        if told and draw(st.booleans()):
            task["retry_of"] = f"task_{draw(st.integers(0, number - 1))}"
        told.append(life)
    return told


TASK_COLUMNS = (
    "task_id", "status", "platform", "model", "type", "priority", "attempts", "worker",
    "available_at", "cancel_requested", "prompt", "output", "partial_output", "finish_reason",
    "error_class", "error", "input_tokens", "output_tokens", "cache_read_tokens",
    "cache_write_tokens", "reasoning_tokens", "cost_usd", "submitted_at", "started_at",
    "ended_at", "batch", "key", "fingerprint", "parent", "retry_of", "labels", "files_created",
)  # fmt: skip


def bits(backend: Backend, url: str) -> Rows:
    """Return all rows of `tasks`, to the last bit."""
    columns = ", ".join(backend.exact(name) for name in ("stream_id", *TASK_COLUMNS))
    return backend.query(url, f"SELECT {columns} FROM tasks ORDER BY stream_id")


MOMENT = "%Y-%m-%dT%H:%M:%S.%fZ"


def stamp(event: RecordedEvent) -> str:
    """Return when an event was recorded, as it is stored."""
    return event.recorded_at.strftime(MOMENT)


def json_of(value: Any) -> str:
    """Return canonical JSON, by the standard library."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def respelt(text: str | None) -> str | None:
    """Return the canonical form of JSON."""
    return None if text is None else json_of(json.loads(text))


def expected_row(task_id: str, life: Life, log: list[RecordedEvent], redacted: bool) -> Rows:
    """Return what a row of `tasks` must be, computed in the plainest way there is."""
    task = life.events[0].task  # type: ignore[attr-defined]
    began = next((e for e in log if isinstance(e.event, Running)), None)
    ended = next((e for e in log if isinstance(e.event, Completed | Failed | Cancelled)), None)
    available = stamp(log[0])
    for recorded in log:
        if isinstance(recorded.event, AttemptFailed):
            available = recorded.event.retry_at.strftime(MOMENT)
        elif isinstance(recorded.event, Interrupted):
            available = stamp(recorded)
    messages = task.get("messages")
    text = None if redacted else life.text
    unsuccessful = life.status in ("failed", "cancelled")
    return [(
        task_id, life.status, life.platform, life.model, task.get("type"),
        task.get("priority", 5), life.attempt, life.worker, available, int(life.cancelling),
        None if redacted else messages[-1]["content"] if messages else task["prompt"],
        text if life.status == "completed" else None, text if unsuccessful else None,
        life.finish_reason, life.error_class, None if redacted else life.error,
        *(life.sum(f"{kind}_tokens") for kind in
          ("input", "output", "cache_read", "cache_write", "reasoning")),
        life.cost, stamp(log[0]), stamp(began) if began else None,
        stamp(ended) if ended else None, task.get("batch"), task.get("key"),
        task.get("fingerprint"), (task.get("parents") or [None])[0], task.get("retry_of"),
        "{}" if redacted else json_of(task.get("labels", {})),
        json_of(life.files) if life.files and not redacted else None,
    )]  # fmt: skip


class Told:
    """Stories that were written to a database."""

    def __init__(self, backend: Backend, lives_: list[Life], redact_: set[str]) -> None:
        self.backend = backend
        self.lives = {f"task_{number}": life for number, life in enumerate(lives_)}
        self.redacted = {t for t, life in self.lives.items() if life.ended and t in redact_}
        self.url = backend.new()
        self.logs: dict[str, list[RecordedEvent]] = {}
        asyncio.run(self._tell())

    async def _tell(self) -> None:
        async with opened(self.url) as store:
            await tell_all(store, *((name, life.steps) for name, life in self.lives.items()))
            for task_id in sorted(self.redacted):
                await store.log.write(
                    lambda tx, task_id=task_id: redact(tx, task_id, "me", None), alone=True
                )
            for task_id in self.lives:
                self.logs[task_id] = await read_events(store.database, task_id)

    def rows(self) -> Rows:
        """Return all rows of `tasks`, type by type and bit by bit."""
        return bits(self.backend, self.url)

    def query(self, sql: str) -> Rows:
        """Return what a query finds."""
        return self.backend.query(self.url, sql)

    def rebuild(self) -> int:
        """Rebuild as `perdure rebuild` does; returns how many rows differed."""
        writer = Database(self.url).writer()
        try:
            with writer.transaction() as connection:
                return rebuild(connection).differed
        finally:
            writer.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def module_backend(
    request: pytest.FixtureRequest, all_backends: AllBackends
) -> Generator[Backend, None, None]:
    """A database backend for many examples."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        prepare = sqlite_module._prepare_connection

        def hasty(raw: Any, record: object) -> None:
            prepare(raw, record)
            raw.execute("PRAGMA synchronous = OFF").close()  # none of them need survive a crash

        monkeypatch.setattr(sqlite_module, "_prepare_connection", hasty)
        yield all_backends[request.param]


redactions = st.sets(st.sampled_from([f"task_{number}" for number in range(5)]), max_size=3)


class TestRows:
    """The rows of `tasks`."""

    @settings(max_examples=40)
    @given(told=stories(), redact_=redactions)
    def test_rebuild_is_equal_to_the_last_bit(
        self, module_backend: Backend, told: list[Life], redact_: set[str]
    ) -> None:
        """Live rows are what the stories come to; dropped and rebuilt they are the very same."""
        story = Told(module_backend, told, redact_)
        for life in story.lives.values():
            note(life.status)

        live = story.rows()
        columns = ", ".join(TASK_COLUMNS)
        for task_id, life in story.lives.items():
            found = story.query(f"SELECT {columns} FROM tasks WHERE task_id = '{task_id}'")
            # `jsonb` is shown with spaces.
            assert [(*row[:-2], *map(respelt, row[-2:])) for row in found] == expected_row(
                task_id, life, story.logs[task_id], task_id in story.redacted
            )
        assert story.rebuild() == 0
        assert story.rows() == live

        with module_backend.shell(story.url) as shell:
            shell.run("DELETE FROM tasks")
        assert story.rebuild() == len(told)
        assert story.rows() == live
        with Database(story.url).snapshot() as connection:
            assert verify(connection).problems == []
            assert compare(connection).differed == 0
        self.check_views(story)

    # -- the views, against plain Python ---------------------------------------------------------

    def check_views(self, story: Told) -> None:
        """Hold all views to what plain Python makes of the same events."""
        self.check_task_events(story)
        self.check_task_output(story)
        self.check_attempts(story)
        self.check_usage_daily(story)
        self.check_batches(story)

    def check_task_events(self, story: Told) -> None:
        """`task_events` is the log with names."""
        found = story.query(
            "SELECT position, task_id, version, type, recorded_at FROM task_events "
            "ORDER BY position"
        )
        expected = sorted(
            (e.position, e.task_id, e.version, e.event.type, stamp(e))
            for log in story.logs.values()
            for e in log
        )
        assert found == expected
        assert story.query(
            "SELECT count(*) FROM task_events v JOIN events e ON e.position = v.position "
            f"WHERE v.data = {story.backend.viewed('e.data')} "
            "AND v.digest = lower(hex(e.digest))"
        ) == [(len(expected),)]

    def check_task_output(self, story: Told) -> None:
        """`task_output` has the text so far of every task, and none of redacted ones."""
        found = {
            task_id: (status, text)
            for task_id, status, text in story.query("SELECT * FROM task_output")
        }
        for task_id, life in story.lives.items():
            text = "" if task_id in story.redacted else life.text
            assert found[task_id] == (life.status, text)
        assert len(found) == len(story.lives)

    def check_attempts(self, story: Told) -> None:
        """`attempts` has each attempt, how it ended and what it cost."""
        expected: list[tuple[Any, ...]] = []
        for task_id, log in story.logs.items():
            for index, recorded in enumerate(log):
                began = recorded.event
                if not isinstance(began, Running):
                    continue
                end = next(
                    (
                        later
                        for later in log[index + 1 :]
                        if isinstance(
                            later.event,
                            AttemptFailed | Interrupted | Completed | Failed | Cancelled,
                        )
                    ),
                    None,
                )
                how: Event | None = end.event if end else None
                message = getattr(how, "message", None)
                if task_id in story.redacted:
                    message = None
                expected.append((
                    task_id, began.attempt, began.platform, began.model, began.worker, began.mode,
                    stamp(recorded), stamp(end) if end else None, how.type if how else "running",
                    getattr(how, "error_class", None), message, getattr(how, "cost_usd", None),
                ))  # fmt: skip
        assert sorted(story.query("SELECT * FROM attempts"), key=repr) == sorted(expected, key=repr)

    def check_usage_daily(self, story: Told) -> None:
        """`usage_daily` sums what is known, and counts tasks whose price isn't."""
        groups: dict[tuple[Any, ...], list[Life]] = defaultdict(list)
        for task_id, life in story.lives.items():
            day = stamp(story.logs[task_id][0])[:10]
            groups[day, life.platform, life.model].append(life)
        found = story.query(
            "SELECT day, platform, model, tasks, input_tokens, output_tokens, cache_read_tokens, "
            "cache_write_tokens, reasoning_tokens, unpriced_tasks, cost_usd FROM usage_daily"
        )
        expected = {
            key: (
                len(group),
                *(total(life.sum(f"{kind}_tokens") for life in group) for kind in (
                    "input", "output", "cache_read", "cache_write", "reasoning")),
                sum(life.cost is None and life.sum("input_tokens") is not None for life in group),
            )
            for key, group in groups.items()
        }  # fmt: skip
        assert {row[:3]: row[3:-1] for row in found} == expected
        for row in found:
            assert row[-1] == approximately(life.cost for life in groups[row[:3]])

    def check_batches(self, story: Told) -> None:
        """`batches` counts each task once, with its latest run, and all the tokens."""
        retried = {life.events[0].task.get("retry_of") for life in story.lives.values()}  # type: ignore[attr-defined]
        groups: dict[str, list[tuple[str, Life]]] = defaultdict(list)
        for task_id, life in story.lives.items():
            batch = life.events[0].task.get("batch")  # type: ignore[attr-defined]
            if batch is not None:
                groups[batch].append((task_id, life))
        expected = {}
        for batch, group in groups.items():
            last = [life for task_id, life in group if task_id not in retried]
            ends = [
                stamp(recorded)
                for task_id, _ in group
                for recorded in story.logs[task_id]
                if recorded.event.ends_task
            ]
            expected[batch] = (
                len(last),
                *(sum(life.status == status for life in last) for status in (
                    "pending", "running", "completed", "failed", "cancelled")),
                len(group) - len(last),
                total(life.sum("input_tokens") for _, life in group),
                total(life.sum("output_tokens") for _, life in group),
                min(stamp(story.logs[task_id][0]) for task_id, _ in group),
                max(ends, default=None),
            )  # fmt: skip
        found = story.query(
            "SELECT batch, tasks, pending, running, completed, failed, cancelled, retried, "
            "input_tokens, output_tokens, submitted_at, ended_at, cost_usd FROM batches"
        )
        assert {row[0]: row[1:-1] for row in found} == expected
        for row in found:
            assert row[-1] == approximately(life.cost for _, life in groups[row[0]])


def total(values: Any) -> Any:
    """Return the sum of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def approximately(values: Any) -> Any:
    """Return the sum, which SQL may add up in another order."""
    found = total(values)
    return None if found is None else pytest.approx(found)


@pytest.fixture
def story(backend: Backend, database_url: str, tmp_path: Path) -> str:
    """The log in which everything has happened."""
    asyncio.run(tell(database_url, tmp_path))
    return database_url


class TestDamage:
    """Rows that somebody has changed, or lost."""

    def rebuild(self, url: str) -> int:
        """Rebuild as `perdure rebuild` does."""
        writer = Database(url).writer()
        try:
            with writer.transaction() as connection:
                return rebuild(connection).differed
        finally:
            writer.close()

    @pytest.mark.parametrize(
        "damage",
        [
            "DELETE FROM tasks",
            "DELETE FROM tasks WHERE task_id = 'good'",
            "UPDATE tasks SET status = 'pending', output = NULL, cost_usd = 7",
            "UPDATE tasks SET available_at = 'soon', submitted_at = '', ended_at = x'ff'",
            "UPDATE tasks SET prompt = CAST(x'ff' AS TEXT), labels = CAST(x'c328' AS TEXT)",
            "UPDATE tasks SET labels = x'00', priority = 'high', cancel_requested = 'no'",
            "UPDATE tasks SET labels = '[1e0]', files_created = 'null', cancel_requested = true",
            "UPDATE tasks SET available_at = '-infinity', submitted_at = 'infinity'",
            "UPDATE tasks SET stream_id = stream_id + 1000",
            "UPDATE tasks SET task_id = task_id || '2', key = NULL",
            "UPDATE tasks SET cost_usd = -0.0",
            "UPDATE tasks SET cost_usd = 0 WHERE cost_usd IS NULL",
            "UPDATE tasks SET tool_calls = '[1.00]', labels = '{\"a\": 1.00}'",
            """INSERT INTO tasks SELECT -1, 'ghost', status, platform, model, type, priority,
            attempts, worker, available_at, cancel_requested, prompt, output, partial_output,
            finish_reason, error_class, error, input_tokens, output_tokens, cache_read_tokens,
            cache_write_tokens, reasoning_tokens, cost_usd, submitted_at, started_at, ended_at,
            batch, 'ghostly', fingerprint, parent, retry_of, labels, files_created,
            tool_calls, archived
            FROM tasks WHERE task_id LIKE 'good'""",
        ],
    )
    def test_is_mended(self, backend: Backend, story: str, damage: str) -> None:
        """Whatever was done to the rows, `rebuild` brings them back and says how many."""
        before = bits(backend, story)
        with backend.shell(story) as shell:
            try:
                shell.run(damage)
            except psycopg.Error:
                return  # its types don't let that happen
        assert self.rebuild(story) > 0
        assert bits(backend, story) == before
        assert self.rebuild(story) == 0

    def test_names_that_were_swapped(self, backend: Backend, database_url: str) -> None:
        """Rows that hold each other's unique values are put right, wherever they stand."""
        histories = [(f"t{n}", [(submitted(key=f"k{n}"),)]) for n in range(150)]
        asyncio.run(write(database_url, *histories))
        before = bits(backend, database_url)
        with backend.shell(database_url) as shell:
            for column, values in (("key", "k{}"), ("task_id", "t{}")):
                for one, other in ((3, 140), (70, 71), (149, 0)):
                    swap = f"UPDATE tasks SET {column} = '{{}}' WHERE {column} = '{{}}'"
                    a, b = values.format(one), values.format(other)
                    for to, of in (("aside", a), (a, b), (b, "aside")):
                        shell.run(swap.format(to, of))
        assert self.rebuild(database_url) >= 6
        assert bits(backend, database_url) == before
        assert self.rebuild(database_url) == 0

    def test_two_damages_are_two(self, backend: Backend, story: str) -> None:
        """Each row that was wrong counts once."""
        with backend.shell(story) as shell:
            shell.run("DELETE FROM tasks WHERE task_id = 'good'")
            shell.run("UPDATE tasks SET status = 'failed' WHERE task_id = 'busy'")
        assert self.rebuild(story) == 2

    def test_a_log_that_cannot_be_folded(self, backend: Backend, story: str) -> None:
        """Where the log is broken nothing is thrown away."""
        before = bits(backend, story)
        with backend.shell(story) as shell:
            shell.run("DELETE FROM events WHERE version = 2")
        with pytest.raises(DatabaseCorrupt, match="perdure verify"):
            self.rebuild(story)
        assert bits(backend, story) == before

    def test_more_tasks_than_a_page(
        self, backend: Backend, database_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Paging finds the same as one page, wherever the pages end."""
        monkeypatch.setattr("perdure.store.scanning.PAGE", 30)
        histories = [
            (f"t{n}", [(submitted(), running())] + [(Cancelled(),)] * (n % 2)) for n in range(17)
        ]
        asyncio.run(write(database_url, *histories))
        before = bits(backend, database_url)
        with backend.shell(database_url) as shell:
            shell.run("DELETE FROM tasks WHERE stream_id % 3 = 0")
            shell.run("UPDATE tasks SET priority = 9 WHERE stream_id % 5 = 0")
        with Database(database_url).snapshot() as connection:
            told: list[tuple[int, int]] = []
            differed = compare(connection, lambda done, all_: told.append((done, all_))).differed
        assert told[-1] == (17, 17)
        assert self.rebuild(database_url) == differed > 5
        assert bits(backend, database_url) == before

    async def test_while_others_write(self, backend: Backend, database_url: str) -> None:
        """Rebuilding in the writer's own transaction, with everyone else at work."""
        async with opened(database_url) as store:
            for number in range(20):
                await store.start(f"t{number}")
            work = [store.log.append(f"t{n}", [Completed()], 2) for n in range(20)]
            report = await store.log.write(lambda tx: rebuild(tx.connection), alone=True)
            await asyncio.gather(*work)
            again = await store.log.write(lambda tx: rebuild(tx.connection), alone=True)
        assert (report.differed, again.differed) == (0, 0)
        assert backend.query(database_url, "SELECT DISTINCT status FROM tasks") == [("completed",)]


class TestBatches:
    """The view `batches`, where its counting is delicate."""

    async def test_run_again_twice(self, backend: Backend, database_url: str) -> None:
        """A task that two others run again counts once among the retried, and its tokens once."""
        spent = Failed(
            error_class="X", message="x", attempts=1, usage=Usage(input_tokens=10), cost_usd=0.5
        )
        await write(
            database_url,
            ("first", [(submitted(batch="b"), running(), spent)]),
            ("second", [(submitted(batch="b", retry_of="first"),)]),
            ("third", [(submitted(batch="b", retry_of="first"),)]),
        )
        assert backend.query(
            database_url,
            "SELECT tasks, pending, failed, retried, input_tokens, cost_usd FROM batches",
        ) == [(2, 2, 0, 1, 10, 0.5)]


class TestReading:
    """Tasks and events, read back."""

    async def test_what_was_submitted(self, backend: Backend, story: str) -> None:
        """A task comes back whole: long texts and conversations in place, files by digest."""
        database = Database(story)
        good = await Records(database).task("good")
        assert good.system == "Be thorough. " * 500
        assert (good.task_id, good.key, good.labels) == ("good", "row 1", {"who": "me"})
        bad = await Records(database).task("bad")
        assert [len(message.content) for message in bad.messages] == [8000, 3, 6]
        stopped = await Records(database).task("stopped")
        assert [file.name for file in stopped.files] == ["notes.txt"]  # type: ignore[union-attr]
        secret = await Records(database).task("secret")
        assert (secret.prompt, secret.key, secret.context) == ("[redacted]", "row 2", {})
        with pytest.raises(TaskNotFound):
            await Records(database).task("nobody")
        await database.close()

    async def test_from_some_version_on(self, backend: Backend, story: str) -> None:
        """Events come in order, from the version that is asked for."""
        database = Database(story)
        log = await read_events(database, "good")
        assert [e.version for e in log] == list(range(1, len(log) + 1))
        assert await read_events(database, "good", after=5) == log[5:]
        assert await read_events(database, "nobody") == []
        await database.close()

    @settings(max_examples=20)
    @given(st.lists(st.tuples(st.sampled_from(KINDS), words), max_size=20))
    def test_chunks_come_back(self, module_backend: Backend, pieces: list[tuple[str, str]]) -> None:
        """The text of a task is the concatenation of its chunks, in SQL and in the row."""
        url = module_backend.new()
        lengths = dict.fromkeys(KINDS, 0)
        chunks: list[Event] = []
        for kind, text in pieces:
            chunks.append(Chunk(text=text, kind=kind, offset=lengths[kind]))  # type: ignore[arg-type]
            lengths[kind] += len(text)
        text = "".join(text for kind, text in pieces if kind == "text")
        begin = [(submitted(), running()), *((chunk,) for chunk in chunks)]
        asyncio.run(write(url, ("task", begin)))
        assert module_backend.query(url, "SELECT text FROM task_output") == [(text,)]
        asyncio.run(self.finish(url, len(chunks) + 2, len(text)))
        assert module_backend.query(url, "SELECT text FROM task_output") == [(text,)]
        assert module_backend.query(url, "SELECT output FROM tasks") == [(text,)]

    async def finish(self, url: str, version: int, length: int) -> None:
        """End the task."""
        async with opened(url) as store:
            await store.log.append("task", [Completed(output_length=length)], version)


def test_rows_have_the_columns_of_the_table() -> None:
    """A row as the fold makes it is named and ordered as the table is."""
    assert TaskRow._fields == tuple(tasks.c.keys())
    assert set(ChangingColumns._fields) < set(TaskRow._fields)
