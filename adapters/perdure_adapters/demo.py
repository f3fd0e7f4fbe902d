"""The platform `demo`: offline, without a key, and always with the same answer.

For newcomers, who see the whole of perdure work before they have a key, and for tests and
benchmarks, which need a platform that is slow, long, failing or hanging at their word. What it
says is fixed by the task; its text says that it is a demonstration.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final, Unpack

from perdure.adapter import Call, Capabilities
from perdure.errors import InvalidRequest, NotConfigured, PlatformError, StreamTruncated
from perdure.events import Accepted, Chunk, Completed, Event, UsageReported
from perdure.task import Task, Usage
from perdure_adapters._demo_options import DemoKeywords, DemoOptions, Journal, error_named
from perdure_adapters.base import AsyncBasePlatformAdapter

__all__ = ["DemoAdapter"]

_FILLER: Final = re.findall(
    r"\w+",
    "The log keeps what was said, and when. Every event has its place. Nothing that was "
    "acknowledged gets lost. A reader may come late and still sees it all, from the beginning. "
    "What ended stays ended; whoever asks again gets the same answer.".lower(),
)

# A word and the white space around it: joined again, the pieces are the text.
_PIECE: Final = re.compile(r"\s*\S+|\s+")
# With no delay the loop still belongs to others too, every so many chunks.
_CHUNKS_A_TURN: Final = 64
_CHUNKS_A_USAGE: Final = 32


class DemoAdapter(AsyncBasePlatformAdapter):
    """A platform that demonstrates. Words count as tokens; nothing costs anything.

    Takes the fields of `DemoOptions` as keyword arguments, or from its table in `perdure.toml`
    (`settings`); `task.options` override them for one task. A task's `max_tokens` ends its text
    early, with the finish reason `length`.

    Example:
        ``DemoAdapter(words=200, delay=0.05)`` writes 200 words, four every 50 ms;
        ``Task(prompt="…", options={"fail": "Overloaded", "fail_attempts": 2})`` succeeds at the
        third attempt.

    Raises:
        InvalidRequest: An option is unknown, or its value isn't possible.
    """

    platform = "demo"
    capabilities = Capabilities(
        reattach=True,
        files=frozenset({"text", "image", "pdf"}),
        usage_on_the_way=True,
        reasoning=True,
    )
    default_model = "demo-1"

    def __init__(
        self,
        *,
        platform: str = "demo",
        settings: Mapping[str, Any] | None = None,
        **options: Unpack[DemoKeywords],
    ) -> None:
        self.platform = platform
        try:
            DemoOptions.of(settings or {})
        except InvalidRequest as error:
            raise NotConfigured(f"perdure.toml: {error}") from None
        self._options = DemoOptions.of(settings or {}, options)

    def __repr__(self) -> str:
        """Return how it was made."""
        changed = self._options.model_dump(exclude_defaults=True)
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    async def run(self, call: Call) -> AsyncGenerator[Event, None]:
        """Say the task's text, or do what its options say goes wrong."""
        options = DemoOptions.of(self._options.model_dump(exclude_unset=True), call.task.options)
        journal = Journal(options.journal)
        mode = call.resume.mode if call.resume is not None else "restart"
        journal.write(call=call.task_id, attempt=call.attempt, mode=mode, prompt=call.task.question)
        index = 0
        outcome = "cancelled"
        try:
            answer = _answer(call, options)
            index = start = _start(call, options)
            if mode != "reattach":
                yield Accepted(
                    response_id=f"demo-{call.task_id}-{call.attempt}",
                    model=call.model or self.default_model,
                    reattachable=options.reattach,
                    cursor="0" if options.reattach else None,
                )
            yield UsageReported(usage=answer.usage(index))
            if options.first_delay:
                await asyncio.sleep(options.first_delay)
            if options.reasoning and index == 0:
                yield Chunk(text=options.reasoning, kind="reasoning")
            while True:
                if index == answer.trouble_at:
                    yield UsageReported(usage=answer.usage(index))
                    await _misbehave(options, answer, call)
                if index == answer.chunks:
                    break
                if index > start:
                    await _pause(options.delay, index)
                text = answer.chunk(index)
                index += 1
                yield Chunk(text=text, cursor=str(index) if options.reattach else None)
                if options.delay or index % _CHUNKS_A_USAGE == 0:
                    yield UsageReported(usage=answer.usage(index))
            outcome = "completed"  # whoever reads stops there, and closes the stream
            yield Completed(
                finish_reason=answer.finish_reason,
                platform_finish_reason=f"demo_{answer.finish_reason}",
                usage=answer.usage(index),
            )
        except PlatformError as error:
            outcome = type(error).__name__
            raise
        finally:
            journal.write(end=call.task_id, attempt=call.attempt, outcome=outcome, chunks=index)

    async def stop(self, response_id: str) -> None:
        """Note in the journal that the response was stopped."""
        Journal(self._options.journal).write(stop=response_id)


@dataclass(frozen=True, slots=True)
class _Answer:
    """What will be said to one call.

    Attributes:
        words: The text in pieces of one word each, with their white space.
        chunk_words: Pieces that make a chunk.
        input_words: Words that were asked.
        finish_reason: Why it ends where it does.
        trouble_at: The number of chunks after which something goes wrong; None where nothing does.
    """

    words: list[str]
    chunk_words: int
    input_words: int
    finish_reason: str
    trouble_at: int | None = None

    @property
    def chunks(self) -> int:
        """How many chunks the text has."""
        return -(-len(self.words) // self.chunk_words)

    def chunk(self, index: int) -> str:
        """Return the text of a chunk, counted from 0."""
        begin = index * self.chunk_words
        return "".join(self.words[begin : begin + self.chunk_words])

    def usage(self, index: int) -> Usage:
        """Return the tokens used up to the chunk before ``index``."""
        said = min(index * self.chunk_words, len(self.words))
        return Usage(input_tokens=self.input_words, output_tokens=said)


def _answer(call: Call, options: DemoOptions) -> _Answer:
    text = options.text if options.text is not None else _demonstration(call.task, options.words)
    asked = _asked(call.task)
    if call.resume is not None and call.resume.mode == "continue":
        asked.append(call.resume.output)
        text = text.removeprefix(call.resume.output)
    words = _PIECE.findall(text)
    most = call.task.limits.max_tokens
    cut = most is not None and len(words) > most
    answer = _Answer(
        words=words[:most],
        chunk_words=options.chunk_words,
        input_words=sum(len(part.split()) for part in asked),
        finish_reason="length" if cut else options.finish_reason,
    )
    trouble = _trouble(call, options)
    return answer if trouble is None else replace(answer, trouble_at=min(trouble, answer.chunks))


def _demonstration(task: Task, length: int) -> str:
    """Return a text of so many words that is the same whenever the same is asked."""
    question = task.question.split()
    begin = " ".join(question[:6])
    words = (
        "Demonstration text; no model was asked. "
        f"The question has {len(question)} words and begins with: {begin[:80]}."
    ).split()
    seed = sha256("\0".join(_asked(task)).encode()).digest()
    chance = random.Random(seed)  # noqa: S311 - it only has to be the same each time
    while len(words) < length:
        sentence = chance.choices(_FILLER, k=chance.randint(6, 14))
        words += [sentence[0].capitalize(), *sentence[1:-1], f"{sentence[-1]}."]
    return " ".join(words[:length])


def _asked(task: Task) -> list[str]:
    """Return all that is said to the platform."""
    parts = [task.prompt, task.system or "", *(turn.content for turn in task.messages)]
    return parts + [f"{name} {value}" for name, value in sorted(task.context.items())]


def _start(call: Call, options: DemoOptions) -> int:
    """Return the chunk at which the call begins, or goes on."""
    resume = call.resume
    if resume is None or resume.mode != "reattach":
        return 0
    if not options.reattach:
        raise InvalidRequest("demo: the call can't be picked up without the option 'reattach'")
    cursor = resume.cursor or "0"
    if not (cursor.isascii() and cursor.isdigit()):
        raise InvalidRequest(f"demo: {cursor!r} is no cursor of this platform")
    return int(cursor)


def _trouble(call: Call, options: DemoOptions) -> int | None:
    """Return the number of chunks after which something goes wrong."""
    if options.fail_attempts is not None and call.attempt > options.fail_attempts:
        return None
    return min((after for after, _ in _troubles(options)), default=None)


def _troubles(options: DemoOptions) -> Iterator[tuple[int, str]]:
    if options.fail is not None:
        yield options.fail_after, "fail"
    if options.truncate_after is not None:
        yield options.truncate_after, "truncate"
    if options.stall_after is not None:
        yield options.stall_after, "stall"


async def _misbehave(options: DemoOptions, answer: _Answer, call: Call) -> None:
    """Do the first of the things that were to go wrong."""
    _, what = min(_troubles(options))
    if what == "fail":
        kind = error_named(options.fail or "Overloaded")
        raise kind(
            f"the demonstration was asked to fail in attempt {call.attempt}",
            retry_after=options.retry_after,
        )
    if what == "truncate":
        raise StreamTruncated(
            f"the demonstration was asked to break off after {answer.trouble_at} chunks"
        )
    await asyncio.get_running_loop().create_future()  # never done: only a cancellation ends it


async def _pause(delay: float, index: int) -> None:
    if delay:
        await asyncio.sleep(delay)
    elif index % _CHUNKS_A_TURN == 0:
        await asyncio.sleep(0)
