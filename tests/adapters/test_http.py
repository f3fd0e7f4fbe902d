"""Connections that end while nobody looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import pytest

from perdure_adapters import _http
from perdure_adapters._http import HttpClient

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """Answers each connection as often as it is told to, and hangs up on the request after that.

    Attributes:
        answers: How often, connection by connection; what comes after them is answered for ever.
        last: What it says before it hangs up.
        requests: How many it has read, connection by connection.
    """

    def __init__(self, answers: list[int]) -> None:
        self.answers = answers
        self.last = b""
        self.requests: list[int] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        number = len(self.requests)
        self.requests.append(0)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
                self.requests[number] += 1
                if number < len(self.answers) and self.requests[number] > self.answers[number]:
                    writer.write(self.last)
                    break
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(*answers: int) -> AsyncIterator[tuple[Server, HttpClient]]:
    """Run a server, and a client that knows where it is."""
    server = Server(list(answers))
    running = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = running.sockets[0].getsockname()[1]
    async with HttpClient(base_url=f"http://127.0.0.1:{port}") as client:
        yield server, client
    running.close()


async def test_a_connection_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent on it is sent again, once for each such connection."""
    monkeypatch.setattr(_http, "_JUST_HUNG_UP", 60.0)  # however busy the machine is
    async with serving(1, 1) as (server, client):
        both = await asyncio.gather(*(client.post("/", content=b"a") for _ in range(2)))
        assert [one.text for one in both] == ["ok", "ok"]
        third = await client.post("/", content=b"b")
        assert third.text == "ok"
    assert server.requests == [2, 2, 1]


async def test_a_new_connection() -> None:
    """Who hangs up on its first request has read it: the error stands."""
    async with serving(0) as (server, client):
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("/", content=b"a")
    assert server.requests == [1]


async def test_an_answer_that_has_begun() -> None:
    """It was read, so it isn't asked again, whether the body is read at once or later."""
    async with serving(1, 1) as (server, client):
        server.last = ANSWER[:-1]
        await client.post("/", content=b"a")
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("/", content=b"b")
        assert server.requests == [2]
        await client.post("/", content=b"c")
        with pytest.raises(httpx2.RemoteProtocolError):
            async with client.stream("POST", "/", content=b"d") as response:
                await response.aread()
    assert server.requests == [2, 2]


async def test_a_request_that_was_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hangs up after a while may have read it, and been paid for it."""
    monkeypatch.setattr(_http, "_JUST_HUNG_UP", 0.0)
    async with serving(1) as (server, client):
        await client.post("/", content=b"a")
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("/", content=b"b")
    assert server.requests == [2]


async def test_a_body_that_is_gone() -> None:
    """What can't be sent twice isn't."""

    async def body() -> AsyncIterator[bytes]:
        yield b"b"

    async with serving(1) as (server, client):
        await client.post("/", content=b"a")
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("/", content=body(), headers={"content-length": "1"})
    assert server.requests == [2]


@pytest.mark.parametrize("said", [b"no HTTP at all\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n"])
async def test_an_answer_that_is_none(said: bytes) -> None:
    """Who said something has read what was sent."""
    async with serving(1) as (server, client):
        server.last = said
        await client.post("/", content=b"a")
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("/", content=b"b")
    assert server.requests == [2]


async def test_a_transport_that_tells_nothing() -> None:
    """Without a word on how far it came, a request isn't sent again."""
    asked: list[httpx2.Request] = []

    def hang_up(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")

    async with HttpClient(transport=httpx2.MockTransport(hang_up)) as client:
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post("http://127.0.0.1/", content=b"a")
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["connection.connect_tcp", "socks.connect_tcp"])
async def test_new_connections_of_all_kinds(kind: str) -> None:
    """A proxy's connections have steps with another name."""
    told = [f"{kind}.started", "http11.send_request_headers.started"]

    class Hangs(httpx2.AsyncBaseTransport):
        asked = 0

        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            self.asked += 1
            for step in told:
                await request.extensions["trace"](step, {})
            raise httpx2.ReadError("reset")

    transport = Hangs()
    async with HttpClient(transport=transport) as client:
        with pytest.raises(httpx2.ReadError):
            await client.post("http://127.0.0.1/", content=b"a")
    assert transport.asked == 1
