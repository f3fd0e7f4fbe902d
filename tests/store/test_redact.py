"""Content can be taken out of history for good, and history says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perdure.errors import InvalidTransition, TaskNotFound
from perdure.events import (
    Accepted,
    AttemptFailed,
    Chunk,
    Completed,
    Event,
    Failed,
    FileCreated,
    Running,
)
from perdure.platforms import Platforms
from perdure.store.database import Database
from perdure.store.maintenance import compare, rebuild, redact, verify
from perdure.store.records import find_task, read_task
from perdure.submission import prepare as prepare_task
from perdure.submission import submit
from perdure.task import Message, Task, TaskStatus
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
        record = await find_task(store.database, task_id)
        assert record is not None
        assert record.status is TaskStatus.COMPLETED
        assert (record.attempts, record.key) == (2, "the-key")
        assert (record.prompt, record.output, dict(record.labels)) == (None, None, {})
        assert WORD not in repr(record)
        left = await read_task(store.database, task_id)
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


async def test_what_others_share_stays(database_url: str) -> None:
    """A text that another task has too is kept for it, and goes with the last one."""
    async with opened(database_url) as store:
        one = await take_in(store, secret_task())
        two = await take_in(store, secret_task(key=None))
        for task_id in (one, two):
            await carry_out(store, task_id, done())
        await take_out(store, one)
        assert (await read_task(store.database, two)).system == LONG
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
        with pytest.raises(TaskNotFound):
            await take_out(store, "demo_none")


async def test_conversation_goes_with_its_task(database_url: str) -> None:
    """Messages are content too, the long ones that are stored apart included."""
    talk = (Message(role="user", content=LONG), Message(role="assistant", content=WORD))
    question = Message(role="user", content=f"And {WORD}?")
    async with opened(database_url) as store:
        task_id = await take_in(store, secret_task(prompt="", messages=(*talk, question)))
        await carry_out(store, task_id, done())
        await take_out(store, task_id)
        left = await read_task(store.database, task_id)
        assert WORD not in left.model_dump_json()
    assert_whole(database_url, redacted=6)
