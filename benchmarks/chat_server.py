"""A server that streams as fast as it can: three protocols, on one event loop, in its own process.

    python -m benchmarks.chat_server DELTAS PAUSE

prints `{"port": …}` and serves until its input ends. The body of an answer is made once; a
connection gets it in a few large writes, so that the server costs as little as it can. With a pause
(seconds) an answer is one delta first, and the rest after the pause.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Final

WORD: Final = "word "
_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
    b"transfer-encoding: chunked\r\nx-request-id: req-1\r\n\r\n"
)


def chat_body(deltas: int) -> list[bytes]:
    """Return the events of a chat completion."""
    usage = {"prompt_tokens": 7, "completion_tokens": deltas, "total_tokens": deltas + 7}
    first = _chat([{"index": 0, "delta": {"role": "assistant", "content": WORD}}])
    middle = _chat([{"index": 0, "delta": {"content": WORD}, "finish_reason": None}])
    last = _chat([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    counted = {**_chat([]), "usage": usage}
    events = [first, *[middle] * (deltas - 1), last, counted]
    return [*(_event(event) for event in events), b"data: [DONE]\n\n"]


def _chat(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": "chat-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "bench",
        "choices": choices,
    }


def messages_body(deltas: int) -> list[bytes]:
    """Return the events of Anthropic's Messages API."""
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "bench",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 7, "output_tokens": 1},
    }
    block = {"type": "text", "text": ""}
    delta = {
        "type": "content_block_delta",
        "index": 0,
        "delta": {"type": "text_delta", "text": WORD},
    }
    stop = {"stop_reason": "end_turn", "stop_sequence": None}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": block},
        *[delta] * deltas,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": stop, "usage": {"output_tokens": deltas}},
        {"type": "message_stop"},
    ]
    return [b"event: %s\n%s" % (event["type"].encode(), _event(event)) for event in events]


def interaction_body(deltas: int) -> list[bytes]:
    """Return the events of an interaction of Gemini's."""
    known = {"id": "int_1", "object": "interaction", "model": "bench"}
    usage = {"total_input_tokens": 7, "total_output_tokens": deltas, "total_tokens": deltas + 7}
    begun, ended = {**known, "status": "in_progress"}, {**known, "status": "completed"}
    delta = {"event_type": "step.delta", "index": 0, "delta": {"type": "text", "text": WORD}}
    events: list[dict[str, Any]] = [
        {"event_type": "interaction.created", "interaction": begun},
        {"event_type": "step.start", "index": 0, "step": {"type": "model_output"}},
        *[delta] * deltas,
        {"event_type": "step.stop", "index": 0},
        {"event_type": "interaction.completed", "interaction": {**ended, "usage": usage}},
    ]
    return [
        b"event: %s\n%s" % (event["event_type"].encode(), _event({**event, "event_id": f"e{n}"}))
        for n, event in enumerate(events)
    ]


def _event(data: dict[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(data).encode()


def _chunked(events: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events)


async def _serve(deltas: int, pause: float) -> None:
    bodies: dict[bytes, tuple[bytes, bytes]] = {}
    for path, events, begin in (
        (b"chat/completions", chat_body(deltas), 1),
        (b"messages", messages_body(deltas), 3),
        (b"interactions", interaction_body(deltas), 3),
    ):
        bodies[path] = (_chunked(events[:begin]), _chunked(events[begin:]) + b"0\r\n\r\n")

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                length = {name.lower(): value for name, value in fields.items()}[b"content-length"]
                await reader.readexactly(int(length))
                path = head.split(b" ", 2)[1].partition(b"?")[0]
                first, rest = next(bodies[end] for end in bodies if path.endswith(end))
                writer.write(_HEAD + first)
                if pause:
                    await asyncio.sleep(pause)
                writer.write(rest)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
