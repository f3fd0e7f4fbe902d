"""What an attempt costs, by the price table of `genai-prices`, at the time of the call."""

from __future__ import annotations

from datetime import datetime
from functools import cache

from perdure.task import Usage

__all__ = ["price"]


def price(
    provider: str | None, model: str | None, usage: Usage | None, at: datetime
) -> tuple[float | None, str | None]:
    """Return US dollars and the version of the price table; None and None where unknown.

    Args:
        provider: The provider's name in the price table.
        model: The model really used.
        usage: Tokens; unless both input and output are known there is no price.
        at: When the call was made; prices change.
    """
    if provider is None or model is None or usage is None:
        return None, None
    if usage.input_tokens is None or usage.output_tokens is None:
        return None, None
    # Imported here: it takes a third of a second, and not every platform has prices.
    from genai_prices import Usage as PricedUsage
    from genai_prices import calc_price

    try:
        found = calc_price(
            PricedUsage(
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                cache_read_tokens=usage.cache_read_tokens,
                cache_write_tokens=usage.cache_write_tokens,
            ),
            model_ref=model,
            provider_id=provider,
            genai_request_timestamp=at,
        )
    except (LookupError, ValueError):  # not in the table, or counts that contradict each other
        return None, None
    return float(found.total_price), _table()


@cache
def _table() -> str:
    from importlib.metadata import version

    return f"genai-prices {version('genai-prices')}"
