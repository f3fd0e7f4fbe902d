"""After a crash: what is known is written down, and the task goes on as it was told to."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from harness import (
    FAST,
    Child,
    Nursery,
    assert_sound,
    count_events,
    demo,
    eventually,
    journal_of,
    query,
    stored_events,
    text_of,
)

from perdure import (
    Accepted,
    Chunk,
    Completed,
    ConnectionLost,
    Engine,
    Recovery,
    Result,
    Resume,
    Task,
    TaskConstraints,
    TaskStatus,
    Usage,
    UsageReported,
    collect_stream,
)
from perdure.calls import make_call
from perdure.policy import RetryPolicy
from perdure.store import claims, liveness
from perdure.store.claims import Scope
from perdure.store.schema import workers
from perdure.store.transaction import Transaction
from perdure.testing import Hold, ScriptedAdapter
from perdure_adapters import DemoAdapter

WORDS = " ".join(f"word{n}" for n in range(60))


def engine_on(db: Path, *adapters: Any, **changes: Any) -> Engine:
    """Return an engine on ``db`` that is quick to notice things."""
    settings = replace(FAST, **changes.pop("settings", {}))
    return Engine.open(db, adapters=adapters or (ScriptedAdapter(),), settings=settings, **changes)


async def crash(
    db: Path, nursery: Nursery, task: Task, words: int = 4, **settings: Any
) -> tuple[str, Child]:
    """Submit a task, let a child run it until so much came, and kill the child."""
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(task)
    before = count_events(db, "running")
    child = nursery.start("run", db=db, until_done=False, settings=settings)
    await eventually(lambda: count_events(db, "running") > before)
    await eventually(lambda: len(text_of(stored_events(db, task_id)).split()) >= words)
    child.kill()
    assert query(db, "SELECT status FROM tasks WHERE task_id = ?", task_id) == [("running",)]
    return task_id, child


def of_type(db: Path, task_id: str, type_: str) -> list[dict[str, Any]]:
    """Return the data of a task's events of one type."""
    return [data for found, data in stored_events(db, task_id) if found == type_]


def slow(**fields: Any) -> Task:
    """Return a task whose demonstration says `WORDS`, but stalls in its first attempt."""
    defaults: dict[str, Any] = {
        "text": WORDS,
        "chunk_words": 2,
        "delay": 0.002,
        "stall_after": 10,
        "fail_attempts": 1,
    }
    return demo("Say the words.", **{**defaults, **fields})


async def finish(db: Path, task_id: str, **options: Any) -> Result:
    """Let another engine finish the task."""
    async with engine_on(db, DemoAdapter(**options)) as engine:
        return await engine.get_result(task_id, 60)


# -- the four ways to go on ------------------------------------------------------------------------


async def test_it_begins_anew_where_nothing_else_was_said(db: Path, nursery: Nursery) -> None:
    """The lost attempt stays in the log, its outcome unknown; the output begins again."""
    task_id, _ = await crash(db, nursery, slow())
    lost = text_of(stored_events(db, task_id))
    assert lost
    used = of_type(db, task_id, "usage")[-1]["usage"]
    (owner,) = {data["worker"] for data in of_type(db, task_id, "running")}
    result = await finish(db, task_id)
    assert (result.output, result.attempts) == (WORDS, 2)
    assert of_type(db, task_id, "interrupted") == [
        {
            "worker": owner,
            "attempt": 1,
            "reason": "worker_lost",
            "outcome": "unknown",
            "next": "restart",
            "usage": used,
        }
    ]
    modes = [data["mode"] for data in of_type(db, task_id, "running")]
    assert modes == ["restart", "restart"]
    assert_sound(db)


async def test_it_goes_on_from_the_partial_output(db: Path, nursery: Nursery) -> None:
    """With `continue` the text so far is handed back, and only the rest is asked for."""
    constraints = TaskConstraints(recovery=Recovery.CONTINUE)
    task_id, _ = await crash(db, nursery, slow(constraints=constraints))
    partial = text_of(stored_events(db, task_id))
    assert partial
    result = await finish(db, task_id)
    assert (result.output, result.attempts) == (WORDS, 2)
    (interrupted,) = of_type(db, task_id, "interrupted")
    assert (interrupted["outcome"], interrupted["next"]) == ("unknown", "continue")
    second = stored_events(db, task_id)
    began = [n for n, (type_, _) in enumerate(second) if type_ == "running"][1]
    assert "".join(d["text"] for t, d in second[began:] if t == "chunk") == WORDS[len(partial) :]
    assert_sound(db)


async def test_continuing_hands_the_partial_output_over(db: Path) -> None:
    """The adapter gets the text so far, and a new call; what it says is appended."""
    constraints = TaskConstraints(recovery=Recovery.CONTINUE)
    task_id = await abandoned(db, Chunk(text="one "), Chunk(text="two "), constraints=constraints)
    adapter = ScriptedAdapter("three", Completed())
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(task_id, 30)
    assert result.output == "one two three"
    assert adapter.calls[0].resume == Resume("continue", "one two ")
    assert adapter.calls[0].attempt == 2
    assert_sound(db)


async def test_continuing_from_nothing_is_a_new_beginning(db: Path) -> None:
    """Where no text had come there is nothing to hand over."""
    task_id = await abandoned(db, constraints=TaskConstraints(recovery=Recovery.CONTINUE))
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter) as engine:
        await engine.get_result(task_id, 30)
    assert adapter.calls[0].resume is None
    assert of_type(db, task_id, "interrupted")[0]["next"] == "restart"


async def test_it_fails_where_that_was_asked_for(db: Path, nursery: Nursery) -> None:
    """With `fail` the platform isn't asked again; the partial output is kept."""
    constraints = TaskConstraints(recovery=Recovery.FAIL)
    task_id, _ = await crash(db, nursery, slow(constraints=constraints))
    partial = text_of(stored_events(db, task_id))
    result = await finish(db, task_id)
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "Interrupted")
    assert "recovery = fail" in str(result.error)
    assert result.partial_output == partial
    assert result.attempts == 1
    (interrupted,) = of_type(db, task_id, "interrupted")
    assert (interrupted["outcome"], interrupted["next"]) == ("unknown", "fail")
    assert_sound(db)


@pytest.mark.parametrize("recovery", list(Recovery))
async def test_an_interrupted_call_is_picked_up(
    db: Path, nursery: Nursery, tmp_path: Path, recovery: Recovery
) -> None:
    """Where the platform can, the same response goes on: no text lost or doubled, paid once."""
    journal = tmp_path / "journal"
    task = demo(
        "Say the words.",
        text=WORDS,
        chunk_words=2,
        delay=0.02,
        reattach=True,
        journal=str(journal),
        constraints=TaskConstraints(recovery=recovery),
    )
    task_id, _ = await crash(db, nursery, task)
    partial = text_of(stored_events(db, task_id))
    async with engine_on(db, DemoAdapter()) as engine:
        reading = asyncio.create_task(collect_stream(engine.stream_result(task_id)))
        result = await engine.get_result(task_id, 60)
        assert await reading == WORDS
    assert (result.output, result.attempts) == (WORDS, 2)
    assert partial
    assert WORDS.startswith(partial)
    (interrupted,) = of_type(db, task_id, "interrupted")
    assert (interrupted["outcome"], interrupted["next"]) == ("reattachable", "reattach")
    assert [data["mode"] for data in of_type(db, task_id, "running")] == ["restart", "reattach"]
    calls = journal_of(journal)
    modes = [entry["mode"] for entry in calls if "call" in entry]
    assert modes == ["restart", "reattach"], "a second generation was asked for"
    assert result.usage.output_tokens == 60
    assert_sound(db)


async def test_picking_up_again_and_again(
    db: Path, nursery: Nursery, tmp_path: Path, chance: Any
) -> None:
    """A response that is interrupted many times comes out whole, from one generation."""
    journal = tmp_path / "journal"
    text = " ".join(f"w{n}" for n in range(400))
    task = demo(
        "Go on.", text=text, chunk_words=1, delay=0.003, reattach=True, journal=str(journal)
    )
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(task)
    for _ in range(6):
        before = count_events(db, "running")
        child = nursery.start("run", db=db, until_done=False)
        await eventually(lambda n=before: count_events(db, "running") > n)
        # Before the platform's answer is known there is nothing to pick up.
        await eventually(lambda: count_events(db, "accepted"))
        await asyncio.sleep(chance.uniform(0, 0.2))
        child.kill()
    result = await finish(db, task_id)
    assert result.output == text
    calls = journal_of(journal)
    assert sum(entry.get("mode") == "restart" for entry in calls) == 1
    assert result.usage.output_tokens == 400
    assert_sound(db)


async def test_picking_up_hands_over_response_and_cursor(db: Path) -> None:
    """The adapter learns which response it was and where its stream goes on; tokens count once."""
    task_id = await abandoned(
        db,
        Accepted(response_id="resp_1", model="m-1", reattachable=True, cursor="0"),
        UsageReported(usage=Usage(input_tokens=5, output_tokens=1)),
        Chunk(text="one ", cursor="1"),
        Chunk(text="two ", cursor="2"),
    )
    used = Usage(input_tokens=5, output_tokens=3)
    adapter = ScriptedAdapter("three", Completed(usage=used))
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(task_id, 30)
    assert adapter.calls[0].resume == Resume("reattach", "one two ", "resp_1", "2")
    assert (result.output, result.model) == ("one two three", "m-1")
    assert result.usage == used
    assert_sound(db)


async def test_a_response_is_picked_up_by_the_engine_that_follows_a_closed_one(db: Path) -> None:
    """Handing back is no loss: the response goes on and isn't stopped at the platform."""
    hold = Hold()
    first = ScriptedAdapter(
        Accepted(response_id="resp_1", reattachable=True), Chunk(text="one ", cursor="1"), hold
    )
    async with engine_on(db, first) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        await hold.reached.wait()
    assert first.stopped == []
    second = ScriptedAdapter("two", Completed())
    async with engine_on(db, second) as engine:
        assert (await engine.get_result(task_id, 30)).output == "one two"
    assert second.calls[0].resume == Resume("reattach", "one ", "resp_1", "1")
    (interrupted,) = of_type(db, task_id, "interrupted")
    assert (interrupted["reason"], interrupted["outcome"]) == ("handed_back", "reattachable")
    assert_sound(db)


async def test_a_picked_up_call_that_fails_begins_anew(db: Path) -> None:
    """When the response is gone, the task is asked again, as after any other error."""
    task_id = await abandoned(
        db, Accepted(response_id="resp_1", reattachable=True), Chunk(text="one ", cursor="1")
    )
    answers = iter(
        [
            [ConnectionLost("no such response", response_over=True)],
            ["all new", Completed()],
        ]
    )
    adapter = ScriptedAdapter(per_call=lambda _call: next(answers))
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(task_id, 30)
    assert (result.output, result.attempts) == ("all new", 3)
    assert [call.resume and call.resume.mode for call in adapter.calls] == ["reattach", None]
    assert_sound(db)


async def test_a_call_that_nobody_wants_any_more_is_stopped(db: Path) -> None:
    """Its worker is gone, and it was cancelled: it doesn't go on at the platform unheard."""
    begun = Accepted(response_id="resp_1", reattachable=True)
    task_id = await abandoned(db, begun, Chunk(text="one "))
    adapter = ScriptedAdapter()
    async with engine_on(db, adapter, run=False) as engine:
        assert await engine.cancel_task(task_id)
        assert adapter.stopped == []
        assert await engine.recover_lost() == 1
        result = await engine.get_result(task_id, 30)
    assert (result.status, result.partial_output) == (TaskStatus.CANCELLED, "one ")
    assert adapter.stopped == ["resp_1"]
    assert_sound(db)


async def test_a_platform_that_does_not_stop_holds_nobody_up(db: Path) -> None:
    """Whoever takes over runs what there is meanwhile."""
    reached = asyncio.Event()

    class Stubborn(ScriptedAdapter):
        async def stop(self, response_id: str) -> None:
            reached.set()
            await super().stop(response_id)
            await asyncio.Event().wait()

    begun = Accepted(response_id="resp_1", reattachable=True)
    task_id = await abandoned(db, begun)
    async with engine_on(db, run=False) as engine:
        await engine.cancel_task(task_id)
    adapter = Stubborn()
    async with engine_on(db, adapter) as engine:
        await eventually(reached.is_set)
        assert (await engine.get_result(await engine.submit_task(Task(prompt="?")), 30)).success
        assert engine.worker._presence._stopping
        for stopping in tuple(engine.worker._presence._stopping):
            stopping.cancel()
    assert adapter.stopped == ["resp_1"]


async def abandoned(db: Path, *events: Any, constraints: TaskConstraints | None = None) -> str:
    """Write down a task whose worker came so far and was never heard of again."""
    async with engine_on(db, run=False) as engine:
        task_id = await engine.submit_task(Task(prompt="?", constraints=constraints))

        def run(tx: Transaction) -> None:
            claims.claim(tx, "gone", 1, Scope(), {})
            tx.connection.exec_driver_sql("DELETE FROM workers WHERE worker_id = 'gone'")
            length = 0
            for number, event in enumerate(events):
                placed = event
                if isinstance(event, Chunk):
                    placed = event.model_copy(update={"offset": length})
                    length += len(event.text)
                tx.append(task_id, (placed,), 2 + number)

        await engine.log.write(run, (task_id,))
    return task_id


# -- how soon, and how often -----------------------------------------------------------------------


async def test_a_sign_of_life_holds_as_long_as_its_worker_says(db: Path) -> None:
    """Whoever looks goes by the other one's lease, not by its own, which may be shorter."""
    hold = Hold()
    patient = {"heartbeat_seconds": 3600.0, "lease_seconds": 7200.0}
    first = ScriptedAdapter("one", hold, Completed())
    async with engine_on(db, first, settings=patient) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        await hold.reached.wait()
        engine.worker.stop_claiming()
        async with engine_on(db, run=False, settings={"lease_seconds": 1.0}) as other:

            def be_silent(tx: Transaction) -> None:
                moment = tx.at - timedelta(seconds=60)
                tx.connection.execute(sa.update(workers).values(heartbeat_at=moment))

            await other.log.write(be_silent)
            assert await other.recover_lost() == 0
            await other.log.write(  # as one of an older perdure
                lambda tx: tx.connection.exec_driver_sql("UPDATE workers SET lease_seconds = NULL")
            )
            assert await other.recover_lost() == 1
        hold.release()
    assert len(of_type(db, task_id, "interrupted")) == 1
    assert_sound(db)


async def test_a_dead_process_of_this_host_is_noticed_at_once(db: Path, nursery: Nursery) -> None:
    """Nobody waits for the lease of a process that doesn't exist any more."""
    task_id, _ = await crash(db, nursery, slow())
    began = time.monotonic()
    async with engine_on(db, DemoAdapter(), settings={"lease_seconds": 3600}) as engine:
        await eventually(lambda: of_type(db, task_id, "interrupted"))
        assert time.monotonic() - began < 20
        await engine.get_result(task_id, 60)
    assert query(db, "SELECT count(*) FROM workers") == [(0,)]


async def test_a_death_is_noticed_while_running(db: Path, nursery: Nursery) -> None:
    """An engine that runs already takes over from one that dies beside it."""
    hold = Hold()
    busy = ScriptedAdapter(hold, Completed(), platform="busy")
    async with engine_on(db, busy, DemoAdapter()) as engine:
        mine = await engine.submit_task(Task(prompt="mine", platform="busy"))
        await hold.reached.wait()
        engine.worker._scope = Scope(platforms=("busy",))  # so that the child gets the next one
        task_id, _ = await crash(db, nursery, slow())
        engine.worker._scope = Scope()
        result = await engine.get_result(task_id, 60)
        hold.release()
        assert (await engine.get_result(mine, 30)).success
    assert result.output == WORDS
    assert_sound(db)


async def test_a_living_process_elsewhere_is_waited_for(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another host only the lease tells; within it nothing is taken."""
    hold = Hold()
    adapter = ScriptedAdapter(hold)
    real = liveness.host_name
    monkeypatch.setattr(liveness, "host_name", lambda: "elsewhere#1")
    async with engine_on(
        db, adapter, settings={"heartbeat_seconds": 3600, "lease_seconds": 7200}
    ) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        await hold.reached.wait()
        engine.worker.stop_claiming()
        await engine.log.write(
            lambda tx: tx.connection.exec_driver_sql("UPDATE workers SET pid = 2147483646")
        )
        monkeypatch.setattr(liveness, "host_name", real)
        async with engine_on(db):
            await asyncio.sleep(0.5)
            assert of_type(db, task_id, "interrupted") == []
        await engine.log.write(
            lambda tx: tx.connection.exec_driver_sql("UPDATE workers SET lease_seconds = 0.3")
        )
        async with engine_on(db) as other:
            assert (await other.get_result(task_id, 30)).success
    assert_sound(db)


async def test_a_task_that_kills_its_workers_is_given_up(db: Path, nursery: Nursery) -> None:
    """After so many lost workers a task fails instead of killing the next."""
    policy = RetryPolicy(max_interruptions=3)
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        task_id = await engine.submit_task(slow())
        good = await engine.submit_task(demo("Good.", words=5, priority=9))
    for _ in range(3):
        child = nursery.start(
            "run", db=db, die="in the stream", settings={"concurrency": 1}, until_done=False
        )
        assert await child.gone() == -9
    async with engine_on(db, DemoAdapter(), settings={"retry": policy}) as engine:
        result = await engine.get_result(task_id, 30)
        assert (await engine.get_result(good, 30)).success
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "Interrupted")
    assert "lost 3 times, and 3 is the limit" in str(result.error)
    assert result.attempts == 3
    assert_sound(db)


async def test_being_handed_back_often_is_no_reason_to_give_up(db: Path) -> None:
    """Only lost workers count; a task may be handed back as often as engines are closed."""
    policy = RetryPolicy(max_interruptions=2)
    hold = Hold()
    for n in range(5):
        async with engine_on(db, ScriptedAdapter(hold), settings={"retry": policy}) as engine:
            task_id = await engine.submit_task(Task(prompt="?", key="one"))
            await eventually(lambda n=n: count_events(db, "running") == n + 1)
    async with engine_on(db, settings={"retry": policy}) as engine:
        assert (await engine.get_result(task_id, 30)).success
    assert_sound(db)


async def test_what_was_paid_for_stays_counted(db: Path, nursery: Nursery) -> None:
    """Tokens of lost attempts are part of the sum."""
    task_id, _ = await crash(db, nursery, slow())
    lost = of_type(db, task_id, "usage")[-1]["usage"]
    result = await finish(db, task_id)
    assert result.usage.input_tokens == 2 * lost["input_tokens"]
    assert result.usage.output_tokens == lost["output_tokens"] + 60
    assert result.cost is None


SOME = Usage(input_tokens=1000, output_tokens=100)
MORE = Usage(input_tokens=1000, output_tokens=500)


def priced(*steps: Any) -> ScriptedAdapter:
    """Return a platform whose prices are known."""
    return ScriptedAdapter(Accepted(model="gpt-4o"), *steps, prices="openai")


async def price_of_more(db: Path) -> float:
    """Return what an attempt that used so much costs."""
    async with engine_on(db, priced("x", Completed(usage=MORE))) as engine:
        cost = (await engine.get_result(await engine.submit_task(Task(prompt="?")), 30)).cost
    assert cost is not None
    return cost


@pytest.mark.parametrize("recovery", [Recovery.RESTART, Recovery.CONTINUE])
async def test_what_was_used_before_handing_back_is_paid_for(db: Path, recovery: Recovery) -> None:
    """Tokens that were told just before, and their price, are part of the sum."""
    cost = await price_of_more(db)
    rarely = {"timing": replace(FAST.timing, usage_interval=60.0)}
    hold = Hold()
    first = priced("one ", UsageReported(usage=SOME), 0.1, UsageReported(usage=MORE), hold)
    constraints = TaskConstraints(recovery=recovery)
    async with engine_on(db, first, settings=rarely) as engine:
        task_id = await engine.submit_task(Task(prompt="?", constraints=constraints))
        await hold.reached.wait()
    (interrupted,) = of_type(db, task_id, "interrupted")
    assert (interrupted["usage"]["output_tokens"], interrupted["cost_usd"]) == (500, cost)
    async with engine_on(db, priced("two", Completed(usage=MORE))) as engine:
        result = await engine.get_result(task_id, 30)
    assert (result.usage.input_tokens, result.usage.output_tokens) == (2000, 1000)
    assert result.cost == pytest.approx(2 * cost)
    assert_sound(db)


async def test_a_call_that_is_picked_up_is_paid_for_once(db: Path) -> None:
    """When it ends; what it had used before is known meanwhile, should nobody ever pick it up."""
    cost = await price_of_more(db)
    rarely = {"timing": replace(FAST.timing, usage_interval=60.0)}
    hold = Hold()
    begun = Accepted(response_id="resp_1", model="gpt-4o", reattachable=True)
    first = ScriptedAdapter(
        *(begun, "one ", UsageReported(usage=SOME), 0.1, UsageReported(usage=MORE), hold),
        prices="openai",
    )
    async with engine_on(db, first, settings=rarely) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        await hold.reached.wait()
    (interrupted,) = of_type(db, task_id, "interrupted")
    assert "usage" not in interrupted
    assert of_type(db, task_id, "usage")[-1]["usage"]["output_tokens"] == 500
    async with engine_on(db, priced("two", Completed(usage=MORE))) as engine:
        result = await engine.get_result(task_id, 30)
    assert (result.usage.output_tokens, result.cost) == (500, cost)
    assert_sound(db)


async def test_closing_fails_what_may_not_be_asked_again(db: Path) -> None:
    """The error says that it was handed back, and what it had cost is known."""
    cost = await price_of_more(db)
    hold = Hold()
    constraints = TaskConstraints(recovery=Recovery.FAIL)
    async with engine_on(db, priced("one", UsageReported(usage=MORE), hold)) as engine:
        task_id = await engine.submit_task(Task(prompt="?", constraints=constraints))
        await hold.reached.wait()
    async with engine_on(db, run=False) as engine:
        result = await engine.get_result(task_id, 30)
    assert (result.status, result.error_class) == (TaskStatus.FAILED, "Interrupted")
    assert str(result.error).startswith("it was handed back by its worker")
    assert (result.partial_output, result.cost, result.tokens_used) == ("one", cost, 1500)
    assert_sound(db)


async def test_closing_before_the_platform_was_asked(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call was made: the task can be run, whatever it says of calls that were lost."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def slow(database: Any, claimed: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await make_call(database, claimed)

    adapter = ScriptedAdapter()
    constraints = TaskConstraints(recovery=Recovery.FAIL)
    with monkeypatch.context() as patching:
        patching.setattr("perdure.worker.make_call", slow)
        async with engine_on(db, adapter) as engine:
            task_id = await engine.submit_task(Task(prompt="?", constraints=constraints))
            await reached.wait()
            closing = asyncio.create_task(engine.close())
            await eventually(lambda: engine.worker.stopping)
            go_on.set()
            await closing
    assert adapter.calls == []
    async with engine_on(db, adapter) as engine:
        result = await engine.get_result(task_id, 30)
    assert (result.success, result.attempts) == (True, 2)
    assert_sound(db)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_what_was_used_before_a_lost_connection_is_known(db: Path, cancelled: bool) -> None:
    """The call may be picked up, and told again what it used; or never, as after a cancellation."""
    rarely = {
        "timing": replace(FAST.timing, usage_interval=60.0),
        "retry": RetryPolicy(base_seconds=3600.0 if cancelled else 0.01, cap_seconds=3600.0),
    }
    begun = Accepted(response_id="resp_1", reattachable=True)
    usage = (UsageReported(usage=SOME), 0.1, UsageReported(usage=MORE))
    answers = iter([[begun, "one ", *usage, ConnectionLost("gone")], ["two", Completed()]])
    adapter = ScriptedAdapter(per_call=lambda _call: next(answers))
    async with engine_on(db, adapter, settings=rarely) as engine:
        task_id = await engine.submit_task(Task(prompt="?"))
        await eventually(lambda: of_type(db, task_id, "attempt_failed"))
        if cancelled:
            assert await engine.cancel_task(task_id)
        result = await engine.get_result(task_id, 30)
    assert of_type(db, task_id, "attempt_failed")[0]["next"] == "reattach"
    assert result.status is (TaskStatus.CANCELLED if cancelled else TaskStatus.COMPLETED)
    assert (result.usage.input_tokens, result.usage.output_tokens) == (1000, 500)
    assert_sound(db)


async def test_many_tasks_of_one_dead_worker(db: Path, nursery: Nursery) -> None:
    """More tasks than are taken over in one go."""
    async with engine_on(db, DemoAdapter(), run=False) as engine:
        await engine.submit_tasks(
            demo(f"{n}", words=6, stall_after=1, fail_attempts=1) for n in range(450)
        )
    child = nursery.start("run", db=db, settings={"concurrency": 500}, until_done=False)
    await eventually(lambda: count_events(db, "chunk") >= 450)
    child.kill()
    async with engine_on(db, DemoAdapter(), run=False, settings={"concurrency": 64}) as engine:
        await engine.run_until_done()
    assert query(db, "SELECT DISTINCT status, attempts FROM tasks") == [("completed", 2)]
    assert count_events(db, "interrupted") == 450
    assert_sound(db)


# -- every point at which one can die --------------------------------------------------------------


@pytest.mark.parametrize(
    "point",
    [
        "between claim and call",
        "in the stream",
        "at the platform's end",
        "before the commit",
        "after the commit",
    ],
)
async def test_dying_at_every_point(db: Path, nursery: Nursery, tmp_path: Path, point: str) -> None:
    """Killed there, at the first to the eighth time: the rest is finished, nothing done twice."""
    journal = tmp_path / "journal"
    submit = [
        demo(f"task {n}", key=f"{n}", words=20, journal=str(journal)).model_dump(
            mode="json", exclude_defaults=True
        )
        for n in range(6)
    ]
    for at in range(1, 9):
        child = nursery.start(
            "run", db=db, submit=submit, die=point, at=at, settings={"concurrency": 2}
        )
        status = await child.gone()
        assert status in (0, -9), child.said()
        if status == 0:
            break
    child = nursery.start("run", db=db, submit=submit)
    assert await child.gone() == 0, child.said()
    assert query(db, "SELECT count(*), min(status), max(status) FROM tasks") == [
        (6, "completed", "completed")
    ]
    calls: dict[str, list[int]] = {}
    for entry in journal_of(journal):
        if "call" in entry:
            calls.setdefault(entry["call"], []).append(entry["attempt"])
    for task_id, attempts in query(db, "SELECT task_id, attempts FROM tasks"):
        made = calls.get(task_id, [])
        assert made == sorted(set(made)), "an attempt was made twice"
        assert made[-1] == attempts, "somebody called the platform after the end"
    assert_sound(db)


async def test_what_was_acknowledged_is_there(db: Path, nursery: Nursery, chance: Any) -> None:
    """Whenever a process is killed: every task whose id it was told is in the log."""
    for round_ in range(8):
        child = nursery.start("submit_many", db=db, count=100_000, name=f"round {round_}")
        await eventually(lambda c=child: len(c.lines()) > 3)
        await asyncio.sleep(chance.uniform(0, 0.15))
        child.kill()
        told = [line.split()[1] for line in child.lines()[1:]]
        there = {row[0] for row in query(db, "SELECT task_id FROM tasks")}
        assert told
        assert set(told) <= there
    assert_sound(db)
