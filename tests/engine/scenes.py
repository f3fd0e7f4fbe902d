"""What children do. Faults are put in from here, so that the product has no hooks for tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
import os
import pkgutil
import signal
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import replace
from typing import Any

from harness import FAST
from islands import leave_the_network, switch
from sqlalchemy import Connection

from perdure import Engine, Scope, Task, WorkerSettings
from perdure.adapter import Adapter, Call
from perdure.attempt import Attempt
from perdure.events import Chunk, Completed, Event
from perdure.store.database import Writer
from perdure.store.transaction import Transaction
from perdure_adapters import ChatGPTAdapter, ClaudeAdapter, DemoAdapter
from servers.cutting import CuttingProxy


def load_everything() -> None:
    """Import all there is, in the process that children are forked from, not in each of them."""
    for package in ("perdure", "perdure_adapters", "perdure_migrations"):
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            if not module.name.endswith(("__main__", ".env")):
                importlib.import_module(module.name)
    for name in (
        *("alembic.command", "genai_prices", "openai", "openai.resources.responses"),
        "sqlalchemy.dialects.sqlite.aiosqlite",
    ):
        importlib.import_module(name)


def play(scene: str, arguments: dict[str, Any]) -> None:
    """Play that scene to its end."""
    playing = SCENES[scene](**arguments)
    if asyncio.iscoroutine(playing):
        asyncio.run(playing)


def say(text: str) -> None:
    """Write a line that is out even if we die right after it."""
    os.write(1, f"{text}\n".encode())


async def run(
    db: str,
    *,
    options: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    until_done: bool = True,
    batch: str | None = None,
    die: str | None = None,
    at: int = 1,
    submit: list[dict[str, Any]] | None = None,
) -> None:
    """Run what is pending on the platform `demo`; without ``until_done`` for ever.

    Args:
        db: The database.
        options: Of the platform.
        settings: Of the worker, where they aren't `FAST`.
        until_done: End when nothing is pending or running.
        batch: Only this batch.
        die: The point at which this process kills itself.
        at: The how-manieth time it gets there.
        submit: Tasks to submit first.
    """
    if die is not None:
        POINTS[die](_Countdown(at))
    adapter = DemoAdapter(**(options or {}))
    engine = Engine.open(
        db, adapters=[adapter], run=False, settings=_settings(settings), scope=Scope(batch=batch)
    )
    async with engine:
        say(f"ready {engine.worker.worker_id}")
        for outcome in await engine.submit_tasks(
            [Task.model_validate(task) for task in submit or ()]
        ):
            say(f"submitted {getattr(outcome, 'task_id', outcome)}")
        if until_done:
            await engine.run_until_done()
        else:
            await engine.worker.run()
    say("done")


async def cancel(db: str, task_ids: list[str], *, delay: float = 0.0) -> None:
    """Cancel tasks from here, one after the other."""
    async with Engine.open(db, adapters=[DemoAdapter()], run=False) as engine:
        say("ready")
        await asyncio.sleep(delay)
        for task_id in task_ids:
            say(f"{task_id} {await engine.cancel_task(task_id, 'from afar')}")


async def read(db: str, task_id: str, readers: list[tuple[float, str]]) -> None:
    """Read one task with several readers that join after some seconds and note what they see."""

    async def follow(engine: Engine, delay: float, note: str) -> None:
        await asyncio.sleep(delay)
        file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        async for chunk in engine.stream_result(task_id):
            line = json.dumps([str(chunk), chunk.offset, chunk.version])
            os.write(file, f"{line}\n".encode())
        os.close(file)

    async with Engine.open(db, adapters=[DemoAdapter()], run=False) as engine:
        say("ready")
        await asyncio.gather(*(follow(engine, *reader) for reader in readers))
    say("done")


async def run_and_read(
    db: str, task_id: str, note: str, *, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Run what is pending, and read one task in the same process."""
    async with Engine.open(
        db, adapters=[DemoAdapter(**options)], settings=_settings(settings)
    ) as engine:
        say("ready")
        file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        async for chunk in engine.stream_result(task_id):
            line = json.dumps([str(chunk), chunk.offset, chunk.version])
            os.write(file, f"{line}\n".encode())
    say("done")


async def submit_many(db: str, count: int, name: str) -> None:
    """Submit tasks one by one and say the id of each as soon as it is ours."""
    async with Engine.open(db, adapters=[DemoAdapter()], run=False) as engine:
        say("ready")
        for number in range(count):
            task = Task(prompt=f"{name} {number}", platform="demo", key=f"{name}-{number}")
            say(f"{number} {await engine.submit_task(task)}")
    say("done")


def command(arguments: list[str], *, die: str | None = None, at: int = 1) -> None:
    """Be the program `perdure` with these arguments; the exit code is the last line said.

    Args:
        arguments: What follows `perdure`.
        die: The point at which this process kills itself.
        at: The how-manieth time it gets there.
    """
    from perdure.cli.main import run as run_command

    if die is not None:
        POINTS[die](_Countdown(at))
    code = run_command(arguments)
    say(f"exit {int(code)}")


async def run_on(db: str, *, platform: str, url: str, concurrency: int = 4) -> None:
    """Run what is pending on a platform whose server is at that address."""
    settings = _settings({"concurrency": concurrency})
    adapter = SERVED[platform](url)
    async with Engine.open(db, adapters=[adapter], run=False, settings=settings) as engine:
        say("ready")
        await engine.run_until_done()
    say("done")


SERVED: dict[str, Callable[[str], Adapter]] = {
    "chatgpt": lambda url: ChatGPTAdapter(base_url=url, api_key="any"),
    "claude": lambda url: ClaudeAdapter(base_url=url, api_key="any"),
}


def run_on_an_island(db: str) -> None:
    """Run what is pending, behind a network that SIGUSR1 cuts and SIGUSR2 mends."""
    try:
        leave_the_network()
    except OSError as error:
        say(f"no network: {error}")
        return
    signal.signal(signal.SIGUSR1, lambda *_: switch(on=False))
    signal.signal(signal.SIGUSR2, lambda *_: switch(on=True))
    with CuttingProxy(db) as network:
        say("network up")
        asyncio.run(run(network.url, settings={"lease_seconds": 2.0}, until_done=False))


SCENES: dict[str, Callable[..., Any]] = {
    scene.__name__: scene
    for scene in (run, run_on, run_on_an_island, cancel, read, run_and_read, submit_many, command)
}


def _settings(changed: dict[str, Any] | None) -> WorkerSettings:
    changed = dict(changed or {})
    interval = changed.pop("chunk_interval", None)
    settings = replace(FAST, **changed)
    if interval is not None:
        settings = replace(settings, timing=replace(settings.timing, chunk_interval=interval))
    return settings


# -- dying at a certain point ----------------------------------------------------------------------


class _Countdown:
    """Kills this process at its so-many-th call."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _between_claim_and_call(tick: _Countdown) -> None:
    """Dies when a task is claimed and its platform wasn't asked yet."""
    real = Attempt.run

    @functools.wraps(real)
    async def run(self: Attempt) -> None:
        tick()
        await real(self)

    Attempt.run = run  # type: ignore[method-assign]


def _in_the_stream(tick: _Countdown) -> None:
    """Dies when a piece of output has come."""
    _at_event(Chunk, tick)


def _at_the_end(tick: _Countdown) -> None:
    """Dies when the platform has ended and that isn't written down yet."""
    _at_event(Completed, tick)


def _at_event(kind: type[Event], tick: _Countdown) -> None:
    real = DemoAdapter.run

    async def run(self: DemoAdapter, call: Call) -> AsyncGenerator[Event, None]:
        async with contextlib.aclosing(real(self, call)) as stream:
            async for event in stream:
                if isinstance(event, kind):
                    tick()
                yield event

    DemoAdapter.run = run  # type: ignore[method-assign]


def _before_the_commit(tick: _Countdown) -> None:
    """Dies in the writer thread when everything is written and the commit is still to come."""
    real = Transaction.flush

    def flush(self: Transaction) -> Any:
        done = real(self)
        if done[1]:
            tick()
        return done

    Transaction.flush = flush  # type: ignore[method-assign]


def _after_the_commit(tick: _Countdown) -> None:
    """Dies in the writer thread when something is committed and nobody was told of it."""
    real = Writer.transaction

    @contextlib.contextmanager
    def transaction(self: Writer) -> Generator[Connection, None, None]:
        with real(self) as connection:
            yield connection
        tick()

    Writer.transaction = transaction  # type: ignore[method-assign]


POINTS: dict[str, Callable[[_Countdown], None]] = {
    "between claim and call": _between_claim_and_call,
    "in the stream": _in_the_stream,
    "at the platform's end": _at_the_end,
    "before the commit": _before_the_commit,
    "after the commit": _after_the_commit,
}
