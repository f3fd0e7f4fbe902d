"""The adapter to OpenAI-compatible servers: answers, as events."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from chatting import a_call, failure, run
from yielded import drain, end_of, text_of

from perdure.errors import (
    InvalidRequest,
    Overloaded,
    StreamTruncated,
)
from perdure.events import Accepted, Chunk, Event, UsageReported
from perdure.task import Usage
from perdure_adapters import CompatibleAdapter
from servers.chat import TEXT, ChatServer, Scenario, events


class TestAnswer:
    """A good answer, as events."""

    async def test_it_streams_text_and_usage(self, chat_server: ChatServer) -> None:
        """Name, pieces, end: what the server sent, with its id, model and count of tokens."""
        seen = await run(chat_server, a_call())
        assert seen[0] == Accepted(response_id="chat-1", request_id="req-1", model="m")
        assert text_of(seen) == TEXT
        assert len([e for e in seen if isinstance(e, Chunk)]) > 5
        end = end_of(seen)
        assert (end.finish_reason, end.platform_finish_reason) == ("stop", "stop")
        assert end.usage is not None
        assert (end.usage.input_tokens, end.usage.output_tokens) == (7, 12)
        assert end.usage.raw == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}

    async def test_pieces_arrive_as_they_are_sent(self, chat_server: ChatServer) -> None:
        """The first piece is there long before the last is sent."""
        async with CompatibleAdapter(chat_server.url) as adapter:
            arrived = [
                time.monotonic()
                async for event in adapter.run(a_call(delay=0.02))
                if isinstance(event, Chunk)
            ]
        assert arrived[-1] - arrived[0] > 0.02 * (len(arrived) - 2)

    @pytest.mark.parametrize(
        ("sent", "normal"),
        [
            ("stop", "stop"),
            ("length", "length"),
            ("tool_calls", "tool_calls"),
            ("function_call", "tool_calls"),
            ("content_filter", "content_filter"),
            ("max_tokens", "length"),
            ("eos", "stop"),
            ("STOP", "stop"),
        ],
    )
    async def test_finish_reasons(self, chat_server: ChatServer, sent: str, normal: str) -> None:
        """They are put into the common words, the server's own beside them."""
        end = end_of(await run(chat_server, a_call(finish_reason=sent)))
        assert (end.finish_reason, end.platform_finish_reason) == (normal, sent)

    async def test_giving_up_is_no_success(self, chat_server: ChatServer) -> None:
        """A finish reason by which a server says that it failed is an error."""
        assert type(await failure(chat_server, a_call(finish_reason="error"))) is Overloaded

    @pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
    async def test_reasoning_is_its_own_kind(self, chat_server: ChatServer, field: str) -> None:
        """Both names that servers use for it are understood."""
        deltas = [{field: "Let me "}, {field: "think."}, {"content": "Four."}]
        seen = await run(chat_server, a_call(deltas=deltas))
        assert text_of(seen, "reasoning") == "Let me think."
        assert text_of(seen) == "Four."

    async def test_content_in_parts(self, chat_server: ChatServer) -> None:
        """Servers that send content as a list of typed parts are understood."""
        thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
        deltas = [{"content": [thinking]}, {"content": [{"type": "text", "text": "Four."}]}]
        seen = await run(chat_server, a_call(deltas=deltas))
        assert (text_of(seen, "reasoning"), text_of(seen)) == ("Hm.", "Four.")

    async def test_a_refusal_is_text_with_its_own_end(self, chat_server: ChatServer) -> None:
        """A refusal is kept as what was said, and the finish reason says what it is."""
        seen = await run(chat_server, a_call(deltas=[{"refusal": "I can't "}, {"refusal": "say."}]))
        assert text_of(seen) == "I can't say."
        assert end_of(seen).finish_reason == "content_filter"

    async def test_tool_calls_are_lines_of_json(self, chat_server: ChatServer) -> None:
        """Each call is one object, streamed as its arguments come, however servers number them."""
        deltas = [
            _called(0, "a", "weather", ""),
            _called(0, None, None, '{"city": '),
            _called(0, None, None, '"Ulm"}'),
            _called(1, "b", "time", '{"zone":"CET"}'),
            _called(1, "c", "now", None),
        ]
        seen = await run(chat_server, a_call(deltas=deltas, finish_reason="tool_calls"))
        assert len([e for e in seen if isinstance(e, Chunk) and e.kind == "tool_call"]) > 3
        assert [json.loads(line) for line in text_of(seen, "tool_call").splitlines()] == [
            {"id": "a", "name": "weather", "arguments": {"city": "Ulm"}},
            {"id": "b", "name": "time", "arguments": {"zone": "CET"}},
            {"id": "c", "name": "now", "arguments": {}},
        ]
        assert end_of(seen).finish_reason == "tool_calls"

    async def test_numbers_that_are_texts(self, chat_server: ChatServer) -> None:
        """A number is one in quotation marks too, of a call as of tokens."""
        rest: dict[str, Any] = _called(0, None, None, '"Ulm"}')
        rest["tool_calls"][0]["index"] = "0"
        deltas = [_called(0, "a", "weather", '{"city": '), rest]
        usage = {"prompt_tokens": "7", "completion_tokens": 2.0, "total_tokens": "x"}
        seen = await run(chat_server, a_call(deltas=deltas, usage=usage))
        assert json.loads(text_of(seen, "tool_call"))["arguments"] == {"city": "Ulm"}
        told = end_of(seen).usage
        assert told is not None
        assert (told.input_tokens, told.output_tokens) == (7, 2)

    @pytest.mark.parametrize("id_", [None, "a"])
    async def test_calls_whose_pieces_are_mixed_up(
        self, chat_server: ChatServer, id_: str | None
    ) -> None:
        """A piece of a call that was written down as whole makes no other call of it."""
        deltas = [
            _called(0, "a", "weather", ""),
            _called(1, "b", "time", ""),
            _called(0, id_, None, '{"city": "Ulm"}'),
        ]
        call = a_call(deltas=deltas, finish_reason="tool_calls")
        assert type(await failure(chat_server, call)) is StreamTruncated

    async def test_what_came_with_a_piece_that_fits_nowhere(self, chat_server: ChatServer) -> None:
        """Text that stands in one delta with a piece of a closed call is kept."""
        deltas = [
            _called(0, "a", "weather", ""),
            _called(1, "b", "time", ""),
            {"content": "Wait.", **_called(0, None, None, '{"city": "Ulm"}')},
        ]
        seen: list[Event] = []
        async with CompatibleAdapter(chat_server.url) as adapter:
            with pytest.raises(StreamTruncated):
                await drain(adapter, a_call(deltas=deltas, finish_reason="tool_calls"), seen)
        assert text_of(seen) == "Wait."

    async def test_an_empty_answer_is_an_answer(self, chat_server: ChatServer) -> None:
        """A model may say nothing at all and be done."""
        seen = await run(chat_server, a_call(deltas=[]))
        assert text_of(seen) == ""
        end_of(seen)

    @pytest.mark.parametrize(
        "odd",
        [
            '{"choices": [{"delta": {"tool_calls": [5, "x", null, []]}}]}',
            '{"choices": [{"delta": {"tool_calls": [{"index": [1], "function": {"name": {}}}]}}]}',
            '{"choices": [{"delta": {"content": {"a": 1}}}], "usage": [3]}',
            "5",
            "[]",
            "null",
            '"text"',
            "{}",
            '{"choices": 5}',
            '{"choices": [null, 7, {}]}',
            '{"choices": [{"index": 0, "delta": null}]}',
            '{"choices": [{"index": 0, "delta": {"content": 5, "tool_calls": [3]}}]}',
            '{"choices": [{"index": 1, "delta": {"content": "another choice"}}]}',
            '{"usage": 7}',
            '{"usage": {"prompt_tokens": "many", "completion_tokens": -1}}',
        ],
    )
    async def test_odd_chunks_do_no_harm(self, chat_server: ChatServer, odd: str) -> None:
        """What makes no sense in a chunk is passed over, or is an error; never a wrong text."""
        raw = events(Scenario())
        seen = await run(chat_server, a_call(raw=[*raw[:3], odd, *raw[3:]]))
        assert text_of(seen) == TEXT


class TestUsage:
    """Tokens, as servers report them."""

    async def test_totals_and_parts(self, chat_server: ChatServer) -> None:
        """Totals include the cached and the reasoned; the parts have fields of their own."""
        reported = {
            "prompt_tokens": 100,
            "completion_tokens": 30,
            "total_tokens": 130,
            "prompt_tokens_details": {"cached_tokens": 64},
            "completion_tokens_details": {"reasoning_tokens": 20},
        }
        end = end_of(await run(chat_server, a_call(usage=reported)))
        assert end.usage == Usage(
            input_tokens=100,
            output_tokens=30,
            cache_read_tokens=64,
            reasoning_tokens=20,
            raw=reported,
        )

    async def test_reasoning_that_was_left_out_is_counted(self, chat_server: ChatServer) -> None:
        """Where a server's output leaves reasoning out, its total gives it away."""
        reported = {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 35,
            "completion_tokens_details": {"reasoning_tokens": 20},
        }
        usage = end_of(await run(chat_server, a_call(usage=reported))).usage
        assert usage is not None
        assert usage.output_tokens == 25

    async def test_it_is_told_on_the_way(self, chat_server: ChatServer) -> None:
        """A server that counts with every piece is heard with every piece."""
        seen = await run(chat_server, a_call(usage_everywhere=True))
        counts = [e.usage.output_tokens for e in seen if isinstance(e, UsageReported)]
        assert counts == list(range(len(counts)))
        assert len(counts) > 5

    async def test_a_server_that_reports_none(self, chat_server: ChatServer) -> None:
        """No usage is unknown usage, not none used."""
        assert end_of(await run(chat_server, a_call(usage=None))).usage is None

    async def test_a_server_that_does_not_know_how(self, chat_server: ChatServer) -> None:
        """It is asked again without, once; later calls don't ask for usage at all."""
        async with CompatibleAdapter(chat_server.url) as adapter:
            first = [event async for event in adapter.run(a_call(knows_usage=False))]
            await asyncio.gather(*(drain(adapter, a_call(knows_usage=False)) for _ in range(3)))
        assert text_of(first) == TEXT
        assert end_of(first).usage is None
        assert isinstance(first[0], Accepted)
        assert first[0].note == "the server can't report usage in a stream"
        asked = ["stream_options" in seen.body for seen in chat_server.chats]
        assert asked == [True, False, False, False, False]

    async def test_another_refusal_is_not_taken_for_that(self, chat_server: ChatServer) -> None:
        """A 400 about something else is an invalid request, and not tried again."""
        refusal = {"status": 400, "error": {"message": "temperature is too hot"}}
        assert type(await failure(chat_server, a_call(**refusal))) is InvalidRequest
        assert len(chat_server.chats) == 1


def _called(index: int, id_: str | None, name: str | None, arguments: str | None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}
