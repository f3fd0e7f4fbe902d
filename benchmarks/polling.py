"""The least that follows a log from another process: a look at `data_version` every 10 ms.

python -m benchmarks.polling DATABASE
"""

from __future__ import annotations

import json
import select
import sqlite3
import sys
import time


def _follow(path: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    look = "PRAGMA data_version"
    seen: dict[int, float] = {}
    before, position = 0, 0
    print(json.dumps("ready"), flush=True)
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        (now,) = connection.execute(look).fetchone()
        if now == before:
            continue
        before = now
        for new, version in connection.execute(
            "SELECT position, version FROM events WHERE position > ?", (position,)
        ):
            position = new
            seen[version] = time.monotonic()
    sys.stdin.readline()
    print(json.dumps(seen), flush=True)
    connection.close()


if __name__ == "__main__":
    _follow(sys.argv[1])
