"""The tools for tests: the scripted platform, and a contract that catches bad adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from perdure.adapter import Call
from perdure.errors import Overloaded
from perdure.events import Chunk, Completed, Event, Submitted, UsageReported
from perdure.task import Task, Usage
from perdure.testing import AdapterContract, Hold, ScriptedAdapter
from perdure_adapters import AsyncBasePlatformAdapter

CALL = Call(task=Task(prompt="x"), task_id="t1")


async def collect(adapter: ScriptedAdapter, call: Call = CALL) -> list[Event]:
    """Return all events of a call."""
    return [event async for event in adapter.run(call)]


class TestScriptedAdapter:
    """It does what the script says, and remembers."""

    async def test_it_plays_its_steps(self) -> None:
        """Text is a chunk, events are themselves, waits and functions happen in between."""
        seen: list[str] = []

        async def later(call: Call) -> None:
            seen.append(call.task_id)

        happened = asyncio.Event()
        happened.set()
        end = Completed(usage=Usage(output_tokens=2))
        adapter = ScriptedAdapter("Hel", 0.001, later, happened, lambda _: None, "lo", end)
        assert await collect(adapter) == [Chunk(text="Hel"), Chunk(text="lo"), end]
        assert seen == ["t1"]
        assert (adapter.calls, adapter.finished, adapter.cancelled) == ([CALL], ["t1"], [])

    async def test_a_reader_that_stops_at_the_end_has_not_cut_it_off(self) -> None:
        """The engine closes the stream after `Completed`: that is a finished call."""
        adapter = ScriptedAdapter()
        stream = adapter.run(CALL)
        async for event in stream:
            if isinstance(event, Completed):
                break
        await stream.aclose()
        assert (adapter.finished, adapter.cancelled) == (["t1"], [])

    async def test_without_a_script_it_greets(self) -> None:
        """The default is a short success."""
        assert isinstance((await collect(ScriptedAdapter()))[-1], Completed)

    async def test_errors_are_raised(self) -> None:
        """An exception in the script is raised, after what came before it."""
        adapter = ScriptedAdapter("Hel", Overloaded("too much"))
        with pytest.raises(Overloaded):
            await collect(adapter)
        assert adapter.finished == ["t1"]

    async def test_a_hold_waits_for_its_release(self) -> None:
        """A test can wait until a call is there, look around, and let it go on."""
        hold = Hold()
        adapter = ScriptedAdapter("Hel", hold, "lo", Completed())
        calls = [asyncio.create_task(collect(adapter)) for _ in range(3)]
        await hold.reached.wait()
        await asyncio.sleep(0)
        assert adapter.running == 3
        hold.release()
        assert len(await asyncio.gather(*calls)) == 3
        assert (adapter.running, adapter.most_running) == (0, 3)

    async def test_a_cancelled_call_is_remembered(self) -> None:
        """Cancelled or closed on the way: it is under `cancelled`."""
        hold = Hold()
        adapter = ScriptedAdapter("Hel", hold)
        call = asyncio.create_task(collect(adapter))
        await hold.reached.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        stream = adapter.run(CALL)
        await anext(stream)
        await stream.aclose()
        assert (adapter.cancelled, adapter.finished, adapter.running) == (["t1", "t1"], [], 0)

    async def test_calls_can_differ(self) -> None:
        """A function gives each call its own script."""
        adapter = ScriptedAdapter(per_call=lambda call: [str(call.attempt), Completed()])
        second = Call(task=CALL.task, task_id="t1", attempt=2)
        assert (await collect(adapter))[0] == Chunk(text="1")
        assert (await collect(adapter, second))[0] == Chunk(text="2")

    async def test_closing_and_stopping_are_counted(self) -> None:
        """`closed` and `stopped` say what the engine did."""
        adapter = ScriptedAdapter()
        await adapter.close()
        await adapter.close()
        await adapter.stop("r1")
        assert (adapter.closed, adapter.stopped) == (2, ["r1"])


class Good(AsyncBasePlatformAdapter):
    """Keeps the contract; the classes below break one rule each."""

    platform = "good"
    said = 0

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say hello, or hang."""
        yield Chunk(text="Hel")
        if call.task.prompt == "hang":
            await asyncio.Event().wait()
        yield Chunk(text="lo")
        if call.task.prompt == "fail":
            raise Overloaded("too much to do")
        yield Completed(usage=Usage(output_tokens=2))


class Swallows(Good):
    """Takes a cancellation for an end."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Swallow the cancellation."""
        try:
            async for event in super().run(call):
                yield event
        except asyncio.CancelledError:
            yield Completed()


class Stubborn(Good):
    """Doesn't let itself be stopped for a while."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Go on for a while after a cancellation."""
        try:
            async for event in super().run(call):
                yield event
        finally:
            await asyncio.shield(asyncio.sleep(1.5))


class Overlong(Good):
    """Says something after its end."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Go on after the end."""
        async for event in super().run(call):
            yield event
        yield Chunk(text="one more thing")


class Endless(Good):
    """Never says that it is done."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Leave the end out."""
        async for event in super().run(call):
            if not isinstance(event, Completed):
                yield event


class Meddles(Good):
    """Writes what is the engine's to write."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Begin with the engine's event."""
        yield Submitted(task={}, platforms=("good",))
        async for event in super().run(call):
            yield event


class Counts(Good):
    """Sets offsets, which the engine does."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Set an offset."""
        yield Chunk(text="Hel")
        yield Chunk(text="lo", offset=3)
        yield Completed()


class Forgets(Good):
    """Counts tokens per piece instead of all so far."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Report less than before."""
        for tokens in (5, 3):
            yield Chunk(text="Hello")
            yield UsageReported(usage=Usage(output_tokens=tokens))
        yield Completed()


class Talks(Good):
    """Has its own word for the end."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """End with a word of its own."""
        yield Chunk(text="Hello")
        yield Completed(finish_reason="end_turn")


class AllAtOnce(Good):
    """Gathers the answer and yields it whole."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say all in one piece."""
        yield Chunk(text="Hello")
        yield Completed()


class Untyped(Good):
    """Raises what the SDK raised."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Fail with a foreign error."""
        try:
            async for event in super().run(call):
                yield event
        except Overloaded as error:
            raise OSError("503") from error


class Shows(Good):
    """Shows its key."""

    def __repr__(self) -> str:
        """Return the key."""
        return "Shows(key='secret-key')"


class Leaves(Good):
    """Leaves a task behind."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Start what nobody ends."""
        self.task = asyncio.create_task(asyncio.sleep(3))
        async for event in super().run(call):
            yield event


class Mixes(Good):
    """Keeps the state of a call in the adapter."""

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say what the adapter remembers."""
        self.said += 1
        await asyncio.sleep(0)
        yield Chunk(text=f"Hello {self.said} ")
        yield Chunk(text="times")
        self.said = 0
        yield Completed()


class Once(Good):
    """Can't be closed twice."""

    async def close(self) -> None:
        """Fail the second time."""
        await super().close()
        self.said += 1
        if self.said == 2:
            raise RuntimeError("closed already")


class Contract(AdapterContract):
    """The contract, for an adapter class that is chosen later."""

    __test__ = False
    patience = 1.0

    def __init__(self, kind: type[AsyncBasePlatformAdapter]) -> None:
        self.kind = kind

    def make_adapter(self) -> AsyncBasePlatformAdapter:
        """Return a new adapter."""
        return self.kind()

    def endless(self) -> Call:
        """Return a call that hangs."""
        return Call(task=Task(prompt="hang"), task_id="t")

    def failures(self) -> list[tuple[type[Overloaded], Call]]:
        """Return a call that fails."""
        return [(Overloaded, Call(task=Task(prompt="fail"), task_id="t"))]

    def secrets(self) -> list[str]:
        """Return the key."""
        return ["secret-key"]


RULES = [name for name in dir(AdapterContract) if name.startswith("test_")]


def broken_rules(kind: type[AsyncBasePlatformAdapter], rules: list[str]) -> list[str]:
    """Return the rules that an adapter breaks."""
    broken: list[str] = []
    for name in rules:
        try:
            getattr(Contract(kind), name)()
        except Exception:  # noqa: BLE001 - pytest would take any of them for a failure
            broken.append(name)
    return broken


def test_a_good_adapter_breaks_no_rule() -> None:
    """The smallest correct adapter passes them all."""
    assert broken_rules(Good, RULES) == []


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (Swallows, "test_cancelling_on_the_way_is_prompt"),
        (Stubborn, "test_cancelling_on_the_way_is_prompt"),
        (Stubborn, "test_closing_the_stream_on_the_way_is_prompt"),
        (Overlong, "test_a_success_ends_with_one_completed"),
        (Endless, "test_a_success_ends_with_one_completed"),
        (Meddles, "test_a_success_ends_with_one_completed"),
        (Counts, "test_the_engines_fields_are_left_alone"),
        (Forgets, "test_usage_only_grows"),
        (Talks, "test_finish_reasons_are_the_common_words"),
        (AllAtOnce, "test_a_success_streams_its_text"),
        (Untyped, "test_failures_are_typed_errors"),
        (Shows, "test_its_repr_shows_no_secret"),
        (Leaves, "test_many_calls_at_once"),
        (Once, "test_closing_twice_and_using_it_again"),
    ],
)
def test_the_contract_catches(kind: type[AsyncBasePlatformAdapter], rule: str) -> None:
    """An adapter that breaks a rule fails the test of that rule."""
    assert broken_rules(kind, [rule]) == [rule]


def test_the_contract_catches_mixed_up_calls() -> None:
    """Where the text is known, calls that get each other's are noticed."""

    class Known(Contract):
        __test__ = False

        def text(self) -> str:
            return "Hello 1 times"

        def failures(self) -> list[tuple[type[Overloaded], Call]]:
            return []

    with pytest.raises(AssertionError, match="different texts"):
        Known(Mixes).test_many_calls_at_once()
