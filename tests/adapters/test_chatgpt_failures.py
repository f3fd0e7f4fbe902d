"""ChatGPT where the platform fails, falls silent or breaks off, and what is picked up then."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from responding import (
    CALL_LINES,
    CALLS,
    KEY,
    a_call,
    adapter_for,
    failure,
    picked_up,
    run,
    run_to_error,
)
from yielded import accepted_of, drain, end_of, text_of

from perdure import Engine, Task, TaskConstraints
from perdure.adapter import Resume
from perdure.errors import (
    AuthenticationFailed,
    ConnectionLost,
    ContentRefused,
    InvalidRequest,
    Overloaded,
    PlatformTimeout,
    QuotaExhausted,
    RateLimited,
    StreamTruncated,
)
from perdure.events import AttemptFailed, Chunk, Completed, Event
from perdure.policy import RetryPolicy
from perdure.settings import WorkerSettings
from servers.chat import nobody_listens
from servers.responses import TEXT, ResponsesServer, Scenario, events

EVERYTHING: dict[str, Any] = {
    "reasoning": ["First I think.", "Then again."],
    "text": "A text of some words.",
    "calls": CALLS,
}
ALL = len(events(Scenario(**EVERYTHING)))
SETTINGS = WorkerSettings(retry=RetryPolicy(base_seconds=0.001))


class TestCutStreams:
    """A stream that ends early is never a success."""

    @pytest.mark.parametrize("cut", ["clean", "abort", "reset"])
    @pytest.mark.parametrize("after", range(len(events(Scenario())) - 1))
    async def test_a_cut_before_the_end_marker(
        self, responses: ResponsesServer, after: int, cut: str
    ) -> None:
        """Wherever it is cut, however: a retryable error, and what came before is right."""
        seen, error = await run_to_error(responses, a_call(cut_after=after, cut=cut))
        assert isinstance(error, (StreamTruncated, ConnectionLost))
        assert not error.response_over
        if cut == "clean":
            assert type(error) is StreamTruncated
        assert TEXT.startswith(text_of(seen))

    @pytest.mark.parametrize("after", range(len(events(Scenario())) - 1))
    async def test_a_malformed_event(self, responses: ResponsesServer, after: int) -> None:
        """Half a JSON object is an unreadable stream, wherever it comes."""
        error = await failure(responses, a_call(malformed_after=after))
        assert type(error) is StreamTruncated

    @pytest.mark.parametrize("after", range(0, 16, 4))
    @pytest.mark.parametrize(
        ("reported", "kind"),
        [
            ({"code": "server_error", "message": "boom"}, Overloaded),
            ({"code": None, "message": "boom"}, Overloaded),
            ({"code": "rate_limit_exceeded", "message": "slow down"}, RateLimited),
            ({"code": "insufficient_quota", "message": "empty"}, QuotaExhausted),
            ({"code": "invalid_prompt", "message": "no"}, InvalidRequest),
            ({"code": "401", "message": f"the key {KEY} is wrong"}, AuthenticationFailed),
            ({"error": {"type": "server_error", "message": "framed"}}, Overloaded),
        ],
    )
    async def test_an_error_event(
        self, responses: ResponsesServer, after: int, reported: dict[str, Any], kind: type
    ) -> None:
        """The SDK only yields it; it is raised as what its code says."""
        error = await failure(responses, a_call(error_after=after, error=reported))
        assert type(error) is kind

    @pytest.mark.parametrize("failed", [True, False])
    async def test_an_error_event_may_end_the_response(
        self, responses: ResponsesServer, failed: bool
    ) -> None:
        """The platform is asked whether it did: only then nothing can be picked up."""
        fault = {"code": "server_error", "message": "boom"}
        call = a_call(error_after=6, error=fault, fails_after_error=failed)
        assert (await failure(responses, call)).response_over is failed

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ({"code": "server_error", "message": "boom"}, Overloaded),
            ({"code": "rate_limit_exceeded", "message": "slow"}, RateLimited),
            ({"code": "invalid_prompt", "message": "no"}, InvalidRequest),
            ({"code": "image_too_large", "message": "no"}, InvalidRequest),
            ({"code": "bio_policy", "message": "no"}, ContentRefused),
            ({"code": "misalignment_policy_violation", "message": "no"}, ContentRefused),
            ({"code": "vector_store_timeout", "message": "slow"}, PlatformTimeout),
            ({"code": "never_heard_of", "message": "?"}, Overloaded),
            (None, Overloaded),
        ],
    )
    async def test_a_failed_response(
        self, responses: ResponsesServer, fault: dict[str, Any] | None, kind: type
    ) -> None:
        """`response.failed` is the error it names, and the response is over."""
        error = await failure(responses, a_call(end="failed", error=fault))
        assert type(error) is kind
        assert error.response_over

    async def test_a_response_that_somebody_cancelled(self, responses: ResponsesServer) -> None:
        """It is over; a new one may be asked for."""
        error = await failure(responses, a_call(end="cancelled"))
        assert type(error) is StreamTruncated
        assert error.response_over
        assert "cancelled" in str(error)

    async def test_an_answer_that_is_no_stream(self, responses: ResponsesServer) -> None:
        """A whole answer, or a web page, is a wrong address or server."""
        for body, kind in (('{"output": []}', "application/json"), ("<html>", "text/html")):
            call = a_call(body=body, headers={"content-type": kind})
            error = await failure(responses, call)
            assert type(error) is InvalidRequest
            assert "base URL" in str(error)


class TestStatus:
    """HTTP statuses and connections, as typed errors."""

    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (400, None, InvalidRequest),
            (401, "invalid_api_key", AuthenticationFailed),
            (403, None, AuthenticationFailed),
            (404, "model_not_found", InvalidRequest),
            (408, None, PlatformTimeout),
            (409, None, Overloaded),
            (413, None, InvalidRequest),
            (422, None, InvalidRequest),
            (429, "rate_limit_exceeded", RateLimited),
            (429, "insufficient_quota", QuotaExhausted),
            (500, None, Overloaded),
            (502, None, Overloaded),
            (503, None, Overloaded),
            (529, None, Overloaded),
        ],
    )
    async def test_each_status_is_its_error(
        self, responses: ResponsesServer, status: int, code: str | None, kind: type
    ) -> None:
        """One request, one error of the right class, with status and request id; no SDK retry."""
        call = a_call(status=status, error={"message": "no\n way", "code": code})
        error = await failure(responses, call)
        assert type(error) is kind
        assert (error.status, error.request_id) == (status, "req-1")
        assert len(responses.posts) == 1

    async def test_retry_after(self, responses: ResponsesServer) -> None:
        """It is kept, and capped."""
        for asked, kept in (("7", 7), ("86400", 600)):
            call = a_call(status=429, error={"message": "x"}, headers={"retry-after": asked})
            assert (await failure(responses, call)).retry_after == kept

    async def test_a_model_that_takes_no_temperature(self, responses: ResponsesServer) -> None:
        """The refusal says what to do about it."""
        words = "Unsupported parameter: 'temperature' is not supported with this model."
        call = a_call(
            status=400, error={"message": words}, constraints=TaskConstraints(temperature=0.5)
        )
        error = await failure(responses, call)
        assert "leave temperature out" in str(error)
        assert error.status == 400

    async def test_nobody_there(self) -> None:
        """A refused connection is `ConnectionLost`."""
        with nobody_listens() as url:
            assert type(await failure(url, a_call())) is ConnectionLost

    @pytest.mark.parametrize("silence", [{"first_delay": 30}, {"stall_after": 6}])
    async def test_silence_is_a_timeout(
        self, responses: ResponsesServer, silence: dict[str, Any]
    ) -> None:
        """No first byte, or no next one, within `read_timeout`."""
        error = await failure(responses, a_call(**silence), read_timeout=0.2)
        assert type(error) is PlatformTimeout
        assert not error.response_over


class TestPickUp:
    """A response that is gone on with where it was read up to."""

    @pytest.mark.parametrize("after", range(1, ALL))
    async def test_at_every_event(self, responses: ResponsesServer, after: int) -> None:
        """No text lost, none doubled, of no kind; no second generation."""
        call = a_call(**EVERYTHING, cut_after=after)
        first, _ = await run_to_error(responses, call)
        rest = await run(responses, replace(call, resume=picked_up(first)))
        assert text_of(first + rest, "reasoning") == "First I think.\n\nThen again."
        assert text_of(first + rest) == EVERYTHING["text"]
        assert text_of(first + rest, "tool_call") == CALL_LINES
        assert end_of(rest).finish_reason == "tool_calls"
        assert end_of(rest).usage == end_of(await run(responses, a_call())).usage
        assert responses.generations["Say hello."] == 2  # the other is the one compared with

    @pytest.mark.parametrize("again", range(1, 5))
    async def test_again_and_again(self, responses: ResponsesServer, again: int) -> None:
        """However often it breaks."""
        call = a_call(**EVERYTHING, cut_after=2, again_cut_after=again)
        kept, _ = await run_to_error(responses, call)
        for _ in range(ALL):
            resume = picked_up(kept)
            async with adapter_for(responses) as adapter:
                try:
                    async for event in adapter.run(replace(call, resume=resume)):
                        kept.append(event)
                    break
                except StreamTruncated:
                    continue
        assert text_of(kept) == EVERYTHING["text"]
        assert text_of(kept, "tool_call") == CALL_LINES
        assert responses.generations.total() == 1

    async def test_while_it_still_goes_on(self, responses: ResponsesServer) -> None:
        """What is there comes at once, the rest as it is made."""
        call = a_call(cut_after=4, delay=0.02)
        first, _ = await run_to_error(responses, call)
        rest = await run(responses, replace(call, resume=picked_up(first)))
        assert text_of(first + rest) == TEXT
        assert len([event for event in rest if isinstance(event, Chunk)]) > 3

    @pytest.mark.parametrize("after", range(1, ALL))
    async def test_without_a_second_stream(self, responses: ResponsesServer, after: int) -> None:
        """A platform that doesn't stream it again gives the rest as a whole, once it has ended."""
        call = a_call(**EVERYTHING, cut_after=after, streams_again=False, delay=0.002)
        first, _ = await run_to_error(responses, call)
        rest = await run(responses, replace(call, resume=picked_up(first)))
        assert text_of(first + rest) == EVERYTHING["text"]
        assert text_of(first + rest, "tool_call") == CALL_LINES
        assert responses.generations.total() == 1

    @pytest.mark.parametrize("forgets", [1, 3, 8, 50])
    async def test_events_the_platform_has_forgotten(
        self, responses: ResponsesServer, forgets: int
    ) -> None:
        """What is missing of the stream is taken from the whole."""
        call = a_call(calls=CALLS, cut_after=6, forgets=forgets)
        first, _ = await run_to_error(responses, call)
        rest = await run(responses, replace(call, resume=picked_up(first)))
        assert text_of(first + rest) == TEXT
        assert text_of(first + rest, "tool_call") == CALL_LINES

    async def test_a_whole_that_says_something_else(self, responses: ResponsesServer) -> None:
        """What was read isn't its beginning: the two don't make an answer."""
        first, _ = await run_to_error(responses, a_call(cut_after=6, streams_again=False))
        resume = replace(picked_up(first), output="Something else")
        error = await failure(responses, a_call(resume=resume))
        assert type(error) is StreamTruncated
        assert error.response_over

    @pytest.mark.parametrize("body", ["{}", "null", "[]", '"x"', '{"status": "odd"}'])
    async def test_a_whole_that_is_none(self, responses: ResponsesServer, body: str) -> None:
        """What doesn't say that it is an answer is none."""
        call = a_call(cut_after=6, again_body=body)
        first, _ = await run_to_error(responses, call)
        error = await failure(responses, replace(call, resume=picked_up(first)))
        assert type(error) is StreamTruncated
        assert not error.response_over

    async def test_with_chat_completions_meanwhile(self, responses: ResponsesServer) -> None:
        """The settings were changed since: it is picked up all the same, and not asked anew."""
        call = a_call(cut_after=6)
        first, _ = await run_to_error(responses, call)
        rest = await run(responses, replace(call, resume=picked_up(first)), api="chat")
        assert text_of(first + rest) == TEXT
        assert not responses.chats

    async def test_one_that_is_gone(self, responses: ResponsesServer) -> None:
        """A 404 is retryable, from the beginning: nothing is there to be picked up."""
        error = await failure(responses, a_call(resume=Resume("reattach", "", "resp_9", "3")))
        assert (type(error), error.status, error.response_over) == (StreamTruncated, 404, True)

    @pytest.mark.parametrize(
        ("status", "kind"), [(429, RateLimited), (503, Overloaded), (401, AuthenticationFailed)]
    )
    async def test_a_platform_that_is_busy(
        self, responses: ResponsesServer, status: int, kind: type
    ) -> None:
        """Its errors are typed, and the response is not over with them."""
        call = a_call(cut_after=4, again_status=status)
        first, _ = await run_to_error(responses, call)
        error = await failure(responses, replace(call, resume=picked_up(first)))
        assert type(error) is kind
        assert not error.response_over

    async def test_one_that_was_cancelled_meanwhile(self, responses: ResponsesServer) -> None:
        """It is over, and there is no success."""
        call = a_call(stall_after=6)
        async with adapter_for(responses, read_timeout=0.2) as adapter:
            seen: list[Event] = []
            with pytest.raises(PlatformTimeout):
                await drain(adapter, call, seen)
            await adapter.stop(accepted_of(seen).response_id or "")
        error = await failure(responses, replace(call, resume=picked_up(seen)))
        assert type(error) is StreamTruncated
        assert error.response_over

    @pytest.mark.parametrize("cursor", ["", "x", "-1", "1;2;3", "1;2;3;4", None])
    async def test_a_cursor_that_is_none(
        self, responses: ResponsesServer, cursor: str | None
    ) -> None:
        """It is refused before anything is asked."""
        call = a_call(resume=Resume("reattach", "", "resp_1", cursor))
        assert type(await failure(responses, call)) is InvalidRequest
        assert not responses.seen


class TestThroughTheEngine:
    """The same with an engine and its log."""

    @pytest.mark.parametrize("background", [True, False])
    async def test_a_cut_after_every_event(
        self, responses: ResponsesServer, make_database: Callable[[], Path], background: bool
    ) -> None:
        """In the background: the uninterrupted text, once generated. Plainly: kept up to there."""
        at = range(1, len(events(Scenario())))
        adapter = adapter_for(responses, background=background)
        once = TaskConstraints(model="m", max_attempts=3 if background else 1)
        async with Engine.open(make_database(), adapters=[adapter], settings=SETTINGS) as engine:
            tasks = {
                after: await engine.submit_task(
                    Task(
                        prompt=f"cut after {after}",
                        platform="chatgpt",
                        constraints=once,
                        options={"scenario": {"cut_after": after}},
                    )
                )
                for after in at
            }
            for after, task_id in tasks.items():
                result = await engine.get_result(task_id, timeout=30)
                assert responses.generations[f"cut after {after}"] == 1
                log = [recorded.event for recorded in await engine.get_events(task_id)]
                if background:
                    assert (result.success, result.output) == (True, TEXT)
                    assert result.usage.output_tokens == 12
                    failed = [e for e in log if isinstance(e, AttemptFailed)]
                    assert [e.next for e in failed] == ["reattach"]
                else:
                    deltas = [json.loads(e).get("delta", "") for e in events(Scenario())[:after]]
                    assert not result.success
                    assert result.error_class == "StreamTruncated"
                    assert (result.partial_output or "") == "".join(deltas)
                    assert not any(isinstance(e, Completed) for e in log)

    async def test_a_cancelled_task_is_stopped_at_the_platform(
        self, responses: ResponsesServer, make_database: Callable[[], Path]
    ) -> None:
        """Its text is kept, and the platform works no more."""
        task = Task(prompt="endless", platform="chatgpt", options={"scenario": {"stall_after": 9}})
        async with Engine.open(make_database(), adapters=[adapter_for(responses)]) as engine:
            task_id = await engine.submit_task(task)
            async for _ in engine.stream_result(task_id):
                break
            await engine.cancel_task(task_id)
            result = await engine.get_result(task_id, timeout=10)
        assert result.partial_output
        assert TEXT.startswith(result.partial_output)
        assert len(responses.cancelled) == 1

    async def test_a_failed_response_is_asked_for_anew(
        self, responses: ResponsesServer, make_database: Callable[[], Path]
    ) -> None:
        """What is over is not picked up: the next attempt begins anew."""
        fault = {"code": "server_error", "message": "boom"}
        task = Task(
            prompt="fails",
            platform="chatgpt",
            constraints=TaskConstraints(max_attempts=2),
            options={"scenario": {"end": "failed", "error": fault}},
        )
        adapter = adapter_for(responses)
        async with Engine.open(make_database(), adapters=[adapter], settings=SETTINGS) as engine:
            result = await engine.get_result(await engine.submit_task(task), timeout=10)
        assert (result.success, result.error_class) == (False, "Overloaded")
        assert responses.generations["fails"] == 2
