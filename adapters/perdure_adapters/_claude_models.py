"""What Claude's models take and refuse, by their names: the one place that knows.

`/v1/messages` wants a limit of tokens with every call, and has changed what it accepts from one
generation to the next. A name that tells no generation is taken for one of the newest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["ClaudeModel", "claude_model"]


@dataclass(frozen=True, slots=True)
class ClaudeModel:
    """What one model takes.

    Attributes:
        max_tokens: Tokens that are asked for where a task sets no limit: what the model can surely
            produce, and enough for an answer with its reasoning.
        temperature: Whether it takes a temperature; if not, asking for one is a 400.
        prefill: Whether it goes on with an answer that is handed back unfinished; if not, that
            is a 400.
        thinking: How it is told to reason: `adaptive`, by effort; `budget`, by tokens; `none`.
    """

    max_tokens: int
    temperature: bool
    prefill: bool
    thinking: Literal["adaptive", "budget", "none"]


# From which generation on; the first that fits, from the newest down.
_GENERATIONS: Final = (
    ((4, 7), ClaudeModel(64_000, temperature=False, prefill=False, thinking="adaptive")),
    ((4, 6), ClaudeModel(64_000, temperature=True, prefill=False, thinking="adaptive")),
    ((3, 7), ClaudeModel(32_000, temperature=True, prefill=True, thinking="budget")),
    ((3, 5), ClaudeModel(8_192, temperature=True, prefill=True, thinking="none")),
    ((0, 0), ClaudeModel(4_096, temperature=True, prefill=True, thinking="none")),
)
# Other makers' models behind the same API keep to what it has always been.
_OTHERS: Final = ClaudeModel(8_192, temperature=True, prefill=False, thinking="budget")

# claude-opus-4-5-20251101, claude-3-5-haiku-latest, claude-4.7-opus, claude-2.1, also within
# longer names such as those of Bedrock and Vertex.
_NAME: Final = re.compile(r"claude-(?:[a-z]+-)?(\d{1,2})(?!\d)(?:[-.](\d{1,2})(?!\d))?")


def claude_model(name: str) -> ClaudeModel:
    """Return what the model of that name takes."""
    name = name.lower()
    if "claude" not in name:
        return _OTHERS
    found = _NAME.search(name)
    if found is None:
        return _GENERATIONS[0][1]
    generation = int(found[1]), int(found[2] or 0)
    return next(model for since, model in _GENERATIONS if generation >= since)
