"""Which platforms there are: the entry-point group `perdure.platforms`, imported only when used."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from perdure.adapter import Adapter
from perdure.errors import NotConfigured, UnknownPlatform

__all__ = ["GROUP", "Platforms"]

GROUP = "perdure.platforms"


class Platforms:
    """The adapters of one engine, by the platform's name; made when first asked for.

    Args:
        adapters: Exactly these; None takes what is installed.
    """

    def __init__(self, adapters: Sequence[Adapter] | None = None) -> None:
        self._made: dict[str, Adapter] = {}
        self._found: Mapping[str, EntryPoint] = {}
        if adapters is None:
            self._found = {found.name: found for found in entry_points(group=GROUP)}
        else:
            self._made = {adapter.platform: adapter for adapter in adapters}

    @property
    def names(self) -> tuple[str, ...]:
        """The platforms' names; none of them need be usable."""
        return tuple(sorted({*self._made, *self._found}))

    @property
    def made(self) -> Mapping[str, Adapter]:
        """The adapters made so far."""
        return self._made

    def check(self, name: str) -> None:
        """Raise `UnknownPlatform` unless there is a platform of that name."""
        if name in self._made or name in self._found:
            return
        near = difflib.get_close_matches(name, self.names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(self.names)}"
        raise UnknownPlatform(f"there is no platform {name!r}{hint}")

    def get(self, name: str) -> Adapter:
        """Return the adapter of that name.

        Raises:
            UnknownPlatform: There is none.
            NotConfigured: It can't be used on this machine; the message says what is missing.
        """
        self.check(name)
        adapter = self._made.get(name)
        if adapter is None:
            adapter = self._made[name] = _make(self._found[name])
        return adapter

    async def close(self) -> None:
        """Close the adapters that were made."""
        for adapter in self._made.values():
            await adapter.close()


def _make(found: EntryPoint) -> Adapter:
    try:
        factory: Any = found.load()
    except ImportError as error:
        raise NotConfigured(f"the platform {found.name!r} can't be loaded: {error}") from error
    adapter: Adapter = factory()
    return adapter
