"""The demo platform: always the same answer, and every mishap on request."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import pytest

from perdure.adapter import Call, Resume
from perdure.errors import InvalidRequest, Overloaded, RateLimited, StreamTruncated
from perdure.events import Accepted, Chunk, Completed, Event, UsageReported
from perdure.task import Message, Task, TaskConstraints
from perdure_adapters import DemoAdapter
from perdure_adapters._demo_options import DemoKeywords, DemoOptions


def a_call(prompt: str = "What is a log?", *, attempt: int = 1, **options: object) -> Call:
    """Return a call with these options in the task."""
    return Call(task=Task(prompt=prompt, options=options), task_id="demo_1", attempt=attempt)


async def collect(adapter: DemoAdapter, call: Call) -> list[Event]:
    """Return all events of a call."""
    return [event async for event in adapter.run(call)]


async def gather_into(events: list[Event], stream: AsyncGenerator[Event, None]) -> None:
    """Collect events where those before an error count too."""
    async for event in stream:
        events.append(event)  # noqa: PERF401 - a comprehension would lose them


def text_of(events: list[Event]) -> str:
    """Return the joined text."""
    return "".join(e.text for e in events if isinstance(e, Chunk) and e.kind == "text")


def end_of(events: list[Event]) -> Completed:
    """Return the last event, which has to be the end."""
    assert isinstance(events[-1], Completed)
    return events[-1]


class TestText:
    """What it says."""

    async def test_it_says_that_it_is_a_demonstration(self) -> None:
        """Nobody can take the text for a model's, and it names what was asked."""
        text = text_of(await collect(DemoAdapter(), a_call("What is an append-only log?")))
        assert text.startswith("Demonstration text; no model was asked.")
        assert "What is an append-only log?" in text

    async def test_the_same_task_gives_the_same_text(self) -> None:
        """Two adapters, two attempts: one text."""
        first = text_of(await collect(DemoAdapter(), a_call()))
        assert first == text_of(await collect(DemoAdapter(), a_call(attempt=2, chunk_words=7)))

    async def test_another_question_gives_another_text(self) -> None:
        """The text depends on what is asked: prompt, system, conversation and facts."""
        conversation = (Message(role="user", content="What is a log?"),)
        tasks = [
            Task(prompt="What is a log?"),
            Task(prompt="What is a lock?"),
            Task(prompt="What is a log?", system="Be brief."),
            Task(prompt="What is a log?", context={"place": "a ship"}),
            Task(messages=conversation),
        ]
        texts = [
            text_of(await collect(DemoAdapter(), Call(task=task, task_id="t"))) for task in tasks
        ]
        assert len(set(texts[:4])) == 4
        assert texts[4].startswith("Demonstration text")

    @pytest.mark.parametrize("words", [1, 2, 40, 1000])
    async def test_it_is_as_long_as_asked(self, words: int) -> None:
        """`words` is the length, and the count of tokens."""
        events = await collect(DemoAdapter(words=words), a_call())
        assert len(text_of(events).split()) == words
        usage = end_of(events).usage
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (4, words)

    async def test_chunks_have_so_many_words(self) -> None:
        """`chunk_words` is the size of a chunk, the last one being what is left."""
        events = await collect(DemoAdapter(words=10, chunk_words=4), a_call())
        assert [len(e.text.split()) for e in events if isinstance(e, Chunk)] == [4, 4, 2]

    @pytest.mark.parametrize(
        "text", ["Exactly this.", "  with  white\n\nspace \t around ", "\n", "", "☃ 日本語 text"]
    )
    async def test_it_says_exactly_what_it_is_told(self, text: str) -> None:
        """`text` is said to the last character, white space too."""
        events = await collect(DemoAdapter(chunk_words=1), a_call(text=text))
        assert text_of(events) == text
        assert end_of(events).finish_reason == "stop"

    async def test_reasoning_comes_before_the_text(self) -> None:
        """`reasoning` is streamed as its own kind."""
        events = await collect(DemoAdapter(words=4), a_call(reasoning="Let me think."))
        kinds = [e.kind for e in events if isinstance(e, Chunk)]
        assert kinds == ["reasoning", "text"]

    async def test_max_tokens_end_it_early(self) -> None:
        """A limit on tokens cuts the text and says so in the finish reason."""
        task = Task(prompt="Go on.", constraints=TaskConstraints(max_tokens=6))
        events = await collect(DemoAdapter(words=50), Call(task=task, task_id="t"))
        assert len(text_of(events).split()) == 6
        assert end_of(events).finish_reason == "length"

    async def test_the_finish_reason_can_be_chosen(self) -> None:
        """`finish_reason` is passed on."""
        events = await collect(DemoAdapter(), a_call(finish_reason="content_filter"))
        assert end_of(events).finish_reason == "content_filter"

    async def test_usage_is_told_on_the_way(self) -> None:
        """Tokens are reported before the first chunk, and with every chunk of a slow answer."""
        events = await collect(DemoAdapter(words=12, chunk_words=4, delay=0.001), a_call())
        reported = [e.usage.output_tokens for e in events if isinstance(e, UsageReported)]
        assert reported == [0, 4, 8, 12]

    async def test_the_model_is_named(self) -> None:
        """`accepted` names the model that was asked for, or the platform's own."""
        for model, named in ((None, "demo-1"), ("other", "other")):
            call = Call(task=Task(prompt="x"), task_id="t", model=model)
            accepted = (await collect(DemoAdapter(), call))[0]
            assert isinstance(accepted, Accepted)
            assert accepted.model == named


class TestSpeed:
    """How fast it says it."""

    async def test_delays_are_waited_for(self) -> None:
        """Before the first chunk `first_delay`, between chunks `delay`."""
        began = time.monotonic()
        await collect(DemoAdapter(words=9, chunk_words=3, first_delay=0.05, delay=0.05), a_call())
        assert time.monotonic() - began >= 0.15

    async def test_a_long_answer_lets_others_run(self) -> None:
        """Without any delay the event loop still comes round while it speaks."""
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        await collect(DemoAdapter(words=2000, chunk_words=1), a_call())
        turning.cancel()
        assert turns >= 20


class TestMishaps:
    """What goes wrong on request."""

    async def test_it_fails_with_the_named_error(self) -> None:
        """`fail` raises that class, with `retry_after` where it is given."""
        with pytest.raises(RateLimited) as caught:
            await collect(DemoAdapter(), a_call(fail="RateLimited", retry_after=1.5))
        assert caught.value.retry_after == 1.5

    @pytest.mark.parametrize(("after", "words"), [(0, 0), (2, 8), (5, 20), (99, 20)])
    async def test_it_fails_after_so_many_chunks(self, after: int, words: int) -> None:
        """`fail_after` chunks are said first; at the end it fails too, and never completes."""
        events: list[Event] = []
        adapter = DemoAdapter(words=20, chunk_words=4, fail="Overloaded", fail_after=after)
        with pytest.raises(Overloaded):
            await gather_into(events, adapter.run(a_call()))
        assert len(text_of(events).split()) == words
        reported = [e.usage.output_tokens for e in events if isinstance(e, UsageReported)]
        assert reported[-1] == words
        assert not any(isinstance(e, Completed) for e in events)

    async def test_it_fails_in_the_first_attempts_only(self) -> None:
        """`fail_attempts` attempts fail, the next one doesn't."""
        adapter = DemoAdapter(fail="Overloaded", fail_attempts=2)
        for attempt in (1, 2):
            with pytest.raises(Overloaded):
                await collect(adapter, a_call(attempt=attempt))
        end_of(await collect(adapter, a_call(attempt=3)))

    async def test_truncation_is_no_success(self) -> None:
        """A stream that just stops is an error, wherever it stops."""
        for after in range(6):
            with pytest.raises(StreamTruncated):
                await collect(DemoAdapter(words=20), a_call(truncate_after=after))

    async def test_it_stalls_until_it_is_cancelled(self) -> None:
        """After `stall_after` chunks nothing comes any more."""
        stream = DemoAdapter(words=20, chunk_words=4).run(a_call(stall_after=2))
        events: list[Event] = []
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gather_into(events, stream), 0.05)
        assert sum(isinstance(event, Chunk) for event in events) == 2

    async def test_of_several_mishaps_the_first_happens(self) -> None:
        """Failing after two chunks comes before stalling after three."""
        with pytest.raises(Overloaded):
            await collect(DemoAdapter(), a_call(stall_after=3, fail="Overloaded", fail_after=2))


class TestOptions:
    """What may be set, and how it is said that something may not."""

    def test_keywords_and_options_are_the_same(self) -> None:
        """Every field of `DemoOptions` is a keyword argument, and no other is."""
        assert DemoKeywords.__annotations__.keys() == DemoOptions.model_fields.keys()

    async def test_the_task_overrides_the_adapter(self) -> None:
        """An option of the task counts more than the adapter's."""
        events = await collect(DemoAdapter(words=50, text="adapter"), a_call(text="task"))
        assert text_of(events) == "task"

    async def test_a_task_can_switch_a_mishap_off(self) -> None:
        """None in the task's options takes back what the adapter was made with."""
        end_of(await collect(DemoAdapter(fail="Overloaded"), a_call(fail=None)))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"wrods": 5}, "wrods: there is no such field; did you mean 'words'?"),
            ({"words": 0}, "words: should be greater than or equal to 1"),
            ({"words": "many"}, "words: should be a valid integer"),
            ({"delay": -1}, "delay: should be greater than or equal to 0"),
            ({"fail": "Catastrophe"}, "fail: must be one of AuthenticationFailed, "),
            ({"fail": "RetryableError"}, "fail: must be one of"),
            ({"finish_reason": "bored"}, "finish_reason: should be 'stop'"),
            ({"truncate_after": -1}, "truncate_after: should be greater"),
            ({"words": 0, "wrods": 5}, "; "),
        ],
    )
    async def test_a_wrong_option_is_one_clear_line(
        self, options: Mapping[str, Any], message: str
    ) -> None:
        """A misspelt name or an impossible value is refused, in the task and in the constructor."""
        with pytest.raises(InvalidRequest) as caught:
            await collect(DemoAdapter(), a_call(**options))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        with pytest.raises(InvalidRequest):
            DemoAdapter(**options)

    def test_its_repr_shows_what_was_set(self) -> None:
        """Only what differs from the defaults is shown."""
        assert repr(DemoAdapter(words=5, fail="Overloaded")) == (
            "DemoAdapter(words=5, fail='Overloaded')"
        )


class TestPickingUp:
    """How an interrupted call goes on."""

    @pytest.mark.parametrize("said", range(6))
    async def test_reattaching_goes_on_after_the_cursor(self, said: int) -> None:
        """From every cursor the rest follows, and the count of tokens is that of the whole."""
        adapter = DemoAdapter(words=20, chunk_words=4, reattach=True)
        whole = await collect(adapter, a_call())
        accepted = whole[0]
        assert isinstance(accepted, Accepted)
        assert accepted.reattachable
        chunks = [e for e in whole if isinstance(e, Chunk)]
        cursor = chunks[said - 1].cursor if said else accepted.cursor
        resume = Resume("reattach", text_of(chunks[:said]), accepted.response_id, cursor)  # type: ignore[arg-type]
        rest = await collect(
            adapter, Call(task=a_call().task, task_id="demo_1", attempt=2, resume=resume)
        )
        assert text_of(rest) == "".join(chunk.text for chunk in chunks[said:])
        assert end_of(rest).usage == end_of(whole).usage

    @pytest.mark.parametrize(
        ("adapter", "cursor"), [(DemoAdapter(), "1"), (None, "x"), (None, "²")]
    )
    async def test_what_cant_be_picked_up_is_refused(
        self, adapter: DemoAdapter | None, cursor: str
    ) -> None:
        """Without the option, or with a cursor that isn't its own, it is an invalid request."""
        resume = Resume("reattach", "", "demo-demo_1-1", cursor)
        call = Call(task=a_call().task, task_id="demo_1", attempt=2, resume=resume)
        with pytest.raises(InvalidRequest):
            await collect(adapter or DemoAdapter(reattach=True), call)

    @pytest.mark.parametrize("length", [0, 1, 17, 60])
    async def test_continuing_goes_on_after_the_partial_output(self, length: int) -> None:
        """What it had said already is not said again."""
        adapter = DemoAdapter(words=40)
        whole = text_of(await collect(adapter, a_call()))
        resume = Resume("continue", whole[:length])
        call = Call(task=a_call().task, task_id="demo_1", attempt=2, resume=resume)
        assert whole[:length] + text_of(await collect(adapter, call)) == whole


class TestJournal:
    """What the platform's side writes down, for tests that look from outside."""

    async def test_every_call_is_there_with_its_end(self, tmp_path: Path) -> None:
        """One line at the beginning, one at the end, with how it ended and how much was said."""
        path = tmp_path / "journal.jsonl"
        adapter = DemoAdapter(words=8, chunk_words=4, journal=str(path))
        stream = adapter.run(a_call("one"))
        async for event in stream:  # as the engine does it: it doesn't wait for what follows
            if isinstance(event, Completed):
                break
        await stream.aclose()
        with pytest.raises(Overloaded):
            await collect(adapter, a_call("two", fail="Overloaded", fail_after=1))
        stream = adapter.run(a_call("three", stall_after=1))
        async for event in stream:
            if isinstance(event, Chunk):
                break
        await stream.aclose()
        await adapter.stop("demo-demo_1-1")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        begun = [line for line in lines if "call" in line]
        ended = [line for line in lines if "end" in line]
        assert [line["prompt"] for line in begun] == ["one", "two", "three"]
        assert begun[0] == {"call": "demo_1", "attempt": 1, "mode": "restart", "prompt": "one"}
        assert [(line["outcome"], line["chunks"]) for line in ended] == [
            ("completed", 2),
            ("Overloaded", 1),
            ("cancelled", 1),
        ]
        assert lines[-1] == {"stop": "demo-demo_1-1"}

    async def test_lines_of_many_calls_stay_whole(self, tmp_path: Path) -> None:
        """A hundred calls at once leave two hundred readable lines."""
        path = tmp_path / "journal.jsonl"
        adapter = DemoAdapter(words=5, delay=0.0001, chunk_words=1, journal=str(path))
        await asyncio.gather(*(collect(adapter, a_call(f"call {n}")) for n in range(100)))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert {line["prompt"] for line in lines if "call" in line} == {
            f"call {n}" for n in range(100)
        }
        assert len(lines) == 200

    async def test_a_journal_that_cant_be_written_is_an_invalid_request(
        self, tmp_path: Path
    ) -> None:
        """A folder that isn't there is reported in one line."""
        with pytest.raises(InvalidRequest, match="journal"):
            await collect(DemoAdapter(), a_call(journal=str(tmp_path / "none" / "journal")))
