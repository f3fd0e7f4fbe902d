"""Claude's answers, as events."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from messaging import ANSWER, COUNT, KEY, RECORDED, SAID, THOUGHTS, a_call, an_adapter, failure, run
from yielded import drain, end_of, text_of

from perdure import Engine, Task
from perdure.adapter import Adapter, Call
from perdure.errors import (
    AuthenticationFailed,
    InvalidRequest,
    Overloaded,
    PlatformError,
    QuotaExhausted,
    RateLimited,
    StreamTruncated,
)
from perdure.events import Accepted, Chunk, UsageReported
from perdure.task import TaskConstraints, Usage
from perdure.testing import AdapterContract
from servers.messages import TEXT, USAGE, MessagesServer, Scenario, events


class TestContract(AdapterContract):
    """The adapter keeps the contract, on the wire."""

    @pytest.fixture(autouse=True)
    def _server(self, messages_server: MessagesServer) -> None:
        self.server = messages_server

    def make_adapter(self) -> Adapter:
        """Return a new adapter."""
        return an_adapter(self.server, default_model="m")

    def text(self) -> str:
        """Return the text of the success."""
        return TEXT

    def success(self) -> Call:
        """Return a call that succeeds."""
        return a_call()

    def endless(self) -> Call:
        """Return a call that hangs on the way."""
        return a_call(stall_after=6)

    def open_calls(self) -> int:
        """Return the requests that the server is answering."""
        return self.server.open

    def secrets(self) -> list[str]:
        """Return the key."""
        return [KEY]

    def failures(self) -> list[tuple[type[PlatformError], Call]]:
        """Return calls that fail."""

        def answer(status: int, **error: object) -> Call:
            return a_call(status=status, error={"message": "no\nway", **error})

        return [
            (InvalidRequest, answer(400)),
            (AuthenticationFailed, answer(401, message=f"the key {KEY} is wrong")),
            (RateLimited, answer(429)),
            (QuotaExhausted, answer(429, type="spend_limit_reached")),
            (Overloaded, answer(529)),
            (StreamTruncated, a_call(malformed_after=3)),
        ]

    def truncated(self) -> list[Call]:
        """Return calls whose stream just stops."""
        return [a_call(cut_after=k, **RECORDED) for k in range(COUNT)]


class TestAnswer:
    """A good answer."""

    async def test_it_streams_text_and_usage(self, messages_server: MessagesServer) -> None:
        """Name, pieces, end: what the server sent, with its ids, model and count of tokens."""
        seen = await run(messages_server, a_call())
        assert seen[0] == Accepted(response_id="msg_1", request_id="req-1", model="m")
        assert text_of(seen) == TEXT
        assert len([e for e in seen if isinstance(e, Chunk)]) > 5
        end = end_of(seen)
        assert (end.finish_reason, end.platform_finish_reason) == ("stop", "end_turn")

    async def test_pieces_arrive_as_they_are_sent(self, messages_server: MessagesServer) -> None:
        """The name and the first piece are there long before the last is sent."""
        async with an_adapter(messages_server) as adapter:
            arrived = [
                time.monotonic()
                async for event in adapter.run(a_call(delay=0.02))
                if isinstance(event, (Accepted, Chunk))
            ]
        assert arrived[-1] - arrived[0] > 0.02 * (len(arrived) - 2)

    async def test_all_kinds_in_their_order(self, messages_server: MessagesServer) -> None:
        """Reasoning, text and a tool's call are chunks of their kind, as they come."""
        seen = await run(messages_server, a_call(**RECORDED))
        chunks = [e for e in seen if isinstance(e, Chunk)]
        assert [kind for kind, n in _runs([c.kind for c in chunks]) if n > 1] == [
            "reasoning",
            "text",
            "tool_call",
        ]
        assert (text_of(seen, "reasoning"), text_of(seen)) == (THOUGHTS, SAID)
        assert [json.loads(line) for line in text_of(seen, "tool_call").splitlines()] == [
            {"id": "toolu_1", "name": "weather", "arguments": {"city": "Ulm", "days": 2}}
        ]
        assert end_of(seen).finish_reason == "tool_calls"

    async def test_several_tool_calls(self, messages_server: MessagesServer) -> None:
        """Each is a line; one without arguments has none, one in a single piece has them all."""
        calls = [
            {"type": "tool_use", "id": "1", "name": "now", "input": {}},
            {"type": "tool_use", "id": "2", "name": "weather", "input": {"city": "Ulm"}},
        ]
        seen = await run(messages_server, a_call(blocks=calls, stop_reason="tool_use"))
        whole = [
            ("content_block_start", {"index": 0, "content_block": calls[1]}),
            ("content_block_stop", {"index": 0}),
        ]
        plain = events(Scenario(blocks=[]))
        raw = [(n, json.dumps({"type": n, **data})) for n, data in whole]
        more = await run(messages_server, a_call(raw=[plain[0], *raw, *plain[1:]]))
        lines = (text_of(seen, "tool_call") + text_of(more, "tool_call")).splitlines()
        assert [json.loads(line)["arguments"] for line in lines] == [
            {},
            {"city": "Ulm"},
            {"city": "Ulm"},
        ]

    @pytest.mark.parametrize(
        ("sent", "normal"),
        [
            ("end_turn", "stop"),
            ("stop_sequence", "stop"),
            ("max_tokens", "length"),
            ("model_context_window_exceeded", "length"),
            ("tool_use", "tool_calls"),
            ("refusal", "content_filter"),
            ("something_new", "stop"),
            (None, "stop"),
        ],
    )
    async def test_finish_reasons(
        self, messages_server: MessagesServer, sent: str | None, normal: str
    ) -> None:
        """They are put into the common words, the platform's own beside them."""
        end = end_of(await run(messages_server, a_call(stop_reason=sent)))
        assert (end.finish_reason, end.platform_finish_reason) == (normal, sent)

    async def test_what_makes_no_text(self, messages_server: MessagesServer) -> None:
        """What the platform's own tools did, and citations, are no part of the output."""
        citation = {"type": "char_location", "cited_text": "x", "document_index": 0}
        blocks = [
            {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
            {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
            {"type": "text", "text": "Found.", "citations": [citation]},
            {"type": "redacted_thinking", "data": "abc"},
        ]
        seen = await run(messages_server, a_call(blocks=blocks))
        assert [(e.kind, e.text) for e in seen if isinstance(e, Chunk)] == [("text", "Found.")]

    async def test_an_empty_answer_is_an_answer(self, messages_server: MessagesServer) -> None:
        """A model may say nothing at all and be done."""
        seen = await run(messages_server, a_call(blocks=[]))
        assert text_of(seen) == ""
        end_of(seen)


class TestOddEvents:
    """What a server sends besides."""

    @pytest.mark.parametrize(
        "odd",
        [
            "5",
            "[]",
            "null",
            '"text"',
            "{}",
            '{"type": "something_new", "text": "x"}',
            '{"type": "content_block_delta", "index": 0, "delta": null}',
            '{"type": "content_block_delta", "index": 0, "delta": {"type": "new", "text": "x"}}',
            '{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta"}}',
            '{"type": "content_block_stop", "index": "many"}',
            '{"type": "message_delta", "delta": null, "usage": null}',
            '{"type": "message_delta", "delta": {}, "usage": {"output_tokens": "many"}}',
        ],
    )
    async def test_odd_events_do_no_harm(self, messages_server: MessagesServer, odd: str) -> None:
        """What makes no sense is passed over, or is an error; never a wrong text."""
        told = events(Scenario())
        raw = [*told[:4], ("content_block_delta", odd), *told[4:]]
        assert text_of(await run(messages_server, a_call(raw=raw))) == TEXT


class TestUsage:
    """Tokens, as Anthropic counts them."""

    async def test_on_the_way_and_at_the_end(self, messages_server: MessagesServer) -> None:
        """Input includes what was cached; the last count stands, its raw form beside it."""
        told = {"output_tokens": 12, "output_tokens_details": {"thinking_tokens": 5}}
        seen = await run(messages_server, a_call(end_usage=told))
        first, last = (e.usage for e in seen if isinstance(e, UsageReported))
        assert seen.index(next(e for e in seen if isinstance(e, UsageReported))) == 1
        assert (first.input_tokens, first.output_tokens) == (127, None)  # it is said to be 1
        assert last == end_of(seen).usage
        assert last == Usage(
            input_tokens=127,
            output_tokens=12,
            cache_read_tokens=100,
            cache_write_tokens=20,
            reasoning_tokens=5,
        ).model_copy(update={"raw": {**USAGE, **told}})

    async def test_a_server_that_counts_nothing(self, messages_server: MessagesServer) -> None:
        """Unknown is not nought."""
        seen = await run(messages_server, a_call(usage=None, end_usage=None))
        assert end_of(seen).usage is None
        assert not [e for e in seen if isinstance(e, UsageReported)]

    async def test_input_that_is_known_at_the_end(self, messages_server: MessagesServer) -> None:
        """A server may know the tokens of the question only when it is done."""
        told = {"input_tokens": 9, "output_tokens": 4}
        usage = {"input_tokens": 0, "output_tokens": 0}
        end = end_of(await run(messages_server, a_call(usage=usage, end_usage=told)))
        assert end.usage is not None
        assert (end.usage.input_tokens, end.usage.output_tokens) == (9, 4)

    async def test_it_has_a_price(
        self, messages_server: MessagesServer, make_database: Any
    ) -> None:
        """The engine knows what a call cost, by the model that answered."""
        adapter = an_adapter(messages_server)
        async with Engine.open(f"sqlite:///{make_database()}", adapters=[adapter]) as engine:
            result = await engine.get_result(
                await engine.submit_task(Task(prompt="x", platform="claude"))
            )
        assert result.success
        assert result.output == TEXT
        assert result.model == "claude-sonnet-5-5"
        assert result.tokens_used == 139
        assert result.cost is not None
        assert 0 < result.cost < 0.01

    async def test_what_was_broken_off_has_none(
        self, messages_server: MessagesServer, make_database: Any
    ) -> None:
        """Its answer is being paid for, and nobody has counted it: that is no small price."""
        adapter = an_adapter(messages_server)
        task = Task(
            prompt="x",
            platform="claude",
            options={"scenario": {"cut_after": 5}},
            constraints=TaskConstraints(max_attempts=1),
        )
        async with Engine.open(f"sqlite:///{make_database()}", adapters=[adapter]) as engine:
            result = await engine.get_result(await engine.submit_task(task))
        assert (result.error_class, result.model) == ("StreamTruncated", "claude-sonnet-5-5")
        assert (result.usage.input_tokens, result.usage.output_tokens) == (127, None)
        assert result.cost is None


SEARCH = [
    {"type": "thinking", "thinking": "Look it up.", "signature": "c2ln"},
    {"type": "text", "text": "One moment. "},
    {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "Ulm"}},
    {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []},
]


class TestPauses:
    """A turn that the platform pauses."""

    async def test_it_is_sent_again_as_it_is(self, messages_server: MessagesServer) -> None:
        """All that was said goes back, and the answer goes on, within the attempt."""
        call = a_call(
            system="Be brief.",
            stop_reason="pause_turn",
            blocks=SEARCH,
            delta={"container": {"id": "box_1", "expires_at": "2030-01-01T00:00:00Z"}},
            turns=[{}, {}, {"stop_reason": "end_turn", "blocks": None, "text": "It rains."}],
        )
        seen = await run(messages_server, call)
        assert text_of(seen) == "One moment. One moment. It rains."
        assert [e.request_id for e in seen if isinstance(e, Accepted)] == [
            "req-1",
            "req-2",
            "req-3",
        ]
        first, second, third = (seen.body for seen in messages_server.messages)
        said = {"role": "assistant", "content": SEARCH}
        assert second == {
            **first,
            "container": "box_1",
            "messages": [*first["messages"], said],
        }
        assert third["messages"] == [*second["messages"], said]
        assert end_of(seen).finish_reason == "stop"

    async def test_a_text_without_text(self, messages_server: MessagesServer) -> None:
        """The platform refuses it, though it is its own: it isn't sent back."""
        for blocks, content in (
            ([{"type": "text", "text": ""}, *SEARCH], [SEARCH]),
            ([{"type": "text", "text": " "}], []),
        ):
            turns = [{}, {"stop_reason": "end_turn", "blocks": None}]
            await run(messages_server, a_call(stop_reason="pause_turn", blocks=blocks, turns=turns))
            said = messages_server.messages[-1].body["messages"][1:]
            assert [turn["content"] for turn in said] == content

    async def test_tokens_of_all_its_parts_count(self, messages_server: MessagesServer) -> None:
        """The usage is the sum; that of a part's answer is known when the part has ended."""
        call = a_call(stop_reason="pause_turn", turns=[{}, {"stop_reason": "end_turn"}])
        seen = await run(messages_server, call)
        usage = end_of(seen).usage
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens, usage.cache_read_tokens) == (254, 24, 200)
        assert usage.raw == {"responses": [{**USAGE, "output_tokens": 12}] * 2}
        counts = [e.usage.output_tokens for e in seen if isinstance(e, UsageReported)]
        assert counts == [None, 12, 12, 24]

    async def test_a_cut_after_a_pause(self, messages_server: MessagesServer) -> None:
        """A part that is cut off makes the whole a failure."""
        call = a_call(stop_reason="pause_turn", turns=[{}, {"cut_after": 5}])
        assert type(await failure(messages_server, call)) is StreamTruncated

    async def test_it_has_an_end(self, messages_server: MessagesServer) -> None:
        """A platform that pauses for ever is not paid for ever: what there is stops short."""
        end = end_of(await run(messages_server, a_call(stop_reason="pause_turn", text="a ")))
        assert (end.finish_reason, end.platform_finish_reason) == ("length", "pause_turn")
        assert messages_server.generations == 26

    async def test_what_cant_be_sent_back(self, messages_server: MessagesServer) -> None:
        """A number that is none in JSON is an unreadable stream, not a fault of the adapter's."""
        told = events(Scenario(blocks=SEARCH, stop_reason="pause_turn"))
        odd = (
            '{"type": "content_block_start", "index": 9, "content_block": {"type": "x", "n": NaN}}'
        )
        raw = [*told[:2], ("content_block_start", odd), *told[2:]]
        assert type(await failure(messages_server, a_call(raw=raw))) is StreamTruncated

    async def test_broken_arguments_cant_be_sent_back(
        self, messages_server: MessagesServer
    ) -> None:
        """They are an unreadable stream, not half a request."""
        told = events(Scenario(blocks=SEARCH, stop_reason="pause_turn"))
        raw = [e for e in told if "input_json_delta" not in e[1]]
        broken = {"type": "input_json_delta", "partial_json": '{"que'}
        delta = {"type": "content_block_delta", "index": 2, "delta": broken}
        raw.insert(-3, ("content_block_delta", json.dumps(delta)))
        assert type(await failure(messages_server, a_call(raw=raw))) is StreamTruncated


class TestBesides:
    """What a server sends that says nothing, or comes too late."""

    @pytest.mark.parametrize(
        "odd",
        [
            *(("ping", "not json"), ("ping", ""), ("message", ""), ("message", "[1, 2]")),
            *(("message", "null"), ("message", "{}"), ("message", '{"type": [1]}')),
            ("content_block_delta", '{"type": "content_block_delta", "index": "x", "delta": 3}'),
            ("message_delta", '{"type": "message_delta", "delta": [], "usage": "none"}'),
        ],
    )
    async def test_an_event_that_says_nothing(
        self, messages_server: MessagesServer, odd: tuple[str, str]
    ) -> None:
        """Wherever one comes that can't be made anything of, the answer is what it is without."""
        plain = events(Scenario())
        raw = [event for one in plain for event in (odd, one)]
        expected = await run(messages_server, a_call())
        seen = await run(messages_server, a_call(raw=raw))
        assert text_of(seen) == text_of(expected)
        assert end_of(seen) == end_of(expected)

    @pytest.mark.parametrize("last", [("error", "{}"), ("ping", ""), ("message", "not json")])
    async def test_what_comes_after_the_end(
        self, messages_server: MessagesServer, last: tuple[str, str]
    ) -> None:
        """An answer that is whole stays whole, whatever is said after it."""
        raw = [*events(Scenario()), last]
        assert end_of(await run(messages_server, a_call(raw=raw))).finish_reason == "stop"

    async def test_a_gateways_own_events(self, messages_server: MessagesServer) -> None:
        """Without a name they may be anything; the answer is whole, and the connection is kept."""
        told = events(Scenario())
        raw = [*told[:3], ("", "ping"), *told[3:], ("", "[DONE]")]
        async with an_adapter(messages_server) as adapter:
            for _ in range(2):
                assert text_of(await drain(adapter, a_call(raw=raw))) == TEXT
        assert messages_server.connections == 1

    async def test_counts_that_are_texts(self, messages_server: MessagesServer) -> None:
        """A number is one in quotation marks too."""
        told = {"output_tokens": "12"}
        usage = end_of(await run(messages_server, a_call(end_usage=told))).usage
        assert usage is not None
        assert usage.output_tokens == 12


def _runs(kinds: list[str]) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for kind in kinds:
        if runs and runs[-1][0] == kind:
            runs[-1] = kind, runs[-1][1] + 1
        else:
            runs.append((kind, 1))
    return runs


def test_the_recorded_answer_is_of_all_kinds() -> None:
    """The stream that is cut everywhere holds every kind of delta there is to cut."""
    sent = json.dumps(events(Scenario(blocks=ANSWER)))
    for kind in ("text_delta", "thinking_delta", "signature_delta", "input_json_delta", "ping"):
        assert kind in sent


async def test_an_adapter_drains_to_its_end(messages_server: MessagesServer) -> None:
    """One after the other, calls share a connection."""
    async with an_adapter(messages_server) as adapter:
        for _ in range(3):
            await drain(adapter, a_call())
    assert messages_server.connections == 1
