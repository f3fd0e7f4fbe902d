"""Which platforms there are: the entry-point group `perdure.platforms`, imported only when used."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Self, cast

from perdure.adapter import Adapter
from perdure.config import load_config
from perdure.containment import contained, described
from perdure.errors import (
    InvalidConfig,
    NotConfigured,
    PerdureError,
    PlatformError,
    UnknownPlatform,
)
from perdure.text import check_text

__all__ = ["GROUP", "Platforms", "check_adapters"]

GROUP = "perdure.platforms"
CLOSING_SECONDS: Final = 10.0

_log: Final = logging.getLogger("perdure")


class Platforms:
    """The adapters of one engine, by the platform's name; made when first asked for.

    Args:
        adapters: Exactly these; None takes what is installed.
        settings: What `perdure.toml` says of platforms, by name. A name that isn't installed
            stands for one more platform of the `kind` that its settings give.

    Raises:
        InvalidConfig: Settings are for no platform there is.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._settings: dict[str, Mapping[str, Any]] = dict(settings or {})
        self._made: dict[str, Adapter] = {}
        self._odd: set[str] = set()
        self._found: Mapping[str, EntryPoint] = {}
        if adapters is None:
            found = {found.name: found for found in entry_points(group=GROUP)}
            self._found = found | {
                name: _kind(name, given, found)
                for name, given in self._settings.items()
                if "kind" in given or name not in found
            }
        else:
            self._made = {adapter.platform: adapter for adapter in adapters}

    @classmethod
    def configured(cls) -> Self:
        """Return what is installed, with the settings of `perdure.toml`.

        Raises:
            InvalidConfig: `perdure.toml` can't be read, or is for no platform there is.
        """
        return cls(settings=load_config().platforms)

    @property
    def names(self) -> tuple[str, ...]:
        """The platforms' names; none of them need be usable."""
        return tuple(sorted({*self._made, *self._found}))

    @property
    def made(self) -> Mapping[str, Adapter]:
        """The adapters made so far."""
        return self._made

    def default_models(self) -> dict[str, str | None]:
        """Return the model of each adapter made so far that is used where a task names none.

        It may have changed since the adapter was made. One that can't be written down is left to
        the adapter, and named once in the program's log.
        """
        models: dict[str, str | None] = {}
        for name, adapter in self._made.items():
            models[name] = None
            try:
                models[name] = _default_model(adapter)
            except ValueError as error:
                if name not in self._odd:
                    self._odd.add(name)
                    _log.error("the platform %r: %s", name, error)
        return models

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
            adapter = _make(name, self._found[name], self._settings.get(name))
            self._made[name] = adapter
        return adapter

    def problem(self, name: str) -> str | None:
        """Return why a platform can't be used on this machine; None where it can."""
        try:
            check: Any = getattr(self.get(name), "check", None)  # others' adapters need have none
            if check is not None:
                check()
        except PerdureError as error:
            return str(error)
        return None

    async def stop(self, name: str, response_id: str) -> None:
        """Stop a response that goes on at a platform without us, as well as that can be done."""

        async def stop() -> None:
            await self.get(name).stop(response_id)

        error = await contained(stop, CLOSING_SECONDS)
        if error is not None:  # the task has ended all the same
            _log.warning("%s: %r could not be stopped: %s", name, response_id, described(error))

    async def close(self) -> None:
        """Close the adapters that were made."""
        for name, adapter in self._made.items():
            error = await contained(partial(_close, adapter), CLOSING_SECONDS)
            if error is not None:  # the rest is to be closed too
                _log.warning("the platform %r could not be closed: %s", name, described(error))


def check_adapters(given: object) -> None:
    """Raise unless these can be the adapters of an engine.

    Raises:
        InvalidConfig: They are no sequence of adapters, two of them are for one platform, or one
            has a default model that can't be written down.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise InvalidConfig("adapters: give a list of adapters, as in [ClaudeAdapter()]")
    taken: set[str] = set()
    for adapter in cast("Sequence[object]", given):
        if isinstance(adapter, type):
            raise InvalidConfig(
                f"adapters: {adapter.__name__} is a class: give an instance, {adapter.__name__}()"
            )
        if not isinstance(adapter, Adapter):
            raise InvalidConfig(
                f"adapters: {adapter!r:.80} is no adapter: give instances, as in [ClaudeAdapter()]"
            )
        if adapter.platform in taken:
            raise InvalidConfig(
                f"adapters: two of them are for the platform {adapter.platform!r}: name one of "
                "them otherwise by its argument `platform`"
            )
        try:
            _default_model(adapter)
        except ValueError as error:
            raise InvalidConfig(f"adapters: the platform {adapter.platform!r}: {error}") from None
        taken.add(adapter.platform)


async def _close(adapter: Adapter) -> None:
    await adapter.close()


def _default_model(adapter: Adapter) -> str | None:
    """Return the model that is used where a task names none.

    Raises:
        ValueError: It is no text, or none that can be stored.
    """
    try:
        model: Any = adapter.default_model
    except Exception as error:  # noqa: BLE001 - it may be a property of somebody else's
        raise ValueError(f"its default_model can't be had: {described(error)}") from None
    if model is None:
        return None
    if not isinstance(model, str):
        kind = type(model).__name__
        raise ValueError(  # noqa: TRY004 - whatever is wrong, it is said alike
            f"its default_model is a {kind}: give the model's name, or None"
        )
    try:
        return check_text(str.__str__(model))  # not that of an enum, which is another
    except ValueError as error:
        raise ValueError(f"its default_model {error}") from None


def _kind(name: str, settings: Mapping[str, Any], found: Mapping[str, EntryPoint]) -> EntryPoint:
    kind = settings.get("kind", name)
    if kind not in found:
        raise InvalidConfig(
            f"perdure.toml: platforms.{name}: there is no platform of the kind {kind!r}; "
            f"there are: {', '.join(sorted(found))}"
        )
    return found[kind]


def _make(name: str, found: EntryPoint, settings: Mapping[str, Any] | None) -> Adapter:
    given: dict[str, Any] = {}
    if settings is not None:
        given["settings"] = {key: value for key, value in settings.items() if key != "kind"}
    if name != found.name:
        given["platform"] = name
    try:
        factory: Any = found.load()
        adapter: Adapter = factory(**given)
        _default_model(adapter)
    except (PlatformError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever is wrong with one platform, the others go on
        what = str(error) if isinstance(error, ImportError) else described(error)
        raise NotConfigured(f"the platform {name!r} can't be loaded: {what}") from error
    return adapter
