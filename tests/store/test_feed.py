"""Following the log: everything once, in order, whoever wrote it and however slow the reader."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from perdure.errors import (
    DatabaseCorrupt,
    DatabaseIncompatible,
    DatabaseUnavailable,
    EngineClosed,
    PerdureError,
)
from perdure.events import CancelRequested, Chunk, Completed, RecordedEvent
from perdure.store import feed as feed_module
from perdure.store import fetching
from store.backends import Backend, Sqlite, Store, append_newer, opened
from store.children import children

PATIENCE = 60


async def say(store: Store, task_id: str, pieces: int, version: int = 2) -> int:
    """Append that many chunks of one character, and the end; returns the last version."""
    for offset in range(pieces):
        version = await store.log.append(task_id, [Chunk(text="x", offset=offset)], version)
    return await store.log.append(task_id, [Completed(output_length=pieces)], version)


async def read(store: Store, task_id: str, after: int = 0) -> list[int]:
    """Follow a stream to its end and return the versions seen."""
    return [event.version async for event in store.log.feed.follow(task_id, after)]


async def within_reason(*work: asyncio.Future[list[int]] | asyncio.Task[list[int]]) -> None:
    """Wait for all of these."""
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*work)


async def test_replays_then_follows(database_url: str) -> None:
    """A reader gets what is there, then what comes, each event once and in order, to the end."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        reading = asyncio.create_task(read(store, "demo_1"))
        await say(store, "demo_1", 20)
        await within_reason(reading)
        assert reading.result() == list(range(1, 24))


async def test_ended_stream_is_replayed_and_over(database_url: str) -> None:
    """A reader that comes after the end gets everything and doesn't wait."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        last = await say(store, "demo_1", 3)
        assert await read(store, "demo_1") == list(range(1, last + 1))
        assert await read(store, "demo_1", after=last - 1) == [last]


async def test_goes_on_after_a_version(database_url: str) -> None:
    """A reader can begin in the middle."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        await say(store, "demo_1", 5)
        assert await read(store, "demo_1", after=4) == [5, 6, 7, 8]


async def test_long_stream_is_replayed_page_by_page(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More events than fit on a page come all the same, once each."""
    monkeypatch.setattr(feed_module, "PAGE", 7)
    async with opened(database_url) as store:
        await store.start("demo_1")
        last = await say(store, "demo_1", 40)
        assert await read(store, "demo_1") == list(range(1, last + 1))


async def test_slow_reader_gets_everything_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that is too slow to be kept events for fetches them, without a gap or a repeat."""
    monkeypatch.setattr(feed_module, "MAILBOX", 3)
    async with opened(database_url) as store:
        await store.start("demo_1")
        seen: list[int] = []
        stepping = asyncio.Semaphore(0)

        async def crawl() -> None:
            async for event in store.log.feed.follow("demo_1"):
                seen.append(event.version)
                await stepping.acquire()

        reading = asyncio.create_task(crawl())
        writing = asyncio.create_task(say(store, "demo_1", 50))
        await writing
        for _ in range(100):
            stepping.release()
        async with asyncio.timeout(PATIENCE):
            await reading
        assert seen == list(range(1, 54))


async def test_many_readers_joining_at_any_time_see_the_same(database_url: str) -> None:
    """Twenty readers that join at random moments all see every event."""
    seed = secrets.randbelow(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with opened(database_url) as store:
        await store.start("demo_1")
        readers: list[asyncio.Task[list[int]]] = []
        version = 2
        for offset in range(60):
            if chance.random() < 0.33 and len(readers) < 20:
                readers.append(asyncio.create_task(read(store, "demo_1")))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
            version = await store.log.append("demo_1", [Chunk(text="x", offset=offset)], version)
        readers += [asyncio.create_task(read(store, "demo_1")) for _ in range(20 - len(readers))]
        await store.log.append("demo_1", [Completed(output_length=60)], version)
        await within_reason(*readers)
        assert [reader.result() for reader in readers] == [list(range(1, 64))] * 20


async def test_commits_of_another_connection_are_seen(database_url: str) -> None:
    """What somebody else's log writes reaches readers here, mixed with what is written here."""
    async with opened(database_url) as here, opened(database_url) as there:
        await here.start("demo_1")
        await there.start("demo_2")
        first = asyncio.create_task(read(here, "demo_2"))
        second = asyncio.create_task(read(there, "demo_1"))
        third = asyncio.create_task(read(here, "demo_1"))
        await asyncio.gather(say(here, "demo_1", 15), say(there, "demo_2", 15))
        await within_reason(first, second, third)
        for reading in (first, second, third):
            assert reading.result() == list(range(1, 19))


async def test_two_writers_on_one_stream(database_url: str) -> None:
    """A stream that two processes write to in turn is followed without a gap."""
    async with opened(database_url) as here, opened(database_url) as there:
        await here.start("demo_1")
        readings = [asyncio.create_task(read(store, "demo_1")) for store in (here, there)]
        version = 2
        for offset in range(30):
            store = (here, there)[offset % 2]
            version = await store.log.append("demo_1", [Chunk(text="x", offset=offset)], version)
        await there.log.append("demo_1", [Completed(output_length=30)], version)
        await within_reason(*readings)
        assert [reading.result() for reading in readings] == [list(range(1, 34))] * 2


async def test_readers_of_many_streams_get_their_own(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more streams to follow than are named in a query, everyone still gets just his own."""
    monkeypatch.setattr(fetching, "MOST_NAMED", 3)
    async with opened(database_url) as here, opened(database_url) as there:
        names = [f"demo_{number}" for number in range(8)]
        for name in names:
            await here.start(name)
        readings = [asyncio.create_task(read(there, name)) for name in names]
        await asyncio.gather(*(say(here, name, 4) for name in names))
        await within_reason(*readings)
        assert all(reading.result() == list(range(1, 8)) for reading in readings)


def listen(
    store: Store, task_id: str, hear: Callable[[RecordedEvent], None], since: int | None = None
) -> Callable[[], None]:
    """Have somebody told of a stream's events; returns what ends that."""
    store.log.feed.listen(task_id, hear, since=since)
    return partial(store.log.feed.stop_listening, task_id, hear)


@pytest.mark.parametrize("writer", ["this process", "another one"])
async def test_an_owner_misses_nothing_since_its_claim(database_url: str, writer: str) -> None:
    """Who names a position is told of what others wrote after it, also before he asked."""
    async with opened(database_url) as store, opened(database_url) as elsewhere:
        await store.start("demo_1")  # positions 1 and 2
        log = store.log if writer == "this process" else elsewhere.log
        version = await log.append("demo_1", [CancelRequested(by="somebody")], 2)
        await log.append("demo_1", [Chunk(text="x")], version)
        heard: dict[int, RecordedEvent] = {}
        complete = asyncio.Event()

        def hear(event: RecordedEvent) -> None:
            heard[event.version] = event
            if event.version == 5:
                complete.set()

        stop = listen(store, "demo_1", hear, since=2)
        await store.log.append("demo_1", [Completed(output_length=1)], 4)
        async with asyncio.timeout(PATIENCE):
            await complete.wait()
        assert {3, 5} <= heard.keys()
        stop()
        stop()  # stopping twice is fine
        assert not store.log.feed.active


async def test_closing_ends_readers_with_a_reason(database_url: str) -> None:
    """A reader of a task that hasn't ended is told that nothing more will come."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        waiting = asyncio.Event()

        async def wait_for_more() -> None:
            async for event in store.log.feed.follow("demo_1"):
                if event.version == 2:
                    waiting.set()

        reading = asyncio.create_task(wait_for_more())
        async with asyncio.timeout(PATIENCE):
            await waiting.wait()
            await store.log.close()
            with pytest.raises(EngineClosed):
                await reading


async def test_reader_that_leaves_is_forgotten(database_url: str) -> None:
    """Breaking out of the loop leaves nothing behind that would be looked after."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        stream = store.log.feed.follow("demo_1")
        async for _event in stream:
            break
        await stream.aclose()
        assert not store.log.feed.active


@contextlib.contextmanager
def gate(
    store: Store, *, fails: bool = False
) -> Generator[tuple[asyncio.Event, asyncio.Event], None, None]:
    """Hold the next look into the database: gives what tells that it came, and what lets it go.

    It is held after it has looked, so that what happens meanwhile is news to whoever asked. With
    ``fails`` the one after it fails.
    """
    came, go = asyncio.Event(), asyncio.Event()
    read_ = store.database.read
    looks = 0

    async def held(query: Callable[[AsyncConnection], Awaitable[Any]]) -> Any:
        nonlocal looks
        looks += 1
        if fails and looks == 2:
            raise DatabaseUnavailable("gone for a moment")
        found = await read_(query)
        if not came.is_set():
            came.set()
            await go.wait()
        return found

    store.database.read = held  # type: ignore[method-assign, assignment]
    try:
        yield came, go
    finally:
        go.set()
        store.database.read = read_  # type: ignore[method-assign]


async def test_joining_while_news_are_fetched(database_url: str) -> None:
    """Whoever begins to listen while others' news are being fetched misses none of them."""
    async with opened(database_url) as here, opened(database_url) as there:
        await there.start("known")
        await there.start("new")
        heard: asyncio.Queue[int] = asyncio.Queue()
        stop = listen(here, "known", lambda e: heard.put_nowait(e.version))
        await there.log.append("known", [Chunk(text="x")], 2)
        async with asyncio.timeout(PATIENCE):
            while await heard.get() != 3:  # all there was before has been fetched then
                pass
            while (fetching := here.log.feed._fetching) is not None:
                await asyncio.wait({fetching})  # else it may look before it is held
        with gate(here) as (came, go):
            # The ending of "new" is committed before the look, and asked for after it.
            await there.log.append("new", [Completed()], 2)
            async with asyncio.timeout(PATIENCE):
                await came.wait()
                stop_new = listen(here, "new", lambda e: heard.put_nowait(e.version))
                go.set()
                while await heard.get() != 3:
                    pass
        stop()
        stop_new()


async def test_falling_behind_while_the_last_page_is_read(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is dropped between the look at the last page and its end is fetched after it."""
    monkeypatch.setattr(feed_module, "MAILBOX", 3)
    async with opened(database_url) as before:
        await before.start("demo_1")  # elsewhere, or it would not have to be fetched at all
    async with opened(database_url) as store:
        with gate(store) as (came, go):
            reading = asyncio.create_task(read(store, "demo_1"))
            await came.wait()  # it has seen two events, and nothing after them
            await say(store, "demo_1", 10)  # more than it is kept, the ending with it
            go.set()
            await within_reason(reading)
        assert reading.result() == list(range(1, 14))


async def test_what_began_here_is_read_without_asking(database_url: str) -> None:
    """A reader that comes early is given what has passed by here, and then what comes."""
    async with opened(database_url) as store:
        await store.start("demo_1")

        async def refuse(_statement: object) -> list[object]:
            raise AssertionError("it was asked for")

        store.database.rows = refuse  # type: ignore[method-assign, assignment]
        reading = asyncio.create_task(read(store, "demo_1"))
        await asyncio.sleep(0)
        await say(store, "demo_1", 3)
        await within_reason(reading)
        assert reading.result() == list(range(1, 7))


@pytest.mark.parametrize("how", ["many events", "long ones", "others committed"])
async def test_what_began_here_and_is_kept_no_more(database_url: str, how: str) -> None:
    """What is long, or what others have written to, is fetched."""
    async with opened(database_url) as store, opened(database_url) as there:
        await store.start("demo_1")
        if how == "many events":
            for offset in range(20):
                await store.log.append("demo_1", [Chunk(text="a", offset=offset)], None)
        elif how == "long ones":
            await store.log.append("demo_1", [Chunk(text="a" * 20_000)], None)
        else:
            await there.log.append("demo_1", [CancelRequested(by="me")], None)
        last = {"many events": 22, "long ones": 3, "others committed": 3}[how]
        seen = []
        async with asyncio.timeout(PATIENCE):
            async for event in store.log.feed.follow("demo_1"):
                seen.append(event.version)
                if event.version == last:
                    break
        assert seen == list(range(1, last + 1))


async def test_listening_since_others_committed_unheard(database_url: str) -> None:
    """What others committed while nobody listened is told to whoever asks for it."""
    async with opened(database_url) as here, opened(database_url) as there:
        await there.start("demo_1")
        heard: asyncio.Queue[int] = asyncio.Queue()
        await here.submit("demo_2")  # this process's own writing goes on meanwhile
        stop = listen(here, "demo_1", lambda e: heard.put_nowait(e.version), since=0)
        async with asyncio.timeout(PATIENCE):
            assert {await heard.get(), await heard.get()} == {1, 2}
        stop()


async def test_listening_since_the_last_position_seen(database_url: str) -> None:
    """The same where others committed right after the last thing that this process has seen."""
    async with opened(database_url) as here, opened(database_url) as there:
        await here.start("demo_1")
        await there.log.append("demo_1", [CancelRequested(by="me")], 2)
        await here.log.write(lambda _tx: None)  # the writer notices, and nobody listens
        heard: asyncio.Queue[int] = asyncio.Queue()
        stop = listen(here, "demo_1", lambda e: heard.put_nowait(e.version), since=2)
        async with asyncio.timeout(PATIENCE):
            assert await heard.get() == 3
        stop()


async def test_readers_in_other_processes(database_url: str) -> None:
    """What a process of its own writes is seen here, each event once."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        reading = asyncio.create_task(read(store, "demo_1"))
        with children(("append_chunks", database_url, "demo_1", 30)) as (child,):
            child.go()
            assert await asyncio.to_thread(child.result) == list(range(3, 33))
        await store.log.append("demo_1", [Completed(output_length=30)], 32)
        await within_reason(reading)
        assert reading.result() == list(range(1, 34))


async def test_a_closed_log_is_read_to_its_end_and_no_further(database_url: str) -> None:
    """After closing, what is there can still be read; waiting for more is refused at once."""
    async with opened(database_url) as store:
        await store.start("live")
        await store.start("over")
        last = await say(store, "over", 3)
        await store.log.close()
        assert await read(store, "over") == list(range(1, last + 1))
        with pytest.raises(EngineClosed):
            await asyncio.wait_for(read(store, "live"), PATIENCE)


async def test_closing_ends_a_slow_reader_after_what_it_was_kept(database_url: str) -> None:
    """A reader that is busy when the log is closed gets what was committed, then the reason."""
    seen: list[int] = []
    async with opened(database_url) as store:
        await store.start("demo_1")
        following = store.log.feed.follow("demo_1")
        seen.append((await anext(following)).version)
        for offset in range(5):
            await store.log.append("demo_1", [Chunk(text="x", offset=offset)], 2 + offset)
        await store.log.close()

        async def go_on() -> None:
            async for event in following:
                seen.append(event.version)  # noqa: PERF401 - it ends with an error

        with pytest.raises(EngineClosed):
            await go_on()
    assert seen == list(range(1, 8))


async def test_cancelled_readers_leave_nothing_behind(database_url: str) -> None:
    """Readers that are cancelled at any moment are forgotten, and hold nothing of the database."""
    async with opened(database_url) as store:
        await store.start("demo_1")
        for moment in range(30):
            reading = asyncio.create_task(read(store, "demo_1"))
            for _ in range(moment):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        assert not store.log.feed.active
        again = asyncio.create_task(read(store, "demo_1"))
        await say(store, "demo_1", 2)
        await within_reason(again)


async def test_what_cannot_be_read_ends_its_readers(backend: Backend, database_url: str) -> None:
    """News that can't be what was written end the readers with the reason; nobody hangs."""
    async with opened(database_url) as here, opened(database_url) as there:
        await there.start("demo_1")
        reading = asyncio.create_task(read(here, "demo_1"))
        await asyncio.sleep(0)
        with backend.shell(database_url) as shell:
            shell.run(
                "INSERT INTO events SELECT 3, stream_id, 3, 'chunk', 1, '[]', recorded_at, digest "
                "FROM events WHERE position = 1"
            )
            shell.run("UPDATE log_head SET position = 3")
        with pytest.raises(DatabaseCorrupt):
            await asyncio.wait_for(reading, PATIENCE)


async def read_until_refused(store: Store, task_id: str) -> tuple[list[int], PerdureError]:
    """Follow a stream until it can't be read any further; returns what came before, and why."""
    seen: list[int] = []
    try:
        async for event in store.log.feed.follow(task_id):
            seen.append(event.version)  # noqa: PERF401 - it ends with an error
    except PerdureError as error:
        return seen, error
    raise AssertionError("it was read to its end")


async def test_what_cannot_be_read_ends_nobody_elses_readers(database_url: str) -> None:
    """An event of a newer release ends the readers of its task, after what comes before it."""
    async with opened(database_url) as here, opened(database_url) as there:
        await there.start("newer")
        await there.start("other")
        refused = [asyncio.create_task(read_until_refused(here, "newer")) for _ in range(2)]
        waiting = here.log.feed.ending("newer")
        reading = asyncio.create_task(read(here, "other"))
        ending = here.log.feed.ending("other")
        await there.log.append("newer", [Chunk(text="x")], 2)
        append_newer(database_url, "newer")
        await there.log.append("other", [Chunk(text="x")], 2)
        async with asyncio.timeout(PATIENCE):
            for one in refused:
                seen, error = await one
                assert seen == [1, 2, 3]
                assert isinstance(error, DatabaseIncompatible)
            with pytest.raises(DatabaseIncompatible, match="invented"):
                await waiting.wait(None)
        waiting.stop()
        await there.log.append("other", [Completed(output_length=1)], 3)
        await within_reason(reading)
        assert reading.result() == [1, 2, 3, 4]
        await ending.wait(PATIENCE)
        ending.stop()


async def test_an_owner_of_what_cannot_be_read(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as somebody listens to such a stream, nothing fails, and owners miss nothing.

    The owner of the stream itself is told of what can be read behind it; a reader that begins
    behind it reads on, and whoever waits for the end anew is told of that.
    """
    monkeypatch.setattr(feed_module, "AGAIN_SECONDS", 0.0)
    async with opened(database_url) as here, opened(database_url) as there:
        for name in ("newer", "mine"):
            await there.start(name)
        heard: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

        def hear(event: RecordedEvent) -> None:
            heard.put_nowait((event.task_id, event.version))

        stops = [listen(here, name, hear) for name in ("newer", "mine")]
        append_newer(database_url, "newer")
        async with asyncio.timeout(PATIENCE):
            await there.log.append("mine", [Chunk(text="x")], 2)
            while await heard.get() != ("mine", 3):
                pass
            ending = here.log.feed.ending("newer")
            behind = asyncio.create_task(read(here, "newer", after=3))
            for version in range(3, 8):  # an owner asks for what was seen before, too
                stops.append(listen(here, "mine", hear, since=0))
                await there.log.append("mine", [Chunk(text="x", offset=version - 2)], version)
                while await heard.get() != ("mine", version + 1):
                    pass
            append_ending(database_url, "newer")
            while await heard.get() != ("newer", 4):
                pass
            await ending.wait(None)
            assert await behind == [4]
        ending.stop()
        for stop in stops:
            stop()


def append_ending(url: str, task_id: str) -> None:
    """End a stream as a newer perdure does that knows all of its events."""
    append_newer(url, task_id, type_="completed")


async def test_an_owner_that_comes_while_a_fetch_fails(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it may not miss isn't missed, though looking for it fails at first."""
    monkeypatch.setattr(feed_module, "AGAIN_SECONDS", 0.01)
    async with opened(database_url) as here, opened(database_url) as there:
        await there.start("known")
        await there.start("owned")  # positions 3 and 4
        heard: asyncio.Queue[int] = asyncio.Queue()
        stop = listen(here, "known", lambda e: heard.put_nowait(e.version))
        await there.log.append("known", [Chunk(text="x")], 2)
        async with asyncio.timeout(PATIENCE):
            while await heard.get() != 3:
                pass
            while (fetching := here.log.feed._fetching) is not None:
                await asyncio.wait({fetching})
        owned: asyncio.Queue[int] = asyncio.Queue()
        with gate(here, fails=True) as (came, go):
            await there.log.append("owned", [CancelRequested(by="me")], 2)
            async with asyncio.timeout(PATIENCE):
                await came.wait()  # it has looked for "known" only
                since = here.log.feed._seen
                stop_owned = listen(
                    here, "owned", lambda e: owned.put_nowait(e.version), since=since
                )
                go.set()
                assert await owned.get() == 3
        stop()
        stop_owned()


async def test_a_moment_that_is_none(sqlite: Sqlite) -> None:
    """What only somebody else can have written ends its own readers with the reason, no others."""
    database_url = sqlite.new()
    async with opened(database_url) as here, opened(database_url) as there:
        await there.start("demo_1")
        await there.start("other")
        refused = asyncio.create_task(read_until_refused(here, "demo_1"))
        reading = asyncio.create_task(read(here, "other"))
        await asyncio.sleep(0)
        with sqlite.shell(database_url) as shell:
            shell.run(
                "INSERT INTO events SELECT 5, stream_id, 3, 'chunk', 1, '{}', 'noon', digest "
                "FROM events WHERE position = 1"
            )
            shell.run("UPDATE log_head SET position = 5")
        seen, error = await asyncio.wait_for(refused, PATIENCE)
        assert seen == [1, 2]
        assert isinstance(error, DatabaseCorrupt)
        await there.log.append("other", [Completed()], 2)
        await within_reason(reading)


async def test_no_wake_up_is_lost(database_url: str) -> None:
    """Readers and writers on two connections in random order: every reader sees the end."""
    seed = secrets.randbelow(10**9)
    print(f"seed {seed}")
    chance = random.Random(seed)
    async with opened(database_url) as here, opened(database_url) as there:

        async def one(number: int) -> None:
            name = f"demo_{number}"
            writer, reader = chance.sample((here, there), 2)
            await writer.start(name)
            reading = [asyncio.create_task(read(chance.choice((reader, writer)), name))]
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            last = await say(writer, name, chance.randrange(6))
            reading.append(asyncio.create_task(read(reader, name)))
            await within_reason(*reading)
            assert all(found.result() == list(range(1, last + 1)) for found in reading)

        await asyncio.gather(*(one(number) for number in range(40)))


async def test_an_owner_whose_cancellation_was_pushed_out(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for owners has room for a few; who asks for more is told by the database."""
    monkeypatch.setattr(feed_module, "MOST_FOR_OWNERS", 3)
    async with opened(database_url) as store:
        for name in ("first", *(f"task_{number}" for number in range(5))):
            await store.start(name)
        await store.log.append("first", [Chunk(text="x")], 2)
        claimed_at = store.log.feed._seen
        await store.log.append("first", [CancelRequested(by="me")], None)
        for number in range(5):
            await store.log.append(f"task_{number}", [CancelRequested(by="me")], None)
        heard: asyncio.Queue[int] = asyncio.Queue()
        stop = listen(store, "first", lambda e: heard.put_nowait(e.version), since=claimed_at)
        async with asyncio.timeout(PATIENCE):
            assert await heard.get() == 4
        stop()
