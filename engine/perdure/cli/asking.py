"""`perdure ask`: one task, streamed as it comes."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from perdure.cli.exits import ExitCode
from perdure.cli.figures import count, dollars, seconds, things
from perdure.cli.options import TaskOptions
from perdure.cli.session import Session
from perdure.cli.terminal import complain, is_terminal, one_line, say, show_json
from perdure.text import printable

if TYPE_CHECKING:
    from perdure.engine import Engine
    from perdure.events import Event
    from perdure.task import Result, Task

__all__ = ["Streamed", "ask"]


async def ask(
    session: Session,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT|-", help="What to ask; - reads stdin.")],
    task: TaskOptions,
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="A file that goes along; repeatable."),
    ] = None,
    continued: Annotated[
        str | None,
        typer.Option(
            "--continue",
            metavar="ID",
            help="Go on with the conversation of this completed task.",
        ),
    ] = None,
) -> int:
    """Ask one thing, and show the answer as it comes.

    Ctrl-C cancels it and keeps what there is of the answer. Exit code 3 where it fails.
    """
    import asyncio

    from perdure.cli.interrupts import Interrupts, any_of
    from perdure.store.claims import Scope

    earlier = None if continued is None else _whole_id(session, continued)
    asked = _make_task(prompt, task, file or (), earlier)
    scope = Scope(task_ids=frozenset())
    async with session.engine(run=True, create=True, scope=scope) as engine:
        task_id = await engine.submit_task(asked)
        with Interrupts() as interrupts:
            interrupts.on_second = engine.log.hurry
            shower = asyncio.create_task(_show(engine, task_id, quiet=session.json))
            try:
                await any_of(interrupts.first, interrupts.terminated, work=(shower,))
                if interrupts.first.is_set() and not shower.done():
                    await engine.cancel_task(task_id, "Ctrl-C")
                    await any_of(interrupts.second, interrupts.terminated, work=(shower,))
                if not shower.done():  # it is handed back: whoever runs tasks next runs it
                    return _say_handed_back(session, task_id)
                shower.result()
            except BrokenPipeError:
                await engine.cancel_task(task_id, "nobody reads the output any more")
                raise
            finally:
                shower.cancel()
                await asyncio.wait({shower})
        result = await engine.get_result(task_id)
    if session.json:
        show_json(_as_json(result))
    return _say_how_it_ended(session, result, interrupted=interrupts.interrupted)


def _whole_id(session: Session, given: str) -> str:
    """Return the id of the task that ``given`` is a part of; as it is where there is none."""
    from perdure.cli.finding import resolve
    from perdure.errors import TaskNotFound
    from perdure.store.readonly import Reader

    try:
        with Reader.open(session.url) as reader:
            return resolve(reader, given)
    except TaskNotFound:  # the engine says so, as it does to everybody
        return given


def _make_task(
    prompt: str,
    options: TaskOptions,
    files: Sequence[Path],
    continued: str | None,
) -> Task:
    from perdure.task import Task, TaskConstraints

    options.check(runs_here=True)
    return Task(
        prompt=_from_stdin() if prompt == "-" else prompt,
        files=tuple(str(file) for file in files),
        constraints=TaskConstraints(**options.constraints()),
        continue_from=continued,
        **options.task_fields(),
    )


def _from_stdin() -> str:
    from perdure.errors import InvalidTask

    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidTask(f"prompt: stdin is not UTF-8: byte {error.start + 1}") from None


async def _show(engine: Engine, task_id: str, *, quiet: bool) -> None:
    """Show the text on stdout and what else happens on stderr, to the end of the task."""
    streamed = None if quiet else Streamed()
    async for recorded in engine.stream_events(task_id):
        _show_event(recorded.event, streamed)
    if streamed is not None:
        streamed.end()


def _show_event(event: Event, streamed: Streamed | None) -> None:
    from perdure.events import AttemptFailed, Chunk, Interrupted, Running

    match event:
        case Chunk() if event.kind == "text" and streamed is not None:
            streamed.add(event.text)
        case Running() if event.mode == "restart" and streamed is not None and streamed.written:
            streamed.begin_again()
        case AttemptFailed():
            follows = _FOLLOWS[event.next]
            if streamed is not None:
                streamed.end()
            complain(
                f"attempt {event.attempt} failed: {event.error_class}: {one_line(event.message)}; "
                f"{follows}"
            )
        case Interrupted():
            complain(f"attempt {event.attempt} was lost; it goes on")
        case _:
            pass


_FOLLOWS: Final = {
    "retry": "it tries again",
    "fallback": "the next platform is asked",
    "reattach": "it is picked up where it was",
    "repair": "it is asked to correct it",
}


class Streamed:
    """Text on stdout that may have to begin again.

    On a terminal its escapes are neutralised. What a lost attempt wrote is taken back where stdout
    is a file; elsewhere the new beginning is announced on stderr.
    """

    def __init__(self) -> None:
        self.written = False
        self._terminal = is_terminal()
        self._open_line = False
        self._held = ""
        self._start = _place_in_file()

    def add(self, text: str) -> None:
        """Write some more."""
        text = self._held + text
        # A \r whose \n comes with the next chunk is no escape.
        self._held = "\r" if self._terminal and text.endswith("\r") else ""
        text = text.removesuffix(self._held) if self._held else text
        sys.stdout.write(printable(text) if self._terminal else text)
        sys.stdout.flush()
        self.written = True
        self._open_line = not text.endswith("\n")

    def begin_again(self) -> None:
        """Note that what was written is no longer part of the output."""
        self._held = ""
        if self._start is not None:
            os.ftruncate(sys.stdout.fileno(), self._start)
            os.lseek(sys.stdout.fileno(), self._start, os.SEEK_SET)
            return
        if self._open_line:
            sys.stdout.write("\n")
        say("perdure: it begins again; what was shown so far is not part of the answer")
        self.written = self._open_line = False

    def end(self) -> None:
        """End the line that is open on the terminal."""
        if self._terminal and self._open_line:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._open_line = False


def _place_in_file() -> int | None:
    """Return where stdout begins in the file it goes to; None where it goes to no file."""
    import fcntl

    try:
        descriptor = sys.stdout.fileno()
        about = os.fstat(descriptor)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(about.st_mode):
        return None
    # With `>>` it stands at 0, and means the end.
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return about.st_size
    return os.lseek(descriptor, 0, os.SEEK_CUR)


def _as_json(result: Result) -> dict[str, Any]:
    return {
        **result.model_dump(mode="json", exclude={"task", "usage"}),
        "usage": result.usage.model_dump(mode="json", exclude={"raw"}),
        "labels": result.task.labels,
        "batch": result.task.batch,
    }


def _say_how_it_ended(session: Session, result: Result, *, interrupted: bool) -> int:
    look = session.command_line("output", result.task_id)
    if result.success:
        tokens = "unknown" if result.tokens_used is None else count(result.tokens_used)
        parts = [
            f"{tokens} tokens",
            "cost unknown" if result.cost is None else dollars(result.cost),
            seconds(result.duration_seconds),
        ]
        say(f"{result.task_id}: {', '.join(parts)}")
        return ExitCode.OK
    kept = len(result.partial_output or "")
    there = f"; {things(kept, 'character')} of the answer are kept: `{look}`" if kept else ""
    if result.status == "cancelled":
        complain(f"{result.task_id} was cancelled{there}")
        return ExitCode.INTERRUPTED if interrupted else ExitCode.SOME_FAILED
    complain(f"{result.task_id} failed: {result.error_class}: {result.error or ''}{there}")
    return ExitCode.SOME_FAILED


def _say_handed_back(session: Session, task_id: str) -> int:
    say(f"{task_id} was handed back; `{session.command_line('resume')}` runs what is left.")
    return ExitCode.INTERRUPTED
