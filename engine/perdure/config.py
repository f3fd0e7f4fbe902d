"""`perdure.toml`: what holds for a project or a user, where nothing more specific was said.

The first of these that is there counts: the file that `PERDURE_CONFIG` names, `perdure.toml` in the
current directory, `perdure.toml` in the user's configuration directory. An argument beats the
environment, and the environment beats the file::

    database = "tasks.db"         # as PERDURE_DB; relative to the file
    platform = "claude"           # for tasks that name none

    [platforms.claude]
    default_model = "claude-haiku-5-5"

    [platforms.lab]               # one more server of a kind there is
    kind = "compatible"
    base_url = "http://lab:8000/v1"

Only the standard library is needed to read it: it is on the way of every command.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

from perdure.errors import InvalidConfig
from perdure.namedfile import read_file

__all__ = ["Config", "load_config", "parse_config"]

NAME: Final = "perdure.toml"
MOST_BYTES: Final = 2**20
_FIELDS: Final = ("database", "platform", "platforms")


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says.

    Attributes:
        path: The file; None where there is none.
        database: The database to use.
        platform: The platform of tasks that name none.
        platforms: Platform -> its settings, each to be checked by its adapter.
    """

    path: Path | None = None
    database: str | None = None
    platform: str | None = None
    # It may hold keys, which don't belong into logs.
    platforms: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict[str, Mapping[str, Any]], repr=False
    )


def load_config() -> Config:
    """Return what `perdure.toml` says; an empty `Config` where there is none.

    Raises:
        InvalidConfig: It can't be read, or says what perdure doesn't know.
    """
    path = _find()
    if path is None:
        return Config()
    try:
        # An empty device is an empty configuration, and a pipe is one as well.
        text = read_file(path, MOST_BYTES, regular=False).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InvalidConfig(f"can't read {path}: {what}") from None
    return parse_config(text, path)


def parse_config(text: str, path: Path) -> Config:
    """Return what the text of a configuration file says.

    Args:
        text: TOML.
        path: Where it comes from; a relative database path begins there.

    Raises:
        InvalidConfig: It can't be read, or says what perdure doesn't know.
    """
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidConfig(f"{path} is no TOML: {error}") from None
    for name in given:
        if name not in _FIELDS:
            raise InvalidConfig(f"{path}: {name}: there is no such setting{_near(name)}")
    platforms = given.get("platforms", {})
    if not isinstance(platforms, dict) or not all(
        isinstance(settings, dict) for settings in cast("dict[str, object]", platforms).values()
    ):
        raise InvalidConfig(f"{path}: platforms: write a table for each, as in [platforms.claude]")
    database = _text(given, "database", path)
    if database is not None and "://" not in database:
        database = str(path.parent / Path(database).expanduser())
    return Config(
        path,
        database,
        _text(given, "platform", path),
        cast("dict[str, Mapping[str, Any]]", platforms),
    )


def _near(name: str) -> str:
    import difflib  # only a mistake needs it

    near = difflib.get_close_matches(name, _FIELDS, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(_FIELDS)}"


def _text(given: Mapping[str, object], name: str, path: Path) -> str | None:
    value = given.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise InvalidConfig(f"{path}: {name}: must be text")
    return value


def _find() -> Path | None:
    named = os.environ.get("PERDURE_CONFIG")
    if named is not None:
        return Path(named).expanduser() if named else None  # empty: no file at all
    here = Path(NAME)
    if os.path.isfile(here):  # noqa: PTH113 - False, not an error, where nobody may look
        return here.absolute()
    from platformdirs import user_config_path

    own = user_config_path("perdure", appauthor=False) / NAME
    return own if os.path.isfile(own) else None  # noqa: PTH113 - as above
