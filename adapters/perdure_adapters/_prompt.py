"""What is said to every platform in the same words: facts, files as text, and "go on".

Everything here is pure; what a platform's own message format looks like is its adapter's business.
"""

from __future__ import annotations

import json
from typing import Final, Literal
from xml.sax.saxutils import quoteattr

from perdure.adapter import Call, LoadedFile
from perdure.errors import InvalidRequest
from perdure.task import Attachment, Task

__all__ = ["GO_ON", "file_kind", "file_text", "follow_up", "opening"]

GO_ON: Final = (
    "Your answer above was cut off. Go on exactly where it stops, even in the middle of a word. "
    "Repeat nothing of it, and add no remark about the interruption."
)
"""What is asked, after the partial answer, of platforms that don't simply go on with it."""

_REPAIR: Final = (
    "Your answer above can't be used: {problem}. Give the whole answer again, corrected: one JSON "
    "value that satisfies the schema you were given, and nothing else."
)

# Media types that are text though they don't begin with `text/`.
_TEXT_TYPES: Final = frozenset(
    {
        "application/javascript",
        "application/json",
        "application/sql",
        "application/toml",
        "application/x-ndjson",
        "application/x-python",
        "application/x-python-code",
        "application/x-sh",
        "application/x-yaml",
        "application/xml",
        "application/yaml",
        "image/svg+xml",
    }
)
_IMAGE_TYPES: Final = frozenset({"image/gif", "image/jpeg", "image/png", "image/webp"})


def file_kind(attachment: Attachment) -> Literal["text", "image", "pdf"] | None:
    """Return what kind of file it is; None where it is none that platforms take."""
    media_type = attachment.media_type.partition(";")[0].strip().lower()
    if media_type in _IMAGE_TYPES:
        return "image"
    if media_type == "application/pdf":
        return "pdf"
    if (
        media_type.startswith("text/")
        or media_type in _TEXT_TYPES
        or media_type.endswith(("+json", "+xml"))
    ):
        return "text"
    return None


def file_text(file: LoadedFile) -> str:
    """Return a text file's content.

    Raises:
        InvalidRequest: It isn't UTF-8.
    """
    try:
        return file.data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the file {file.attachment.name!r} is no UTF-8 text (byte {error.start}); convert it"
        ) from None


def opening(task: Task, texts: list[tuple[str, str]]) -> str:
    """Return what goes before the question: the task's facts, then text files; maybe empty.

    Args:
        task: The task whose `context` holds the facts.
        texts: Name and content of each text file.
    """
    parts = [
        _tagged("context", name, value if isinstance(value, str) else _json(value))
        for name, value in task.context.items()
    ]
    parts += [_tagged("file", name, text) for name, text in texts]
    return "".join(f"{part}\n\n" for part in parts)


def follow_up(call: Call) -> tuple[str, str] | None:
    """Return the two turns that come after the question: the answer there is, and what to do.

    None where the call is a new beginning, or goes on with a response that is still there.
    """
    resume = call.resume
    if resume is None or not resume.output.strip():
        return None
    match resume.mode:
        case "continue":
            return resume.output, GO_ON
        case "repair":
            return resume.output, _REPAIR.format(problem=resume.problem or "it is not valid")
        case "reattach":
            return None


def _tagged(tag: str, name: str, text: str) -> str:
    return f"<{tag} name={quoteattr(name)}>\n{text}\n</{tag}>"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
