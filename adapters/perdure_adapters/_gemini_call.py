"""What requests to both of Gemini's APIs have in common: turns, files, options. All pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from perdure.adapter import Call, LoadedFile
from perdure.errors import InvalidRequest
from perdure_adapters._prompt import file_kind, file_text, follow_up, opening

__all__ = ["Turn", "checked_options", "conversation", "merged"]

# A request with its files in it may have 20 MB; base64 makes four bytes of three.
MAX_REQUEST: Final = 20_000_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: `user` or `model`.
        text: What is said.
        files: Images and PDFs that go before it.
    """

    role: str
    text: str
    files: tuple[LoadedFile, ...] = ()


def conversation(call: Call) -> list[Turn]:
    """Return the turns: the earlier ones, the question with facts and files, what follows it.

    Raises:
        InvalidRequest: A file is of a kind Gemini doesn't take, or they are too large together.
    """
    task = call.task
    turns = [
        Turn("user" if turn.role == "user" else "model", turn.content)
        for turn in task.messages[:-1]
    ]
    texts, binaries = _sorted_files(call)
    turns.append(Turn("user", opening(task, texts) + task.question, binaries))
    more = follow_up(call)
    if more is not None:
        turns += [Turn("model", more[0]), Turn("user", more[1])]
    return turns


def _sorted_files(call: Call) -> tuple[list[tuple[str, str]], tuple[LoadedFile, ...]]:
    texts: list[tuple[str, str]] = []
    binaries: list[LoadedFile] = []
    size = 0
    for file in call.files:
        kind = file_kind(file.attachment)
        if kind is None:
            raise InvalidRequest(
                f"the file {file.attachment.name!r} is {file.attachment.media_type}; Gemini takes "
                "text, images and PDF: convert it, or leave it out"
            )
        size += len(file.data) if kind == "text" else -(-len(file.data) // 3) * 4
        if kind == "text":
            texts.append((file.attachment.name, file_text(file)))
        else:
            binaries.append(file)
    if size > MAX_REQUEST:
        raise InvalidRequest(
            f"the files make a request of {size / 1e6:.1f} MB; Gemini takes "
            f"{MAX_REQUEST / 1e6:.0f} MB: send fewer or smaller ones"
        )
    return texts, tuple(binaries)


def checked_options(call: Call, reserved: Collection[str]) -> dict[str, Any]:
    """Return the task's options, without `background`, which is perdure's own.

    Raises:
        InvalidRequest: One of them is the adapter's business.
    """
    options = dict(call.task.options)
    for name in reserved:
        if name in options:
            raise InvalidRequest(f"options.{name}: perdure sets this itself; remove it")
    if not isinstance(options.pop("background", False), bool):
        raise InvalidRequest("options.background: must be true or false")
    return options


def merged(body: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``body`` with ``options`` put into it, objects within objects too."""
    result = dict(body)
    for name, value in options.items():
        before = result.get(name)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            inner = cast("Mapping[str, Any]", before)
            result[name] = merged(inner, cast("Mapping[str, Any]", value))
        else:
            result[name] = value
    return result
