"""The models that are asked where neither a task nor a setting names one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["DEFAULT_MODELS"]

DEFAULT_MODELS: Final[Mapping[str, str]] = {
    "chatgpt": "gpt-6.2-sol",
    "claude": "claude-sonnet-5-5",
    "gemini": "gemini-3.8-flash",
}
