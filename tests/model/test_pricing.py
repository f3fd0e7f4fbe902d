"""Prices: known, or None; never 0 for what nobody knows."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.pricing import price
from perdure.task import Usage

AT = datetime(2026, 6, 1, tzinfo=UTC)


def cost(usage: Usage | None, model: str | None = "gpt-4o", provider: str | None = "openai"):  # noqa: ANN201
    """Return the price of one call."""
    return price(provider, model, usage, AT)


def test_known() -> None:
    """A known model has a price in dollars, and the version of the table it comes from."""
    dollars, version = cost(Usage(input_tokens=1_000_000, output_tokens=0))
    assert dollars == pytest.approx(2.5)
    assert version is not None
    assert version.startswith("genai-prices ")
    assert cost(Usage(input_tokens=0, output_tokens=1_000_000))[0] == pytest.approx(10)


def test_cached_tokens_are_cheaper() -> None:
    """What was read from a cache is part of the input and has its own price."""
    plain, _ = cost(Usage(input_tokens=1000, output_tokens=0))
    cached, _ = cost(Usage(input_tokens=1000, output_tokens=0, cache_read_tokens=800))
    assert plain is not None
    assert cached is not None
    assert 0 < cached < plain


def test_nothing_used_costs_nothing() -> None:
    """Tokens that are known to be 0 cost 0: that is knowledge."""
    assert cost(Usage(input_tokens=0, output_tokens=0))[0] == 0


@pytest.mark.parametrize(
    ("provider", "model", "usage"),
    [
        ("openai", "no-such-model-1", Usage(input_tokens=5, output_tokens=5)),
        ("no-such-provider", "gpt-4o", Usage(input_tokens=5, output_tokens=5)),
        ("openai", "", Usage(input_tokens=5, output_tokens=5)),
        ("openai", None, Usage(input_tokens=5, output_tokens=5)),
        (None, "gpt-4o", Usage(input_tokens=5, output_tokens=5)),
        ("openai", "gpt-4o", None),
        ("openai", "gpt-4o", Usage()),
        ("openai", "gpt-4o", Usage(cache_read_tokens=5)),
        ("openai", "gpt-4o", Usage(input_tokens=5)),
        ("openai", "gpt-4o", Usage(output_tokens=5)),
        ("openai", "gpt-4o", Usage(input_tokens=1, output_tokens=1, cache_read_tokens=50)),
    ],
)
def test_unknown(provider: str | None, model: str | None, usage: Usage | None) -> None:
    """Whatever isn't known makes the price None, and the version with it."""
    assert price(provider, model, usage, AT) == (None, None)


@given(
    st.sampled_from(["openai", "anthropic", "google", "nobody"]),
    st.sampled_from(["gpt-4o", "claude-sonnet-4-5", "gemini-2.5-pro", "x"]) | st.text(max_size=9),
    st.builds(
        Usage,
        **{
            name: st.none() | st.integers(-5, 10**12)
            for name in Usage.model_fields
            if name != "raw"
        },
    ),
)
def test_whatever_a_platform_reports(provider: str, model: str, usage: Usage) -> None:
    """Absurd counts and names never fail an attempt: there is a price, or None."""
    dollars, version = price(provider, model, usage, AT)
    assert (dollars is None) == (version is None)
