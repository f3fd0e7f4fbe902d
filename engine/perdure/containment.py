"""What an adapter does wrong, kept to its own task: whatever it yields, raises or never ends.

Adapters are others' code, run in one event loop with everybody's tasks, and what they yield is kept
for ever. So nothing of theirs goes on that wasn't looked at here: an event as the log will give it
back, an error with attributes that can be written down, a call that ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, cast

import orjson
from pydantic import ValidationError

from perdure.errors import FinalError, PlatformError
from perdure.events import (
    Accepted,
    Chunk,
    Completed,
    Event,
    FileCreated,
    UsageReported,
    encode_data,
)
from perdure.task import Usage
from perdure.text import check_json, clean_text

__all__ = ["CHUNK_KINDS", "AdapterFault", "admit", "admit_error", "contained", "described"]

CHUNK_KINDS: Final = ("text", "reasoning", "tool_call")
_WRITTEN_BY_ADAPTERS: Final = (Accepted, Chunk, UsageReported, FileCreated, Completed)
_EXACTLY: Final[dict[type, type[Event]]] = {model: model for model in _WRITTEN_BY_ADAPTERS}
_COUNTS: Final = tuple(name for name in Usage.model_fields if name != "raw")
_TIDYING_SECONDS: Final = 1.0


class AdapterFault(FinalError):
    """An adapter raised something that is no sound `PlatformError`: a fault of the adapter's."""


def admit(event: object) -> Event:
    """Return what an adapter yielded as the log will give it back.

    So an object of a derived class becomes the event that it is derived from, unless it has fields
    of its own, and what was made without validation is validated. A chunk keeps what can't be
    stored in its text out, as all chunks do.

    Raises:
        FinalError: It is not an adapter's to write, or couldn't be read again.
    """
    model = _EXACTLY.get(type(event)) or _derived_from(event)
    try:
        if isinstance(event, Chunk):
            event = event.model_copy(update={"text": _mended(event.text), "length": None})
        plain = orjson.loads(encode_data(cast("Event", event)))
        # Not `model_validate`, which takes half as long again to come to the same.
        admitted: Event = model.__pydantic_validator__.validate_python(plain)
        if isinstance(admitted, (UsageReported, Completed)) and admitted.usage is not None:
            counts = vars(admitted.usage)
            for name in _COUNTS:
                check_json(counts[name])  # columns hold 63 bits
    except Exception as error:  # noqa: BLE001 - a derived class runs code of its own
        raise FinalError(
            f"the adapter yielded {model.type!r} with something that can't be stored: "
            f"{_problem(error)}"
        ) from None
    return admitted


def _derived_from(event: object) -> type[Event]:
    if not isinstance(event, Event):
        raise FinalError(f"the adapter yielded a {type(event).__name__}, which is no event")
    for model in _WRITTEN_BY_ADAPTERS:
        if isinstance(event, model):
            return model
    raise FinalError(f"the adapter yielded {event.type!r}, which is not its to write")


def _mended(text: object) -> object:
    return clean_text(text) if isinstance(text, str) else text


def _problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if type(error) in (TypeError, ValueError):  # the encoder's, which say it all
        return str(error)
    return described(error)


# What the log takes of an error, attribute by attribute.
_ATTRIBUTES: Final[dict[str, tuple[type, ...]]] = {
    "message": (str,),
    "status": (int, type(None)),
    "request_id": (str, type(None)),
    "retry_after": (int, float, type(None)),
    "retryable": (bool,),
    "response_over": (bool,),
}
_MOST: Final = 2**31 - 1  # of a status and of seconds: what every database and clock can hold


def admit_error(error: PlatformError) -> PlatformError:
    """Return an adapter's error; where it can't be written down, the fault that this is."""
    raised = type(error).__name__
    for name, kinds in _ATTRIBUTES.items():
        try:
            value: object = getattr(error, name)
        except Exception as missing:  # noqa: BLE001 - as of one that never called its base class
            return AdapterFault(f"the adapter raised {raised} without {name}: {described(missing)}")
        if not isinstance(value, kinds):
            kind = type(value).__name__
            return AdapterFault(f"the adapter raised {raised} whose {name} is a {kind}")
        if isinstance(value, int) and abs(value) > _MOST:
            return AdapterFault(f"the adapter raised {raised} whose {name} is beyond 32 bits")
    return error


def described(error: BaseException) -> str:
    """Return an error's class and text; without its text where that can't be had."""
    name = type(error).__name__
    try:
        text = str(error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # noqa: BLE001 - an error that can't be shown is still that error
        return f"{name}, whose text can't be had"
    return f"{name}: {text}" if text else name


async def contained(work: Callable[[], Awaitable[object]], seconds: float) -> BaseException | None:
    """Do what an adapter does beside a call, for so long at most; returns what went wrong.

    It is done in a task of its own: so a `CancelledError` that the adapter raises isn't taken for
    our own cancellation, and what doesn't let itself be cancelled is left behind.
    `KeyboardInterrupt` and `SystemExit` end the event loop, as from any task.
    """

    async def doing() -> None:
        await work()

    task = asyncio.create_task(doing())
    try:
        done, _pending = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=min(seconds, _TIDYING_SECONDS))
            return TimeoutError(f"it took longer than {seconds:g} s")
    finally:
        task.cancel()
    return asyncio.CancelledError() if task.cancelled() else task.exception()
