"""Which platforms there are: the entry-point group `perdure.platforms`, imported only when used."""

from __future__ import annotations

import asyncio
import difflib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from perdure.adapter import Adapter
from perdure.errors import NotConfigured, PlatformError, UnknownPlatform

__all__ = ["GROUP", "Platforms"]

GROUP = "perdure.platforms"
CLOSING_SECONDS: Final = 10.0

_log: Final = logging.getLogger("perdure")


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
        for name, adapter in self._made.items():
            try:
                async with asyncio.timeout(CLOSING_SECONDS):
                    await adapter.close()
            except Exception as error:  # noqa: BLE001 - the rest is to be closed too
                _log.warning("the platform %r could not be closed: %r", name, error)


def _make(found: EntryPoint) -> Adapter:
    try:
        factory: Any = found.load()
        adapter: Adapter = factory()
    except PlatformError:
        raise
    except Exception as error:  # whatever is wrong with one platform, the others go on
        what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise NotConfigured(f"the platform {found.name!r} can't be loaded: {what}") from error
    return adapter
