"""Readers: any number, anywhere, from any point; all get the same, and nothing that isn't there."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import (
    FAST,
    PATIENCE,
    Nursery,
    assert_sound,
    chunks_in,
    count_events,
    demo,
    eventually,
    query,
    stored_events,
    text_of,
)

from perdure import (
    Call,
    Chunk,
    Completed,
    DatabaseIncompatible,
    Engine,
    EngineClosed,
    Event,
    Overloaded,
    Submission,
    Task,
    TaskStatus,
    collect_stream,
)
from perdure.store import feed
from perdure.store.records import Records
from perdure.streaming import StreamingResult, TextChunk
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter
from store.backends import append_newer

ASK = Task(prompt="Say hello.")


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


def content(chunks: list[TextChunk]) -> str:
    """Return the text that a reader has at the end, by the rule for beginning anew."""
    collected = StreamingResult()
    for chunk in chunks:
        collected.add_chunk(chunk)
    return collected.get_content()


def numbered(count: int, pause: float = 0.0) -> list[Any]:
    """Return a script of so many pieces."""
    steps = [step for n in range(count) for step in (f"{n} ", pause)]
    return [step for step in steps if step != 0.0]


# -- many readers ----------------------------------------------------------------------------------


async def test_twenty_readers_in_two_processes_get_the_same_text(
    db: Path, nursery: Nursery, tmp_path: Path, chance: random.Random
) -> None:
    """They join before, while and after it streams, while attempts fail and workers die."""
    notes = [tmp_path / f"reader {n}" for n in range(20)]
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(
            demo(
                "Tell.",
                words=240,
                chunk_words=2,
                delay=0.01,
                fail="ConnectionLost",
                fail_after=25,
                fail_attempts=1,
            )
        )
    readers = [
        nursery.start(
            "read",
            db=db,
            task_id=task_id,
            readers=[(chance.uniform(0, 3), str(note)) for note in notes[half : half + 10]],
        )
        for half in (0, 10)
    ]
    for reader in readers:
        await eventually(lambda r=reader: r.has_said("ready"))
    first = nursery.start("run", db=db, until_done=False)
    await eventually(lambda: len(of_type(db, task_id, "running")) == 2)
    await eventually(lambda: text_of(stored_events(db, task_id)))
    await asyncio.sleep(chance.uniform(0, 0.3))
    first.kill()
    second = nursery.start("run", db=db)
    assert await second.gone() == 0, second.said()
    for reader in readers:
        assert await reader.gone() == 0, reader.said()
    ((output, attempts),) = query(db, "SELECT output, attempts FROM tasks")
    assert attempts == 3
    assert len(output.split()) == 240
    for note in notes:
        assert content(chunks_in(note)) == output
    assert_sound(db)


def of_type(db: Path, task_id: str, type_: str) -> list[dict[str, Any]]:
    """Return the data of a task's events of one type."""
    return [data for found, data in stored_events(db, task_id) if found == type_]


async def test_many_readers_of_many_tasks(db: Path, chance: random.Random) -> None:
    """Readers that come at any moment, in the engine that runs and in one beside it, all end."""
    adapter = ScriptedAdapter(
        per_call=lambda call: [
            *(
                step
                for n in range(12)
                for step in (f"{call.task.prompt}.{n} ", chance.choice([0, 0.002]))
            ),
            Completed(),
        ]
    )
    async with engine_on(db, adapter) as engine, engine_on(db, run=False) as beside:
        outcomes = await engine.submit_tasks(Task(prompt=f"{n}") for n in range(30))
        ids = [one.task_id for one in outcomes if isinstance(one, Submission)]

        async def read(number: int) -> str:
            await asyncio.sleep(chance.uniform(0, 0.3))
            reader = chance.choice([engine, beside])
            return await collect_stream(reader.stream_result(ids[number]), 60)

        wanted = [chance.randrange(30) for _ in range(300)]
        texts = await asyncio.gather(*(read(number) for number in wanted))
    for number, text in zip(wanted, texts, strict=True):
        assert text == "".join(f"{number}.{n} " for n in range(12))
    assert_sound(db)


async def test_readers_that_join_while_others_are_served_miss_nothing(
    db: Path, chance: random.Random
) -> None:
    """Over and over: a reader joins in the very moment in which its task ends."""
    async with (
        engine_on(db, ScriptedAdapter("a", Completed()), run=False) as runner,
        engine_on(db, run=False) as engine,
    ):
        runner.start_running()
        noise = asyncio.create_task(_noise(engine, runner))
        for _ in range(80):
            task_id = await runner.submit_task(ASK)
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(chance.choice([0, 0, 0.001]))
            async with asyncio.timeout(30):
                assert await collect_stream(engine.stream_result(task_id)) == "a"
        noise.cancel()
        await asyncio.wait({noise})


async def _noise(reading: Engine, running: Engine) -> None:
    """Keep an engine fetching news of other tasks."""
    while True:
        task_id = await running.submit_task(ASK)
        await reading.get_result(task_id)


async def test_who_joins_during_a_fetch_misses_nothing(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that somebody joined while the news of other streams were fetched is fetched too.

    The moment: the newcomer has read what there is, its task ends, and only then the fetch reads
    how long the log is.
    """
    hold_other, hold = Hold(), Hold()
    adapter = ScriptedAdapter(
        per_call=lambda call: [hold_other if call.task.prompt == "other" else hold, Completed()]
    )
    fetching, joined = asyncio.Event(), asyncio.Event()
    real = feed.fetch_news

    async def late_news(connection: Any, **arguments: Any) -> Any:
        fetching.set()
        await joined.wait()
        return await real(connection, **arguments)

    async with engine_on(db, adapter) as runner, engine_on(db, run=False) as engine:
        other = await runner.submit_task(Task(prompt="other"))
        mine = await runner.submit_task(Task(prompt="mine"))
        following = asyncio.create_task(engine.get_result(other))
        await hold.reached.wait()
        await hold_other.reached.wait()
        await eventually(lambda: engine.log.feed.active)
        monkeypatch.setattr(feed, "fetch_news", late_news)
        await runner.submit_task(Task(prompt="something that makes the others look"))
        await fetching.wait()
        waiting = asyncio.create_task(engine.get_result(mine))
        await eventually(lambda: mine in engine.log.feed._listeners)
        await asyncio.sleep(0.2)  # until it has read what there is
        hold.release()
        await eventually(lambda: query(db, "SELECT 1 FROM events WHERE type = 'completed'"))
        joined.set()
        async with asyncio.timeout(10):
            assert (await waiting).success
        hold_other.release()
        await following


async def test_a_slow_reader_misses_nothing(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that falls far behind, in the replay or live, fetches what it has missed."""
    monkeypatch.setattr(feed, "MAILBOX", 10)
    hold, rest = Hold(), Hold()
    script = [*numbered(30, 0.001), hold, *numbered(60, 0.001), rest, "end", Completed()]
    async with engine_on(db, ScriptedAdapter(*script)) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        await eventually(lambda: text_of(stored_events(db, task_id)).endswith("29 "))
        stream = engine.stream_result(task_id)
        seen = [await anext(stream)]  # it has the whole last page, and stops at its first piece
        hold.release()
        await rest.reached.wait()
        await eventually(lambda: text_of(stored_events(db, task_id)).endswith("59 "))
        while len(content(seen).split()) < 32:  # a busy machine writes several pieces as one
            seen.append(await anext(stream))
        rest.release()
        await eventually(lambda: count_events(db, "completed"))
        async with asyncio.timeout(10):
            seen += [piece async for piece in stream]
    expected = "".join(step for step in script if isinstance(step, str))
    assert content(seen) == expected
    assert "".join(seen) == expected, "something came twice"


@pytest.mark.parametrize("after_end", [True, False])
async def test_a_reader_that_stops_in_its_replay_still_learns_of_the_end(
    db: Path, monkeypatch: pytest.MonkeyPatch, after_end: bool
) -> None:
    """All the rest comes while a reader holds the last page of its replay, more than is kept."""
    monkeypatch.setattr(feed, "MAILBOX", 5)
    hold = Hold()
    script = ["first ", 0.02, "second ", 0.02, hold, *numbered(40, 0.002), Completed()]
    async with engine_on(db, ScriptedAdapter(*script)) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        await eventually(lambda: text_of(stored_events(db, task_id)) == "first second ")
        stream = engine.stream_result(task_id)
        seen = [await anext(stream)]
        hold.release()
        if after_end:
            await eventually(lambda: count_events(db, "completed"))
        async with asyncio.timeout(10):
            seen += [piece async for piece in stream]
    assert "".join(seen) == "".join(step for step in script if isinstance(step, str))


# -- beginning anew --------------------------------------------------------------------------------


async def test_a_reader_learns_that_the_output_begins_anew(db: Path) -> None:
    """Between the attempts comes an empty piece of offset 0; collectors follow the rule."""
    script = iter([["lost ", "words ", Overloaded("again")], ["kept", Completed()]])
    async with engine_on(db, ScriptedAdapter(per_call=lambda _call: next(script))) as engine:
        task_id = await engine.submit_task(ASK)
        live = [piece async for piece in engine.stream_result(task_id)]
        later = [piece async for piece in engine.stream_result(task_id)]
    assert live == later
    assert content(live) == "kept"
    assert "" in live
    assert live[live.index("")].restarts
    assert [piece for piece in live if piece] != ["kept"]


async def test_a_reader_that_joins_late_is_not_told_of_what_never_was_its_own(db: Path) -> None:
    """The first piece of all is a piece of text, not the empty one that begins it."""
    async with engine_on(db) as engine:
        task_id = await engine.submit_task(ASK)
        pieces = [piece async for piece in engine.stream_result(task_id)]
    assert pieces[0] != ""
    assert pieces[0].offset == 0


# -- from a version on -----------------------------------------------------------------------------


async def test_reading_goes_on_where_it_stopped(db: Path, chance: random.Random) -> None:
    """After any piece a reader can leave and come back with that piece's version."""
    script = [*numbered(25, 0.001), Completed()]
    async with engine_on(db, ScriptedAdapter(*script)) as engine:
        task_id = await engine.submit_task(ASK)
        seen: list[TextChunk] = []
        while True:
            version = seen[-1].version if seen else 0
            taken = 0
            async with contextlib.aclosing(engine.stream_result(task_id, version)) as stream:
                async for piece in stream:
                    seen.append(piece)
                    taken += 1
                    if taken == chance.randint(1, 4):
                        break
                else:
                    break
        result = await engine.get_result(task_id)
    assert content(seen) == result.output == "".join(f"{n} " for n in range(25))
    text = [piece for piece in seen if piece]
    assert [piece.version for piece in text] == sorted({piece.version for piece in text})


async def test_reading_on_after_the_end_gives_nothing(db: Path) -> None:
    """From the last version on there is nothing, at once; from beyond it as well."""
    async with engine_on(db) as engine:
        task_id = await engine.submit_task(ASK)
        await engine.get_result(task_id)
        last = (await engine.get_events(task_id))[-1].version
        async with asyncio.timeout(10):
            chunks = [piece async for piece in engine.stream_result(task_id, last - 1)]
    assert chunks == []


async def test_leaving_early_leaves_nothing_behind(db: Path) -> None:
    """A reader that goes takes its place in the feed with it."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("a", hold, "b", Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        for _ in range(20):
            stream = engine.stream_result(task_id)
            await anext(stream)
            await stream.aclose()
            waiting = asyncio.create_task(engine.get_result(task_id))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
        await eventually(lambda: not engine.log.feed._readers)
        assert sum(len(found) for found in engine.log.feed._listeners.values()) == 1
        hold.release()
        assert (await engine.get_result(task_id, 30)).output == "ab"
        await eventually(lambda: not engine.log.feed.active)


# -- crashes ---------------------------------------------------------------------------------------


async def test_nobody_sees_what_is_not_in_the_log(
    db: Path, nursery: Nursery, tmp_path: Path, chance: random.Random
) -> None:
    """What readers were shown when the process was killed is, to the letter, in the log.

    The reader sits in the very process that writes, where it could see things too early.
    """
    options = {"words": 100_000, "chunk_words": 1, "delay": 0.001}
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(demo("Tell.", batch="b"))
    shown = 0
    for n in range(8):
        note = tmp_path / f"note {n}"
        child = nursery.start(
            "run_and_read",
            db=db,
            task_id=task_id,
            note=str(note),
            options=options,
            settings={"chunk_interval": chance.choice([0.0, 0.005])},
        )
        beside = tmp_path / f"beside {n}"
        other = nursery.start("read", db=db, task_id=task_id, readers=[(0, str(beside))])
        await eventually(lambda p=note: content(chunks_in(p)))
        await asyncio.sleep(chance.uniform(0, 0.25))
        child.kill()
        committed = stored_events(db, task_id)
        other.kill()
        for file in (note, beside):
            pieces = chunks_in(file)
            shown += len(pieces)
            for piece in pieces:
                type_, data = committed[piece.version - 1]
                assert piece == (data["text"] if type_ == "chunk" else "")
                assert piece.offset == (data["offset"] if type_ == "chunk" else 0)
            # As far as it was told: an attempt may have begun anew since.
            told = committed[: pieces[-1].version] if pieces else []
            assert text_of(told) == content(pieces)
    assert shown
    assert_sound(db)


async def test_who_has_seen_the_end_already_is_not_left_waiting(db: Path) -> None:
    """From the ending's version on, and beyond it, there is nothing to wait for."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("x", hold, Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        early = [
            asyncio.create_task(collect_stream(engine.stream_result(task_id, version), 60))
            for version in (5, 50)
        ]
        hold.release()
        await engine.get_result(task_id, 60)
        assert [await reading for reading in early] == ["", ""]
        last = (await engine.get_events(task_id))[-1].version
        for version in (last, last + 1, last + 50):
            assert await collect_stream(engine.stream_result(task_id, version), 60) == ""
        await engine.redact_task(task_id)
        for version in range(last + 3):
            async with asyncio.timeout(60):
                seen = [event.version async for event in engine.stream_events(task_id, version)]
            assert seen == sorted(seen)


@pytest.mark.parametrize("version", [5, 50])
async def test_the_end_comes_while_it_is_looked_up(
    db: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    """A reader from beyond the end is told of it, though it looked a moment too early."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("x", hold, Completed())) as engine:
        task_id = await engine.submit_task(ASK)
        await hold.reached.wait()
        look = Records.status

        async def slow_look(records: Records, task_id: str) -> TaskStatus:
            status = await look(records, task_id)
            monkeypatch.setattr(Records, "status", look)
            hold.release()
            await engine.get_result(task_id, 60)
            return status

        monkeypatch.setattr(Records, "status", slow_look)
        monkeypatch.setattr(engine.log.feed, "knows_open", lambda _task_id: False)
        assert await collect_stream(engine.stream_result(task_id, version), 60) == ""


async def test_a_task_that_cannot_be_read_is_no_trouble_of_others(db: Path) -> None:
    """A newer perdure writes to one that runs and is read here: the others are heard of as before.

    Its attempt, which waits, goes on to listen to its stream.
    """
    holds = {"newer": Hold(), "cancelled": Hold(), "read": Hold()}
    adapter = ScriptedAdapter(
        per_call=lambda call: ["a ", holds[call.task.prompt], "b", Completed()]
    )
    async with engine_on(db, adapter) as engine, engine_on(db, run=False) as beside:
        ids = {name: await engine.submit_task(Task(prompt=name)) for name in holds}
        await eventually(lambda: count_events(db, "chunk") == 3)
        refused = asyncio.create_task(collect_stream(engine.stream_result(ids["newer"])))
        reading = asyncio.create_task(collect_stream(engine.stream_result(ids["read"])))
        waiting = [
            asyncio.create_task(engine.get_result(ids[name])) for name in ("cancelled", "read")
        ]
        await eventually(lambda: len(engine.log.feed._readers) == 4)
        append_newer(str(db), ids["newer"])
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(DatabaseIncompatible, match="invented"):
                await refused
            await beside.cancel_task(ids["cancelled"])
            cancelled = await waiting[0]
            assert (cancelled.status, cancelled.partial_output) == ("cancelled", "a ")
            holds["read"].release()
            assert await reading == (await waiting[1]).output == "a b"
        holds["newer"].release()


async def test_readers_of_a_closed_engine_end(db: Path) -> None:
    """Nobody is left waiting, and nobody opens connections that nothing would close."""
    hold = Hold()
    async with engine_on(db, ScriptedAdapter("x", hold, Completed())) as engine:
        held = await engine.submit_task(ASK)
        await hold.reached.wait()
        reading = asyncio.create_task(collect_stream(engine.stream_result(held), 60))
        await eventually(lambda: count_events(db, "chunk"))
    with pytest.raises(EngineClosed):
        await reading
    for late in (engine.get_status(held), collect_stream(engine.stream_result(held), 60)):
        with pytest.raises(EngineClosed):
            await late


async def test_a_reader_that_is_slow_does_not_hold_up_the_task(db: Path) -> None:
    """The platform is read at its own speed, whoever looks on."""

    async def flood(call: Call) -> AsyncGenerator[Event, None]:
        for n in range(3000):
            yield Chunk(text=f"{n} ")
            if n % 10 == 0:
                await asyncio.sleep(0)
        yield Completed()

    class Flood(ScriptedAdapter):
        def run(self, call: Call) -> AsyncGenerator[Event, None]:
            return flood(call)

    async with engine_on(db, Flood()) as engine:
        task_id = await engine.submit_task(ASK)
        stream = engine.stream_result(task_id)
        seen = [await anext(stream)]
        result = await engine.get_result(task_id, 60)
        seen += [piece async for piece in stream]
    assert "".join(seen) == result.output == "".join(f"{n} " for n in range(3000))
