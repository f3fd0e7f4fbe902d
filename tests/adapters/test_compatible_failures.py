"""The adapter to OpenAI-compatible servers, where the server fails, falls silent or breaks off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from chatting import BEFORE_THE_END, KEY, a_call, failure, run
from yielded import drain, end_of, text_of

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
from perdure.events import Completed, Event
from perdure_adapters import CompatibleAdapter
from servers.chat import TEXT, ChatServer, Scenario, events, nobody_listens


class TestCutStreams:
    """A stream that ends early is never a success."""

    @pytest.mark.parametrize("cut", ["clean", "abort", "reset"])
    @pytest.mark.parametrize("after", range(BEFORE_THE_END))
    async def test_a_cut_before_the_end_marker(
        self, chat_server: ChatServer, after: int, cut: str
    ) -> None:
        """Wherever it is cut, however: a retryable error, and what came before is right."""
        seen: list[Event] = []
        async with CompatibleAdapter(chat_server.url) as adapter:
            with pytest.raises((StreamTruncated, ConnectionLost)) as caught:
                await drain(adapter, a_call(cut_after=after, cut=cut), seen)
        if cut == "clean":
            assert type(caught.value) is StreamTruncated
        assert TEXT.startswith(text_of(seen))
        assert not any(isinstance(e, Completed) for e in seen)
        chat_server.wait_until_idle()

    @pytest.mark.parametrize("cut", ["clean", "abort", "reset"])
    @pytest.mark.parametrize("after", range(BEFORE_THE_END + 1, BEFORE_THE_END + 3))
    async def test_a_cut_after_the_end_marker(
        self, chat_server: ChatServer, after: int, cut: str
    ) -> None:
        """The answer is whole: it is not asked for again, though its tokens may be unknown."""
        call = a_call(cut_after=after, cut=cut, delay=0.005 if cut == "reset" else 0)
        seen = await run(chat_server, call)
        assert text_of(seen) == TEXT
        end_of(seen)

    async def test_a_connection_that_stays_open(
        self, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once the finish reason was there, nobody waits for long for what may never come."""
        monkeypatch.setattr("perdure_adapters._completions.LAST_WORDS", 0.2)
        began = time.monotonic()
        end_of(await run(chat_server, a_call(stall_after=BEFORE_THE_END + 1), read_timeout=10))
        assert time.monotonic() - began < 5
        chat_server.wait_until_idle()

    @pytest.mark.parametrize("after", range(BEFORE_THE_END + 1))
    async def test_a_malformed_chunk(self, chat_server: ChatServer, after: int) -> None:
        """Half a JSON object is an unreadable stream, wherever it comes before the end marker."""
        error = await failure(chat_server, a_call(malformed_after=after))
        assert type(error) is StreamTruncated
        assert error.retryable

    async def test_invalid_utf8(self, chat_server: ChatServer) -> None:
        """Bytes that are no text are an unreadable stream."""
        error = await failure(chat_server, a_call(garbage_after=3))
        assert type(error) is StreamTruncated

    @pytest.mark.parametrize("after", range(0, BEFORE_THE_END, 4))
    @pytest.mark.parametrize(
        ("reported", "kind"),
        [
            ({"message": "boom"}, Overloaded),
            ({"message": "boom", "type": "server_error", "code": None}, Overloaded),
            ({"message": "slow down", "code": "rate_limit_exceeded"}, RateLimited),
            ({"message": "empty", "code": "insufficient_quota"}, QuotaExhausted),
            ({"message": "too long", "code": 400, "type": "other"}, InvalidRequest),
            ({"message": "boom", "code": "500"}, Overloaded),
            ({"message": f"the key {KEY} is wrong", "code": 401}, AuthenticationFailed),
        ],
    )
    async def test_an_error_inside_the_stream(
        self, chat_server: ChatServer, after: int, reported: dict[str, Any], kind: type
    ) -> None:
        """It is raised as what its code or type says; without any it is the server's fault."""
        call = a_call(error_after=after, error=reported)
        assert type(await failure(chat_server, call, api_key=KEY)) is kind

    async def test_an_error_without_a_frame(self, chat_server: ChatServer) -> None:
        """Older servers send the error object bare."""
        bare = '{"object": "error", "message": "too long", "code": 400}'
        error = await failure(chat_server, a_call(raw=[*events(Scenario())[:2], bare]))
        assert type(error) is InvalidRequest

    async def test_an_error_that_quotes_the_key(self, chat_server: ChatServer) -> None:
        """What a server repeats of the request isn't written down."""
        bare = json.dumps({"object": "error", "message": f"no such key: {KEY}", "code": 401})
        error = await failure(chat_server, a_call(raw=[bare]), api_key=KEY)
        assert "no such key: ***" in str(error)

    async def test_an_answer_that_is_no_stream(self, chat_server: ChatServer) -> None:
        """A whole answer, or a web page, is a wrong address or server, not a lost connection."""
        for body in ('{"choices": []}', "not even JSON"):
            error = await failure(chat_server, a_call(body=body))
            assert type(error) is InvalidRequest
            assert "base URL" in str(error)
        page = a_call(body="<html>", headers={"content-type": "text/html; charset=utf-8"})
        assert type(await failure(chat_server, page)) is InvalidRequest

    async def test_an_error_with_status_200(self, chat_server: ChatServer) -> None:
        """An error object instead of a stream is that error."""
        body = json.dumps({"error": {"message": "wait", "type": "rate_limit_error"}})
        assert type(await failure(chat_server, a_call(body=body))) is RateLimited


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
            (413, InvalidRequest),
            (418, InvalidRequest),
            (422, InvalidRequest),
            (425, Overloaded),
            (429, RateLimited),
            (500, Overloaded),
            (501, InvalidRequest),
            (502, Overloaded),
            (503, Overloaded),
            (529, Overloaded),
        ],
    )
    async def test_each_status_is_its_error(
        self, chat_server: ChatServer, status: int, kind: type
    ) -> None:
        """One request, one error of the right class, with status and request id; no SDK retry."""
        error = await failure(chat_server, a_call(status=status, error={"message": "no\n way"}))
        assert type(error) is kind
        assert (error.status, error.request_id) == (status, "req-1")
        assert error.message.endswith(f"answered {status}: no way") or status in (401, 403)
        assert len(chat_server.chats) == 1

    @pytest.mark.parametrize(
        ("status", "code", "kind"),
        [
            (429, "insufficient_quota", QuotaExhausted),
            (429, "spend_limit_reached", QuotaExhausted),
            (400, "content_filter", ContentRefused),
            (429, "invalid_request_error", RateLimited),
        ],
    )
    async def test_some_codes_say_more_than_the_status(
        self, chat_server: ChatServer, status: int, code: str, kind: type
    ) -> None:
        """Used-up quotas and refused contents are final; a general word doesn't count."""
        error = await failure(
            chat_server, a_call(status=status, error={"message": "x", "code": code})
        )
        assert type(error) is kind

    @pytest.mark.parametrize(
        ("headers", "seconds"),
        [
            ({"retry-after": "7"}, 7),
            ({"retry-after": "1.5"}, 1.5),
            ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
            ({"retry-after": "86400"}, 600),
            ({"retry-after": "-3"}, 0),
            ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
            ({"retry-after": "Wed, 21 Oct 2999 07:28:00 GMT"}, 600),
            ({"retry-after": "soon"}, None),
            ({"retry-after": "nan"}, None),
            ({}, None),
        ],
    )
    async def test_retry_after(
        self, chat_server: ChatServer, headers: dict[str, str], seconds: float | None
    ) -> None:
        """Seconds and dates are understood, and nobody makes us wait for more than ten minutes."""
        error = await failure(
            chat_server, a_call(status=429, error={"message": "x"}, headers=headers)
        )
        assert error.retry_after == seconds

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("<html><h1>Bad gateway</h1></html>", "no explanation"),
            ('{"detail": [{"loc": ["body", "tools"]}]}', "tools"),
            ('{"error": "just words"}', "just words"),
            ('{"message": "without a frame"}', "without a frame"),
            ("x" * 5000, "xxx"),
        ],
    )
    async def test_bodies_of_all_sorts(
        self, chat_server: ChatServer, body: str, words: str
    ) -> None:
        """Whatever a server sends with an error, it becomes one line of bearable length."""
        error = await failure(chat_server, a_call(status=502, body=body))
        assert words in str(error)
        assert len(str(error)) < 600

    async def test_a_wrong_base_url_is_explained(self, chat_server: ChatServer) -> None:
        """A 404 that says nothing is most likely a base URL without its `/v1`."""
        error = await failure(chat_server, a_call(status=404, body="404 page not found"))
        assert "check the base URL" in str(error)

    async def test_a_missing_key_is_named(self, chat_server: ChatServer) -> None:
        """A 401 says whether there was a key at all, and never which."""
        call = a_call(status=401, error={"message": "who are you"})
        assert "no key was given" in str(await failure(chat_server, call))
        quoting = a_call(status=401, error={"message": f"wrong key {KEY}"})
        assert "wrong key ***" in str(await failure(chat_server, quoting, api_key=KEY))


class TestTime:
    """Connecting, waiting, and being cancelled."""

    async def test_nobody_there(self) -> None:
        """A refused connection is `ConnectionLost` and says where nobody listens."""
        with nobody_listens() as url:
            error = await failure(url, a_call())
        assert type(error) is ConnectionLost
        assert url in str(error)

    async def test_a_host_that_is_none(self) -> None:
        """A name that can't be resolved is `ConnectionLost` too."""
        assert type(await failure("http://nowhere.invalid/v1", a_call())) is ConnectionLost

    @pytest.mark.parametrize("silence", [{"first_delay": 30}, {"stall_after": 3}])
    async def test_silence_is_a_timeout(
        self, chat_server: ChatServer, silence: Mapping[str, Any]
    ) -> None:
        """No first byte, or no next one, within `read_timeout`: the platform's timeout."""
        error = await failure(chat_server, a_call(**silence), read_timeout=0.2)
        assert type(error) is PlatformTimeout
        assert "0.2 s" in str(error)
        chat_server.wait_until_idle()

    async def test_a_slow_answer_is_no_timeout(self, chat_server: ChatServer) -> None:
        """The limit is on silence, not on the whole."""
        seen = await run(chat_server, a_call(delay=0.05), read_timeout=0.4)
        assert text_of(seen) == TEXT

    @pytest.mark.parametrize("silence", [{"first_delay": 30}, {"stall_after": 0}, {"delay": 0.5}])
    async def test_cancelling_closes_the_connection(
        self, chat_server: ChatServer, silence: Mapping[str, Any]
    ) -> None:
        """Whatever it waits for, the server sees it go at once."""
        async with CompatibleAdapter(chat_server.url) as adapter:
            calls = [asyncio.create_task(drain(adapter, a_call(**silence))) for _ in range(5)]
            await asyncio.to_thread(chat_server.wait_until_open, 5)
            for call in calls:
                call.cancel()
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(one, asyncio.CancelledError) for one in ended)
            await asyncio.to_thread(chat_server.wait_until_idle, 2)
        assert chat_server.dropped == 5

    async def test_connections_are_used_again(self, chat_server: ChatServer) -> None:
        """Calls one after the other share a connection, and a lost one is replaced."""
        async with CompatibleAdapter(chat_server.url) as adapter:
            for _ in range(3):
                await drain(adapter, a_call())
            with pytest.raises(ConnectionLost):
                await drain(adapter, a_call(cut_after=2, cut="reset"))
            await drain(adapter, a_call())
        assert chat_server.connections == 2

    async def test_many_at_once(self, chat_server: ChatServer) -> None:
        """Two hundred calls at the same time, some of them failing, each get their own answer."""
        calls = [
            a_call(status=500, error={"message": "x"})
            if n % 10 == 0
            else a_call(text=f"number {n}")
            for n in range(200)
        ]
        async with CompatibleAdapter(chat_server.url) as adapter:
            ended = await asyncio.gather(
                *(drain(adapter, call) for call in calls), return_exceptions=True
            )
        for n, one in enumerate(ended):
            if n % 10 == 0:
                assert type(one) is Overloaded
            else:
                assert isinstance(one, list)
                assert text_of(one) == f"number {n}"
