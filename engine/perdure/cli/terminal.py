r"""What goes to stdout and stderr, and how it is shown.

Data goes to stdout: on a terminal with its escapes neutralised (``\x1b``), in a pipe or file as it
is. Everything else goes to stderr, always neutralised. rich is loaded where something is drawn.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import TYPE_CHECKING, Any, Final

from perdure.text import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "complain",
    "console",
    "error_console",
    "is_terminal",
    "json_text",
    "one_line",
    "say",
    "send_log_to_stderr",
    "show",
    "show_json",
    "show_line",
]

# What JSON may hold in the clear, and a terminal would obey.
_ESCAPABLE: Final = re.compile("[\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def is_terminal() -> bool:
    """Return whether stdout is looked at by a person."""
    return sys.stdout.isatty()


def show(text: str) -> None:
    """Write data to stdout as it is, on a terminal with its escapes neutralised. Adds nothing."""
    sys.stdout.write(printable(text) if is_terminal() else text)


def show_line(text: str) -> None:
    """Write data and a newline to stdout."""
    show(text + "\n")


def show_json(value: object) -> None:
    """Write a value as one line of JSON to stdout; moments are text, other objects their `str`."""
    sys.stdout.write(json_text(value) + "\n")


def json_text(value: object) -> str:
    """Return a value as JSON on one line, without anything that a terminal would obey."""
    import orjson

    try:
        text = orjson.dumps(value, default=_plain, option=orjson.OPT_UTC_Z).decode()
    except TypeError:  # text that is no UTF-8, a number beyond 64 bits
        import json

        text = json.dumps(value, ensure_ascii=False, default=_plain)
    if text.isascii() and "\x7f" not in text:
        return text
    return _ESCAPABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _plain(value: object) -> Any:  # noqa: ANN401 - whatever json can take
    from datetime import UTC, datetime

    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if dump is not None else str(value)


def say(text: str) -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def complain(message: str) -> None:
    """Write `perdure: message` to stderr, on one line."""
    say(f"perdure: {one_line(message)}")


def one_line(text: str, length: int | None = None) -> str:
    """Return ``text`` on one line, cut to ``length`` characters where one is given."""
    line = " ".join(text.split())
    if length is not None and len(line) > length:
        line = line[: max(0, length - 1)] + "…"
    return line


def console() -> Console:
    """Return a console that draws on stdout; it takes text as it is, without markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def error_console() -> Console:
    """Return a console that draws on stderr; it takes text as it is, without markup."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False)


class _Complaints(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from perdure.containment import described

        try:
            message = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                message += f": {described(record.exc_info[1])}"
            complain(message)
        except Exception:  # noqa: BLE001 - who logs is in the middle of something else
            self.handleError(record)


def send_log_to_stderr() -> None:
    """Show what the engine logs as lines on stderr, warnings and worse."""
    logger = logging.getLogger("perdure")
    if not any(isinstance(handler, _Complaints) for handler in logger.handlers):
        logger.addHandler(_Complaints(logging.WARNING))
        logger.propagate = False
