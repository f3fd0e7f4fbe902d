"""Claude, where the platform fails, falls silent or breaks off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from messaging import COUNT, KEY, RECORDED, SAID, THOUGHTS, a_call, an_adapter, failure, run
from yielded import drain, end_of, text_of

from perdure.errors import (
    AuthenticationFailed,
    ConnectionLost,
    InvalidRequest,
    Overloaded,
    PlatformTimeout,
    QuotaExhausted,
    RateLimited,
    StreamTruncated,
)
from perdure.events import Chunk, Completed, Event, UsageReported
from servers.chat import nobody_listens
from servers.messages import TEXT, MessagesServer, Scenario, events


class TestCutStreams:
    """A stream that ends early is never a success."""

    @pytest.mark.parametrize("cut", ["clean", "abort", "reset"])
    async def test_a_cut_after_every_event(self, messages_server: MessagesServer, cut: str) -> None:
        """Wherever it is cut, however: a retryable error, and all that came before is kept."""
        call = '{"id":"toolu_1","name":"weather","arguments":{"city": "Ulm", "days": 2}}\n'
        kept: list[int] = []
        async with an_adapter(messages_server) as adapter:
            for after in range(COUNT):  # the last event, the end marker, is never sent
                seen: list[Event] = []
                with pytest.raises((StreamTruncated, ConnectionLost)) as caught:
                    await drain(adapter, a_call(cut_after=after, cut=cut, **RECORDED), seen)
                if cut == "clean":
                    assert type(caught.value) is StreamTruncated
                    assert caught.value.request_id == f"req-{after + 1}"
                assert not any(isinstance(e, Completed) for e in seen)
                assert SAID.startswith(text_of(seen))
                assert THOUGHTS.startswith(text_of(seen, "reasoning"))
                assert call.startswith(text_of(seen, "tool_call"))
                if cut != "reset":  # which may overtake what was sent before it
                    assert len(_chunks(seen)) == _deltas_before(after)
                kept.append(len(_chunks(seen)))
            seen = await drain(adapter, a_call(**RECORDED))
        messages_server.wait_until_idle()
        assert messages_server.generations == COUNT + 1
        if cut != "reset":
            assert kept == sorted(kept)
            assert kept[-1] == len(_chunks(seen))
        assert (text_of(seen), text_of(seen, "tool_call")) == (SAID, call)

    @pytest.mark.parametrize("cut", ["clean", "abort", "reset"])
    async def test_a_cut_after_the_end_marker(
        self, messages_server: MessagesServer, cut: str
    ) -> None:
        """The answer is whole, whatever becomes of the connection."""
        after = len(events(Scenario()))
        call = a_call(cut_after=after, cut=cut, delay=0.005 if cut == "reset" else 0)
        seen = await run(messages_server, call)
        assert text_of(seen) == TEXT
        end_of(seen)

    async def test_a_connection_that_stays_open(self, messages_server: MessagesServer) -> None:
        """Once the end marker was there, nobody waits for the end of the body."""
        began = time.monotonic()
        end_of(await run(messages_server, a_call(stall_after=len(events(Scenario())))))
        assert time.monotonic() - began < 3
        messages_server.wait_until_idle()

    async def test_what_was_counted_before_the_cut(self, messages_server: MessagesServer) -> None:
        """The tokens that are known by then are told."""
        seen: list[Event] = []
        async with an_adapter(messages_server) as adapter:
            with pytest.raises(StreamTruncated):
                await drain(adapter, a_call(cut_after=4), seen)
        (told,) = (e.usage for e in seen if isinstance(e, UsageReported))
        assert told.input_tokens == 127

    @pytest.mark.parametrize("after", range(0, COUNT, 3))
    @pytest.mark.parametrize("how", ["malformed_after", "garbage_after"])
    async def test_an_unreadable_event(
        self, messages_server: MessagesServer, after: int, how: str
    ) -> None:
        """Half a JSON object, or bytes that are no text, wherever they come."""
        error = await failure(messages_server, a_call(**{how: after}, **RECORDED))
        assert type(error) is StreamTruncated
        assert error.retryable

    @pytest.mark.parametrize("after", [0, 1, 5])
    @pytest.mark.parametrize(
        ("reported", "kind"),
        [
            ({"message": "boom", "type": "overloaded_error"}, Overloaded),
            ({"message": "boom", "type": "api_error"}, Overloaded),
            ({"message": "boom", "type": "something_new"}, Overloaded),
            ({"message": "boom", "type": "timeout_error"}, PlatformTimeout),
            ({"message": "slow down", "type": "rate_limit_error"}, RateLimited),
            ({"message": "too long", "type": "invalid_request_error"}, InvalidRequest),
            ({"message": "no such model", "type": "not_found_error"}, InvalidRequest),
            ({"message": "empty", "type": "billing_error"}, QuotaExhausted),
            ({"message": f"the key {KEY}", "type": "authentication_error"}, AuthenticationFailed),
            ({"message": "not yours", "type": "permission_error"}, AuthenticationFailed),
            (
                {
                    "message": "enough",
                    "type": "rate_limit_error",
                    "details": {"error_code": "contract_spend_limit_reached"},
                },
                QuotaExhausted,
            ),
            ({}, Overloaded),
            (None, Overloaded),
        ],
    )
    async def test_an_error_inside_the_stream(
        self,
        messages_server: MessagesServer,
        after: int,
        reported: dict[str, Any] | None,
        kind: type,
    ) -> None:
        """It is what it is called, though the response's status was 200."""
        error = await failure(messages_server, a_call(error_after=after, error=reported))
        assert type(error) is kind
        assert error.status is None
        assert error.request_id == "req-1"

    async def test_an_error_without_its_name(self, messages_server: MessagesServer) -> None:
        """Some gateways send the error as if it were any event."""
        fault = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}
        raw = [*events(Scenario())[:3], ("message", json.dumps(fault))]
        assert type(await failure(messages_server, a_call(raw=raw))) is RateLimited

    async def test_an_error_that_quotes_the_key(self, messages_server: MessagesServer) -> None:
        """What a gateway repeats of the request isn't written down."""
        fault = {"type": "error", "error": {"type": "authentication_error", "message": KEY}}
        raw = [*events(Scenario())[:3], ("message", json.dumps(fault))]
        assert "***" in str(await failure(messages_server, a_call(raw=raw)))

    async def test_an_error_that_is_no_json(self, messages_server: MessagesServer) -> None:
        """What it says is in the message."""
        raw = [*events(Scenario())[:3], ("error", "upstream went away")]
        error = await failure(messages_server, a_call(raw=raw))
        assert type(error) is Overloaded
        assert "upstream went away" in str(error)

    async def test_an_answer_that_is_no_stream(self, messages_server: MessagesServer) -> None:
        """A whole answer, or a web page, is a wrong address or server, not a lost connection."""
        for body in ('{"content": []}', "not even JSON"):
            error = await failure(messages_server, a_call(body=body))
            assert type(error) is InvalidRequest
            assert "base URL" in str(error)
        page = a_call(body="<html>", headers={"content-type": "text/html; charset=utf-8"})
        assert type(await failure(messages_server, page)) is InvalidRequest

    async def test_an_error_with_status_200(self, messages_server: MessagesServer) -> None:
        """An error object instead of a stream is that error."""
        fault = {"type": "error", "error": {"message": "wait", "type": "rate_limit_error"}}
        assert type(await failure(messages_server, a_call(body=json.dumps(fault)))) is RateLimited


class TestStatus:
    """HTTP statuses, as typed errors."""

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, InvalidRequest),
            (401, AuthenticationFailed),
            (402, QuotaExhausted),
            (403, AuthenticationFailed),
            (404, InvalidRequest),
            (408, PlatformTimeout),
            (409, Overloaded),
            (412, InvalidRequest),
            (413, InvalidRequest),
            (418, InvalidRequest),
            (422, InvalidRequest),
            (429, RateLimited),
            (431, InvalidRequest),
            (499, InvalidRequest),
            (500, Overloaded),
            (501, InvalidRequest),
            (502, Overloaded),
            (503, Overloaded),
            (504, Overloaded),
            (529, Overloaded),
        ],
    )
    async def test_each_status_is_its_error(
        self, messages_server: MessagesServer, status: int, kind: type
    ) -> None:
        """One request, one error of the right class, with status and request id; no SDK retry."""
        call = a_call(status=status, error={"message": "no\n way", "type": "x"})
        error = await failure(messages_server, call)
        assert type(error) is kind
        assert (error.status, error.request_id) == (status, "req-1")
        assert error.message.endswith(f"answered {status}: no way")
        assert len(messages_server.messages) == 1

    async def test_what_asks_the_sdk_to_retry(self, messages_server: MessagesServer) -> None:
        """A header for SDKs makes none of them try again on its own."""
        call = a_call(status=503, error={"message": "x"}, headers={"x-should-retry": "true"})
        await failure(messages_server, call)
        assert len(messages_server.messages) == 1

    @pytest.mark.parametrize(
        ("status", "error", "kind"),
        [
            (429, {"type": "spend_limit_reached"}, QuotaExhausted),
            (429, {"type": "rate_limit_error", "code": "spend_limit_reached"}, QuotaExhausted),
            (
                429,
                {
                    "type": "rate_limit_error",
                    "details": {"error_code": "enforced_spend_limit_reached"},
                },
                QuotaExhausted,
            ),
            (
                429,
                {"type": "rate_limit_error", "details": {"error_code": "ramp_limit_exceeded"}},
                RateLimited,
            ),
            (400, {"type": "billing_error"}, QuotaExhausted),
            (429, {"type": "invalid_request_error"}, RateLimited),
            (529, {"type": "overloaded_error"}, Overloaded),
        ],
    )
    async def test_some_names_say_more_than_the_status(
        self, messages_server: MessagesServer, status: int, error: dict[str, Any], kind: type
    ) -> None:
        """A limit of spending that is reached is final, by whichever of its names."""
        call = a_call(status=status, error={"message": "x", **error})
        assert type(await failure(messages_server, call)) is kind

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "7"}, 7),
            ({"retry-after": "86400"}, 600),
            ({"retry-after": "soon"}, None),
            ({}, None),
        ],
    )
    async def test_retry_after(
        self, messages_server: MessagesServer, headers: dict[str, str], seconds: float | None
    ) -> None:
        """It is passed on, and nobody makes us wait for more than ten minutes."""
        for status in (429, 529):
            call = a_call(status=status, error={"message": "x"}, headers=headers)
            assert (await failure(messages_server, call)).retry_after == seconds

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("<html><h1>Bad gateway</h1></html>", "no explanation"),
            ('{"detail": "the tools"}', "tools"),
            ('{"error": "just words"}', "just words"),
            ('{"message": "without a frame"}', "without a frame"),
            ("x" * 5000, "xxx"),
            ("", "no explanation"),
        ],
    )
    async def test_bodies_of_all_sorts(
        self, messages_server: MessagesServer, body: str, words: str
    ) -> None:
        """Whatever a server sends with an error, it becomes one line of bearable length."""
        error = await failure(messages_server, a_call(status=502, body=body))
        assert words in str(error)
        assert len(str(error)) < 600

    async def test_a_missing_key_is_named(self, messages_server: MessagesServer) -> None:
        """A 401 says whether there was a key at all, and never which."""
        call = a_call(status=401, error={"message": "who are you"})
        assert "no key was given" in str(await failure(messages_server, call, api_key=None))
        quoting = a_call(status=401, error={"message": f"wrong key {KEY}"})
        assert "wrong key ***" in str(await failure(messages_server, quoting))


class TestTime:
    """Connecting, waiting, and being cancelled."""

    async def test_nobody_there(self) -> None:
        """A refused connection is `ConnectionLost` and says where nobody listens."""
        with nobody_listens() as url:
            error = await failure(url, a_call())
            assert type(error) is ConnectionLost
            assert url.removesuffix("/v1") in str(error)

    async def test_a_host_that_is_none(self) -> None:
        """A name that can't be resolved is `ConnectionLost` too."""
        assert type(await failure("http://nowhere.invalid", a_call())) is ConnectionLost

    @pytest.mark.parametrize("silence", [{"first_delay": 30}, {"stall_after": 3}])
    async def test_silence_is_a_timeout(
        self, messages_server: MessagesServer, silence: Mapping[str, Any]
    ) -> None:
        """No first byte, or no next one, within `read_timeout`: the platform's timeout."""
        error = await failure(messages_server, a_call(**silence), read_timeout=0.2)
        assert type(error) is PlatformTimeout
        assert "0.2 s" in str(error)
        messages_server.wait_until_idle()

    async def test_a_slow_answer_is_no_timeout(self, messages_server: MessagesServer) -> None:
        """The limit is on silence, not on the whole, and a slow first byte is waited for."""
        call = a_call(delay=0.02, first_delay=0.3)
        seen = await run(messages_server, call, read_timeout=0.5)
        assert text_of(seen) == TEXT

    @pytest.mark.parametrize("silence", [{"first_delay": 30}, {"stall_after": 0}, {"delay": 0.5}])
    async def test_cancelling_closes_the_connection(
        self, messages_server: MessagesServer, silence: Mapping[str, Any]
    ) -> None:
        """Whatever it waits for, the server sees it go at once."""
        took: list[float] = []
        async with an_adapter(messages_server) as adapter:
            for _ in range(3):  # a busy machine may be late once
                calls = [asyncio.create_task(drain(adapter, a_call(**silence))) for _ in range(5)]
                await asyncio.to_thread(messages_server.wait_until_open, 5)
                began = time.monotonic()
                for call in calls:
                    call.cancel()
                ended = await asyncio.gather(*calls, return_exceptions=True)
                assert all(isinstance(one, asyncio.CancelledError) for one in ended)
                await asyncio.to_thread(messages_server.wait_until_idle, 2)
                took.append(time.monotonic() - began)
        assert min(took) < 0.25
        assert messages_server.dropped == 15

    async def test_connections_are_used_again(self, messages_server: MessagesServer) -> None:
        """Calls one after the other share a connection, and a lost one is replaced."""
        async with an_adapter(messages_server) as adapter:
            for _ in range(3):
                await drain(adapter, a_call())
            with pytest.raises(ConnectionLost):
                await drain(adapter, a_call(cut_after=2, cut="reset"))
            await drain(adapter, a_call())
        assert messages_server.connections == 2


def _chunks(seen: list[Event]) -> list[Chunk]:
    return [e for e in seen if isinstance(e, Chunk)]


def _deltas_before(after: int) -> int:
    """Return how many chunks the recorded stream's first events are."""
    count = 0
    for name, data in events(Scenario(**RECORDED))[:after]:
        event = json.loads(data)
        kind = event.get("delta", {}).get("type")
        begins = event.get("content_block", {}).get("type") == "tool_use"
        count += kind in ("text_delta", "thinking_delta") or begins
        count += kind == "input_json_delta" and bool(event["delta"]["partial_json"])
        count += name == "content_block_stop" and event["index"] == 2
    return count
