"""ChatGPT through the Responses API, where all goes well."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from responding import CALL_LINES, CALLS, KEY, a_call, adapter_for, run, run_to_error
from yielded import accepted_of, drain, end_of, text_of

from perdure.errors import NotConfigured
from perdure.events import Chunk, UsageReported
from perdure.task import Usage
from perdure_adapters import ChatGPTAdapter
from servers.responses import TEXT, USAGE, ResponsesServer, Scenario
from servers.responses import events as scripted

EVERYTHING: dict[str, Any] = {"reasoning": ["First I think.", "Then again."], "calls": CALLS}


class TestStreaming:
    """What comes, in which order, and how it ends."""

    async def test_text(self, responses: ResponsesServer) -> None:
        """It comes in pieces, after the response's name; each piece knows where it goes on."""
        events = await run(responses, a_call())
        accepted = accepted_of(events)
        assert (accepted.response_id, accepted.request_id) == ("resp_1", "req-1")
        assert (accepted.reattachable, accepted.cursor, accepted.note) == (True, "0", None)
        chunks = [event for event in events if isinstance(event, Chunk)]
        assert len(chunks) > 5
        assert text_of(events) == TEXT
        cursors = [int(chunk.cursor or "") for chunk in chunks]
        assert cursors == sorted(set(cursors))
        end = end_of(events)
        assert (end.finish_reason, end.platform_finish_reason) == ("stop", "completed")

    async def test_everything(self, responses: ResponsesServer) -> None:
        """Reasoning, text and tool calls are chunks of their kinds, in order."""
        events = await run(responses, a_call(**EVERYTHING))
        assert text_of(events, "reasoning") == "First I think.\n\nThen again."
        assert text_of(events) == TEXT
        assert text_of(events, "tool_call") == CALL_LINES
        kinds = [event.kind for event in events if isinstance(event, Chunk)]
        assert kinds == sorted(kinds, key=["reasoning", "text", "tool_call"].index)
        assert end_of(events).finish_reason == "tool_calls"

    async def test_usage(self, responses: ResponsesServer) -> None:
        """Totals include the cached and the reasoned; the platform's own words are kept."""
        usage = end_of(await run(responses, a_call())).usage
        assert usage == Usage(
            input_tokens=7,
            output_tokens=12,
            cache_read_tokens=3,
            cache_write_tokens=1,
            reasoning_tokens=5,
            raw=USAGE,
        )

    @pytest.mark.parametrize(
        ("scenario", "reason", "own"),
        [
            ({}, "stop", "completed"),
            ({"refusal": "I won't."}, "content_filter", "refusal"),
            ({"calls": CALLS}, "tool_calls", "completed"),
            ({"end": "incomplete"}, "length", "max_output_tokens"),
            ({"end": "incomplete", "incomplete": "content_filter"},) + ("content_filter",) * 2,
            ({"end": "incomplete", "incomplete": "max_messages"}, "length", "max_messages"),
            ({"end": "incomplete", "incomplete": None}, "length", "incomplete"),
        ],
    )
    async def test_finish_reasons(
        self, responses: ResponsesServer, scenario: dict[str, Any], reason: str, own: str
    ) -> None:
        """They are translated to the common words, the platform's own kept beside them."""
        end = end_of(await run(responses, a_call(**scenario)))
        assert (end.finish_reason, end.platform_finish_reason) == (reason, own)

    async def test_a_refusal_is_text(self, responses: ResponsesServer) -> None:
        """What the model says instead is the output."""
        assert text_of(await run(responses, a_call(refusal="I would rather not."))) == (
            "I would rather not."
        )

    async def test_usage_on_the_way(self, responses: ResponsesServer) -> None:
        """A failed response reports what it used before the error."""
        call = a_call(end="failed", error={"code": "server_error", "message": "boom"})
        seen, _ = await run_to_error(responses, call)
        assert isinstance(seen[-1], UsageReported)

    async def test_text_that_only_the_end_holds(self, responses: ResponsesServer) -> None:
        """A server that streams no deltas gives its text all the same."""
        bare = [e for e in scripted(Scenario(calls=CALLS)) if "delta" not in json.loads(e)["type"]]
        events = await run(responses, a_call(raw=bare))
        assert text_of(events) == TEXT
        assert text_of(events, "tool_call") == CALL_LINES

    async def test_calls_that_come_at_once_keep_their_lines(
        self, responses: ResponsesServer
    ) -> None:
        """Pieces of two calls in turn don't get mixed up."""
        plain = [json.loads(e) for e in scripted(Scenario(text="", calls=CALLS))]
        first = [e for e in plain if e.get("output_index") == 0]
        second = [e for e in plain if e.get("output_index") == 1]
        mixed = [e for pair in zip(first, second, strict=False) for e in pair]
        mixed += first[len(second) :]
        raw = [json.dumps(e) for e in [*plain[:2], *mixed, plain[-1]]]
        assert text_of(await run(responses, a_call(raw=raw)), "tool_call") == CALL_LINES

    async def test_it_does_not_wait_for_the_connections_end(
        self, responses: ResponsesServer
    ) -> None:
        """After the end marker the answer is there, though the server goes on sending nothing."""
        raw = [*scripted(Scenario()), '{"type":"late"}']
        began = time.monotonic()
        await run(responses, a_call(raw=raw, stall_after=len(raw) - 1), background=False)
        assert time.monotonic() - began < 5


class TestBackground:
    """Asking for it, and being refused."""

    async def test_it_is_asked_for(self, responses: ResponsesServer) -> None:
        """Background needs storing; both are sent."""
        await run(responses, a_call())
        body = responses.posts[0].body
        assert (body["background"], body["store"], body["stream"]) == (True, True, True)

    @pytest.mark.parametrize(
        ("options", "how"),
        [
            ({}, {"background": False}),
            ({}, {"settings": {"background": False}}),
            ({"background": False}, {}),
            ({"store": False}, {}),
        ],
    )
    async def test_it_can_be_switched_off(
        self, responses: ResponsesServer, options: dict[str, Any], how: dict[str, Any]
    ) -> None:
        """By argument, by setting, by the task; nothing is stored at the platform then."""
        events = await run(responses, a_call(options=options), **how)
        assert "background" not in responses.posts[0].body
        assert responses.posts[0].body["store"] is False
        accepted = accepted_of(events)
        assert (accepted.reattachable, accepted.cursor, accepted.note) == (False, None, None)
        assert not any(event.cursor for event in events if isinstance(event, Chunk))

    async def test_it_can_be_stored_all_the_same(self, responses: ResponsesServer) -> None:
        """Where the task says so: somebody may want to look it up there."""
        await run(responses, a_call(options={"background": False, "store": True}))
        assert responses.posts[0].body["store"] is True

    async def test_a_task_can_switch_it_on(self, responses: ResponsesServer) -> None:
        """Where the adapter was made without, the task's option counts."""
        call = a_call(options={"background": True})
        assert accepted_of(await run(responses, call, background=False)).reattachable

    @pytest.mark.parametrize(
        "words",
        [
            "Background mode is not supported for zero data retention organizations.",
            "Unknown parameter: 'background'.",
            "'store' must be false",
        ],
    )
    async def test_a_platform_that_refuses_it(self, responses: ResponsesServer, words: str) -> None:
        """It is used plainly from then on, and the log says so each time."""
        async with adapter_for(responses) as adapter:
            for _ in range(2):
                events = [event async for event in adapter.run(a_call(refuses=words))]
                accepted = accepted_of(events)
                assert not accepted.reattachable
                assert words in (accepted.note or "")
                assert text_of(events) == TEXT
        asked = [post.body.get("background") for post in responses.posts]
        assert asked == [True, None, None]
        assert responses.generations.total() == 2

    async def test_a_refusal_does_not_touch_what_runs(self, responses: ResponsesServer) -> None:
        """A response that was taken into the background stays one, though another is refused."""
        async with adapter_for(responses) as adapter:
            taken = asyncio.create_task(drain(adapter, a_call(first_delay=0.3)))
            await asyncio.to_thread(responses.wait_until_open, 1)
            await drain(adapter, a_call(refuses="no background for this model"))
            accepted = accepted_of(await taken)
        assert accepted.reattachable
        assert accepted.note is None

    async def test_a_platform_that_ignores_it(self, responses: ResponsesServer) -> None:
        """What doesn't say that it runs in the background can't be picked up; the log says so."""
        accepted = accepted_of(await run(responses, a_call(ignores_background=True)))
        assert not accepted.reattachable
        assert accepted.cursor is None
        assert "can't be picked up" in (accepted.note or "")


class TestStopping:
    """Cancelling."""

    @pytest.mark.parametrize("background", [True, False])
    @pytest.mark.parametrize("silence", [{"first_delay": 30}, {"stall_after": 5}, {"delay": 0.3}])
    async def test_cancelling_closes_the_connection(
        self, responses: ResponsesServer, silence: dict[str, float], background: bool
    ) -> None:
        """Within a quarter of a second, whatever it waits for; the best of three rounds counts."""
        took: list[float] = []
        async with adapter_for(responses, background=background) as adapter:

            async def read() -> None:
                async for _ in adapter.run(a_call(**silence)):
                    pass

            for _ in range(3):
                reading = asyncio.create_task(read())
                await asyncio.to_thread(responses.wait_until_open, 1)
                await asyncio.sleep(0.05)
                began = time.monotonic()
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
                await asyncio.to_thread(responses.wait_until_idle)
                took.append(time.monotonic() - began)
        assert min(took) < 0.25
        assert responses.dropped == 3

    async def test_stop_ends_what_goes_on_in_the_background(
        self, responses: ResponsesServer
    ) -> None:
        """Leaving does not end it; `stop` does, and doing so twice is no error."""
        async with adapter_for(responses) as adapter:
            stream = adapter.run(a_call(stall_after=8))
            accepted = await anext(stream)
            await stream.aclose()
            await asyncio.to_thread(responses.wait_until_idle)
            assert responses.working == 1
            id_ = accepted.response_id  # type: ignore[attr-defined]
            for _ in range(2):
                await adapter.stop(id_)
            await adapter.stop("resp_unknown")
        assert responses.cancelled == [id_, id_]


class TestConfiguration:
    """Keys, addresses, and what is shown of them."""

    def test_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the SDK reads is read; without a key the adapter says what to set."""
        with pytest.raises(NotConfigured, match="OPENAI_API_KEY"):
            ChatGPTAdapter().check()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        ChatGPTAdapter().check()
        assert "api.openai.com" in repr(ChatGPTAdapter())
        assert KEY not in repr(ChatGPTAdapter())
        monkeypatch.setenv("OPENAI_BASE_URL", "http://gateway.test/v1")
        assert "gateway.test" in repr(ChatGPTAdapter())

    def test_a_local_server_needs_no_key(self) -> None:
        """An address somebody gave may do without."""
        ChatGPTAdapter(base_url="http://127.0.0.1:1/v1").check()

    def test_a_file_can_not_send_the_key_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An address that only `perdure.toml` names gets the key that stands there, no other."""
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        with pytest.raises(NotConfigured, match="not sent"):
            ChatGPTAdapter(settings={"base_url": "http://elsewhere.test/v1"}).check()
        ChatGPTAdapter(settings={"base_url": "http://elsewhere.test/v1", "api_key": "x"}).check()

    async def test_organization_and_project(
        self, responses: ResponsesServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By environment or argument, they go along; the key as a bearer token."""
        monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
        await run(responses, a_call(), project="proj-1")
        headers = responses.posts[0].headers
        assert (headers["openai-organization"], headers["openai-project"]) == ("org-1", "proj-1")
        assert headers["authorization"] == f"Bearer {KEY}"

    def test_what_can_not_be_is_refused(self) -> None:
        """Unknown settings and values are named."""
        with pytest.raises(NotConfigured, match="did you mean 'background'"):
            ChatGPTAdapter(settings={"backgrund": True})
        with pytest.raises(NotConfigured, match="api: must be one of"):
            ChatGPTAdapter(api="completions")

    def test_capabilities_are_those_of_the_way_it_is_used(self) -> None:
        """Only what goes on in the background can be picked up; chat takes no PDF."""
        assert ChatGPTAdapter().capabilities.reattach
        assert not ChatGPTAdapter(background=False).capabilities.reattach
        chat = ChatGPTAdapter(api="chat").capabilities
        assert not chat.reattach
        assert "pdf" not in chat.files
