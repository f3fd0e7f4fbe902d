"""Adapters that are badly written: what they do wrong costs their own task, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest
from harness import FAST, assert_sound, eventually, stored_events
from sqlalchemy.exc import SAWarning

from perdure import Engine, InvalidConfig, Result, Task, TaskStatus
from perdure.adapter import Call
from perdure.cli.terminal import send_log_to_stderr
from perdure.containment import CHUNK_KINDS
from perdure.errors import (
    ConcurrencyError,
    EngineClosed,
    FinalError,
    RateLimited,
    StoreError,
)
from perdure.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    FileCreated,
    Running,
    UsageReported,
)
from perdure.platforms import Platforms
from perdure.task import Recovery, TaskConstraints, Usage
from perdure.testing import ScriptedAdapter

ASK: Final = Task(prompt="?", platform="scripted")
GOOD: Final = Task(prompt="?", platform="good")


class MyAccepted(Accepted):
    """What an adapter derives, to keep something of its own."""

    region: str = "eu"


class MyCompleted(Completed):
    """The same, at the end."""

    note: str = "x"


class MyUsage(Usage):
    """The same, inside."""

    seconds: float = 1.5


class Renamed(Completed):
    """An ending under a name of its own."""

    type: ClassVar[str] = "renamed"


class Tagged(Chunk):
    """A chunk with nothing more than a chunk has."""


class Odd(BaseException):
    """What is no `Exception`, and nobody expects."""


class Unspeakable(Exception):
    """An error that can't be shown."""

    def __str__(self) -> str:
        raise LookupError("no text")


class Baseless(FinalError):
    """An error whose base class was never told of it."""

    def __init__(self) -> None:
        Exception.__init__(self, "made wrongly")


def engine_on(db: Path, adapter: Any) -> AbstractAsyncContextManager[Engine]:
    """Return an engine with the adapter in question, and one that is as it should be."""
    return Engine.open(db, adapters=[adapter, ScriptedAdapter(platform="good")], settings=FAST)


async def outcome(db: Path, adapter: Any, **constraints: Any) -> Result:
    """Run a task of the adapter; hold the log, and the engine, to be as good as before."""
    task = ASK
    if constraints:
        task = ASK.model_copy(update={"constraints": TaskConstraints(**constraints)})
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(await engine.submit_task(task), 30)
        assert (await engine.get_result(await engine.submit_task(GOOD), 30)).success
    assert_sound(db)
    return result


# -- what is yielded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (MyAccepted(response_id="r"), "'accepted' with .*stored: region: Extra inputs"),
        (MyAccepted(response_id="r", reattachable=True), "'accepted' with .*stored: region: Extra"),
        (MyCompleted(), "'completed' with .*stored: note: Extra inputs"),
        (Completed(usage=MyUsage(input_tokens=2)), "'completed' with .*: usage.seconds: Extra"),
        (UsageReported(usage=MyUsage(input_tokens=2)), "'usage' with .*: usage.seconds: Extra"),
        (Completed(usage=Usage.model_construct(input_tokens=1.5)), ": usage.input_tokens: "),
        (UsageReported(usage=Usage.model_construct(input_tokens=[])), ": usage.input_tokens: "),
        (UsageReported.model_construct(), "'usage' with .*stored: usage: Field required"),
        (Completed.model_construct(usage={"input_tokens": 3}), "'completed' with .*AttributeError"),
        (Completed.model_construct(finish_reason=5), "stored: finish_reason: Input should be"),
        (Chunk.model_construct(text="b", kind="odd"), "'chunk' with .*stored: kind: Input should"),
        (Chunk.model_construct(text="b", kind=["text"]), "'chunk' with .*stored: kind: Input"),
        (Chunk.model_construct(text=b"b"), "'chunk' with .*stored: Type is not JSON .*: bytes"),
        (Chunk.model_construct(text="b", cursor=5), "'chunk' with .*stored: cursor: Input"),
        (Running(attempt=9, worker="w", platform="scripted"), "'running', which is not its to"),
        (None, "a NoneType, which is no event"),
        ({"type": "chunk"}, "a dict, which is no event"),
    ],
)  # fmt: skip
async def test_what_could_not_be_read_again_is_never_written(
    db: Path, event: Any, said: str
) -> None:
    """The task fails and says what the adapter did; its output so far is kept."""

    class Adapter(ScriptedAdapter):
        async def run(self, call: Call) -> AsyncGenerator[Event, None]:
            yield Chunk(text="a")
            yield event
            yield Completed()

    result = await outcome(db, Adapter())
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "FinalError")
    assert result.partial_output == "a"
    with pytest.raises(FinalError, match=said):
        raise FinalError(result.error or "")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (Renamed(finish_reason="length"), {"finish_reason": "length"}),
        (Completed(usage=Usage(input_tokens=1).model_copy(update={"input_tokens": "7"})),
         {"usage": {"input_tokens": 7}}),
        (Completed.model_construct(finish_reason="s\0"), {"finish_reason": "s\ufffd"}),
        (Completed(usage=Usage.model_construct(raw={"k\0": "\0"})),
         {"usage": {"raw": {"k\ufffd": "\ufffd"}}}),
    ],
)  # fmt: skip
async def test_what_can_be_mended_is(db: Path, given: Any, stored: dict[str, Any]) -> None:
    """A derived class without fields of its own is what it derives from; no answer is lost."""
    adapter = ScriptedAdapter(
        Accepted.model_construct(response_id="r\0"),
        FileCreated.model_construct(path="p", digest="d\0"),
        Tagged(text="a"),
        Tagged(text="b\ud800"),
        Chunk.model_construct(text="c", cursor="1\0"),
        Chunk(text="d", offset=100, length=50),
        given,
    )
    result = await outcome(db, adapter)
    assert (result.output, result.success) == ("ab\ufffdcd", True)
    events = dict(stored_events(db, result.task_id))
    assert events["completed"].items() >= stored.items()
    assert events["accepted"]["response_id"] == "r\ufffd"
    assert events["file_created"]["digest"] == "d\ufffd"
    assert events["chunk"]["cursor"] == "1\ufffd"


async def test_every_kind_of_chunk_is_known(db: Path) -> None:
    """And each of them gets its way past the closer look."""
    pieces = [Chunk.piece(kind, kind) for kind in CHUNK_KINDS]
    result = await outcome(db, ScriptedAdapter(*pieces, Completed()))
    chunks = [data for type_, data in stored_events(db, result.task_id) if type_ == "chunk"]
    assert [chunk["kind"] for chunk in chunks] == list(CHUNK_KINDS)


# -- what is raised --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StoreError("of another database"), "StoreError: of another database"),
        (EngineClosed("another engine"), "EngineClosed: another engine"),
        (ConcurrencyError("another_task", 1, 2), "ConcurrencyError: another_task is at"),
        (Unspeakable(), "Unspeakable, whose text can't be had"),
        (Odd("odd"), "Odd: odd"),
        (asyncio.CancelledError(), "the adapter failed: CancelledError"),
        (Baseless(), "raised Baseless without message"),
        (RateLimited("m", request_id=5), "RateLimited whose request_id is a int"),  # type: ignore[arg-type]
        (RateLimited("m", retry_after="3"), "RateLimited whose retry_after is a str"),  # type: ignore[arg-type]
        (RateLimited("m", status="429"), "RateLimited whose status is a str"),  # type: ignore[arg-type]
        (RateLimited("m", status=2**70), "RateLimited whose status is beyond 32 bits"),
    ],
)
async def test_whatever_is_raised_fails_the_task(db: Path, error: BaseException, said: str) -> None:
    """Errors that the engine's own log might raise as well, and those that can't be stored."""
    result = await outcome(db, ScriptedAdapter("a", error))
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "AdapterFault")
    assert said in (result.error or "")
    assert result.partial_output == "a"


async def test_prices_that_can_not_be_had_are_unknown(db: Path) -> None:
    """The answer is there, and was paid for."""

    class Adapter(ScriptedAdapter):
        def __getattribute__(self, name: str) -> Any:
            if name == "prices" and self.calls:
                raise LookupError("no prices")
            return super().__getattribute__(name)

    end = Completed(usage=Usage(input_tokens=3, output_tokens=2))
    for adapter in (Adapter("a", end), ScriptedAdapter("a", end, prices=5)):  # type: ignore[arg-type]
        result = await outcome(db, adapter)
        assert (result.success, result.tokens_used, result.cost) == (True, 5, None)


def test_an_error_that_cannot_be_shown_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    """On the command's stderr as well; telling of it fails nobody."""
    logger = logging.getLogger("perdure")
    before = list(logger.handlers), logger.propagate
    logger.handlers.clear()
    try:
        send_log_to_stderr()
        logger.error("the adapter %r failed", "odd", exc_info=Unspeakable())
    finally:
        logger.handlers[:], logger.propagate = before
    assert (
        "the adapter 'odd' failed: Unspeakable, whose text can't be had" in capsys.readouterr().err
    )


# -- stopping and closing --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [asyncio.CancelledError(), Odd("stop"), Unspeakable()])
async def test_a_stop_that_fails_is_no_matter(
    db: Path, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises: the task is cancelled, the worker goes on, and it is said."""

    class Adapter(ScriptedAdapter):
        async def stop(self, response_id: str) -> None:
            await super().stop(response_id)
            raise error

    adapter = Adapter(Accepted(response_id="r", reattachable=True), "a", 60.0)
    async with engine_on(db, adapter) as engine:
        task_id = await engine.submit_task(ASK)
        await eventually(lambda: adapter.calls)
        await eventually(lambda: any(t == "chunk" for t, _ in stored_events(db, task_id)))
        assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
        assert (result.status, result.partial_output) == (TaskStatus.CANCELLED, "a")
        assert (await engine.get_result(await engine.submit_task(GOOD), 30)).success
    assert adapter.stopped == ["r"]
    assert f"'r' could not be stopped: {type(error).__name__}" in caplog.text
    assert_sound(db)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), Odd("close")])
async def test_a_close_that_fails_leaves_nothing_open(
    db: Path, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """The other adapters, the log and the database are closed, and leaving raises nothing."""

    class Adapter(ScriptedAdapter):
        async def close(self) -> None:
            raise error

    good = ScriptedAdapter(platform="good")
    async with Engine.open(db, adapters=[Adapter(), good], settings=FAST) as engine:
        assert (await engine.get_result(await engine.submit_task(ASK), 30)).success
    assert good.closed == 1
    assert "'scripted' could not be closed" in caplog.text
    with pytest.raises(EngineClosed):
        await engine.log.write(lambda _tx: None)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("where", ["run", "stop", "close"])
def test_what_ends_a_program_ends_it(db: Path, error: BaseException, where: str) -> None:
    """`KeyboardInterrupt` and `SystemExit` go through, wherever they come up."""

    class Adapter(ScriptedAdapter):
        async def stop(self, response_id: str) -> None:
            if where == "stop":
                raise error

        async def close(self) -> None:
            if where == "close":
                raise error

    async def main() -> None:
        steps: tuple[Any, ...] = (Accepted(response_id="r", reattachable=True), "a")
        adapter = Adapter(*steps, error if where == "run" else 60.0)
        async with engine_on(db, adapter) as engine:
            task_id = await engine.submit_task(ASK)
            await eventually(lambda: any(t == "chunk" for t, _ in stored_events(db, task_id)))
            if where == "stop":
                await engine.cancel_task(task_id)
                await asyncio.sleep(30)
            elif where == "run":
                await asyncio.sleep(30)

    with pytest.raises(type(error)):
        asyncio.run(main())
    # Whoever tears an event loop down cancels what nobody else would: a reading connection is left
    # then, and SQLAlchemy says so once it is gone.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)
        gc.collect()


async def test_an_attempt_that_somebody_cancels_is_lost_not_stuck(db: Path) -> None:
    """An adapter that cancels what isn't its own: the task is begun again, or fails."""

    def cancel_attempt(_call: Call) -> None:
        for task in asyncio.all_tasks():
            if "Worker._carry_out" in repr(task.get_coro()):
                task.cancel()

    result = await outcome(db, ScriptedAdapter("a", cancel_attempt, 60.0), recovery=Recovery.FAIL)
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "Interrupted")


# -- what never ends -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: UsageReported(usage=Usage(input_tokens=1)),
        lambda: Accepted(response_id="r"),
        lambda: FileCreated(path="p"),
        lambda: Chunk(text=""),
    ],
    ids=["usage", "accepted", "file_created", "empty"],
)
async def test_events_without_end_hold_nobody_up(db: Path, make: Callable[[], Event]) -> None:
    """Without a single `await` in the adapter: others go on, and the time limit is kept."""
    most = 0

    class Adapter(ScriptedAdapter):
        async def run(self, call: Call) -> AsyncGenerator[Event, None]:
            while True:
                yield make()

    task = ASK.model_copy(update={"constraints": TaskConstraints(timeout_seconds=0.5)})
    timing = replace(FAST.timing, chunk_interval=0.05, buffer_characters=10_000)
    settings = replace(FAST, timing=timing)
    adapters = [Adapter(), ScriptedAdapter(platform="good")]
    async with Engine.open(db, adapters=adapters, settings=settings) as engine:
        task_id = await engine.submit_task(task)
        good = await engine.submit_task(GOOD)
        assert (await engine.get_result(good, 30)).success
        result = await engine.get_result(task_id, 30)
    assert result.error_class == "TimeLimitExceeded"
    most = max(most, len(stored_events(db, task_id)))
    assert most < 5000, "what gathers is bounded"
    assert_sound(db)


# -- the default model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (5, "default_model is a int"),
        ("m\ud800", "default_model contains a lone surrogate"),
        ("m\0", "default_model contains a NUL character"),
    ],
)
async def test_a_default_model_that_can_not_be_stored(
    db: Path, model: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused when the engine is made, and when it comes later left to the adapter."""
    with pytest.raises(InvalidConfig, match=f"the platform 'scripted': its {said}"):
        Engine.open(db, adapters=[ScriptedAdapter(default_model=model)])
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter) as engine:
        adapter.default_model = model
        for _ in range(2):
            result = await engine.get_result(await engine.submit_task(ASK), 30)
            assert (result.success, result.model) == (True, None)
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [said in r.getMessage() for r in errors] == [True], "it is said once"
    assert_sound(db)


def test_a_default_model_of_an_enum_is_its_value() -> None:
    """As it would be written down as text anywhere else."""

    class Model(StrEnum):
        SMALL = "small-1"

    adapter = ScriptedAdapter(default_model=Model.SMALL)
    (model,) = Platforms([adapter]).default_models().values()
    assert (type(model), model) == (str, "small-1")


async def test_an_error_that_was_never_made_right_by_what_makes_an_adapter(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A platform that can't even be asked: the task fails with the fault's name, others run."""
    get = Platforms.get

    def made_wrongly(platforms: Platforms, name: str) -> Any:
        if name == "scripted":
            raise Baseless
        return get(platforms, name)

    adapters = [ScriptedAdapter(), ScriptedAdapter("fine", Completed(), platform="good")]
    async with Engine.open(db, adapters=adapters, settings=FAST) as engine:
        monkeypatch.setattr(Platforms, "get", made_wrongly)
        result = await engine.get_result(await engine.submit_task(ASK), 30)
        assert (result.status, result.error_class) == (TaskStatus.FAILED, "AdapterFault")
        assert "Baseless" in (result.error or "")
        assert (await engine.get_result(await engine.submit_task(GOOD), 30)).output == "fine"
    assert_sound(db)
