"""Two engines on one database file against a plain model in memory, step by step.

Every step is one that really happens: submitting, claiming, writing output, cancelling, ending,
dying, being declared lost, coming back, redacting, archiving, starting anew. The clock is the
test's own, and nothing runs by itself, so a failure can be repeated: hypothesis prints how, and
``--hypothesis-seed`` sets where it begins. ``PERDURE_TEST_EXAMPLES`` sets how many runs there are.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial, partialmethod
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
import pytest
from harness import count_events, query, status_of, stored_events
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from perdure import (
    Accepted,
    AuthenticationFailed,
    Chunk,
    Completed,
    ConcurrencyError,
    ConnectionLost,
    Engine,
    Event,
    FileCreated,
    InvalidTask,
    PlatformError,
    RateLimited,
    Recovery,
    Submission,
    Task,
    TaskArchived,
    TaskConstraints,
    Usage,
    UsageReported,
)
from perdure.errors import InvalidTransition, TimeLimitExceeded
from perdure.events import Cancelled, CancelRequested
from perdure.lifecycle import TaskState
from perdure.policy import RetryPolicy, Spent, after_failure, after_interruption, cancelled
from perdure.store import archivefile, claims, liveness
from perdure.store.claims import Claimed, Scope
from perdure.store.database import Database, Writer
from perdure.store.rebuilding import compare, rebuild
from perdure.store.schema import iso
from perdure.store.transaction import Transaction
from perdure.store.verification import verify
from perdure.testing import ScriptedAdapter

PLATFORMS: Final = ("one", "two")
LEASE: Final = timedelta(seconds=30)
POLICY: Final = RetryPolicy(base_seconds=4, cap_seconds=20, max_interruptions=3)
BEGIN: Final = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class ModelTask:
    """All that can be known of a task, kept the plainest way."""

    task_id: str
    priority: int
    platforms: tuple[str, ...]
    recovery: str
    max_attempts: int
    available: datetime
    key: str | None = None
    retry_of: str | None = None
    status: str = "pending"
    platform: str = ""
    events: list[str] = field(default_factory=lambda: ["submitted"])
    attempt: int = 0
    owner: str | None = None
    mode: str = "restart"
    cancel: bool = False
    text: str = ""
    reasoning: int = 0
    files: list[str] = field(default_factory=list)
    reattachable: bool = False
    failures: int = 0
    losses: int = 0
    earlier: int | None = None
    usage: int | None = None
    error: str | None = None
    redacted: bool = False
    archived: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing but a redaction can follow."""
        return self.status in ("completed", "failed", "cancelled")

    @property
    def tokens(self) -> int | None:
        """Tokens over all attempts."""
        known = [count for count in (self.earlier, self.usage) if count is not None]
        return sum(known) if known else None

    def start(self, worker: str) -> None:
        """Note that it was claimed."""
        self.events.append("running")
        self.status, self.owner, self.attempt = "running", worker, self.attempt + 1
        if self.mode == "restart":
            self.text, self.reasoning, self.files = "", 0, []
        if self.mode != "reattach":
            self.earlier, self.usage, self.reattachable = self.tokens, None, False

    def end(self, status: str, error: str | None = None) -> None:
        """Note its ending."""
        self.events.append(status)
        self.status, self.owner = status, None
        if status == "failed":
            self.error = error
        elif status == "completed":
            self.error = None

    def wait(self, event: str, mode: str, until: datetime) -> None:
        """Note that it waits for the next attempt."""
        self.events.append(event)
        self.status, self.owner, self.mode, self.available = "pending", None, mode, until


@dataclass
class Owner:
    """An attempt under way in some worker, which may have lost it without knowing.

    Attributes:
        state: What the worker knows of the task.
        text: What it has to write down at the end.
    """

    node: int
    worker: str
    task: ModelTask
    attempt: int
    state: TaskState


class TwoEngines(RuleBasedStateMachine):
    """Steps, and what must hold after each of them."""

    template: Path
    folder: Path
    numbers = itertools.count()

    owners: Bundle[Owner] = Bundle("owners")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.path = Path(shutil.copy(self.template, self.folder / f"{next(self.numbers)}.db"))
        self.now = BEGIN
        self.tasks: dict[str, ModelTask] = {}
        self.nodes: list[Engine] = []
        self.workers: dict[str, tuple[int, datetime]] = {}  # worker -> node, last sign of life
        self.names = itertools.count(1)
        self.written = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(Writer, "now", lambda _writer: self.now)
        # Migrating each archive would take most of the time.
        self.patch.setattr(archivefile.Database, "prepare", partialmethod(_copied, self.template))
        for _ in range(2):
            self.nodes.append(self.open())

    def teardown(self) -> None:
        """Close everything."""
        for node in self.nodes:
            self.run(node.close())
        self.runner.close()
        self.patch.undo()

    def run(self, work: Awaitable[Any]) -> Any:
        """Run to the end of ``work``."""

        async def whole() -> Any:
            return await work

        return self.runner.run(whole())

    def open(self) -> Engine:
        """Open another engine on the file; it does nothing by itself."""
        adapters = [ScriptedAdapter(platform=name) for name in PLATFORMS]
        return self.run(Engine.open(self.path, adapters=adapters, run=False).__aenter__())

    def write(self, node: int, work: Callable[[Transaction], Any], *streams: str) -> Any:
        """Do something in a write transaction of a node."""
        return self.run(self.nodes[node].log.write(work, streams))

    # -- steps -----------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        """Each engine has a worker."""
        for node in range(2):
            self.add_worker(node)

    def add_worker(self, node: int) -> str:
        """Let a worker begin on a node."""
        worker = f"worker {next(self.names)}"
        self.write(node, lambda tx: liveness.register_worker(tx, worker))
        self.workers[worker] = (node, self.now)
        return worker

    @rule(
        node=st.integers(0, 1),
        priority=st.integers(0, 2),
        key=st.none() | st.sampled_from("ab"),
        recovery=st.sampled_from(Recovery),
        max_attempts=st.integers(1, 3),
        fallback=st.booleans(),
    )
    def submit(
        self,
        node: int,
        priority: int,
        key: str | None,
        recovery: Recovery,
        max_attempts: int,
        fallback: bool,
    ) -> None:
        """Submit a task; a known key writes nothing."""
        platforms = PLATFORMS if fallback else PLATFORMS[:1]
        constraints = TaskConstraints(recovery=recovery, max_attempts=max_attempts)
        task = Task(
            prompt="?",
            priority=priority,
            key=key,
            platform="one",
            fallbacks=platforms[1:],
            constraints=constraints,
        )
        (outcome,) = self.run(self.nodes[node].submit_tasks([task]))
        assert isinstance(outcome, Submission)
        known = next((t for t in self.tasks.values() if key is not None and t.key == key), None)
        assert outcome.new == (known is None)
        if known is not None:
            assert outcome.task_id == known.task_id
            return
        self.add(
            ModelTask(
                task_id=outcome.task_id,
                priority=priority,
                platforms=platforms,
                recovery=recovery.value,
                max_attempts=max_attempts,
                available=self.now,
                key=key,
            )
        )

    def add(self, task: ModelTask) -> None:
        """Note a new task."""
        task.platform = task.platforms[0]
        self.tasks[task.task_id] = task

    @rule(target=owners, data=st.data(), limit=st.integers(1, 3))
    def claim(self, data: st.DataObject, limit: int) -> Any:
        """A worker takes what is due, by priority and age; where none is left one begins."""
        if not self.workers:
            self.add_worker(0)
        worker = data.draw(st.sampled_from(list(self.workers)))
        return multiple(*self.claimed(worker, self.write_claim(worker, limit), limit))

    def write_claim(self, worker: str, limit: int) -> list[Claimed]:
        """Claim."""
        node, _ = self.workers[worker]
        return self.write(node, lambda tx: claims.claim(tx, worker, limit, Scope(), {}))

    def claimed(self, worker: str, found: Sequence[Claimed], limit: int) -> list[Owner]:
        """Hold what was claimed against what had to be."""
        node, _ = self.workers[worker]
        assert [one.task_id for one in found] == [task.task_id for task in self.due()[:limit]]
        made: list[Owner] = []
        for one in found:
            task = self.tasks[one.task_id]
            mode, before = task.mode, task.text
            task.start(worker)
            assert one.output == before
            assert one.previous.next_mode == mode
            assert one.state.attempt == task.attempt
            assert one.state.version == len(task.events)
            assert (one.state.accepted is not None) == task.reattachable
            made.append(Owner(node, worker, task, task.attempt, one.state))
        if found:
            self.workers[worker] = (node, self.now)
        return made

    # -- an attempt goes on ----------------------------------------------------------------------

    def owns(self, owner: Owner) -> bool:
        """Whether the task is still its own."""
        task = owner.task
        return (
            task.status == "running"
            and task.owner == owner.worker
            and task.attempt == owner.attempt
        )

    def append(self, owner: Owner, decide: Callable[[TaskState], Sequence[Event]]) -> bool:
        """Write as an attempt does: at the version it knows, deciding again where it must.

        Returns:
            Whether it was written; it must be where the task is the owner's, and only there.
        """
        task, log = owner.task, self.nodes[owner.node].log
        while True:
            fresh = owner.state.version == len(task.events)
            try:
                version = self.run(
                    log.append(task.task_id, decide(owner.state), owner.state.version)
                )
            except ConcurrencyError as error:
                actual = error.actual
            else:
                assert fresh
                assert self.owns(owner)
                owner.state = owner.state._replace(version=version)
                return True
            assert not fresh
            assert actual == len(task.events)
            state = self.write(owner.node, partial(_look, task_id=task.task_id), task.task_id)
            assert state.status == task.status
            if not self.owns(owner):
                assert (state.status, state.worker, state.attempt) != (
                    "running",
                    owner.worker,
                    owner.attempt,
                )
                return False
            assert (state.cancel is not None) == task.cancel
            owner.state = state

    @rule(
        owner=owners,
        what=st.sampled_from(["text", "text", "text", "reasoning", "usage", "accepted", "file"]),
        text=st.text(min_size=1, max_size=5),
        tokens=st.integers(0, 9),
    )
    def write_something(self, owner: Owner, what: str, text: str, tokens: int) -> None:
        """What an adapter may yield on the way."""
        task = owner.task
        text = text.replace("\x00", "").encode(errors="ignore").decode() or "x"
        # Nobody else writes chunks to a task one owns, so the offset one knows is the right one.
        event: Event = {
            "text": Chunk(text=text, offset=len(task.text)),
            "reasoning": Chunk(text=text, kind="reasoning", offset=task.reasoning),
            "usage": UsageReported(usage=Usage(output_tokens=tokens)),
            "accepted": Accepted(response_id="r", reattachable=True),
            "file": FileCreated(path=text[0]),
        }[what]
        if not self.append(owner, lambda _state: (event,)):
            return
        task.events.append(event.type)
        if what == "text":
            task.text += text
        elif what == "reasoning":
            task.reasoning += len(text)
        elif what == "usage":
            task.usage = tokens
        elif what == "accepted":
            task.reattachable = True
        elif text[0] not in task.files:
            task.files.append(text[0])

    @rule(owner=consumes(owners), tokens=st.none() | st.integers(0, 9))
    def complete(self, owner: Owner, tokens: int | None) -> None:
        """The platform has ended; that counts even when a cancellation was asked for."""
        task = owner.task
        usage = None if tokens is None else Usage(output_tokens=tokens)
        event = Completed(usage=usage, output_length=len(task.text))
        if self.append(owner, lambda _state: (event,)):
            task.usage = task.usage if tokens is None else tokens
            task.end("completed")

    @rule(
        owner=consumes(owners),
        error=st.sampled_from(
            [
                ConnectionLost("gone"),
                RateLimited("slowly", retry_after=7),
                AuthenticationFailed("key"),
                TimeLimitExceeded("time"),
            ]
        ),
    )
    def fail(self, owner: Owner, error: PlatformError) -> None:
        """The platform, or the time, has failed."""
        task, length = owner.task, len(owner.task.text)

        def decide(state: TaskState) -> Sequence[Event]:
            if state.cancel is not None:
                return (cancelled(state, Spent(), length),)
            return (
                after_failure(
                    state,
                    error,
                    max_attempts=task.max_attempts,
                    policy=POLICY,
                    now=self.now,
                    chance=lambda: 1.0,
                    spent=Spent(),
                    output_length=length,
                ),
            )

        if not self.append(owner, decide):
            return
        kind = type(error).__name__
        again = error.retryable and task.failures + 1 < task.max_attempts
        last = task.platform == task.platforms[-1] or isinstance(error, TimeLimitExceeded)
        if task.cancel:
            task.end("cancelled")
        elif again:
            task.failures += 1
            backoff = min(20, 4 * 2 ** (task.failures - 1))
            wait = backoff if error.retry_after is None else error.retry_after + 0.1 * backoff
            task.wait("attempt_failed", "restart", self.now + timedelta(seconds=wait))
            task.error = kind
        elif not last:
            task.failures, task.platform = 0, task.platforms[1]
            task.wait("attempt_failed", "restart", self.now)
            task.error = kind
        else:
            task.end("failed", kind)

    @rule(owner=consumes(owners))
    def obey(self, owner: Owner) -> None:
        """An owner that learns of a cancellation ends the task, the partial output kept."""
        task = owner.task
        if not (task.cancel and self.owns(owner)):
            self.look(owner)
            return
        length = len(task.text)
        if self.append(owner, lambda state: (cancelled(state, Spent(), length),)):
            task.end("cancelled")

    def look(self, owner: Owner) -> None:
        """An owner looks, and sees what there is."""
        state = self.write(owner.node, partial(_look, task_id=owner.task.task_id))
        assert state.version == len(owner.task.events)
        assert state.status == owner.task.status

    @rule(owner=consumes(owners))
    def hand_back(self, owner: Owner) -> None:
        """An engine is closed: what runs waits for the next one."""
        task = owner.task

        def decide(state: TaskState) -> Sequence[Event]:
            constraints = {"recovery": task.recovery}
            return after_interruption(state, constraints, policy=POLICY, handed_back=True)

        state = self.write(owner.node, partial(_look, task_id=task.task_id))
        if self.owns(owner):
            owner.state = state
        if self.append(owner, decide):
            self.interrupted(task, handed_back=True)

    def interrupted(self, task: ModelTask, *, handed_back: bool) -> None:
        """Note what becomes of a task that is taken from its worker."""
        task.losses += not handed_back
        worn_out = not handed_back and task.losses >= POLICY.max_interruptions
        fails = worn_out or (task.recovery == "fail" and not task.reattachable)
        if task.cancel or fails:
            task.wait("interrupted", "restart", self.now)
            if task.cancel:
                task.end("cancelled")
            else:
                task.end("failed", "Interrupted")
            return
        continues = task.recovery == "continue" and task.text
        mode = "reattach" if task.reattachable else "continue" if continues else "restart"
        task.wait("interrupted", mode, self.now)

    # -- from outside ----------------------------------------------------------------------------

    @precondition(lambda self: self.tasks)
    @rule(node=st.integers(0, 1), data=st.data())
    def cancel(self, node: int, data: st.DataObject) -> None:
        """Anybody cancels; too late or twice is in vain."""
        task = self.tasks[data.draw(st.sampled_from(list(self.tasks)))]
        accepted = self.run(self.nodes[node].cancel_task(task.task_id))
        self.cancel_answered(task, accepted)

    def cancel_answered(self, task: ModelTask, accepted: bool) -> None:
        """Hold the answer against what it had to be."""
        assert accepted == (not task.ended and not task.cancel)
        if not accepted:
            return
        if task.status == "pending":
            task.end("cancelled")
        else:
            task.events.append("cancel_requested")
            task.cancel = True

    @precondition(lambda self: self.tasks and self.workers)
    @rule(target=owners, data=st.data(), cancel_first=st.booleans())
    def cancel_and_claim(self, data: st.DataObject, cancel_first: bool) -> Any:
        """Both in one transaction, as group commit brings them together."""
        task = self.tasks[data.draw(st.sampled_from(list(self.tasks)))]
        worker = data.draw(st.sampled_from(list(self.workers)))
        node, _ = self.workers[worker]

        def cancel(tx: Transaction) -> bool:
            fold = tx.fold(task.task_id)
            assert fold is not None
            state = fold.state
            event = (
                Cancelled(output_length=state.length())
                if state.status == "pending"
                else CancelRequested(by="test")
            )
            try:
                tx.append(task.task_id, (event,), fold.version)
            except InvalidTransition:
                return False
            return True

        def claim(tx: Transaction) -> list[Claimed]:
            return claims.claim(tx, worker, 2, Scope(), {})

        if not cancel_first:
            found, accepted = self.write(node, lambda tx: (claim(tx), cancel(tx)))
            made = self.claimed(worker, found, 2)
            self.cancel_answered(task, accepted)
            return multiple(*made)
        due = self.due()[:2]
        accepted, found = self.write(node, lambda tx: (cancel(tx), claim(tx)))
        self.cancel_answered(task, accepted)
        # What is cancelled in the very same transaction takes a place and isn't claimed.
        return multiple(*self.claimed(worker, found, 2 - (task in due)))

    def due(self) -> list[ModelTask]:
        """Return what can be claimed, in order."""
        found = [t for t in self.tasks.values() if t.status == "pending"]
        found = [task for task in found if task.available <= self.now]
        return sorted(found, key=lambda task: task.priority)  # stable: by age within a priority

    @rule(seconds=st.sampled_from([1, 10, 20]))
    def time_passes(self, seconds: int) -> None:
        """Waits end, and workers that don't show themselves become suspicious."""
        self.now += timedelta(seconds=seconds)

    @rule(node=st.integers(0, 1), silence=st.booleans())
    def recover(self, node: int, silence: bool) -> None:
        """A node looks for the dead and takes over what they had, in time or after a silence."""
        if silence:
            self.now += LEASE
        database = self.nodes[node].database
        found = self.run(liveness.look_around(database, LEASE, self.now)).lost
        lost = [name for name, (_, seen) in self.workers.items() if seen + LEASE <= self.now]
        assert sorted(found) == sorted(lost)
        for worker in found:
            self.take_over(node, worker)

    def take_over(self, node: int, worker: str) -> None:
        """Take everything from a worker."""
        decide = partial(after_interruption, policy=POLICY)
        mine = [t for t in self.tasks.values() if t.owner == worker]
        assert self.write(node, lambda tx: claims.recover(tx, worker, decide)).tasks == len(mine)
        for task in mine:
            self.interrupted(task, handed_back=False)
        assert self.write(node, lambda tx: claims.recover(tx, worker, decide)).tasks == 0
        # It may come back, and then has to make itself known again.
        self.workers.pop(worker, None)

    @rule(
        node=st.integers(0, 1),
        what=st.sampled_from(["beat", "another worker", "start anew", "rebuild"]),
        data=st.data(),
    )
    def look_after_it(self, node: int, what: str, data: st.DataObject) -> None:
        """What changes no task."""
        if what == "beat" and self.workers:
            worker = data.draw(st.sampled_from(list(self.workers)))
            place, _ = self.workers[worker]
            self.write(place, lambda tx: liveness.beat(tx, worker))
            self.workers[worker] = (place, self.now)
        elif what == "another worker" and len(self.workers) < 4:
            self.add_worker(node)
        elif what == "start anew":  # an engine ends, and what it knew by heart is gone
            self.run(self.nodes[node].close())
            self.nodes[node] = self.open()
        elif what == "rebuild":
            report = self.write(node, lambda tx: rebuild(tx.connection))
            assert (report.tasks, report.differed) == (len(self.tasks), 0)

    @precondition(lambda self: self.tasks)
    @rule(node=st.integers(0, 1), data=st.data())
    def retry(self, node: int, data: st.DataObject) -> None:
        """Ended tasks are run again as new ones, once."""
        task = self.tasks[data.draw(st.sampled_from(list(self.tasks)))]
        retrying = self.nodes[node].retry_task(task.task_id)
        if not task.ended or task.redacted or task.archived:
            with pytest.raises(TaskArchived if task.archived else InvalidTask):
                self.run(retrying)
            return
        outcome = self.run(retrying)
        known = next((t for t in self.tasks.values() if t.retry_of == task.task_id), None)
        assert outcome.new == (known is None)
        if known is not None:
            assert outcome.task_id == known.task_id
            return
        self.add(
            ModelTask(
                task_id=outcome.task_id,
                priority=task.priority,
                platforms=task.platforms,
                recovery=task.recovery,
                max_attempts=task.max_attempts,
                available=self.now,
                key=f"retry:{task.task_id}",
                retry_of=task.task_id,
            )
        )

    @precondition(lambda self: any(task.ended for task in self.tasks.values()))
    @rule(node=st.integers(0, 1), data=st.data())
    def redact(self, node: int, data: st.DataObject) -> None:
        """The content of an ended task is removed; what happened stays known."""
        ended = [task.task_id for task in self.tasks.values() if task.ended]
        task = self.tasks[data.draw(st.sampled_from(ended))]
        if task.archived:
            with pytest.raises(TaskArchived):
                self.run(self.nodes[node].redact_task(task.task_id, by="test"))
            return
        changed = self.run(self.nodes[node].redact_task(task.task_id, by="test"))
        assert (changed > 0) == (not task.redacted)
        if changed:
            task.events.append("redacted")
            task.redacted = True

    @precondition(lambda self: any(task.ended for task in self.tasks.values()))
    @rule(node=st.integers(0, 1))
    def archive(self, node: int) -> None:
        """What has ended goes into a file; one event of each task stays."""
        going = [task for task in self.tasks.values() if task.ended and not task.archived]
        file = self.folder / f"archive{next(self.numbers)}.db"
        moment = self.now + timedelta(days=1)
        report = self.run(self.nodes[node].archive_tasks(moment, file, by="test"))
        assert (report.tasks, report.changed) == (len(going), 0)
        assert report.events == sum(len(task.events) for task in going)
        assert file.exists() == bool(going)
        for task in going:
            task.events.append("archived")
            task.archived = file.name

    # -- what must hold --------------------------------------------------------------------------

    @invariant()
    def the_log_is_as_the_model_says(self) -> None:
        """The same events in every stream, gapless, with at most one ending."""
        rows = query(
            self.path,
            "SELECT e.position, s.task_id, e.version, e.type, s.version FROM events AS e "
            "JOIN streams AS s USING (stream_id) ORDER BY e.position",
        )
        gaps = query(self.path, "SELECT first_position, last_position FROM gaps")
        elsewhere = [position for first, last in gaps for position in range(first, last + 1)]
        positions = sorted([*elsewhere, *(row[0] for row in rows)])
        assert positions == list(range(1, len(positions) + 1))
        found: dict[str, list[str]] = {}
        for _, task_id, version, type_, last in rows:
            task = self.tasks[task_id]
            found.setdefault(task_id, []).append(type_)
            assert version == (len(task.events) if task.archived else len(found[task_id]))
            assert last == len(task.events)
        assert found == {
            task.task_id: task.events[-1:] if task.archived else task.events
            for task in self.tasks.values()
        }
        for types in found.values():
            assert sum(type_ in ("completed", "failed", "cancelled") for type_ in types) <= 1

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        """Status, owner, output, partial output, tokens and all."""
        rows = query(
            self.path,
            "SELECT task_id, status, platform, attempts, worker, cancel_requested, error_class, "
            "output, partial_output, output_tokens, available_at, files_created FROM tasks",
        )
        assert len(rows) == len(self.tasks)
        for row in rows:
            task = self.tasks[row[0]]
            gone = task.redacted or task.archived
            text = None if gone else task.text
            files = [] if gone else task.files
            assert row[1:] == (
                task.status,
                task.platform,
                task.attempt,
                task.owner,
                int(task.cancel),
                task.error,
                text if task.status == "completed" else None,
                text if task.status in ("failed", "cancelled") else None,
                task.tokens,
                iso(task.available),
                json.dumps(files, ensure_ascii=False, separators=(",", ":")) if files else None,
            )
            if not task.archived:
                assert status_of(stored_events(self.path, task.task_id)) == task.status

    @invariant()
    def the_chain_holds(self) -> None:
        """Nothing was changed, and the projection is what the log says."""
        written = count_events(self.path)
        if written == self.written:
            return
        self.written = written
        with Database(self.path).snapshot() as connection:
            report = verify(connection)
            assert report.ok, report.problems
            assert compare(connection).differed == 0


def _copied(database: Database, template: Path, **_how: bool) -> None:
    if not database.path.exists():
        shutil.copy(template, database.path)


def _look(tx: Transaction, task_id: str) -> TaskState:
    fold = tx.fold(task_id)
    assert fold is not None
    return fold.state


def test_two_engines_behave_as_the_model(migrated_file: Path, tmp_path: Path) -> None:
    """Whatever is done in whatever order, log and rows are as the model says."""

    class Machine(TwoEngines):
        template = migrated_file
        folder = tmp_path

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(os.environ.get("PERDURE_TEST_EXAMPLES") or 30),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
