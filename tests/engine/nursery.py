"""The process that children are forked from: it has imported everything, and opened nothing.

Starting an interpreter with all of perdure takes more than a second, a fork some milliseconds; and
only by dying often do crashes become interesting. Orders come as lines of JSON on stdin; who was
started and who has ended goes to stdout.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import scenes


def _say(**news: int) -> None:
    os.write(1, (json.dumps(news) + "\n").encode())


def _fork(order: dict[str, Any]) -> None:
    pid = os.fork()
    if pid:
        _say(started=pid)
        return
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(order[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(file, number)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        scenes.play(order["scene"], order["arguments"])
        status = 0
    except BaseException:  # noqa: BLE001 - the parent learns of it from stderr and the status
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _reap() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _say(ended=pid, status=os.waitstatus_to_exitcode(status))


def main() -> None:
    """Take orders until stdin ends."""
    scenes.load_everything()
    wake, note = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(note, False)
    signal.set_wakeup_fd(note)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake, selectors.EVENT_READ)
    buffer = b""
    while True:
        for key, _ in selector.select():
            if key.fd == wake:
                os.read(wake, 4096)
                _reap()
                continue
            read = os.read(0, 65536)
            if not read:
                return
            buffer += read
            *orders, buffer = buffer.split(b"\n")
            for order in orders:
                _fork(json.loads(order))


if __name__ == "__main__":
    main()
