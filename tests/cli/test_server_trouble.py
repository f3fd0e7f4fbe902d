"""Commands on a PostgreSQL server that takes no writes: they wait, and end when told to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import Program, until, write_rows

from perdure.store.database import Database
from servers.postgresql import Server

# Those who are asked twice wait for some seconds, others for a minute.
SOON = 30.0
REFUSED = "read-only transaction"


@pytest.fixture
def url(postgresql_server: Server, make_server_database: Callable[[], str]) -> str:
    """A database that takes no writes, as on a standby."""
    url = make_server_database()
    name = url.partition("?")[0].rpartition("/")[2]
    postgresql_server.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    return url


@pytest.mark.parametrize(
    ("command", "requests", "code"),
    [
        ("run", (signal.SIGTERM, signal.SIGTERM), 1),
        ("run", (signal.SIGINT, signal.SIGINT), 1),
        ("worker", (signal.SIGINT, signal.SIGTERM), 1),
        ("submit", (signal.SIGINT,), 130),
    ],
)
def test_who_asks_twice_is_heard(
    postgresql_server: Server,
    url: str,
    tmp_path: Path,
    command: str,
    requests: tuple[signal.Signals, ...],
    code: int,
) -> None:
    """What waits for the server ends in seconds; of the trouble there is one line."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": "a", "prompt": "x"}])
    arguments = {
        "run": ("run", rows, "-p", "demo"),
        "worker": ("worker", "-p", "demo"),
        "submit": ("submit", "--prompt", "x", "-p", "demo"),
    }[command]
    before = postgresql_server.log().count(REFUSED)
    with Program(*arguments, "--db", url, database=tmp_path / "none.db") as program:
        until(lambda: postgresql_server.log().count(REFUSED) > before + 3, "a few tries")
        began = time.monotonic()
        program.send_each(*requests)
        ended = program.ended()
        assert time.monotonic() - began < SOON
    assert ended[0] == code
    said = [line for line in ended[2].splitlines() if line.startswith("perdure: ")]
    assert len(said) == (code == 1)
    assert all("takes no writes" in line for line in said)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_asks_three_times_waits_for_nothing(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Where the server hangs in the middle of an answer, that is what is left."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "options": {"stall_after": 1}}])
    with Server() as server:
        server.execute("CREATE DATABASE own")
        Database(server.url("own")).upgrade()
        command = ("run", rows, "-p", "demo", "--db", server.url("own"))
        with (
            Program(*command, database=tmp_path / "none.db") as program,
            server.connect("own") as other,
        ):
            chunks = b"SELECT FROM events WHERE type = 'chunk'"
            until(lambda: other.execute(chunks).rowcount, "a task that runs")
            other.execute("BEGIN")
            other.execute("SELECT FROM log_head FOR UPDATE")  # so that all who write wait
            program.send_each(number, number, number)
            began = time.monotonic()
            assert program.ended()[0] == code
            assert time.monotonic() - began < SOON


def test_what_goes_wrong_while_ending_is_one_line(tmp_path: Path) -> None:
    """A server that is gone when it is asked to end is told of once, and without a traceback."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "x", "options": {"stall_after": 1}}])
    with Server() as server:
        server.execute("CREATE DATABASE own")
        Database(server.url("own")).upgrade()
        command = ("run", rows, "-p", "demo", "--db", server.url("own"))
        with Program(*command, database=tmp_path / "none.db") as program:
            with server.connect("own") as other:
                chunks = b"SELECT FROM events WHERE type = 'chunk'"
                until(lambda: other.execute(chunks).rowcount, "a task that runs")
            server.stop()
            program.send_each(signal.SIGINT, signal.SIGINT)
            code, _, err = program.ended()
    assert code == 1
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if "PostgreSQL database" in line]) == 1
