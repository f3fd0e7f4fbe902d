"""Which workers are alive: they show it from time to time, and on this host by their processes."""

from __future__ import annotations

import contextlib
import os
import platform as host_platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from perdure.store.database import Database
from perdure.store.direct import Statement
from perdure.store.readonly import lease_of
from perdure.store.schema import tasks, workers
from perdure.store.transaction import Transaction

__all__ = [
    "Census",
    "beat",
    "beat_and_look",
    "forget_worker",
    "host_name",
    "look_around",
    "register_worker",
]

_PID_NAMESPACE: Final = Path("/proc/self/ns/pid")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
BOOT_LETTERS: Final = 8  # enough to tell machines of one name apart, and to be read


def host_name() -> str:
    """Return a name under which process ids mean the same: host and, on Linux, namespace and boot.

    The PID namespace tells the containers of a machine apart. Its number is the same on all
    machines outside of containers; what was drawn when the machine booted tells those apart that
    have one name, and process ids of before from those of after.
    """
    name = host_platform.node()
    with contextlib.suppress(OSError):
        name += "#" + _PID_NAMESPACE.readlink().name.strip("pid:[]")
    with contextlib.suppress(OSError):
        name += "@" + _BOOT_ID.read_text().strip()[:BOOT_LETTERS]
    return name


def register_worker(tx: Transaction, worker: str, lease: timedelta | None = None) -> None:
    """Write down that a worker of this process has begun.

    Args:
        tx: The transaction.
        worker: Its name.
        lease: For how long each of its signs of life holds; None leaves that to whoever looks.
    """
    tx.connection.execute(
        sa.insert(workers).values(
            worker_id=worker,
            host=host_name(),
            pid=os.getpid(),
            started_at=tx.at,
            heartbeat_at=tx.at,
            lease_seconds=None if lease is None else lease.total_seconds(),
        )
    )


_BEAT: Final = Statement(
    sa.update(workers)
    .where(workers.c.worker_id == sa.bindparam("worker"))
    .values(heartbeat_at=sa.bindparam("at")),
    ("at", "worker"),
)


def beat(tx: Transaction, worker: str, lease: timedelta | None = None) -> None:
    """Write down that a worker is alive; see `register_worker`."""
    if _BEAT.change(tx.connection, tx.at, worker) == 0:
        # It was away for long and declared lost; it may work on new tasks.
        register_worker(tx, worker, lease)


def forget_worker(tx: Transaction, worker: str) -> None:
    """Remove a worker that has ended and owns nothing any more."""
    tx.connection.execute(sa.delete(workers).where(workers.c.worker_id == worker))


class Census(NamedTuple):
    """Who works on a database.

    Attributes:
        alive: How many workers there are.
        lost: The workers that are gone, and owners of running tasks that nobody knows.
        expires: When the next of those that are alive is lost, unless it shows itself before.
    """

    alive: int
    lost: list[str]
    expires: datetime | None


# The owners first: one that registers and claims in between must not look unknown.
_OWNERS: Final = sa.select(tasks.c.worker).where(tasks.c.status == "running").distinct()
_WORKERS: Final = sa.select(workers)


async def look_around(database: Database, lease: timedelta, now: datetime) -> Census:
    """Count the workers, and find those that are gone.

    Args:
        database: Where.
        lease: For how long the signs of life hold of those that don't say it, as an older release
            wrote them down.
        now: What time it is there.
    """

    async def look(connection: AsyncConnection) -> Census:
        owners = (await connection.scalars(_OWNERS)).all()
        known = (await connection.execute(_WORKERS)).mappings().all()
        return _census(owners, known, lease, now)

    return await database.read(look)


def beat_and_look(tx: Transaction, worker: str, lease: timedelta) -> Census:
    """Write down that a worker is alive, and look around, all in one transaction.

    Args:
        tx: The transaction.
        worker: Who does it.
        lease: For how long this sign of life holds, and those of workers that don't say it.
    """
    beat(tx, worker, lease)
    owners = tx.connection.scalars(_OWNERS).all()
    known = tx.connection.execute(_WORKERS).mappings().all()
    return _census(owners, known, lease, tx.at)


def _census(
    owners: Iterable[str | None], rows: Sequence[sa.RowMapping], lease: timedelta, now: datetime
) -> Census:
    here = host_name()
    ends = {
        row["worker_id"]: row["heartbeat_at"] + lease_of(row["lease_seconds"], lease)
        for row in rows
    }
    alive = [row["worker_id"] for row in rows if ends[row["worker_id"]] > now and _runs(row, here)]
    gone = ends.keys() - set(alive)
    lost = [*sorted(gone), *(str(owner) for owner in owners if owner not in ends)]
    return Census(len(alive), lost, min((ends[worker] for worker in alive), default=None))


def _runs(row: sa.RowMapping, here: str) -> bool:
    # What an older release wrote is no name of this host: its workers go by the lease only.
    return row["host"] != here or _pid_exists(row["pid"])


def _pid_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
