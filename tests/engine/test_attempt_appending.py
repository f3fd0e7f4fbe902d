"""What an attempt appends, held against a log that answers when, and as, the test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from harness import eventually

from perdure import Accepted, ConcurrencyError, DatabaseUnavailable, TaskStatus, Usage
from perdure.appending import Appender, Timing
from perdure.events import (
    Cancelled,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    FileCreated,
    Interrupted,
    Running,
    Submitted,
    UsageReported,
)
from perdure.gathering import Gathering
from perdure.lifecycle import TaskState, evolve
from perdure.stopping import ReasonToEnd, Stop
from perdure.store.claims import Claimed
from perdure.store.log import EventLog

AT = datetime(2026, 1, 1, tzinfo=UTC)
ACCEPTED = Accepted(response_id="r", reattachable=True)
LOST = Interrupted(worker="w", attempt=1, reason="worker_lost", outcome="unknown", next="restart")
FULL = DatabaseUnavailable("no space left")


class Log:
    """One stream, as the appender sees it.

    Attributes:
        state: The task as it is in the log.
        appended: What was appended, append by append.
        held: Where there is one, appends wait for it; an error in it is theirs.
        failure: What every look fails with.
    """

    def __init__(self) -> None:
        self.asked = Submitted(task={}, platforms=("p",))
        self.state = evolve(None, self.asked, AT)
        self.appended: list[tuple[Event, ...]] = []
        self.waiting = 0
        self.held: asyncio.Future[None] | None = None
        self.failure: Exception | None = None
        self.put(Running(attempt=1, worker="w", platform="p"))

    def put(self, event: Event) -> None:
        """Let somebody else append that."""
        self.state = evolve(self.state, event, AT)

    async def append(self, _task_id: str, events: Sequence[Event], expected: int) -> int:
        """As the log's, one append at a time."""
        if self.held is not None:
            self.waiting += 1
            await self.held
            self.waiting -= 1
        if expected != self.state.version:
            raise ConcurrencyError("t", expected, self.state.version)
        for event in events:
            self.put(event)
        self.appended.append(tuple(events))
        return self.state.version

    async def write(self, _look: Callable[[Any], Any], _streams: Sequence[str]) -> TaskState:
        """As the log's; there is but one thing to look for."""
        if self.failure is not None:
            raise self.failure
        return self.state

    def hold(self) -> asyncio.Future[None]:
        """Hold up what is appended from now on, until the future is done that this returns."""
        self.held = asyncio.get_running_loop().create_future()
        return self.held

    @property
    def texts(self) -> list[list[str]]:
        """The texts of the chunks, append by append."""
        return [[e.text for e in events if isinstance(e, Chunk)] for events in self.appended]


class Scene:
    """An appender, and all that it has to do with."""

    def __init__(self, **timing: Any) -> None:
        self.log = Log()
        self.reason = ReasonToEnd()
        self.gathered = Gathering({}, "", keep=False)
        self.appender = Appender(
            cast("EventLog", self.log),
            Claimed("t", self.log.state, self.log.asked, "", self.log.state),
            self.gathered,
            timing=Timing(**{"chunk_interval": 0.0, "usage_interval": 0.0} | timing),
            reason=self.reason,
        )

    def say(self, *texts: str) -> None:
        """Let the platform say that."""
        for text in texts:
            self.appender.add_piece(text, "text", None)

    async def end(self) -> bool:
        """Append an ending."""
        return await self.appender.append_ending(
            lambda _state: (Completed(output_length=self.gathered.length()),)
        )

    async def fail(self) -> None:
        """Let something be appended, and the log fail then."""
        held = self.log.hold()
        self.say("lost")
        await eventually(lambda: self.log.waiting)
        held.set_exception(FULL)
        self.log.held = None
        await eventually(lambda: self.appender.failure)


@pytest.fixture
async def scene() -> Scene:
    """An appender that doesn't pause."""
    return Scene()


# -- gathering and pacing --------------------------------------------------------------------------


async def test_what_comes_while_an_append_is_under_way_goes_with_the_next(scene: Scene) -> None:
    """Pieces that come in one turn, or during a commit, are one chunk."""
    held = scene.log.hold()
    scene.say("a", "b")
    await eventually(lambda: scene.log.waiting)
    scene.say("c", "d")
    held.set_result(None)
    await eventually(lambda: len(scene.log.appended) == 2)
    assert scene.log.texts == [["ab"], ["cd"]]
    await scene.appender.close()


async def test_what_is_there_as_a_whole_is_written_with_its_ending(scene: Scene) -> None:
    """In one append."""
    scene.say("a", "b")
    scene.reason.give()
    await asyncio.sleep(0)
    assert await scene.end()
    assert [[type(e) for e in events] for events in scene.log.appended] == [[Chunk, Completed]]
    await scene.appender.close()


async def test_within_an_interval_nothing_is_written_but_the_ending() -> None:
    """The first piece at once, and the ending takes what is left with it."""
    scene = Scene(chunk_interval=3600.0)
    scene.say("a")
    await eventually(lambda: scene.log.appended)
    scene.say("b")
    scene.appender.add(FileCreated(path="f"))
    scene.say("c")
    assert await scene.end()
    assert scene.log.texts == [["a"], ["b", "c"]]
    await scene.appender.close()


async def test_room_is_made_by_writing(scene: Scene) -> None:
    """Who waits for room goes on once what had gathered is in the log."""
    held = scene.log.hold()
    scene.say("a")
    waiting = asyncio.create_task(scene.appender.wait_for_room())
    await eventually(lambda: scene.log.waiting)
    assert not waiting.done()
    held.set_result(None)
    await waiting
    assert scene.gathered.characters == 0
    await scene.appender.close()


async def test_usage_is_written_once_an_interval_and_where_the_task_is_left_to_others() -> None:
    """Of a call that is picked up again nothing else says what it has used so far."""
    scene = Scene(usage_interval=3600.0)
    for tokens in (1, 2, 3):
        scene.appender.add_usage(Usage(input_tokens=tokens))
        await scene.appender.append_gathered()
    assert scene.log.appended == [(UsageReported(usage=Usage(input_tokens=1)),)]
    await scene.appender.catch_up()
    assert scene.log.appended[1:] == [(UsageReported(usage=Usage(input_tokens=3)),)]
    await scene.appender.close()


# -- others ----------------------------------------------------------------------------------------


async def test_where_somebody_wrote_first_it_is_decided_again(scene: Scene) -> None:
    """A cancellation is a reason to end; what had gathered is written after it."""
    scene.log.put(CancelRequested(by="me"))
    seen: list[TaskState] = []

    def decide(state: TaskState) -> Sequence[Event]:
        seen.append(state)
        return (Cancelled(output_length=scene.gathered.length()),)

    scene.gathered.add_piece("a", "text", None)
    assert await scene.appender.append_ending(decide)
    assert [state.cancel is None for state in seen] == [True, False]
    assert scene.reason.stopped.result() is Stop.CANCEL
    assert scene.log.texts == [["a"]]
    assert scene.log.state.status is TaskStatus.CANCELLED


@pytest.mark.parametrize("claimed_again", [False, True])
async def test_nothing_is_written_to_what_is_lost(scene: Scene, claimed_again: bool) -> None:
    """Whether somebody has taken it over already or not; that is no failure."""
    scene.log.put(LOST)
    if claimed_again:
        scene.log.put(Running(attempt=2, worker="v", platform="p"))
    scene.say("a")
    assert await scene.reason.stopped is Stop.LOST
    await scene.appender.append_at_once(ACCEPTED)
    assert not await scene.end()
    assert (scene.log.appended, scene.appender.failure) == ([], None)
    await scene.appender.close()


async def test_nothing_follows_an_ending(scene: Scene) -> None:
    """Nor does a second one."""
    assert await scene.end()
    scene.say("late")
    assert not await scene.end()
    assert len(scene.log.appended) == 1
    await scene.appender.close()


# -- a log that fails ------------------------------------------------------------------------------


async def test_nothing_follows_what_could_not_be_written(scene: Scene) -> None:
    """It is missing in the middle; whoever reads and ends the attempt is told why."""
    await scene.fail()
    assert await scene.reason.stopped is Stop.BROKEN
    with pytest.raises(DatabaseUnavailable, match="no space left"):
        await scene.appender.append_at_once(ACCEPTED)
    with pytest.raises(DatabaseUnavailable, match="no space left"):
        await scene.appender.append_gathered()
    await scene.appender.catch_up()
    assert not await scene.end()
    assert (scene.log.appended, scene.appender.failure) == ([], FULL)
    await scene.appender.close()


@pytest.mark.parametrize("error", [None, FULL, LookupError("a bug")])
async def test_what_must_not_be_lost_is_written_whoever_is_cancelled(
    scene: Scene, error: Exception | None
) -> None:
    """The cancellation comes after it, and then the failure is there, if there is one."""
    held = scene.log.hold()
    reading = asyncio.create_task(scene.appender.append_at_once(ACCEPTED))
    await eventually(lambda: scene.log.waiting)
    reading.cancel()
    assert await asyncio.wait({reading}, timeout=0.01) == (set(), {reading})
    if error is None:
        held.set_result(None)
    else:
        held.set_exception(error)
    scene.log.held = None
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert scene.appender.failure is error
    assert scene.log.appended == ([(ACCEPTED,)] if error is None else [])
    assert await scene.end() is (error is None)


async def test_a_look_that_fails_is_a_failure_but_the_ending_is_tried(scene: Scene) -> None:
    """What is known may be all there is, and the version says whether it is."""
    scene.log.failure = FULL
    await scene.appender.catch_up()
    assert scene.appender.failure is FULL
    assert await scene.end()
