"""A log in which everything has happened at least once."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from perdure.events import (
    Accepted,
    AttemptFailed,
    Cancelled,
    CancelRequested,
    Chunk,
    Completed,
    Event,
    Failed,
    FileCreated,
    Interrupted,
    Running,
    UsageReported,
)
from perdure.platforms import Platforms
from perdure.store.redaction import redact
from perdure.submission import prepare, submit
from perdure.task import Message, Task, TaskConstraints, Usage
from perdure.testing import ScriptedAdapter
from store.backends import opened

PLATFORMS = Platforms([ScriptedAdapter(platform=name) for name in ("alpha", "beta")])
USAGE = Usage(input_tokens=10, output_tokens=5, raw={"prompt_tokens": 10})
RETRY_AT = datetime(2026, 11, 22, 14, 0, tzinfo=UTC)


def running(attempt: int, platform: str = "alpha", mode: Any = "restart") -> Running:
    """Return the beginning of an attempt."""
    return Running(attempt=attempt, worker="w", platform=platform, model="m", mode=mode)


def chunk(text: str, offset: int = 0, kind: Any = "text", cursor: str | None = None) -> Chunk:
    """Return a piece of output."""
    return Chunk(text=text, offset=offset, kind=kind, cursor=cursor)


def failed_attempt(attempt: int, following: Any) -> AttemptFailed:
    """Return the end of an attempt that leads to another one."""
    return AttemptFailed(
        attempt=attempt,
        error_class="Overloaded",
        message="too much to do",
        status=503,
        retryable=True,
        next=following,
        retry_at=RETRY_AT,
        usage=USAGE,
        cost_usd=0.25,
    )


def lost(attempt: int, following: Any) -> Interrupted:
    """Return the loss of a worker."""
    return Interrupted(
        worker="w", attempt=attempt, reason="worker_lost", outcome="unknown", next=following
    )


# What happens to which task, in this order: streams take turns.
STORY: tuple[tuple[str, tuple[Event, ...]], ...] = (
    ("good", (running(1),)),
    ("secret", (running(1),)),
    ("good", (Accepted(response_id="r1", model="m-1", reattachable=True, cursor="0"),)),
    ("good", (chunk("Let me think", kind="reasoning"), chunk("Hé", cursor="1"))),
    ("secret", (chunk("The secret "), chunk("is out.", 11), FileCreated(path="secret.txt"))),
    ("good", (UsageReported(usage=USAGE),)),
    ("good", (lost(1, "reattach"),)),
    ("bad", (running(1),)),
    ("good", (running(2, mode="reattach"), chunk("llo 👍", 2), chunk("{}", kind="tool_call"))),
    ("bad", (failed_attempt(1, "retry"),)),
    ("good", (FileCreated(path="a.txt", size=3, digest="0" * 64),)),
    ("bad", (running(2), chunk("no"), failed_attempt(2, "fallback"))),
    ("good", (Completed(usage=USAGE, cost_usd=0.5, output_length=7),)),
    ("bad", (running(3, "beta"), chunk("half"), Failed(
        error_class="InvalidRequest", message="no way", attempts=3, output_length=4, usage=USAGE,
    ))),
    ("secret", (Completed(output_length=18),)),
    ("stopped", (running(1), chunk("par"))),
    ("stopped", (lost(1, "continue"),)),
    ("stopped", (running(2, mode="continue"), chunk("tial", 3))),
    ("stopped", (CancelRequested(by="me", reason="wrong prompt"),)),
    ("stopped", (Cancelled(by="me", reason="wrong prompt", output_length=7),)),
    ("busy", (running(1), chunk("so far"))),
)  # fmt: skip
TASK_IDS = ("good", "bad", "secret", "stopped", "busy", "idle")


async def tell(url: str, folder: Path) -> None:
    """Write the log: six tasks, two of them with blobs, one of them redacted."""
    (folder / "notes.txt").write_text("notes " * 100)
    tasks = [
        Task(
            task_id="good", prompt="Hello?", system="Be thorough. " * 500, key="row 1", batch="b",
            labels={"who": "me"}, constraints=TaskConstraints(model="m"), platform="alpha",
        ),
        Task(
            task_id="bad", platform="alpha", fallbacks=("beta",), batch="b", priority=1,
            messages=(
                Message(role="user", content="One " * 2000),
                Message(role="assistant", content="two"),
                Message(role="user", content="three?"),
            ),
        ),
        Task(
            task_id="secret", platform="alpha", prompt="The secret?", labels={"secret": "yes"},
            context={"secret": "secret " * 1000}, metadata={"secret": 1}, key="row 2",
        ),
        Task(
            task_id="stopped", platform="alpha", prompt="Slow?", files=(str(folder / "notes.txt"),),
            parents=("good",), retry_of="bad", batch="b",
        ),
        Task(task_id="busy", platform="alpha", prompt="Busy?", system="Be thorough. " * 500),
        Task(task_id="idle", platform="beta", prompt="When?", type="research"),  # type: ignore[arg-type]
    ]  # fmt: skip
    ready = [prepare(task, PLATFORMS, None) for task in tasks]
    async with opened(url) as store:
        await store.log.write(lambda tx: submit(tx, ready))
        for task_id, events in STORY:
            await store.log.append(task_id, events, None)
        await store.log.write(lambda tx: redact(tx, "secret", "me", "asked for"), alone=True)
        await store.log.append("busy", [chunk(" good", 6)], None)
