"""Addresses as they are shown: whatever may be secret in them is not."""

from __future__ import annotations

import pytest

from perdure.errors import NotConfigured
from perdure_adapters import ChatGPTAdapter, ClaudeAdapter, CompatibleAdapter, GeminiAdapter

SECRET = "very-hidden"  # noqa: S105 - it is none


@pytest.mark.parametrize("kind", [ChatGPTAdapter, ClaudeAdapter, CompatibleAdapter, GeminiAdapter])
@pytest.mark.parametrize(
    "url",
    [
        f"ftp://user:{SECRET}@host/v1",
        f"http://user:a/{SECRET}@host/v1",
        f"http://user:a?{SECRET}@host:port/v1",
        f"http://user:a@{SECRET}@host:port/v1",
        f"ftp://host/v1?key={SECRET}",
        f"localhost:8080/v1?key={SECRET}",
        f"http://host:port/v1#{SECRET}",
        "http://[::1/v1",
    ],
)
def test_an_address_that_is_none(
    kind: type[ChatGPTAdapter | ClaudeAdapter | CompatibleAdapter | GeminiAdapter], url: str
) -> None:
    """It is refused, and shown without password and query; `repr` shows it too."""
    adapter = kind(base_url=url, api_key="a-key")
    with pytest.raises(NotConfigured, match="base URL") as caught:
        adapter.check()
    assert SECRET not in f"{caught.value} {adapter!r}"
