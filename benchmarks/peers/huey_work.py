"""huey: tasks in SQLite, run by a consumer of threads; the client blocks for the result.

Its results are gone once they were read: there is no history.
"""

from __future__ import annotations

import threading

from huey import SqliteHuey
from work import answer, arguments, threads

WORK = arguments()
# SQLite's own default is an fsync for each commit; "unsafe" leaves that out.
OPTIONS = {"fsync": False} if WORK.options else {}
huey = SqliteHuey("bench", filename=str(WORK.folder / "huey.db"), **OPTIONS)


@huey.task()
def task(number: int) -> str:
    """Answer."""
    return f"Sales rose by {number} per cent."


def main() -> None:
    """Start a consumer in this process, warm up, then measure."""
    # Four threads were the fastest of 1, 4 and 8; shorter delays than the defaults are slower.
    consumer = huey.create_consumer(workers=4, periodic=False)
    consumer._set_signal_handlers = lambda: None
    threading.Thread(target=consumer.run, daemon=True).start()

    def one(number: int) -> None:
        task(number).get(blocking=True, timeout=60)

    one(0)
    answer(threads(WORK, one))
    consumer.stop()


if __name__ == "__main__":
    main()
