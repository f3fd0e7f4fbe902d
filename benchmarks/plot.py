"""Horizontal bars as SVG: the median, and a line from the lowest to the highest round.

Written by hand, since that is all we draw: a plotting library would make files twenty times as
large that differ from run to run. Readable on light and on dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

__all__ = ["bars"]

Bar = tuple[str, float, float, float, str]
"""Name, lowest, median, highest, and the median as it is written."""

_NAMES: Final = 250
_LENGTH: Final = 380
_VALUES: Final = 70
_STEP: Final = 26
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#57606a}.t{font-weight:600}"
    ".o{fill:#2f81f7}.r{fill:#8c959f}line{stroke:#57606a}"
    "@media(prefers-color-scheme:dark){text{fill:#adbac7}line{stroke:#adbac7}}"
)


def bars(title: str, measured: Sequence[Bar]) -> str:
    """Return a plot; bars whose name begins with `bare` or is another library's are grey."""
    width, height = _NAMES + _LENGTH + _VALUES, 30 + _STEP * len(measured)
    longest = max(max(high, 1e-9) for _name, _low, _median, high, _text in measured)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="t" x="4" y="16">{escape(title)}</text>',
    ]
    for index, (name, low, median, high, text) in enumerate(measured):
        top = 28 + index * _STEP
        middle = top + 9
        scale = _LENGTH / longest
        kind = "o" if index == 0 or name.startswith("perdure") else "r"
        parts += [
            f'<text x="{_NAMES - 8}" y="{top + 13}" text-anchor="end">{escape(name)}</text>',
            (
                f'<rect class="{kind}" x="{_NAMES}" y="{top}" width="{median * scale:.1f}" '
                f'height="18" rx="2"/>'
            ),
            (
                f'<line x1="{_NAMES + low * scale:.1f}" x2="{_NAMES + high * scale:.1f}" '
                f'y1="{middle}" y2="{middle}"/>'
            ),
            f'<text x="{_NAMES + high * scale + 6:.1f}" y="{top + 13}">{escape(text)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])
