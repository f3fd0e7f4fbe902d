"""A chat-completions server that does what the request's `scenario` tells it to, byte by byte.

It runs on an event loop in a thread of its own, on a free port of the loopback interface, so that
it serves tests of any event loop. Whatever a server can do to a client is a field of `Scenario`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Self

TEXT = "Hello from a server, with a snowman ☃ and two lines.\nThis is the second."


@dataclass(frozen=True)
class Scenario:
    """How one request is answered."""

    text: str = TEXT
    """Streamed word by word."""
    deltas: list[dict[str, Any]] | None = None
    """These deltas instead of those of the text."""
    finish_reason: str | None = "stop"
    usage: dict[str, Any] | None = field(
        default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    )
    """Sent as the last event, if it is asked for."""
    usage_everywhere: bool = False
    """Also with every delta."""
    done: bool = True
    """Whether `[DONE]` is sent."""
    raw: list[str] | None = None
    """These event data instead of everything above."""
    cut_after: int | None = None
    """Stop after so many events."""
    cut: Literal["clean", "abort", "reset"] = "clean"
    """How: as if all were said; without the end of the body; with a TCP reset."""
    malformed_after: int | None = None
    """Send half a JSON object after so many events."""
    garbage_after: int | None = None
    """Send bytes that are no UTF-8 after so many events."""
    error_after: int | None = None
    """Send `error` as an event after so many events."""
    error: dict[str, Any] | None = None
    stall_after: int | None = None
    """Say nothing more after so many events."""
    delay: float = 0.0
    """Seconds between events."""
    first_delay: float = 0.0
    """Seconds before the response's first byte."""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: str | None = None
    """The whole body, instead of a stream."""
    knows_usage: bool = True
    """Else `stream_options` are refused with a 400."""


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class ChatServer:
    """The server; a context manager.

    Attributes:
        seen: The requests so far.
        open: Requests being answered now.
        connections: Connections that were made.
        dropped: Requests whose client went away before the answer was over.
        models: What `/v1/models` lists.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.open = 0
        self.connections = 0
        self.dropped = 0
        self.models = ["first-model", "second-model"]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._started = threading.Event()
        self._stop: asyncio.Event | None = None
        self._port = 0

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def chats(self) -> list[Seen]:
        """The requests for a completion."""
        return [seen for seen in self.seen if seen.path.endswith("/chat/completions")]

    def wait_until_open(self, count: int, seconds: float = 5) -> None:
        """Wait until so many requests are being answered."""
        latest = time.monotonic() + seconds
        while self.open < count:
            assert time.monotonic() < latest, f"{self.open} requests are open"
            time.sleep(0.005)

    def wait_until_idle(self, seconds: float = 5) -> None:
        """Wait until no request is being answered."""
        latest = time.monotonic() + seconds
        while self.open:
            assert time.monotonic() < latest, f"{self.open} requests are still open"
            time.sleep(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        # A server of asyncio's forgets who is just being let in when it stops.
        def accept() -> None:
            connection, _ = listening.accept()
            task = asyncio.create_task(self._connection(connection))
            connections.add(task)
            task.add_done_callback(connections.discard)
            task.add_done_callback(lambda _: connection.close())  # one cancelled never begins

        with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
            listening.setblocking(False)
            self._port = listening.getsockname()[1]
            self._loop.add_reader(listening, accept)
            self._started.set()
            await self._stop.wait()
            self._loop.remove_reader(listening)
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # what was closed last ends with the next turn of the loop

    async def _connection(self, connection: socket.socket) -> None:
        self.connections += 1
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            await self._requests(reader, writer)
            writer.close()
            await writer.wait_closed()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()  # what nobody reads is not waited for

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (seen := await _request(reader)) is not None:
            self.seen.append(seen)
            self.open += 1
            try:
                if not await self._until_gone(reader, Response(writer), seen):
                    break
            finally:
                self.open -= 1

    async def _until_gone(
        self, reader: asyncio.StreamReader, response: Response, seen: Seen
    ) -> bool:
        """Answer, or stop as soon as the client is gone; return whether the connection stays."""
        answering = asyncio.create_task(self._answer(response, seen))
        gone = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.dropped += 1
                return False
            return answering.result()
        finally:
            for task in (answering, gone):
                task.cancel()
            await asyncio.gather(answering, gone, return_exceptions=True)

    async def _answer(self, response: Response, seen: Seen) -> bool:
        if seen.path.endswith("/models"):
            listed = [{"id": name, "object": "model"} for name in self.models]
            return await response.whole(200, json.dumps({"object": "list", "data": listed}))
        if not seen.path.startswith("/v1/chat/completions"):
            return await response.whole(404, json.dumps({"error": {"message": "no such path"}}))
        scenario = Scenario(**seen.body.pop("scenario", {}))
        await asyncio.sleep(scenario.first_delay)
        if not scenario.knows_usage and "stream_options" in seen.body:
            refusal = {"error": {"message": "Unrecognized request argument: stream_options"}}
            return await response.whole(400, json.dumps(refusal))
        if scenario.body is not None or scenario.status != 200:
            body = scenario.body or json.dumps({"error": scenario.error})
            return await response.whole(scenario.status, body, scenario.headers)
        return await self._stream(response, scenario, seen.body)

    async def _stream(self, response: Response, scenario: Scenario, body: dict[str, Any]) -> bool:
        await response.begin(scenario.headers)
        for index, data in enumerate([*events(scenario, body), None]):
            if scenario.delay:
                await asyncio.sleep(scenario.delay)
            if index == scenario.stall_after:
                await asyncio.Event().wait()
            if index == scenario.error_after:
                await response.event(json.dumps({"error": scenario.error}))
            if index == scenario.malformed_after:
                await response.event('{"id":"chat-1","choices":[{"index":0,"del')
            if index == scenario.garbage_after:
                await response.event(b'{"id": "\xff\xfe"}')
            if index == scenario.cut_after and scenario.cut != "clean":
                response.drop(reset=scenario.cut == "reset")
                return False
            if data is None or index == scenario.cut_after:
                break
            await response.event(data)
        return await response.end()


def events(scenario: Scenario, body: dict[str, Any] | None = None) -> list[str]:
    """Return the data of all events of a scenario, those that are cut off too."""
    if scenario.raw is not None:
        return scenario.raw
    model = (body or {}).get("model", "m")
    asked = bool(((body or {}).get("stream_options") or {}).get("include_usage", body is None))
    deltas = scenario.deltas
    if deltas is None:
        words = scenario.text.split(" ")
        pieces = [word + " " for word in words[:-1]] + words[-1:]
        deltas = [{"role": "assistant", "content": None}, *({"content": p} for p in pieces)]
    chunks = [_chunk(model, [{"index": 0, "delta": d, "finish_reason": None}]) for d in deltas]
    if scenario.usage_everywhere:
        for index, chunk in enumerate(chunks):
            chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": index}
    if scenario.finish_reason is not None:
        end = {"index": 0, "delta": {}, "finish_reason": scenario.finish_reason}
        chunks.append(_chunk(model, [end]))
    if scenario.usage is not None and asked:
        chunks.append({**_chunk(model, []), "usage": scenario.usage})
    return [json.dumps(chunk) for chunk in chunks] + (["[DONE]"] if scenario.done else [])


def _chunk(model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "chat-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": choices,
    }


async def _request(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.decode().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {}
    for line in filter(None, lines):
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Seen(method, path, headers, json.loads(body) if body else {})


class Response:
    """What is sent back."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def whole(self, status: int, body: str, headers: dict[str, str] | None = None) -> bool:
        """Send a response that is no stream."""
        data = body.encode()
        fields = {"content-type": "application/json", "x-request-id": "req-1", **(headers or {})}
        await self._send(_head(status, {**fields, "content-length": str(len(data))}) + data)
        return True

    async def begin(self, headers: dict[str, str]) -> None:
        """Begin a stream."""
        fields = {"content-type": "text/event-stream", "x-request-id": "req-1", **headers}
        await self._send(_head(200, {**fields, "transfer-encoding": "chunked"}))

    async def event(self, data: str | bytes, name: str | None = None) -> None:
        """Send one event of the stream."""
        payload = b"data: %s\n\n" % (data.encode() if isinstance(data, str) else data)
        if name is not None:
            payload = b"event: %s\n%s" % (name.encode(), payload)
        await self._send(b"%x\r\n%s\r\n" % (len(payload), payload))

    async def end(self) -> bool:
        """End the stream as one does whose answer is whole."""
        await self._send(b"0\r\n\r\n")
        return True

    def drop(self, *, reset: bool) -> None:
        """Break the connection off."""
        if reset:
            sock = self._writer.get_extra_info("socket")
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._writer.transport.abort()
        else:
            self._writer.close()

    async def _send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *(f"{k}: {v}" for k, v in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@contextlib.contextmanager
def nobody_listens() -> Iterator[str]:
    """Yield a base URL where connections are refused."""
    with socket.socket() as held:  # bound but not listening: nobody else can take the port
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/v1"
