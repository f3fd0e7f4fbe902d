"""200 streams at full speed from a local server: the engine, with a reader each, and the bare SDK.

The server is a process of its own. Through the engine each answer is a durable task, and a reader
takes its text from `stream_result`; the rival consumes the same streams with the SDK alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from benchmarks.chat_server import WORD
from benchmarks.clients import Client, usable
from benchmarks.measuring import Row, Target, samples
from benchmarks.session import Session
from perdure import Engine, Task
from perdure.settings import WorkerSettings

STREAMS: Final = 200


def measure(session: Session) -> Sequence[Row]:
    """Measure deltas a second."""
    streams = session.size(STREAMS, 5)
    subjects: dict[str, Callable[[], float]] = {}
    with contextlib.ExitStack() as servers:
        for client in usable():
            deltas = session.size(client.deltas, 10)
            server = servers.enter_context(session.child("chat_server", deltas, 0))
            address = f"http://127.0.0.1:{server.hear()['port']}"
            arguments = (session, client, address, streams, deltas)
            subjects[f"perdure over {client.name}"] = partial(_run, _ours, *arguments)
            subjects[f"bare {client.name}"] = partial(_run, _bare, *arguments)
        found = samples("deltas/s", subjects, session.many_rounds)
    return [
        Row(
            f"over {client.name}",
            found[f"perdure over {client.name}"],
            found[f"bare {client.name}"],
            target=Target("at least", 0.8),
        )
        for client in usable()
    ]


def _run(measured: Callable[..., object], *arguments: object) -> float:
    return float(asyncio.run(measured(*arguments)))  # type: ignore[arg-type]


async def _ours(session: Session, client: Client, address: str, streams: int, deltas: int) -> float:
    settings = WorkerSettings(concurrency=streams)
    adapter = client.adapter(address)
    wanted = deltas * len(WORD)
    async with Engine.open(session.database(), adapters=[adapter], settings=settings) as engine:

        async def one() -> None:
            task_id = await engine.submit_task(Task(prompt="Question"))
            length = 0
            async for text in engine.stream_result(task_id):
                length += len(text)
            assert length == wanted

        task_id = await engine.submit_task(Task(prompt="Question"))
        await engine.get_result(task_id)  # imports the SDK
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(streams)))
        return streams * deltas / (time.perf_counter() - began)


async def _bare(
    _session: Session, client: Client, address: str, streams: int, deltas: int
) -> float:
    ask, close = client.bare(address)
    wanted = deltas * len(WORD)

    async def one() -> None:
        length = 0

        def on_text(text: str) -> None:
            nonlocal length
            length += len(text)

        await ask(on_text)
        assert length == wanted

    await one()
    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(streams)))
    taken = time.perf_counter() - began
    await close()
    return streams * deltas / taken
