"""Who listens to a server, and can't: it goes on trying, and has others look meanwhile."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from perdure.store import listening
from perdure.store.dialect import News
from perdure.store.listening import Listener

MINUTES = 10.0


class _Connection:
    """What is there of a connection that is of no use."""

    async def close(self) -> None:
        """Close it."""


class _Cut(Listener):
    """Hears, and loses its connection at once."""

    async def _listen(self, connection: object) -> None:
        self._on_news(News())
        self.hears = True
        raise psycopg.OperationalError("cut")


class _Refused(Listener):
    """May not listen, as on a standby."""

    async def _listen(self, connection: object) -> None:
        raise psycopg.errors.FeatureNotSupported("cannot execute LISTEN during recovery")


class World:
    """Where no time passes but by waiting, and what happens in it is noted by the moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, active: bool, reached: bool) -> None:
        self.now = 0.0
        self.reached = reached
        self.tries: list[float] = []
        self.news: list[tuple[float, bool]] = []
        self.active = active
        monkeypatch.setattr(listening.asyncio, "sleep", self._sleep)

    async def live(self, kind: type[Listener]) -> Listener:
        """Let somebody listen for some minutes."""
        listener = kind(self._connect, self._hear, lambda: self.active, "me")  # type: ignore[arg-type]
        with pytest.raises(asyncio.CancelledError):
            await listener.run()
        return listener

    async def _sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > MINUTES * 60:
            raise asyncio.CancelledError

    async def _connect(self) -> Any:
        self.tries.append(self.now)
        if not self.reached:
            raise psycopg.OperationalError("too many clients")
        return _Connection()

    def _hear(self, news: News) -> None:
        self.news.append((self.now, news.work))


async def test_those_who_follow_the_log_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as no connection can be had, they look every 2 s at least; it is tried less often."""
    world = World(monkeypatch, active=True, reached=False)
    await world.live(Listener)
    looks = [now for now, _work in world.news]
    pauses = [after - before for before, after in pairwise(looks)]
    assert max(pauses) < listening.SLOW_SECONDS + 0.001
    assert len(looks) < MINUTES * 60 / 1.5
    assert MINUTES * 60 / 10 < len(world.tries) < MINUTES * 60 / 4
    assert not any(work for _now, work in world.news), "workers weren't told, and look themselves"


async def test_nobody_looks_where_nobody_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a reader nothing is asked for."""
    world = World(monkeypatch, active=False, reached=False)
    await world.live(Listener)
    assert world.news == []


async def test_workers_are_told_when_nothing_is_heard_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By then they can see that, and go on by themselves; though it is cut each time, seldom."""
    world = World(monkeypatch, active=False, reached=True)
    heard: list[bool] = []
    tell = world._hear

    def hear(news: News) -> None:
        heard.append(listener.hears)
        tell(news)

    monkeypatch.setattr(world, "_hear", hear)
    listener = _Cut(world._connect, hear, lambda: False, "me")
    with pytest.raises(asyncio.CancelledError):
        await listener.run()
    assert not any(heard)
    assert len(world.news) == 2 * len(world.tries), "once when it begins, once when it is lost"
    assert all(work for _now, work in world.news)
    assert len(world.tries) < MINUTES * 60 / 4


async def test_a_server_where_nobody_may_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't asked again and again without a pause that grows."""
    world = World(monkeypatch, active=True, reached=True)
    listener = await world.live(_Refused)
    assert not listener.hears
    assert len(world.tries) < MINUTES * 60 / 4
    assert world.news


async def test_while_a_connection_is_being_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those who follow the log look, however long that takes; and it can be given up."""
    monkeypatch.setattr(listening, "SLOW_SECONDS", 0.01)
    looked, given_up = asyncio.Event(), asyncio.Event()

    def look(news: News) -> None:
        assert not news.work
        looked.set()

    async def connect() -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            given_up.set()

    running = asyncio.create_task(Listener(connect, look, lambda: True, "me").run())
    await asyncio.wait_for(looked.wait(), 60)
    running.cancel()
    await asyncio.wait({running})
    assert given_up.is_set()
