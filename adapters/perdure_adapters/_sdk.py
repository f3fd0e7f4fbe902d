"""What adapters to SDKs share: importing late, one client per event loop, errors made typed.

The functions here know HTTP and the words platforms use, but no SDK.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import math
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, Generic, TypeVar
from weakref import WeakKeyDictionary

from perdure.errors import (
    AuthenticationFailed,
    ContentRefused,
    InvalidRequest,
    NotConfigured,
    Overloaded,
    PlatformError,
    PlatformTimeout,
    QuotaExhausted,
    RateLimited,
)

__all__ = [
    "PerLoop",
    "error_class",
    "find_sdk",
    "load_sdk",
    "redact",
    "retry_after",
    "typed_error",
    "within",
]

C = TypeVar("C")
T = TypeVar("T")

MAX_RETRY_AFTER: Final = 600.0
"""Seconds. Whoever asks for more is asked again after that."""

_MAX_MESSAGE: Final = 500
_SHORTEST_SECRET: Final = 4

_BY_STATUS: Final[Mapping[int, type[PlatformError]]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    402: QuotaExhausted,
    403: AuthenticationFailed,
    404: InvalidRequest,
    405: InvalidRequest,
    408: PlatformTimeout,
    409: Overloaded,  # two requests that got in each other's way: the next one need not
    413: InvalidRequest,
    422: InvalidRequest,
    425: Overloaded,
    429: RateLimited,
    501: InvalidRequest,  # a feature the server was not built or started with
}

# Words that say more than the status: the `code` and `type` of error bodies and error events.
_BY_NAME: Final[Mapping[str, type[PlatformError]]] = {
    # Used up: these come as 429, or as 400, and waiting won't help.
    "insufficient_quota": QuotaExhausted,
    "spend_limit_reached": QuotaExhausted,
    "billing_error": QuotaExhausted,
    "billing_hard_limit_reached": QuotaExhausted,
    "billing_not_active": QuotaExhausted,
    "credit_balance_too_low": QuotaExhausted,
    # Refused for what it says, as a 400.
    "content_filter": ContentRefused,
    "content_policy_violation": ContentRefused,
    "responsibleaipolicyviolation": ContentRefused,
    "bio_policy": ContentRefused,
    "image_content_policy_violation": ContentRefused,
    "misalignment_policy_violation": ContentRefused,
    # Error events in a stream whose status was 200.
    "overloaded_error": Overloaded,
    "overloaded": Overloaded,
    "api_error": Overloaded,
    "server_error": Overloaded,
    "internal_server_error": Overloaded,
    "internal_error": Overloaded,
    "unavailable_error": Overloaded,
    "service_unavailable": Overloaded,
    "rate_limit_error": RateLimited,
    "rate_limit_exceeded": RateLimited,
    "timeout_error": PlatformTimeout,
    "timeout": PlatformTimeout,
    "authentication_error": AuthenticationFailed,
    "invalid_api_key": AuthenticationFailed,
    "permission_error": AuthenticationFailed,
    "invalid_request_error": InvalidRequest,
    "not_found_error": InvalidRequest,
    "not_supported_error": InvalidRequest,
    "context_length_exceeded": InvalidRequest,
    "exceed_context_size_error": InvalidRequest,
    "model_not_found": InvalidRequest,
    "data_residency_mismatch": InvalidRequest,
    "empty_image_file": InvalidRequest,
    "failed_to_download_image": InvalidRequest,
    "image_file_not_found": InvalidRequest,
    "image_file_too_large": InvalidRequest,
    "image_parse_error": InvalidRequest,
    "image_too_large": InvalidRequest,
    "image_too_small": InvalidRequest,
    "invalid_base64_image": InvalidRequest,
    "invalid_image": InvalidRequest,
    "invalid_image_format": InvalidRequest,
    "invalid_image_mode": InvalidRequest,
    "invalid_image_url": InvalidRequest,
    "invalid_prompt": InvalidRequest,
    "unsupported_image_media_type": InvalidRequest,
    "vector_store_timeout": PlatformTimeout,
}

# These overrule any status. A general word such as `invalid_request_error` does not: some servers
# put it into everything, a 429 too.
_OVERRULING: Final = frozenset({QuotaExhausted, ContentRefused})


async def load_sdk(module: str, extra: str) -> None:
    """Import an SDK, off the event loop: the big ones take a second or two.

    Args:
        module: The name to import, as in `sys.modules`.
        extra: The extra of perdure that installs it.

    Raises:
        NotConfigured: It isn't installed, or can't be imported; says what to install.
    """
    if sys.modules.get(module) is not None:
        return
    try:
        await asyncio.to_thread(importlib.import_module, module)
    except ImportError as error:
        raise NotConfigured(
            f"the package {module!r} can't be imported ({error}): "
            f"run `pip install 'perdure[{extra}]'`"
        ) from error


def find_sdk(module: str, extra: str) -> None:
    """Raise `NotConfigured` where an SDK isn't installed, without the time it takes to import it.

    Args:
        module: The name to import.
        extra: The extra of perdure that installs it.
    """
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        raise NotConfigured(
            f"the package {module!r} is not installed: run `pip install 'perdure[{extra}]'`"
        )


class PerLoop(Generic[C]):
    """One value per event loop, made when it is first asked for.

    A client's connections belong to the event loop they were opened on, while one adapter may
    serve several: each blocking `execute` has its own.
    """

    def __init__(self, make: Callable[[], C]) -> None:
        self._make = make
        self._values: WeakKeyDictionary[asyncio.AbstractEventLoop, C] = WeakKeyDictionary()

    def get(self) -> C:
        """Return the running loop's value."""
        loop = asyncio.get_running_loop()
        value = self._values.get(loop)
        if value is None:
            value = self._values[loop] = self._make()
        return value

    def take(self) -> C | None:
        """Give up the running loop's value and return it, for closing; None if there is none."""
        return self._values.pop(asyncio.get_running_loop(), None)


async def within(seconds: float | None, awaitable: Awaitable[T]) -> T:
    """Return what ``awaitable`` comes to.

    Args:
        seconds: How long that may take; None for however long, which costs nothing.
        awaitable: What to wait for.

    Raises:
        TimeoutError: It took longer.
    """
    if seconds is None:
        return await awaitable
    async with asyncio.timeout(seconds):
        return await awaitable


def error_class(status: int | None, names: Iterable[str | None] = ()) -> type[PlatformError]:
    """Return the class of error that a platform's answer is.

    Args:
        status: The HTTP status; None, or 200, for an error inside a stream.
        names: What the body calls it: its `code`, its `type`. A number counts as a status.
    """
    words = [str(name).strip().lower() for name in names if name is not None]
    named = [_BY_NAME[word] for word in words if word in _BY_NAME]
    for found in named:
        if found in _OVERRULING:
            return found
    if status is not None and status >= 300:
        return _of_status(status)
    if named:
        return named[0]
    for word in words:
        if word.isascii() and word.isdigit() and 400 <= int(word) <= 599:
            return _of_status(int(word))
    return Overloaded


def _of_status(status: int) -> type[PlatformError]:
    known = _BY_STATUS.get(status)
    if known is not None:
        return known
    return Overloaded if status >= 500 else InvalidRequest


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return the seconds a platform asks to wait, at most ten minutes; None where it doesn't.

    Args:
        headers: The response's headers, their names in lower case or without regard to case.
        now: The moment from which a date is counted; None takes the present one.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return _capped(milliseconds / 1000)
    value = headers.get("retry-after")
    seconds = _number(value)
    if seconds is not None:
        return _capped(seconds)
    if value is None:
        return None
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError, OverflowError):  # what a server may write has no end
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return _capped((date - (now or datetime.now(UTC))).total_seconds())


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _capped(seconds: float) -> float:
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def redact(text: str, secrets: Iterable[str | None]) -> str:
    """Return ``text`` with every secret in it replaced: some servers quote the key they refuse."""
    for secret in secrets:
        if secret and len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return text


def typed_error(
    message: str,
    *,
    status: int | None = None,
    names: Iterable[str | None] = (),
    headers: Mapping[str, str] | None = None,
    request_id: str | None = None,
    secrets: Iterable[str | None] = (),
) -> PlatformError:
    """Return the typed error for what a platform answered, its message short and without keys.

    Args:
        message: The platform's words.
        status: The HTTP status, where there was one.
        names: The `code` and `type` of the body.
        headers: The response's headers, for `Retry-After`.
        request_id: The platform's id of the request.
        secrets: What must not be in the message.
    """
    kind = error_class(status, names)
    text = redact(message, secrets)
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE]} …"
    return kind(
        text,
        status=status if status is not None and status >= 300 else None,
        request_id=request_id,
        retry_after=retry_after(headers) if headers is not None and kind.retryable else None,
    )
