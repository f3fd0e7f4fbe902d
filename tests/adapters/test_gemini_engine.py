"""Gemini run by an engine on a database: broken off anywhere, paid once; and llmock's verdict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interacting import KEY, WAYS, adapter

from perdure import Engine, Task, TaskConstraints, TaskStatus
from perdure.events import Accepted, AttemptFailed
from perdure.policy import RetryPolicy
from perdure.settings import WorkerSettings
from perdure.task import Result
from perdure_adapters import GeminiAdapter
from servers.gemini import TEXT, GeminiServer, Scenario, generate_events, interaction_events
from servers.llmock import LLMockServer, delay, fail, reply, stream_fault

AT_ONCE = WorkerSettings(retry=RetryPolicy(base_seconds=0.001))
EVENTS = len(interaction_events(Scenario()))
CHUNKS = len(generate_events(Scenario()))


def a_task(attempts: int = 5, **scenario: Any) -> Task:
    """Return a task that the server answers in its way."""
    return Task(
        prompt="Say hello.",
        options={"scenario": scenario},
        constraints=TaskConstraints(max_attempts=attempts),
    )


async def results(db: Path, asked: GeminiAdapter, tasks: list[Task]) -> list[Result]:
    """Return how tasks end."""
    async with Engine.open(db, adapters=[asked], settings=AT_ONCE) as engine:
        ids = [await engine.submit_task(task) for task in tasks]
        return await asyncio.gather(*(engine.get_result(id_, timeout=60) for id_ in ids))


class TestCuts:
    """A cut after event k, for every k."""

    @pytest.mark.parametrize("cut", ["clean", "abort", "reset"])
    async def test_in_the_background(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path], cut: str
    ) -> None:
        """The text is the uninterrupted one, and it was generated once."""
        # Without its first event nobody knows the interaction's name: that is tested below.
        # With a reset, what was sent last may be lost as well.
        begin = 1 if cut != "reset" else 3
        pace = 0.002 if cut == "reset" else 0.0
        cuts = range(begin, EVENTS + 1)
        tasks = [a_task(cut_after=k, cut=cut, delay=pace) for k in cuts]
        ended = await results(make_database(), adapter(gemini_server), tasks)
        assert [result.output for result in ended] == [TEXT] * len(tasks)
        assert all(result.success for result in ended)
        assert gemini_server.generations == len(tasks)
        assert len(gemini_server.picked_up) >= len(tasks) - 2

    async def test_before_the_name_is_known(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path]
    ) -> None:
        """Nothing can be picked up then: it is asked again, and each time is an attempt."""
        [result] = await results(
            make_database(), adapter(gemini_server), [a_task(3, cut_after=0, cut="abort")]
        )
        assert result.status is TaskStatus.FAILED
        assert result.attempts == gemini_server.generations == 3

    @pytest.mark.parametrize("way", ["plain", "generate"])
    async def test_without_it(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path], way: str
    ) -> None:
        """It is no success, and the text is kept up to the cut."""
        count = EVENTS if way == "plain" else CHUNKS
        tasks = [a_task(1, cut_after=k) for k in range(count)]
        ended = await results(make_database(), adapter(gemini_server, way), tasks)
        assert {result.status for result in ended} == {TaskStatus.FAILED}
        assert {result.error_class for result in ended} == {"StreamTruncated"}
        kept = [result.partial_output or "" for result in ended]
        assert all(TEXT.startswith(text) for text in kept)
        assert kept == sorted(kept, key=len)
        assert kept[-1] == TEXT or way == "generate"
        assert len(set(kept)) > 10
        assert gemini_server.generations == len(tasks)


class TestRecovering:
    """Errors on the way, and what the log says of them."""

    @pytest.mark.parametrize("over", [False, True])
    async def test_an_error_event(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path], over: bool
    ) -> None:
        """Picked up where the interaction goes on, asked again where it has failed."""
        error = {"event_type": "error", "error": {"code": "internal", "message": "broke"}}
        # Picked-up streams have no faults; a new interaction has them again.
        task = a_task(2, error_after=8, error=error, fails_in_the_end=over, delay=0.002)
        db = make_database()
        async with Engine.open(db, adapters=[adapter(gemini_server)], settings=AT_ONCE) as engine:
            id_ = await engine.submit_task(task)
            result = await engine.get_result(id_, timeout=30)
            events = [recorded.event async for recorded in engine.stream_events(id_)]
        failed = [event for event in events if isinstance(event, AttemptFailed)]
        assert [event.next for event in failed] == ["retry" if over else "reattach"]
        assert result.success is not over
        assert gemini_server.generations == (2 if over else 1)

    async def test_a_forgotten_interaction(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path]
    ) -> None:
        """It is asked anew, and the log has both."""
        task = a_task(3, cut_after=9, cut="abort", forgotten=True)
        db = make_database()
        async with Engine.open(db, adapters=[adapter(gemini_server)], settings=AT_ONCE) as engine:
            id_ = await engine.submit_task(task)
            await engine.get_result(id_, timeout=30)
            events = [recorded.event async for recorded in engine.stream_events(id_)]
        failed = [event for event in events if isinstance(event, AttemptFailed)]
        assert [event.next for event in failed] == ["reattach", "retry"]
        assert len([event for event in events if isinstance(event, Accepted)]) == 2

    async def test_cancelling_stops_the_platform(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path]
    ) -> None:
        """What was said is kept, the interaction is cancelled where it runs."""
        db = make_database()
        async with Engine.open(db, adapters=[adapter(gemini_server)], settings=AT_ONCE) as engine:
            id_ = await engine.submit_task(a_task(stall_after=12))
            async for _ in engine.stream_result(id_):
                break
            assert await engine.cancel_task(id_)
            result = await engine.get_result(id_, timeout=30)
        assert result.status is TaskStatus.CANCELLED
        assert result.partial_output
        assert TEXT.startswith(result.partial_output)
        assert gemini_server.cancelled == ["int_1"]

    @pytest.mark.parametrize("way", WAYS)
    async def test_what_it_costs(
        self, gemini_server: GeminiServer, make_database: Callable[[], Path], way: str
    ) -> None:
        """Tokens are priced by the model that answered; tools are in the result."""
        call = {"id": "a", "name": "weather", "arguments": {"city": "Ulm"}}
        [result] = await results(
            make_database(), adapter(gemini_server, way), [a_task(calls=[call])]
        )
        assert result.cost
        assert result.tokens_used == 22
        assert result.finish_reason == "tool_calls"
        assert [(c.id, c.name, c.arguments) for c in result.tool_calls] == [
            ("a", "weather", {"city": "Ulm"})
        ]


class TestLLMock:
    """A server that nobody here wrote, with its faults and its verdict on the client."""

    @pytest.mark.parametrize(
        "fault",
        [
            (),
            (fail(429, times=2, retry_after=0),),
            (fail(503),),
            (stream_fault("truncate", after_chunks=1),),
            (stream_fault("disconnect", after_chunks=1),),
            (stream_fault("malformed", after_chunks=1),),
            (delay(0.2),),
            (delay(0.2, first_token=True),),
        ],
        ids=lambda fault: fault[0].get("kind", fault[0]["type"]) if fault else "none",
    )
    async def test_faults(
        self,
        llmock_server: LLMockServer,
        make_database: Callable[[], Path],
        fault: tuple[dict[str, Any], ...],
    ) -> None:
        """Whatever breaks, the answer comes in the end, whole, and the client behaved."""
        text = "A model that is none says these words, one after the other, to be counted."
        llmock_server.script(*fault, reply(text, times=5))
        asked = GeminiAdapter(
            api="generate", base_url=llmock_server.gemini, api_version="v1beta", api_key=KEY
        )
        task = Task(prompt="Say it.", constraints=TaskConstraints(model="gemini-3.8-flash"))
        [result] = await results(make_database(), asked, [task])
        assert result.output == text
        assert result.attempts == len(llmock_server.requests)
        llmock_server.assert_resilient()

    async def test_a_stall(
        self, llmock_server: LLMockServer, make_database: Callable[[], Path]
    ) -> None:
        """Who falls silent is given up after the time limit of reading."""
        llmock_server.script(stream_fault("stall", stall_seconds=5), reply("Hello there.", times=2))
        asked = GeminiAdapter(
            api="generate",
            base_url=llmock_server.gemini,
            api_version="v1beta",
            api_key=KEY,
            read_timeout=0.3,
        )
        [result] = await results(make_database(), asked, [Task(prompt="Say it.")])
        assert (result.output, result.attempts) == ("Hello there.", 2)

    async def test_tool_calls(
        self, llmock_server: LLMockServer, make_database: Callable[[], Path]
    ) -> None:
        """Its calls are in the result."""
        calls = [{"name": "weather", "arguments": {"city": "Ulm"}}]
        llmock_server.script(reply(None, tool_calls=calls))
        asked = GeminiAdapter(
            api="generate", base_url=llmock_server.gemini, api_version="v1beta", api_key=KEY
        )
        [result] = await results(make_database(), asked, [Task(prompt="The weather?")])
        assert [(c.name, c.arguments) for c in result.tool_calls] == [("weather", {"city": "Ulm"})]
