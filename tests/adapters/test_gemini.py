"""What Gemini says, as events: text, thoughts, calls, usage, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import sys
import time
from typing import Any

import pytest
from interacting import KEY, WAYS, a_call, adapter, failure, run
from yielded import end_of, text_of

from perdure.adapter import Resume
from perdure.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ContentRefused,
    InvalidRequest,
    NotConfigured,
    Overloaded,
    PlatformError,
    PlatformTimeout,
    RateLimited,
    StreamTruncated,
)
from perdure.events import Accepted, Chunk, Completed, Event, UsageReported
from perdure.task import Usage
from perdure_adapters import GeminiAdapter
from perdure_adapters._generate import FINISH_REASONS, generate_usage
from servers.chat import nobody_listens
from servers.gemini import TEXT, GeminiServer, Scenario, generate_events, interaction_events

CALLS: tuple[dict[str, Any], ...] = (
    {"id": "a", "name": "weather", "pieces": ['{"city": ', '"Ulm"}']},
    {"id": "b", "name": "time", "arguments": {"zone": "CET"}},
    {"id": "c", "name": "now"},
)
CALLED = [
    {"id": "a", "name": "weather", "arguments": {"city": "Ulm"}},
    {"id": "b", "name": "time", "arguments": {"zone": "CET"}},
    {"id": "c", "name": "now", "arguments": {}},
]
INTERACTIONS = ("background", "plain")


def lines_of(text: str) -> list[Any]:
    """Return the tool calls that a text holds, one a line."""
    return [json.loads(line) for line in text.splitlines()]


class TestStreaming:
    """What comes, in order, each in its kind."""

    @pytest.mark.parametrize("way", WAYS)
    async def test_text_and_thoughts(self, gemini_server: GeminiServer, way: str) -> None:
        """Thoughts are reasoning, text is text, and both come in pieces."""
        seen = await run(gemini_server, a_call(), way)
        assert text_of(seen) == TEXT
        assert text_of(seen, "reasoning") == "Let me think."
        assert len([e for e in seen if isinstance(e, Chunk)]) > 10
        assert end_of(seen).finish_reason == "stop"
        assert gemini_server.generations == 1

    @pytest.mark.parametrize("way", WAYS)
    async def test_function_calls_are_lines_of_json(
        self, gemini_server: GeminiServer, way: str
    ) -> None:
        """Each call is one object, whether its arguments come in pieces, at once, or not at all."""
        seen = await run(gemini_server, a_call(calls=CALLS), way)
        assert lines_of(text_of(seen, "tool_call")) == CALLED
        assert text_of(seen) == TEXT
        assert end_of(seen).finish_reason == "tool_calls"

    async def test_no_model_is_made_of_an_event(
        self, gemini_server: GeminiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not of those of a stream that is picked up, either: it takes longer than all the rest."""
        made: list[object] = []
        unmarshal = "google.genai._gaos.interactions.unmarshal_json_response"
        importlib.import_module("google.genai._gaos.interactions")
        monkeypatch.setattr(unmarshal, lambda *args, **_: made.append(args))
        seen = await run(gemini_server, a_call())
        cursor = next(e.cursor for e in seen if isinstance(e, Chunk))
        resume = Resume(mode="reattach", response_id="int_1", cursor=cursor)
        assert text_of(await run(gemini_server, a_call(resume))) == TEXT
        assert not made

    async def test_calls_in_loose_forms(self, gemini_server: GeminiServer) -> None:
        """Numbers of steps that are texts, and arguments that don't say what they are."""
        begun, *_ = interaction_events(Scenario())
        call = {"type": "function_call", "id": "a", "name": "weather"}
        raw = [
            begun,
            {"event_type": "step.start", "index": 1, "step": call},
            {"event_type": "step.delta", "index": "1", "delta": {"arguments": '{"city": '}},
            {"event_type": "step.delta", "index": 1.0, "delta": {"arguments": '"Ulm"}'}},
            {"event_type": "step.stop", "index": "1"},
            {"event_type": "interaction.completed", "interaction": {"status": "requires_action"}},
        ]
        seen = await run(gemini_server, a_call(raw=raw))
        assert lines_of(text_of(seen, "tool_call")) == CALLED[:1]

    async def test_arguments_come_as_deltas(self, gemini_server: GeminiServer) -> None:
        """A call's pieces aren't kept back until it is whole."""
        seen = await run(gemini_server, a_call(calls=CALLS[:1]))
        pieces = [e.text for e in seen if isinstance(e, Chunk) and e.kind == "tool_call"]
        assert pieces[1:3] == ['{"city": ', '"Ulm"}']

    async def test_calls_that_come_at_once_keep_their_lines(
        self, gemini_server: GeminiServer
    ) -> None:
        """A call with its arguments is kept whatever comes before its end, or in its place."""
        begun, *_ = interaction_events(Scenario())
        calls = [{"type": "function_call", **call} for call in CALLED[:2]]
        said = {"type": "text", "text": "Now."}
        raw = [
            begun,
            {"event_type": "step.start", "index": 0, "step": {"type": "model_output"}},
            {"event_type": "step.start", "index": 1, "step": calls[0]},
            {"event_type": "step.start", "index": 2, "step": calls[1]},
            {"event_type": "step.delta", "index": 0, "delta": said, "event_id": "late"},
            {"event_type": "step.stop", "index": 1},
            {"event_type": "interaction.completed", "interaction": {"status": "requires_action"}},
        ]
        seen = await run(gemini_server, a_call(raw=raw))
        assert lines_of(text_of(seen, "tool_call")) == CALLED[:2]
        kinds = [e.kind for e in seen if isinstance(e, Chunk)]
        assert kinds == ["tool_call", "tool_call", "text"]  # whoever goes on after "late" has both

    async def test_it_is_accepted_at_once(self, gemini_server: GeminiServer) -> None:
        """The interaction's name is known before its first word, and every chunk has a cursor."""
        seen = await run(gemini_server, a_call())
        accepted = seen[0]
        assert isinstance(accepted, Accepted)
        assert (accepted.response_id, accepted.model) == ("int_1", "gemini-3.8-flash")
        assert accepted.reattachable
        assert accepted.cursor
        cursors = [e.cursor for e in seen if isinstance(e, Chunk)]
        assert all(cursors)
        assert len(set(cursors)) == len(cursors)

    @pytest.mark.parametrize("way", ["plain", "generate"])
    async def test_what_cannot_be_picked_up_says_so(
        self, gemini_server: GeminiServer, way: str
    ) -> None:
        """Without the background there is no cursor, and nothing is stored."""
        seen = await run(gemini_server, a_call(), way)
        assert isinstance(seen[0], Accepted)
        assert not seen[0].reattachable
        assert not any(e.cursor for e in seen if isinstance(e, Accepted | Chunk))
        assert gemini_server.asked[0].body.get("store", False) is False

    async def test_a_connection_that_stays_open(
        self, gemini_server: GeminiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once the finish reason was there, nobody waits for long for what may never come."""
        monkeypatch.setattr("perdure_adapters.gemini.LAST_WORDS", 0.2)
        began = time.monotonic()
        chunks = len(generate_events(Scenario()))
        call = a_call(stall_after=chunks)
        end_of(await run(gemini_server, call, "generate", read_timeout=10))
        assert time.monotonic() - began < 5

    async def test_what_a_newer_api_adds_is_passed_over(self, gemini_server: GeminiServer) -> None:
        """Events, steps and deltas nobody here has heard of do no harm."""
        raw: list[Any] = list(interaction_events(Scenario()))
        raw[3:3] = [
            {"event_type": "interaction.dreamt", "event_id": "x"},
            {"event_type": "step.start", "index": 7, "step": {"type": "dream"}},
            {"event_type": "step.delta", "index": 7, "delta": {"type": "dream", "text": "zzz"}},
            {"event_type": "step.delta", "index": 0, "delta": None},
        ]
        seen = await run(gemini_server, a_call(raw=raw))
        assert text_of(seen) == TEXT

    @pytest.mark.parametrize(
        "odd",
        [
            "5",
            "[]",
            '"text"',
            "{}",
            "not even JSON",
            '{"event_type": 5}',
            '{"event_type": "step.delta", "index": 1, "delta": {"type": "text", "text": 5}}',
            '{"event_type": "step.delta", "delta": {"type": "arguments_delta", "arguments": "{}"}}',
        ],
    )
    async def test_what_cannot_be_read_is_no_success(
        self, gemini_server: GeminiServer, odd: str
    ) -> None:
        """The SDK passes over what it can't read; its text would be missing from the answer."""
        raw = interaction_events(Scenario())
        call = a_call(raw=[*raw[:5], odd, *raw[5:]])
        assert type(await failure(gemini_server, call)) is StreamTruncated


class TestUsage:
    """Tokens, as the platform reports them."""

    @pytest.mark.parametrize("way", WAYS)
    async def test_totals_and_parts(self, gemini_server: GeminiServer, way: str) -> None:
        """Input has the cached in it, output the thoughts; the raw words are kept."""
        usage = end_of(await run(gemini_server, a_call(), way)).usage
        assert usage is not None
        assert usage.raw
        assert usage.model_copy(update={"raw": None}) == Usage(
            input_tokens=7, output_tokens=15, cache_read_tokens=2, reasoning_tokens=3
        )

    @pytest.mark.parametrize("way", WAYS)
    async def test_it_is_told_on_the_way(self, gemini_server: GeminiServer, way: str) -> None:
        """Where it is told with each step or chunk it is heard with each."""
        seen = await run(gemini_server, a_call(usage_everywhere=True), way)
        counts = [e.usage.output_tokens or 0 for e in seen if isinstance(e, UsageReported)]
        assert len(counts) > 1
        assert counts == sorted(counts)

    @pytest.mark.parametrize("count", [1e300, 12345678901234567890, "9" * 18, True, -1, "many"])
    async def test_what_is_no_count(self, gemini_server: GeminiServer, count: object) -> None:
        """What can't be a number of tokens is unknown; the answer is an answer all the same."""
        raw = [json.loads(event) for event in interaction_events(Scenario())]
        raw[-1]["interaction"]["usage"] = {"total_output_tokens": count, "total_thought_tokens": 1}
        events = [json.dumps(event) for event in raw]
        usage = end_of(await run(gemini_server, a_call(raw=events))).usage
        assert usage is not None
        assert usage.output_tokens in (None, int("9" * 18) + 1)

    async def test_counts_of_other_forms(self, gemini_server: GeminiServer) -> None:
        """Large numbers travel as texts in Google's JSON; the raw form stays what was sent."""
        raw = [json.loads(event) for event in interaction_events(Scenario())]
        sent = {"total_input_tokens": "7", "total_output_tokens": 12.0, "total_tokens": None}
        raw[-1]["interaction"]["usage"] = sent
        usage = end_of(await run(gemini_server, a_call(raw=raw))).usage
        assert usage == Usage(input_tokens=7, output_tokens=12, raw=sent)

    @pytest.mark.parametrize(
        ("told", "output"),
        [
            ({"total_token_count": 9}, 0),
            ({"total_token_count": 12, "tool_use_prompt_token_count": 3}, 0),
            ({"total_token_count": 11}, None),
            ({}, None),
            ({"total_token_count": 12, "thoughts_token_count": 3}, 3),
        ],
    )
    def test_nought_is_left_out(self, told: dict[str, int], output: int | None) -> None:
        """An answer without tokens, as one that was refused, is known by the sum."""
        usage = generate_usage({"prompt_token_count": 9, **told})
        assert usage.output_tokens == output

    @pytest.mark.parametrize("way", WAYS)
    async def test_none_is_unknown(self, gemini_server: GeminiServer, way: str) -> None:
        """No usage is unknown usage, not none used."""
        assert end_of(await run(gemini_server, a_call(usage=False), way)).usage is None


class TestEndings:
    """How it ended, in the words all platforms share, the platform's own beside them."""

    @pytest.mark.parametrize("way", INTERACTIONS)
    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            ("completed", "stop"),
            ("requires_action", "tool_calls"),
            ("incomplete", "length"),
            ("budget_exceeded", "length"),
            ("requires_continuation", "length"),
        ],
    )
    async def test_states_of_interactions(
        self, gemini_server: GeminiServer, way: str, status: str, reason: str
    ) -> None:
        """Each state with which an interaction may have an answer is its finish reason."""
        end = end_of(await run(gemini_server, a_call(end=status), way))
        assert (end.finish_reason, end.platform_finish_reason) == (reason, status)
        assert gemini_server.generations == 1  # no continuation that nobody sees

    @pytest.mark.parametrize("way", INTERACTIONS)
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            ("failed", Overloaded),
            ("cancelled", InvalidRequest),
            ("queued", StreamTruncated),
            ("in_progress", StreamTruncated),
            ("idle", StreamTruncated),
            ("dreaming", StreamTruncated),
        ],
    )
    async def test_states_that_are_no_answer(
        self, gemini_server: GeminiServer, way: str, status: str, kind: type
    ) -> None:
        """What failed is over; what is still under way, or unheard of, is no success."""
        error = await failure(gemini_server, a_call(end=status), way)
        assert type(error) is kind
        assert error.response_over == (status in ("failed", "cancelled"))

    async def test_a_failed_step_says_why(self, gemini_server: GeminiServer) -> None:
        """The error of a step is the interaction's."""
        raw = [json.loads(event) for event in interaction_events(Scenario(end="failed"))]
        problem = {"code": 8, "message": "out of tokens"}
        raw[-1]["interaction"]["steps"] = [{"type": "model_output", "error": problem}]
        error = await failure(gemini_server, a_call(raw=raw))
        assert "out of tokens" in error.message
        assert error.response_over

    @pytest.mark.parametrize("nothing", [None, "", {}, {"code": None, "message": None}, {"x": 1}])
    async def test_an_error_of_a_step_that_says_nothing(
        self, gemini_server: GeminiServer, nothing: object
    ) -> None:
        """A complete answer, which has its price, isn't thrown away for it."""
        raw = [json.loads(event) for event in interaction_events(Scenario())]
        raw[-1]["interaction"]["steps"] = [{"type": "model_output", "error": nothing}]
        assert end_of(await run(gemini_server, a_call(raw=raw))).finish_reason == "stop"

    async def test_every_finish_reason_of_the_sdk_is_known(self) -> None:
        """A new release of the SDK may add some; this says so."""
        from google.genai.types import FinishReason

        assert {reason.value for reason in FinishReason} == set(FINISH_REASONS)
        assert len(FINISH_REASONS) == 24

    @pytest.mark.parametrize("reason", sorted(FINISH_REASONS))
    async def test_finish_reasons(self, gemini_server: GeminiServer, reason: str) -> None:
        """Each is the common word for it, or the error that it is; the text is kept either way."""
        seen: list[Event] = []
        expected = FINISH_REASONS[reason]
        if isinstance(expected, str):
            end = end_of(await run(gemini_server, a_call(end=reason), "generate", seen))
            assert (end.finish_reason, end.platform_finish_reason) == (expected, reason)
        else:
            with pytest.raises(expected, match=reason):
                await run(gemini_server, a_call(end=reason), "generate", seen)
        assert text_of(seen) == TEXT
        assert gemini_server.generations == 1

    @pytest.mark.parametrize(
        ("reason", "expected"),
        [
            ("VIDEO_SAFETY", "content_filter"),
            ("MAX_THOUGHTS", "length"),
            ("BORED", Overloaded),
        ],
    )
    @pytest.mark.filterwarnings("ignore:.*is not a valid FinishReason:UserWarning")
    async def test_unknown_finish_reasons_are_suspicious(
        self, gemini_server: GeminiServer, reason: str, expected: str | type[PlatformError]
    ) -> None:
        """What nobody here has heard of is never taken for success."""
        call = a_call(end=reason)
        if isinstance(expected, str):
            end = end_of(await run(gemini_server, call, "generate"))
            assert (end.finish_reason, end.platform_finish_reason) == (expected, reason)
        else:
            assert type(await failure(gemini_server, call, "generate")) is expected

    @pytest.mark.parametrize("why", ["SAFETY", "PROHIBITED_CONTENT", "OTHER"])
    async def test_a_blocked_prompt(self, gemini_server: GeminiServer, why: str) -> None:
        """A prompt that is blocked is refused, for good, and the reason is told."""
        error = await failure(gemini_server, a_call(blocked=why), "generate")
        assert type(error) is ContentRefused
        assert why in error.message


class TestErrorEvents:
    """Errors inside a stream whose status was 200."""

    @pytest.mark.parametrize("way", INTERACTIONS)
    @pytest.mark.parametrize("after", [0, 1, 5, 12])
    @pytest.mark.parametrize(
        ("code", "kind"),
        [
            ("unavailable", Overloaded),
            ("https://errors.example/deadline_exceeded", PlatformTimeout),
            ("invalid_argument", InvalidRequest),
            ("unauthenticated", AuthenticationFailed),
            ("prohibited_content", ContentRefused),
            ("503", Overloaded),
            (None, Overloaded),
            ("something new", Overloaded),
        ],
    )
    async def test_a_yielded_error_is_raised(
        self, gemini_server: GeminiServer, way: str, after: int, code: str | None, kind: type
    ) -> None:
        """The SDK hands it on like any event; here it is the error that its code says."""
        error = {"event_type": "error", "error": {"code": code, "message": f"{KEY} broke"}}
        call = a_call(error_after=after, error=error)
        assert type(await failure(gemini_server, call, way)) is kind

    @pytest.mark.parametrize("way", INTERACTIONS)
    @pytest.mark.parametrize(
        ("event", "kind", "message"),
        [
            ({"error": {"code": 8, "status": "UNAVAILABLE", "message": "m"}}, Overloaded, "m"),
            ({"error": {"code": "safety", "message": "m"}}, ContentRefused, "m"),
            ({"event_type": "error", "error": "mere words"}, Overloaded, "mere words"),
            ({"event_type": "error", "error": {}}, Overloaded, "without a message"),
            ({"event_type": "error", "error": [1]}, StreamTruncated, "unreadable"),
            ({"event_type": "error"}, StreamTruncated, "unreadable"),
            ({"event_type": 5, "delta": {}}, StreamTruncated, "unreadable"),
            ([1], StreamTruncated, "unreadable"),
            ("no JSON", StreamTruncated, "unreadable"),
        ],
    )
    async def test_errors_of_other_forms(
        self, gemini_server: GeminiServer, way: str, event: object, kind: type, message: str
    ) -> None:
        """A gateway leaves out what kind of event it is; what says nothing at all is no answer."""
        events: list[object] = list(interaction_events(Scenario()))
        error = await failure(gemini_server, a_call(raw=[*events[:4], event, *events[4:]]), way)
        assert type(error) is kind
        assert message in error.message

    @pytest.mark.parametrize("way", INTERACTIONS)
    @pytest.mark.parametrize("status", [201, 204, 302])
    async def test_nothing_at_all(self, gemini_server: GeminiServer, way: str, status: int) -> None:
        """A status that means no stream, without a body: another try would bring the same."""
        error = await failure(gemini_server, a_call(status=status, body=""), way)
        assert type(error) is InvalidRequest

    @pytest.mark.parametrize("over", [False, True])
    async def test_whether_the_interaction_is_over(
        self, gemini_server: GeminiServer, over: bool
    ) -> None:
        """An error may be the stream's alone: the platform is asked what became of the rest."""
        error = {"event_type": "error", "error": {"code": "internal", "message": "broke"}}
        call = a_call(error_after=6, error=error, fails_in_the_end=over, delay=0.001)
        assert (await failure(gemini_server, call)).response_over is over

    @pytest.mark.parametrize(
        ("code", "kind"), [(503, Overloaded), (500, Overloaded), (400, InvalidRequest)]
    )
    async def test_an_error_among_the_chunks(
        self, gemini_server: GeminiServer, code: int, kind: type
    ) -> None:
        """The other API sends an error object instead of a chunk."""
        error = {"error": {"code": code, "status": "WHATEVER", "message": "broke"}}
        call = a_call(error_after=4, error=error)
        assert type(await failure(gemini_server, call, "generate")) is kind


SLOW_DOWN: dict[str, Any] = {
    "code": 429,
    "status": "RESOURCE_EXHAUSTED",
    "message": f"slow {KEY} down",
    "details": [{"retryDelay": "3s"}],
}


class TestNoStream:
    """Status 200 and a whole body: a proxy does that, and Google now and then."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("indent", [None, 2])
    @pytest.mark.parametrize("listed", [False, True])
    async def test_an_error(
        self, gemini_server: GeminiServer, way: str, listed: bool, indent: int | None
    ) -> None:
        """It is the error that it says it is, with its words and the time to wait."""
        told: object = {"error": SLOW_DOWN}
        body = json.dumps([told] if listed else told, indent=indent)
        error = await failure(gemini_server, a_call(body=body), way)
        assert type(error) is RateLimited
        assert error.message.endswith(": slow *** down")
        assert (error.status, error.retry_after) == (429, 3.0)
        assert not error.response_over

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("told", "kind"),
        [
            ({"error": {"code": 403, "message": "why"}}, AuthenticationFailed),
            ({"error": {"status": "UNAVAILABLE", "message": "why"}}, Overloaded),
            (
                {"error": {"code": 8, "status": "INVALID_ARGUMENT", "message": "why"}},
                InvalidRequest,
            ),
            ({"error": {"code": True, "message": "why"}}, Overloaded),
            ({"error": {"code": "safety", "message": "why"}}, ContentRefused),
            ({"error": "why"}, Overloaded),
            ([{"error": "why"}], Overloaded),
        ],
    )
    async def test_errors_of_other_forms(
        self, gemini_server: GeminiServer, way: str, told: object, kind: type
    ) -> None:
        """A gateway's are less complete."""
        error = await failure(gemini_server, a_call(body=json.dumps(told)), way)
        assert type(error) is kind
        assert "why" in error.message

    async def test_an_error_in_the_place_of_the_rest(self, gemini_server: GeminiServer) -> None:
        """Whoever picks a stream up is told as well; what is gone has to begin anew."""
        whole = await run(gemini_server, a_call())
        assert isinstance(whole[0], Accepted)
        call = a_call(resume=Resume("reattach", "", whole[0].response_id, whole[0].cursor))
        gemini_server.no_stream = json.dumps([{"error": SLOW_DOWN}])
        assert type(await failure(gemini_server, call)) is RateLimited
        gone = {"code": 404, "status": "NOT_FOUND", "message": "no such interaction"}
        gemini_server.no_stream = json.dumps({"error": gone})
        error = await failure(gemini_server, call)
        assert type(error) is StreamTruncated
        assert error.response_over

    async def test_the_background_refused(self, gemini_server: GeminiServer) -> None:
        """The error is heard, whatever the status: it is asked once more, without."""
        refusal = {"error": {"code": 400, "message": "background=true is not supported here"}}
        await failure(gemini_server, a_call(body=json.dumps(refusal)))
        assert [bool(seen.body.get("background")) for seen in gemini_server.asked] == [True, False]

    @pytest.mark.parametrize("way", INTERACTIONS)
    @pytest.mark.parametrize(
        "body", ['{"id": "int_1", "status": "completed"}', "[]", "[5]", "5", "null", '{"error": 5}']
    )
    async def test_what_is_no_error(self, gemini_server: GeminiServer, way: str, body: str) -> None:
        """It is no answer either, and the next one would be the same."""
        error = await failure(gemini_server, a_call(body=body), way)
        assert type(error) is InvalidRequest
        assert "check the base URL" in error.message

    async def test_a_chunk(self, gemini_server: GeminiServer) -> None:
        """An answer that comes at once is an answer."""
        (chunk,) = generate_events(Scenario(text="Hi", thoughts=()))
        assert text_of(await run(gemini_server, a_call(body=chunk), "generate")) == "Hi"

    @pytest.mark.parametrize(
        "body", ["", "[", "[]", '{"er', '[{"error": {"message": "cut o', '{"error": 5}', "oops"]
    )
    async def test_what_is_neither(self, gemini_server: GeminiServer, body: str) -> None:
        """No chunk and no error is no success."""
        error = await failure(gemini_server, a_call(body=body or " "), "generate")
        assert type(error) is StreamTruncated

    async def test_a_stream_that_says_it_is_none(self, gemini_server: GeminiServer) -> None:
        """Its first chunk is there before its last, whatever its head calls it."""
        headers = {"content-type": "application/json"}
        call = a_call(headers=headers, stall_after=4)
        async with (
            adapter(gemini_server, "generate") as asked,
            contextlib.aclosing(asked.run(call)) as events,
        ):
            async for event in events:
                if isinstance(event, Chunk):
                    break


class TestPickingUp:
    """The very same interaction goes on after the cursor."""

    async def test_after_every_event(self, gemini_server: GeminiServer) -> None:
        """Wherever it is left: nothing is lost, nothing doubled, nothing generated again."""
        call = a_call(calls=CALLS)
        whole = await run(gemini_server, call)
        accepted = whole[0]
        assert isinstance(accepted, Accepted)
        places: list[tuple[int, str | None]] = [(1, accepted.cursor)]
        places += [(n, e.cursor) for n, e in enumerate(whole, start=1) if isinstance(e, Chunk)]
        async with adapter(gemini_server) as asked:
            for read, cursor in places:
                resume = Resume("reattach", text_of(whole[:read]), accepted.response_id, cursor)
                rest = [event async for event in asked.run(a_call(resume=resume))]
                for kind in ("text", "reasoning", "tool_call"):
                    parts = text_of(whole[:read], kind) + text_of(rest, kind)
                    assert parts == text_of(whole, kind), (kind, cursor)
                assert end_of(rest).finish_reason == "tool_calls"
                assert end_of(rest).usage == end_of(whole).usage
        assert gemini_server.generations == 1

    @pytest.mark.parametrize("replays", ["all", "last", "created"])
    async def test_a_server_that_says_it_again(
        self, gemini_server: GeminiServer, replays: str
    ) -> None:
        """From the beginning, from the last event on, or just its name: nothing comes twice."""
        gemini_server.replays = replays
        whole = await run(gemini_server, a_call(calls=CALLS))
        accepted = whole[0]
        assert isinstance(accepted, Accepted)
        places: list[tuple[int, str | None]] = [(1, accepted.cursor)]
        places += [(n, e.cursor) for n, e in enumerate(whole, start=1) if isinstance(e, Chunk)]
        for read, cursor in places:
            resume = Resume("reattach", text_of(whole[:read]), accepted.response_id, cursor)
            rest = await run(gemini_server, a_call(resume=resume))
            assert not any(isinstance(event, Accepted) for event in rest)
            for kind in ("text", "reasoning", "tool_call"):
                parts = text_of(whole[:read], kind) + text_of(rest, kind)
                assert parts == text_of(whole, kind), (kind, cursor)
            assert end_of(rest).finish_reason == "tool_calls"

    async def test_it_ended_while_nobody_listened(self, gemini_server: GeminiServer) -> None:
        """The rest is streamed all the same."""
        with pytest.raises(ConnectionLost):
            await run(gemini_server, a_call(cut_after=9, cut="abort"), into=(first := []))
        cursor = next(e.cursor for e in reversed(first) if isinstance(e, Chunk))
        await asyncio.to_thread(gemini_server.wait_until_over, "int_1")
        rest = await run(gemini_server, a_call(resume=Resume("reattach", "", "int_1", cursor)))
        assert text_of(first) + text_of(rest) == TEXT
        assert gemini_server.picked_up == [cursor]

    async def test_a_forgotten_interaction_begins_anew(self, gemini_server: GeminiServer) -> None:
        """What the platform doesn't know any more can't be picked up, but asked for again."""
        with pytest.raises(StreamTruncated):
            await run(gemini_server, a_call(cut_after=9, forgotten=True))
        error = await failure(gemini_server, a_call(resume=Resume("reattach", "", "int_1", "e-1")))
        assert (type(error), error.status) == (StreamTruncated, 404)
        assert error.retryable
        assert error.response_over

    async def test_a_platform_without_background(self, gemini_server: GeminiServer) -> None:
        """It is asked once; from then on plainly, and the log says so."""
        async with adapter(gemini_server) as asked:
            for _ in range(3):
                seen = [event async for event in asked.run(a_call(background="refused"))]
                assert isinstance(seen[0], Accepted)
                assert not seen[0].reattachable
                assert "can't be picked up" in (seen[0].note or "")
                assert text_of(seen) == TEXT
        assert ["background" in seen.body for seen in gemini_server.asked] == [True] + [False] * 3

    async def test_another_refusal_is_not_taken_for_that(self, gemini_server: GeminiServer) -> None:
        """A 400 about something else is an invalid request, and not tried again."""
        call = a_call(status=400, error={"message": "temperature is too hot"})
        assert type(await failure(gemini_server, call)) is InvalidRequest
        assert len(gemini_server.asked) == 1

    async def test_one_task_without_background(self, gemini_server: GeminiServer) -> None:
        """The option is perdure's own, and isn't sent."""
        seen = await run(gemini_server, a_call(options={"background": False}))
        assert isinstance(seen[0], Accepted)
        assert not seen[0].reattachable
        assert seen[0].note is None
        assert "background" not in gemini_server.asked[0].body

    async def test_what_must_not_be_stored(self, gemini_server: GeminiServer) -> None:
        """A task that says so isn't stored, and then there is nothing to pick up."""
        seen = await run(gemini_server, a_call(options={"store": False}))
        assert isinstance(seen[0], Accepted)
        assert not seen[0].reattachable
        assert gemini_server.asked[0].body["store"] is False


class TestStopping:
    """Being cancelled, and stopping what goes on without us."""

    @pytest.mark.parametrize("way", WAYS)
    async def test_cancelling_closes_the_connection(
        self, gemini_server: GeminiServer, way: str
    ) -> None:
        """Soon, as the server sees it; so does leaving. The best of three counts.

        What has arrived is read before the cancellation is noticed, and the SDK takes long for it.
        """
        took: dict[bool, list[float]] = {True: [], False: []}
        for leave in (True, False) * 3:
            async with adapter(gemini_server, way) as asked:
                stream = asked.run(a_call(stall_after=8))
                async for event in stream:
                    if isinstance(event, Chunk):
                        break
                began = time.monotonic()
                if leave:
                    await stream.aclose()
                else:
                    reading = asyncio.ensure_future(_rest(stream))
                    await asyncio.sleep(0)
                    reading.cancel()
                    await asyncio.wait({reading})
                    assert reading.cancelled()
                await asyncio.to_thread(gemini_server.wait_until_idle)
                took[leave].append(time.monotonic() - began)
        assert all(min(rounds) < 2 for rounds in took.values()), took

    async def test_stop_cancels_the_interaction(self, gemini_server: GeminiServer) -> None:
        """The platform's own cancel is called, and it generates nothing more."""
        async with adapter(gemini_server) as asked:
            with pytest.raises(StreamTruncated):
                async for _ in asked.run(a_call(cut_after=3, stall_after=4)):
                    pass
            await asked.stop("int_1")
        assert gemini_server.cancelled == ["int_1"]
        assert gemini_server.interactions["int_1"].status == "cancelled"

    async def test_stopping_what_is_not_there(self, gemini_server: GeminiServer) -> None:
        """It is an error like any other, for the engine to report."""
        async with adapter(gemini_server) as asked:
            with pytest.raises(InvalidRequest):
                await asked.stop("int_7")


class TestTime:
    """Waiting, and for how long."""

    @pytest.mark.parametrize("way", WAYS)
    async def test_a_silent_server(self, gemini_server: GeminiServer, way: str) -> None:
        """Who says nothing for too long is given up, before the first byte or after."""
        for silence in ({"first_delay": 30}, {"stall_after": 5}):
            error = await failure(gemini_server, a_call(**silence), way, read_timeout=0.2)
            assert type(error) is PlatformTimeout
            assert "0.2 s" in error.message

    @pytest.mark.parametrize("way", WAYS)
    async def test_nobody_listens(self, gemini_server: GeminiServer, way: str) -> None:
        """A refused connection is a lost one, and says where."""
        with nobody_listens() as url:
            error = await failure(gemini_server, a_call(), way, base_url=url)
        assert type(error) is ConnectionLost
        assert url in error.message

    @pytest.mark.parametrize("way", WAYS)
    async def test_a_slow_server_is_waited_for(self, gemini_server: GeminiServer, way: str) -> None:
        """A slow first byte is no error, as long as it comes in time."""
        seen = await run(gemini_server, a_call(first_delay=0.4), way, read_timeout=5)
        assert text_of(seen) == TEXT


class TestSettings:
    """Where keys and addresses come from, and where keys are not."""

    def test_googles_key_beats_geminis(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in Google's own SDK; an argument beats both."""
        monkeypatch.setenv("GEMINI_API_KEY", "second")
        assert GeminiAdapter()._endpoint.key == "second"
        monkeypatch.setenv("GOOGLE_API_KEY", "first")
        assert GeminiAdapter()._endpoint.key == "first"
        assert GeminiAdapter(api_key="given")._endpoint.key == "given"

    async def test_the_environments_address(
        self, gemini_server: GeminiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The variable of the SDK counts, and a Vertex project in the environment doesn't."""
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", gemini_server.url)
        monkeypatch.setenv("GOOGLE_GENAI_USE_VERTEXAI", "true")
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        async with GeminiAdapter() as asked:
            seen = [event async for event in asked.run(a_call())]
        assert text_of(seen) == TEXT
        assert gemini_server.asked[0].headers["x-goog-api-key"] == KEY

    async def test_no_key_goes_where_a_file_points(
        self, gemini_server: GeminiServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An address of `perdure.toml` gets no key of the environment, not by the SDK either."""
        monkeypatch.setenv("GOOGLE_API_KEY", KEY)
        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        async with GeminiAdapter(settings={"base_url": gemini_server.url}) as asked:
            seen = [event async for event in asked.run(a_call())]
        assert text_of(seen) == TEXT
        assert KEY not in str(gemini_server.seen)

    @pytest.mark.parametrize("way", WAYS)
    async def test_the_api_version(self, gemini_server: GeminiServer, way: str) -> None:
        """It is the first part of the path."""
        await run(gemini_server, a_call(), way, api_version="v1beta")
        assert gemini_server.asked[0].path.startswith("/v1beta/")

    def test_the_key_is_nowhere_to_be_seen(self) -> None:
        """Neither in `repr` nor in what the adapter holds, shown."""
        asked = GeminiAdapter(api_key=KEY, base_url="https://me:pass@example.org/v?key=x")
        assert KEY not in f"{asked!r} {asked._endpoint!r}"
        assert "pass" not in f"{asked!r} {asked._endpoint!r}"

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ({}, "GOOGLE_API_KEY or GEMINI_API_KEY"),
            ({"api_key": "two words"}, "copy it again"),
            ({"base_url": "localhost:80"}, "base URL"),
            ({"base_url": "http://[::1"}, "base URL"),
        ],
    )
    def test_check_says_what_is_missing(self, how: dict[str, Any], words: str) -> None:
        """In words that say what to set."""
        with pytest.raises(NotConfigured, match=words):
            GeminiAdapter(**how).check()

    @pytest.mark.parametrize("google", [True, False])
    def test_check_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, google: bool
    ) -> None:
        """Whether only the SDK is missing, or all of Google's packages are."""

        def find(name: str) -> None:
            if not google:
                raise ModuleNotFoundError(f"No module named {name.partition('.')[0]!r}")

        monkeypatch.setattr("importlib.util.find_spec", find)
        monkeypatch.delitem(sys.modules, "google.genai", raising=False)
        with pytest.raises(NotConfigured, match=r"pip install 'perdure\[gemini\]'"):
            GeminiAdapter(api_key=KEY).check()

    def test_check_is_content(self) -> None:
        """With a key, or with a server that may need none."""
        GeminiAdapter(api_key=KEY).check()
        GeminiAdapter(base_url="http://127.0.0.1:1").check()

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"api": "responses"}, "one of generate, interactions"),
            ({"backgruond": True}, "did you mean 'background'"),
            ({"background": "yes"}, "true or false"),
        ],
    )
    def test_settings_are_checked(self, settings: dict[str, Any], words: str) -> None:
        """What `perdure.toml` says is held against what there is."""
        with pytest.raises(NotConfigured, match=words):
            GeminiAdapter(settings=settings)

    def test_capabilities_are_those_of_the_way(self) -> None:
        """Only interactions in the background can be picked up."""
        ways = {way: GeminiAdapter(**how).capabilities.reattach for way, how in WAYS.items()}
        assert ways == {"background": True, "plain": False, "generate": False}

    def test_prices(self) -> None:
        """The default model has a price."""
        from datetime import UTC, datetime

        from perdure.pricing import price

        asked = GeminiAdapter()
        usage = Usage(input_tokens=1000, output_tokens=1000)
        cost, _ = price(asked.prices, asked.default_model, usage, datetime.now(UTC))
        assert cost is not None
        assert cost > 0


async def _rest(stream: Any) -> None:
    async for event in stream:
        assert not isinstance(event, Completed)
