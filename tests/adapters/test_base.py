"""The bases that adapters inherit, and the five methods they give to every adapter."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

import perdure_adapters
from perdure import Engine
from perdure.adapter import Adapter, Call
from perdure.errors import InvalidTask, RunningLoop, StoreError, TaskNotFound
from perdure.events import Chunk, Completed, Event
from perdure.ids import generate_task_id
from perdure.streaming import collect_stream
from perdure.task import Result, Task, TaskStatus
from perdure_adapters import AsyncBasePlatformAdapter, BasePlatformAdapter, DemoAdapter


class Echo(AsyncBasePlatformAdapter):
    """The smallest adapter there can be."""

    platform = "claude_code"

    def __init__(self) -> None:
        self.closed = 0

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say what was asked."""
        yield Chunk(text=call.task.question)
        yield Completed()

    async def close(self) -> None:
        """Count."""
        await super().close()
        self.closed += 1


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The database that is used where none is named."""
    path = tmp_path / "perdure.db"
    monkeypatch.setenv("PERDURE_DB", str(path))
    return path


def test_the_public_names_are_sorted_and_there() -> None:
    """`__all__` is sorted, and holds exactly what can be imported."""
    assert perdure_adapters.__all__ == sorted(perdure_adapters.__all__)
    assert all(hasattr(perdure_adapters, name) for name in perdure_adapters.__all__)


def test_importing_the_adapters_imports_no_sdk_and_no_sql() -> None:
    """Neither an SDK nor SQLAlchemy is loaded before it is needed, not even to make adapters."""
    code = (
        "import sys, perdure_adapters as p; p.DemoAdapter(); p.CompatibleAdapter('http://x/v1');"
        "p.ClaudeAdapter(api_key='x').check();"
        "p.ClaudeCodeAdapter().check();"
        "heavy = ('anthropic', 'claude_agent_sdk', 'openai', 'httpx2', 'sqlalchemy', 'alembic');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("base", [BasePlatformAdapter, AsyncBasePlatformAdapter])
def test_the_bases_are_abstract(base: type) -> None:
    """The bases can't be instantiated."""
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_a_subclass_without_run_is_abstract() -> None:
    """An adapter that doesn't say how it runs can't be instantiated."""

    class Nothing(AsyncBasePlatformAdapter):
        platform = "nothing"

    with pytest.raises(TypeError, match="run"):
        Nothing()  # type: ignore[abstract]


def test_one_method_makes_an_adapter() -> None:
    """With `run` alone a subclass is all that the engine asks for."""
    assert isinstance(Echo(), Adapter)
    assert isinstance(Echo(), BasePlatformAdapter)


class TestTaskIds:
    """Ids read `platform_yyyymmdd_uuid8`."""

    def test_the_platform_may_contain_underscores(self) -> None:
        """The last two parts are the date and the random one, whatever the platform's name."""
        id_ = Echo()._generate_task_id()
        platform, date, chance = id_.rsplit("_", 2)
        assert platform == "claude_code"
        assert abs(datetime.now(UTC) - datetime.strptime(date, "%Y%m%d").replace(tzinfo=UTC)) < (
            timedelta(days=2)
        )
        assert re.fullmatch("[0-9a-f]{8}", chance)

    def test_the_date_is_that_of_utc(self) -> None:
        """The same moment gives the same date in every time zone."""
        moment = datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=5)))
        assert generate_task_id("demo", moment).startswith("demo_20251231_")

    def test_ids_differ(self) -> None:
        """A thousand ids of one moment are a thousand ids."""
        moment = datetime(2026, 1, 1, tzinfo=UTC)
        assert len({generate_task_id("demo", moment) for _ in range(1000)}) == 1000


class TestWaitingWithATimeout:
    """`_wait_with_timeout` waits with a limit and swallows no cancellation."""

    async def test_the_result_comes_back(self) -> None:
        """What is ready in time is returned."""
        assert await Echo()._wait_with_timeout(asyncio.sleep(0, "done"), 5) == "done"

    async def test_no_limit_waits(self) -> None:
        """None waits without a limit."""
        assert await Echo()._wait_with_timeout(asyncio.sleep(0.01, "done"), None) == "done"

    async def test_too_slow_is_a_timeout(self) -> None:
        """After the limit the inner work is cancelled, has ended, and `TimeoutError` is raised."""
        inner = asyncio.create_task(asyncio.sleep(60))
        with pytest.raises(TimeoutError):
            await Echo()._wait_with_timeout(inner, 0.01)
        assert inner.cancelled()

    async def test_a_cancellation_from_outside_passes_through(self) -> None:
        """Cancelling the one who waits is `CancelledError`, and ends the inner work."""
        inner = asyncio.create_task(asyncio.sleep(60))
        waiting = asyncio.create_task(Echo()._wait_with_timeout(inner, 30))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert waiting.cancelled()
        assert inner.cancelled()

    async def test_an_error_of_the_inner_work_is_raised(self) -> None:
        """Errors of what is waited for come through as they are."""

        async def broken() -> None:
            raise LookupError("nothing there")

        with pytest.raises(LookupError, match="nothing there"):
            await Echo()._wait_with_timeout(broken(), 5)


class TestLifecycle:
    """The five methods on an adapter mean what they mean on the engine."""

    async def test_an_adapter_alone_opens_an_engine_of_its_own(self, database: Path) -> None:
        """Submit, watch, result: without an engine, on the default database."""
        async with Echo() as adapter:
            task_id = await adapter.submit_task(Task(prompt="Say this."))
            assert await collect_stream(adapter.stream_result(task_id)) == "Say this."
            result = await adapter.get_result(task_id)
            assert await adapter.get_status(task_id) is TaskStatus.COMPLETED
        assert (result.output, result.platform, result.success) == (
            "Say this.",
            "claude_code",
            True,
        )
        assert task_id.startswith("claude_code_")
        assert adapter.closed
        assert await asyncio.to_thread(database.exists)

    async def test_closing_releases_the_engine_and_it_can_be_used_again(self) -> None:
        """After `close` nothing is left running, and the next use opens a new engine."""
        adapter = Echo()
        before = asyncio.all_tasks()
        first = await adapter.submit_task(Task(prompt="one"))
        await adapter.get_result(first)
        await adapter.close()
        await adapter.close()
        assert asyncio.all_tasks() == before
        async with adapter:
            assert (await adapter.get_result(first)).output == "one"

    async def test_many_first_calls_open_one_engine(self) -> None:
        """Calls that come at the same time, before there is an engine, share one."""
        async with Echo() as adapter:
            ids = await asyncio.gather(
                *(adapter.submit_task(Task(prompt=f"task {n}")) for n in range(10))
            )
            results = await asyncio.gather(*(adapter.get_result(id_) for id_ in ids))
        assert [result.output for result in results] == [f"task {n}" for n in range(10)]

    async def test_an_engine_that_cant_be_opened_leaves_no_half_open_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A failure to open is raised, and the next try opens anew."""
        monkeypatch.setenv("PERDURE_DB", str(tmp_path))
        async with Echo() as adapter:
            with pytest.raises(StoreError):
                await adapter.submit_task(Task(prompt="one"))
            monkeypatch.setenv("PERDURE_DB", str(tmp_path / "good.db"))
            task_id = await adapter.submit_task(Task(prompt="two"))
            assert (await adapter.get_result(task_id)).output == "two"

    async def test_a_bound_adapter_uses_its_engine(self, tmp_path: Path) -> None:
        """With an engine, all of them see the same tasks, and no other database is opened."""
        adapter = Echo()
        async with Engine.open(tmp_path / "other.db", adapters=[adapter, DemoAdapter()]) as engine:
            task_id = await adapter.submit_task(Task(prompt="Say this."))
            assert (await engine.get_result(task_id)).output == "Say this."
            assert (await adapter.get_result(task_id)).output == "Say this."
        assert not (tmp_path / "perdure.db").exists()

    async def test_what_waits_in_the_database_is_not_run_unasked(self, tmp_path: Path) -> None:
        """An adapter alone runs what it is asked about, and leaves alone what others submitted."""
        async with Engine.open(adapters=[Echo()], run=False) as engine:
            waiting = await engine.submit_task(Task(prompt="waiting"))
            asked = await engine.submit_task(Task(prompt="asked for"))
        async with Echo() as adapter:
            assert (await adapter.get_result(asked, timeout=20)).output == "asked for"
            assert await adapter.get_status(waiting) is TaskStatus.PENDING

    async def test_ended_tasks_are_forgotten(self) -> None:
        """However many an adapter alone has run or is asked about, it remembers a few of them."""
        async with Echo() as adapter:
            ids: list[str] = []
            for number in range(150):
                ids.append(await adapter.submit_task(Task(prompt=f"{number}")))
                await adapter.get_result(ids[-1])
            for task_id in (*ids, *(f"echo_20260101_{n:08x}" for n in range(150))):
                with suppress(TaskNotFound):
                    await adapter.get_result(task_id)
            engine: Engine = vars(adapter)["_AsyncBasePlatformAdapter__own"]
            kept = engine.worker.scope.task_ids
        assert kept is not None
        assert len(kept) <= 64

    async def test_cancelling_keeps_what_was_there(self) -> None:
        """A cancelled task keeps its partial output; cancelling again changes nothing."""
        async with DemoAdapter(stall_after=3, chunk_words=2) as adapter:
            task_id = await adapter.submit_task(Task(prompt="Hang."))
            stream = adapter.stream_result(task_id)
            seen = ""
            while len(seen.split()) < 6:
                seen += await anext(stream)
            assert await adapter.cancel_task(task_id, "enough")
            result = await adapter.get_result(task_id, timeout=20)
            assert not await adapter.cancel_task(task_id)
            assert await anext(stream, None) is None
        assert result.status is TaskStatus.CANCELLED
        assert result.partial_output == seen

    async def test_another_platforms_task_is_refused(self) -> None:
        """A task goes to the adapter's own platform; one that names another is no task for it."""
        async with Echo() as adapter:
            with pytest.raises(InvalidTask, match="demo"):
                await adapter.submit_task(Task(prompt="one", platform="demo"))

    async def test_an_unknown_task(self) -> None:
        """There is no such task: its status is unknown, its result an error."""
        async with Echo() as adapter:
            assert await adapter.get_status("claude_code_20260101_00000000") is TaskStatus.UNKNOWN
            with pytest.raises(TaskNotFound):
                await adapter.get_result("claude_code_20260101_00000000")

    async def test_a_result_that_takes_too_long_is_a_timeout(self) -> None:
        """`get_result` gives up after its time; the task goes on."""
        async with DemoAdapter(stall_after=1) as adapter:
            task_id = await adapter.submit_task(Task(prompt="Hang."))
            with pytest.raises(TimeoutError):
                await adapter.get_result(task_id, timeout=0.2)
            assert not (await adapter.get_status(task_id)).ended


class TestExecute:
    """`execute` is the blocking form."""

    def test_it_returns_the_result(self) -> None:
        """One call runs the task to its end, as often as one likes."""
        adapter = Echo()
        for text in ("one", "two"):
            result = adapter.execute(Task(prompt=text))
            assert isinstance(result, Result)
            assert (result.output, result.task.platform) == (text, "claude_code")
        assert adapter.closed == 2

    async def test_it_refuses_to_block_a_running_loop(self) -> None:
        """Where a loop is running it says so, and spoils nothing."""
        async with Echo() as adapter:
            with pytest.raises(RunningLoop):
                adapter.execute(Task(prompt="one"))
            assert (await adapter.get_result(await adapter.submit_task(Task(prompt="two")))).success

    async def test_it_leaves_the_adapters_engine_alone(self) -> None:
        """Run in a thread beside an open adapter, it does not close that one's engine."""
        async with Echo() as adapter:
            first = await adapter.submit_task(Task(prompt="one"))
            result = await asyncio.to_thread(adapter.execute, Task(prompt="two"))
            assert result.output == "two"
            assert (await adapter.get_result(first, timeout=20)).output == "one"

    def test_another_platforms_task_is_refused(self) -> None:
        """A task that names another platform is no task for it."""
        with pytest.raises(InvalidTask):
            Echo().execute(Task(prompt="one", platform="demo"))
