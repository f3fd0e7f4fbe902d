"""Content can be taken out of history for good, and history says so."""

from __future__ import annotations

import random
import secrets
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from perdure.errors import InvalidTransition, TaskNotFound
from perdure.events import (
    Accepted,
    AttemptFailed,
    Cancelled,
    Chunk,
    Completed,
    Event,
    Failed,
    FileCreated,
    Running,
)
from perdure.platforms import Platforms
from perdure.store import sqlite as sqlite_module
from perdure.store.claims import load_blobs
from perdure.store.database import Database
from perdure.store.rebuilding import compare, rebuild
from perdure.store.records import Records
from perdure.store.redaction import redact
from perdure.store.schema import VIEWS
from perdure.store.verification import verify
from perdure.submission import prepare as prepare_task
from perdure.submission import submit
from perdure.task import Attachment, Message, Task, TaskStatus
from perdure_adapters import DemoAdapter
from store.backends import Sqlite, Store, opened

WORD = "Xyzzy-the-secret-word"
LONG = f"{WORD} " * 400  # long enough to be stored apart


def secret_task(**fields: Any) -> Task:
    """Return a task that has the secret everywhere a task can have something."""
    given: dict[str, Any] = {
        "prompt": f"What is {WORD}?",
        "platform": "demo",
        "system": LONG,
        "context": {"manual": LONG, "short": WORD},
        "metadata": {"note": WORD},
        "labels": {"note": WORD},
        "options": {"note": WORD},
        "key": "the-key",
    }
    return Task(**{**given, **fields})


async def take_in(store: Store, task: Task) -> str:
    """Submit a task and return its id."""
    ready = prepare_task(task, Platforms([DemoAdapter()]), None)
    (outcome,) = await store.log.write(lambda tx: submit(tx, [ready]))
    return outcome.task_id  # type: ignore[union-attr]


async def carry_out(store: Store, task_id: str, *ending: Event) -> None:
    """Let a task say the secret, fail once, say it again, and end."""
    retry = AttemptFailed(
        attempt=1,
        error_class="Overloaded",
        message=f"too busy for {WORD}",
        retryable=True,
        next="retry",
        retry_at="2026-01-01T00:00:00Z",  # type: ignore[arg-type]
    )
    steps: list[tuple[Event, ...]] = [
        (Running(attempt=1, worker="w", platform="demo"),),
        (Accepted(response_id="r"), Chunk(text=f"It is {WORD}")),
        (retry,),
        (Running(attempt=2, worker="w", platform="demo"),),
        (Chunk(text=f"{WORD}, "), Chunk(text="I said.", offset=len(WORD) + 2)),
        (FileCreated(path=f"{WORD}.txt", size=3),),
        ending,
    ]
    version = 1
    for step in steps:
        version = await store.log.append(task_id, step, version)


def done() -> Completed:
    """Return the ending of a task that said all of it."""
    return Completed(output_length=len(WORD) + 9)


async def take_out(store: Store, task_id: str) -> int:
    """Redact a task."""
    return await store.log.write(lambda tx: redact(tx, task_id, "me", "it was secret"))


def assert_whole(url: str, redacted: int) -> None:
    """Hold chain and rows against the log."""
    with Database(url).snapshot() as connection:
        report = verify(connection)
        assert report.ok, report.problems
        assert report.redacted == redacted
        assert compare(connection).differed == 0
    writer = Database(url).writer()
    try:
        with writer.transaction() as connection:
            assert rebuild(connection).differed == 0
    finally:
        writer.close()


async def test_nothing_of_the_content_is_left(database_url: str) -> None:
    """Neither events nor rows nor blobs hold what was redacted; status and counts stay."""
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task())
        await carry_out(store, task_id, done())
        assert await take_out(store, task_id) == 6
        record = await Records(store.database).find(task_id)
        assert record is not None
        assert record.status is TaskStatus.COMPLETED
        assert (record.attempts, record.key) == (2, "the-key")
        assert (record.prompt, record.output, dict(record.labels)) == (None, None, {})
        assert WORD not in repr(record)
        left = await Records(store.database).task(task_id)
        assert WORD not in left.model_dump_json()
    assert_whole(database_url, redacted=6)


@pytest.mark.parametrize(
    "ending", [done(), Failed(error_class="InvalidRequest", message=WORD, attempts=2)]
)
async def test_no_byte_is_left_in_the_file(sqlite: Sqlite, ending: Event) -> None:
    """Once the database is closed the secret is in none of its files, not even in free places."""
    url = sqlite.new()
    path: Path = sqlite.path(url)
    async with opened(url) as store:
        for _ in range(5):  # neighbours, so that pages are shared and rows move
            await take_in(store, secret_task(key=None, prompt="x" * 900, **harmless()))
        task_id = await take_in(store, secret_task())
        await carry_out(store, task_id, ending)
    assert WORD.encode() in path.read_bytes()
    async with opened(url) as store:
        await take_out(store, task_id)
    for file in path.parent.glob(f"{path.name}*"):
        assert WORD.encode() not in file.read_bytes(), file


def harmless() -> dict[str, Any]:
    """Return fields without the secret."""
    return {"system": None, "context": {}, "metadata": {}, "labels": {}, "options": {}}


def traces(sqlite: Sqlite, url: str, marks: list[str]) -> list[tuple[str, str]]:
    """Return which of these marks are in which file of the database."""
    path = sqlite.path(url)
    contents = {file.name: file.read_bytes() for file in path.parent.glob(f"{path.name}*")}
    return [
        (mark, name) for mark in marks for name, data in contents.items() if mark.encode() in data
    ]


@pytest.mark.parametrize("round_", range(3))
async def test_no_byte_is_left_while_others_have_it_open(sqlite: Sqlite, round_: int) -> None:
    """Short and long texts, redacted at any time, are gone at once, from the WAL too."""
    seed = secrets.randbelow(10**9)
    print(f"seed {seed} in round {round_}")
    chance = random.Random(seed)
    url = sqlite.new()
    live: dict[str, tuple[int, int]] = {}
    gone: list[str] = []
    async with opened(url) as store, opened(url) as other:
        await other.submit("bystander")
        for number in range(80):
            mark = f"mark{seed}x{number:04d}"
            size = chance.choice([1, 5, 50, 300, 900, 3000, 9000, 40_000])
            text = mark * (size // len(mark) + 1)
            live[mark] = (await store.start(mark, prompt=text, labels={"mark": mark}), 0)
            for mark in chance.choices(list(live), k=chance.randrange(5)):
                version, offset = live[mark]
                text = mark * chance.choice([1, 3, 100, 1000])
                chunk = Chunk(text=text, offset=offset)
                live[mark] = (await store.log.append(mark, [chunk], version), offset + len(text))
            mark = chance.choice(list(live))
            if chance.random() < 0.5:
                version, offset = live.pop(mark)
                await store.log.append(mark, [Completed(output_length=offset)], version)
                await store.log.write(lambda tx, mark=mark: redact(tx, mark, "me", None))
                gone.append(f"mark{mark[4:]}" * 2)  # its id alone stays, of course
                assert traces(sqlite, url, gone[-1:]) == []
        assert len(gone) > 10
        assert traces(sqlite, url, gone) == []
    assert traces(sqlite, url, gone) == []
    assert_whole(url, redacted=verified(url))


def verified(url: str) -> int:
    """Return how many tombstones a verified log has."""
    with Database(url).snapshot() as connection:
        report = verify(connection)
    assert report.problems == []
    return report.redacted


async def test_somebody_still_looks_at_it(sqlite: Sqlite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of an older state doesn't hold a redaction up for long; it is gone after it left."""
    monkeypatch.setattr(sqlite_module, "ERASING_SECONDS", 0.1)
    url = sqlite.new()
    async with opened(url) as store:
        task_id = await take_in(store, secret_task(task_id="task"))
        await carry_out(store, task_id, done())
        with store.database.snapshot() as older:
            count = "SELECT count(*) FROM events WHERE data LIKE '%Xyzzy%'"
            assert older.exec_driver_sql(count).scalar() == 5
            assert await take_out(store, task_id) == 6
            assert older.exec_driver_sql(count).scalar() == 5  # that is what a snapshot is for
        task_id = await take_in(
            store, secret_task(task_id="other", key=None, prompt="x", **harmless())
        )
        await store.log.append(task_id, [Cancelled()], 1)
        await take_out(store, task_id)
        assert traces(sqlite, url, [WORD]) == []
    assert_whole(url, redacted=7)


async def test_what_others_share_stays(database_url: str) -> None:
    """A text that another task has too is kept for it, and goes with the last one."""
    async with opened(database_url) as store:
        one = await take_in(store, secret_task())
        two = await take_in(store, secret_task(key=None))
        for task_id in (one, two):
            await carry_out(store, task_id, done())
        await take_out(store, one)
        assert (await Records(store.database).task(two)).system == LONG
        await take_out(store, two)
    with Database(database_url).snapshot() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM blobs").scalar() == 0


async def test_its_key_still_keeps_the_row_from_being_run_again(database_url: str) -> None:
    """What was done and redacted is not done once more by running its batch again."""
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task())
        await carry_out(store, task_id, done())
        await take_out(store, task_id)
        assert await take_in(store, secret_task()) == task_id


async def test_twice_is_once(database_url: str) -> None:
    """There is nothing left to redact, and nothing is written."""
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task())
        await carry_out(store, task_id, done())
        await take_out(store, task_id)
        before = await store.log.write(lambda tx: tx.fold(task_id).version)  # type: ignore[union-attr]
        assert await take_out(store, task_id) == 0
        after = await store.log.write(lambda tx: tx.fold(task_id).version)  # type: ignore[union-attr]
        assert after == before


async def test_live_task_is_refused(database_url: str) -> None:
    """A task that may still run needs its content: it has to be cancelled first."""
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task())
        with pytest.raises(InvalidTransition, match="cancel it"):
            await take_out(store, task_id)
        await store.log.append(task_id, [Running(attempt=1, worker="w", platform="demo")], 1)
        with pytest.raises(InvalidTransition, match="is running: cancel it"):
            await take_out(store, task_id)
        assert (await Records(store.database).task(task_id)).prompt == f"What is {WORD}?"
        with pytest.raises(TaskNotFound):
            await take_out(store, "demo_none")


async def test_files_are_content(database_url: str, tmp_path: Path) -> None:
    """An attached file goes with the last task that has it; its name goes at once."""
    (tmp_path / f"{WORD}.txt").write_text(f"{WORD} in a file")
    async with opened(database_url) as store:
        ids = []
        for key in ("one", "two"):
            task = secret_task(key=key, files=(str(tmp_path / f"{WORD}.txt"),), **harmless())
            ids.append(await take_in(store, task))
            await store.log.append(ids[-1], [Cancelled()], 1)
        await take_out(store, ids[0])
        (file,) = (await Records(store.database).task(ids[1])).files
        assert isinstance(file, Attachment)
        assert await load_blobs(store.database, [file.digest]) == {
            file.digest: f"{WORD} in a file".encode()
        }
        await take_out(store, ids[1])
        assert await load_blobs(store.database, [file.digest]) == {}
        assert WORD not in (await Records(store.database).task(ids[1])).model_dump_json()
    assert_whole(database_url, redacted=2)


async def test_a_digest_in_a_prompt_is_no_name(database_url: str, tmp_path: Path) -> None:
    """Somebody may ask about it, also in capitals, as some tools print it."""
    (tmp_path / f"{WORD}.txt").write_text(f"{WORD} in a file")
    async with opened(database_url) as store:
        task_id = await take_in(
            store, secret_task(files=(str(tmp_path / f"{WORD}.txt"),), **harmless())
        )
        (file,) = (await Records(store.database).task(task_id)).files
        assert isinstance(file, Attachment)
        assert file.digest is not None
        about = secret_task(**harmless() | {"prompt": f"Whose is {file.digest.upper()}?"})
        await take_in(store, about)
        await store.log.append(task_id, [Cancelled()], 1)
        await take_out(store, task_id)
        assert await load_blobs(store.database, [file.digest]) == {}


async def test_readers_of_what_was_redacted(database_url: str) -> None:
    """Its events can still be read, without their content; views show none of it."""
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task())
        await carry_out(store, task_id, Failed(error_class="X", message=WORD, attempts=2))
        await take_out(store, task_id)
        followed = [event async for event in store.log.feed.follow(task_id)]
        assert [event.version for event in followed] == list(range(1, 11))
        assert WORD not in repr(followed)
        for view in VIEWS:
            assert WORD not in repr(await store.database.rows(sa.text(f"SELECT * FROM {view}")))


async def test_conversation_goes_with_its_task(database_url: str) -> None:
    """Messages are content too, the long ones that are stored apart included."""
    talk = (Message(role="user", content=LONG), Message(role="assistant", content=WORD))
    question = Message(role="user", content=f"And {WORD}?")
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task(prompt="", messages=(*talk, question)))
        await carry_out(store, task_id, done())
        await take_out(store, task_id)
        left = await Records(store.database).task(task_id)
        assert WORD not in left.model_dump_json()
    assert_whole(database_url, redacted=6)
