"""Commands on a PostgreSQL server that takes no writes: they wait, and end when told to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from programs import Program, until, write_rows

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
        for number in requests:
            program.send(number)
            time.sleep(0.2)  # two of a kind at once are one
        ended = program.ended()
        assert time.monotonic() - began < SOON
    assert ended[0] == code
    said = [line for line in ended[2].splitlines() if line.startswith("perdure: ")]
    assert len(said) == (code == 1)
    assert all("takes no writes" in line for line in said)
