"""Rebuilds or verifies a log as the program does, in a process of its own.

python -m benchmarks.upkeeping rebuild|verify DATABASE
"""

from __future__ import annotations

import gc
import json
import sys
import time

from perdure.store.database import Database
from perdure.store.helping import helpers_for
from perdure.store.rebuilding import rebuild
from perdure.store.verification import verify


def timed_rebuild(database: Database) -> float:
    """Return the seconds that rebuilding takes, starting helpers included."""
    writer = database.writer()
    try:
        began = time.perf_counter()
        with writer.transaction() as connection, helpers_for(database, connection) as helpers:
            report = rebuild(connection, helpers=helpers)
        taken = time.perf_counter() - began
    finally:
        writer.close()
    assert report.tasks
    assert report.differed == 0
    return taken


def timed_verify(database: Database) -> float:
    """Return the seconds that verifying takes, starting helpers included."""
    began = time.perf_counter()
    with database.snapshot() as connection, helpers_for(database, connection) as helpers:
        report = verify(connection, helpers=helpers)
    taken = time.perf_counter() - began
    assert report.events
    assert report.ok, report.problems
    return taken


if __name__ == "__main__":
    what, place = sys.argv[1:]
    gc.set_threshold(50_000, 20, 20)  # as the program has it
    timed = {"rebuild": timed_rebuild, "verify": timed_verify}[what]
    print(json.dumps({"seconds": timed(Database(place))}))
