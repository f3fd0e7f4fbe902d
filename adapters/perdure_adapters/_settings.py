"""What an adapter was told: by argument, else by the environment, else by `perdure.toml`."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from perdure.errors import NotConfigured

__all__ = ["Settings"]


class Settings:
    """The settings of one platform.

    Args:
        platform: Its name, for messages.
        settings: Its table in `perdure.toml`; None where there is none.
        known: The names it may hold.

    Raises:
        NotConfigured: The table holds another name.
    """

    def __init__(
        self, platform: str, settings: Mapping[str, Any] | None, known: Collection[str]
    ) -> None:
        self._platform = platform
        self._settings = settings or {}
        for name in self._settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {_listed(known)}"
                self._refuse(name, f"there is no such setting; {hint}")

    def text(self, name: str, argument: str | None, *variables: str) -> str | None:
        """Return a text that isn't blank, without space around it; None where nobody gave one.

        Args:
            name: The setting's name in `perdure.toml`.
            argument: What the caller gave.
            variables: Names in the environment, the first that is set counts.
        """
        for given in (argument, *map(os.environ.get, variables)):
            if given is not None and given.strip():
                return given.strip()
        given = self._settings.get(name)
        if given is None:
            return None
        if not isinstance(given, str):
            self._refuse(name, "must be text")
        return given.strip() or None

    def file_names_address(self, argument: str | None, *variables: str) -> bool:
        """Return whether the `base_url` that counts is the one in `perdure.toml`.

        A key of the environment must not go there: the file may have come with somebody else's
        project. It gets a key that the caller or the file itself gives, or none.
        """
        given = (argument, *map(os.environ.get, variables))
        return "base_url" in self._settings and not any(one and one.strip() for one in given)

    def number(self, name: str, argument: float | None, default: float) -> float:
        """Return a number above 0, such as seconds."""
        given: object = argument if argument is not None else self._settings.get(name, default)
        if (
            isinstance(given, bool)
            or not isinstance(given, (int, float))
            or not math.isfinite(given)
            or given <= 0
        ):
            self._refuse(name, "must be a number above 0")
        return float(given)

    def flag(self, name: str, argument: bool | None, default: bool) -> bool:
        """Return yes or no."""
        given: object = argument if argument is not None else self._settings.get(name, default)
        if not isinstance(given, bool):
            self._refuse(name, "must be true or false")
        return given

    def choice(self, name: str, argument: str | None, choices: tuple[str, ...]) -> str:
        """Return one of ``choices``, the first where nobody chose."""
        given = self.text(name, argument) or choices[0]
        if given not in choices:
            self._refuse(name, f"must be one of {_listed(choices)}")
        return given

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise NotConfigured(f"the platform {self._platform!r}: {name}: {why}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
