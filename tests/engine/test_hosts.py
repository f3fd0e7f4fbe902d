"""On which host a worker is: where its process can be looked for."""

from __future__ import annotations

import platform
from datetime import timedelta
from pathlib import Path

import pytest
from harness import FAST, eventually

from perdure import Completed, Engine, Task
from perdure.store import liveness
from perdure.testing import Hold, ScriptedAdapter


def test_a_host_is_its_name_its_namespace_and_its_boot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of them tells hosts apart; what a system doesn't have is left out."""
    boot, namespace = tmp_path / "boot_id", tmp_path / "pid"
    monkeypatch.setattr(liveness, "_BOOT_ID", boot)
    monkeypatch.setattr(liveness, "_PID_NAMESPACE", namespace)
    name = platform.node()
    assert liveness.host_name() == name
    boot.write_text("97e4b5e8-7c45-4b2e-9f39-9a8f5bd1c7f1\n")
    assert liveness.host_name() == f"{name}@97e4b5e8"
    namespace.symlink_to("pid:[4026531836]")
    assert liveness.host_name() == f"{name}#4026531836@97e4b5e8"


async def test_another_machine_of_the_same_name(
    db: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its processes aren't looked for here, so its workers live as long as their leases."""
    monkeypatch.setattr(liveness, "_BOOT_ID", tmp_path / "boot_id")
    (tmp_path / "boot_id").write_text("11111111-there")
    adapter = ScriptedAdapter("one ", hold := Hold(), "two", Completed())
    async with Engine.open(db, adapters=[adapter], settings=FAST) as there:
        task_id = await there.submit_task(Task(prompt="?"))
        await hold.reached.wait()
        await there.log.write(
            lambda tx: tx.connection.exec_driver_sql("UPDATE workers SET pid = 2147483646")
        )
        lease = timedelta(seconds=30)

        async def lost() -> list[str]:
            census = await liveness.look_around(there.database, lease, there.database.now)
            return census.lost

        assert await lost() == [there.worker.worker_id]
        (tmp_path / "boot_id").write_text("22222222-here")
        assert await lost() == []
        async with Engine.open(db, adapters=[ScriptedAdapter()], settings=FAST, run=False) as here:
            assert await here.recover_lost() == 0
        hold.release()
        assert (await there.get_result(task_id, 30)).attempts == 1
    await eventually(lambda: not adapter.running)
