"""The HTTP client that the SDKs are given. It needs httpx2, so it is imported inside functions."""

from __future__ import annotations

import time
from typing import Any, Final

import httpx2

__all__ = ["HttpClient"]

_JUST_HUNG_UP: Final = 1.0
"""Seconds in which a connection that the server had closed before turns out to be closed."""


class HttpClient(httpx2.AsyncClient):
    """A client that tells a connection that has ended from an answer that was lost.

    A server may close a connection that it has promised to keep (llama.cpp does after each streamed
    answer) while the next request is on its way. Nobody has read that request, so it is sent again,
    in the end on a new connection. It looks the same where a server reads a request and dies within
    a second, which is much rarer. A request on a new connection, or one that was answered or broke
    off later, may well have been read and paid for: its error stands, and what follows from it is
    for the log to say.
    """

    async def send(
        self,
        request: httpx2.Request,
        **how: Any,  # noqa: ANN401 - what the base takes
    ) -> httpx2.Response:
        """Send a request and return its response, as the base does."""
        while True:
            followed = _Followed()
            request.extensions = {**request.extensions, "trace": followed.note}
            try:
                return await super().send(request, **how)
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError):
                if not followed.unread or not isinstance(request.stream, httpx2.ByteStream):
                    raise


class _Followed:
    """What httpcore2 tells of a request on its way."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._new_or_answered = False

    async def note(self, step: str, _details: dict[str, Any]) -> None:
        """Take note of a step."""
        if step.startswith("connection.") or step.endswith(".receive_response_headers.complete"):
            self._new_or_answered = True

    @property
    def unread(self) -> bool:
        """Whether it went to a connection that had ended."""
        return not self._new_or_answered and time.monotonic() - self._began < _JUST_HUNG_UP
