"""The HTTP client that the SDKs are given. It needs httpx2, so it is imported inside functions."""

from __future__ import annotations

import time
from typing import Any, Final

import httpx2

__all__ = ["HttpClient"]

_JUST_HUNG_UP: Final = 1.0
"""Seconds in which connections that the server had closed before turn out to be closed."""
_NO_ANSWER: Final = "without sending a response"


class HttpClient(httpx2.AsyncClient):
    """A client that tells a connection that has ended from an answer that was lost.

    A server may close a connection that it has promised to keep (llama.cpp does after each streamed
    answer) while the next request is on its way. Nobody has read that request, so it is sent again,
    in the end on a new connection. It looks the same where a server reads a request and dies within
    a second, before it has sent a whole head, which is much rarer. A request on a new connection,
    or one that was answered or broke off later, may well have been read and paid for: its error
    stands, and what follows from it is for the log to say.
    """

    async def send(
        self,
        request: httpx2.Request,
        **how: Any,  # noqa: ANN401 - what the base takes
    ) -> httpx2.Response:
        """Send a request and return its response, as the base does."""
        began = time.monotonic()
        while True:
            steps = _Steps()
            request.extensions = {**request.extensions, "trace": steps.note}
            try:
                return await super().send(request, **how)
            except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError) as error:
                garbled = isinstance(error, httpx2.RemoteProtocolError) and _NO_ANSWER not in str(
                    error
                )
                late = time.monotonic() - began > _JUST_HUNG_UP
                lasting = isinstance(request.stream, httpx2.ByteStream)
                if garbled or late or not lasting or not steps.unanswered:
                    raise


class _Steps:
    """What httpcore2 tells of a request on its way."""

    def __init__(self) -> None:
        self._sent = self._connected = self._answered = False

    async def note(self, step: str, _details: dict[str, Any]) -> None:
        """Take note of a step; the first part of its name says which kind of connection took it."""
        self._sent = self._sent or step.endswith(".send_request_headers.started")
        self._connected = self._connected or ".connect_" in step
        self._answered = self._answered or step.endswith(".receive_response_headers.complete")

    @property
    def unanswered(self) -> bool:
        """Whether it was sent on a connection of an earlier request, and nothing came back."""
        return self._sent and not (self._connected or self._answered)
