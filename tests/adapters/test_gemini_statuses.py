"""Gemini's HTTP statuses and error bodies, as typed errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from interacting import KEY, WAYS, a_call, failure

from perdure.errors import (
    AuthenticationFailed,
    ContentRefused,
    InvalidRequest,
    Overloaded,
    PlatformTimeout,
    QuotaExhausted,
    RateLimited,
    StreamTruncated,
)
from servers.gemini import GeminiServer

pytestmark = pytest.mark.parametrize("way", WAYS)

RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34.5s"}
BAD_KEY = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
PER_DAY = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}],
}
PER_MINUTE = {
    "@type": "type.googleapis.com/google.rpc.QuotaFailure",
    "violations": [{"quotaId": "GenerateRequestsPerMinutePerProjectPerModel"}],
}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, AuthenticationFailed),
        (402, QuotaExhausted),
        (403, AuthenticationFailed),
        (404, InvalidRequest),
        (408, PlatformTimeout),
        (409, Overloaded),
        (413, InvalidRequest),
        (418, InvalidRequest),
        (422, InvalidRequest),
        (429, RateLimited),
        (499, InvalidRequest),
        (500, Overloaded),
        (501, InvalidRequest),
        (502, Overloaded),
        (503, Overloaded),
        (504, Overloaded),
        (529, Overloaded),
    ],
)
async def test_each_status_is_its_error(
    gemini_server: GeminiServer, way: str, status: int, kind: type
) -> None:
    """One request, one error of the right class, with its status; no retry of the SDK's."""
    error = await failure(
        gemini_server, a_call(status=status, error={"message": f"no\n way with {KEY}"}), way
    )
    assert type(error) is kind
    assert error.status == status
    assert error.message.endswith(f"answered {status}: no way with ***")
    assert not error.response_over
    assert len(gemini_server.seen) == 1


@pytest.mark.parametrize(
    ("status", "details", "kind", "wait"),
    [
        (400, [BAD_KEY], AuthenticationFailed, None),
        (429, [RETRY_INFO], RateLimited, 34.5),
        (429, [PER_MINUTE, RETRY_INFO], RateLimited, 34.5),
        (429, [PER_DAY, RETRY_INFO], QuotaExhausted, None),
        (503, [{**RETRY_INFO, "retryDelay": "99999s"}], Overloaded, 600),
        (503, [{**RETRY_INFO, "retryDelay": "soon"}], Overloaded, None),
        (503, "no list", Overloaded, None),
        (503, [5, None], Overloaded, None),
    ],
)
async def test_details_say_more_than_the_status(
    gemini_server: GeminiServer, way: str, status: int, details: Any, kind: type, wait: float | None
) -> None:
    """A bad key comes as 400, a used-up day as 429, and the time to wait inside the body."""
    call = a_call(status=status, error={"message": "no", "code": status, "details": details})
    error = await failure(gemini_server, call, way)
    assert type(error) is kind
    assert error.retry_after == wait


async def test_retry_after_of_the_headers(gemini_server: GeminiServer, way: str) -> None:
    """It counts too, and before the body's."""
    error = {"message": "slow", "details": [RETRY_INFO]}
    call = a_call(status=429, headers={"retry-after": "7"}, error=error)
    assert (await failure(gemini_server, call, way)).retry_after == 7


async def test_a_refused_content(gemini_server: GeminiServer, way: str) -> None:
    """Some contents are refused with a 400."""
    call = a_call(status=400, error={"message": "no", "status": "PROHIBITED_CONTENT"})
    assert type(await failure(gemini_server, call, way)) is ContentRefused


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("<html><h1>Bad gateway</h1></html>", "answered 502"),
        ('[{"error": {"message": "in a list"}}]', "in a list"),
        ('{"error": "just words"}', "just words"),
        ("oops", "oops"),
        ("", "answered 502"),
        ("x" * 5000, "xxx"),
        ("5", "answered 502"),
        ("null", "answered 502"),
    ],
)
async def test_bodies_of_any_form(
    gemini_server: GeminiServer, way: str, body: str, words: str
) -> None:
    """A proxy's page, a list, nothing at all: always the error of the status, short."""
    call = a_call(status=502, body=body or " ")
    error = await failure(gemini_server, call, way)
    assert type(error) is Overloaded
    assert error.status == 502
    assert words in error.message
    assert len(error.message) < 700


async def test_a_redirect_is_not_followed(gemini_server: GeminiServer, way: str) -> None:
    """The key would go along to wherever it points."""
    call = a_call(status=307, headers={"location": f"{gemini_server.url}/v1/x"}, body="{}")
    assert type(await failure(gemini_server, call, way)) is InvalidRequest
    assert len(gemini_server.seen) == 1


async def test_an_error_with_status_200(gemini_server: GeminiServer, way: str) -> None:
    """An error object instead of a stream is no answer."""
    body = json.dumps({"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}})
    await failure(gemini_server, a_call(body=body), way)


async def test_an_answer_nested_without_end(gemini_server: GeminiServer, way: str) -> None:
    """What can't even be decoded is a typed error like all others."""
    error = await failure(gemini_server, a_call(body="[" * 5000), way)
    assert type(error) in (StreamTruncated, InvalidRequest)
