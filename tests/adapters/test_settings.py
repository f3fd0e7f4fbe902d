"""Settings of platforms: argument before environment before `perdure.toml`."""

from __future__ import annotations

from typing import Any

import pytest

from perdure import NotConfigured
from perdure_adapters import ClaudeAdapter, CompatibleAdapter
from perdure_adapters._settings import Settings

KNOWN = ("api_key", "base_url", "background", "read_timeout", "api")


def settings(**given: Any) -> Settings:
    """Return the settings of a platform."""
    return Settings("claude", given, KNOWN)


def test_which_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument, else the first variable that is set, else the file; blank is nothing."""
    told = settings(base_url=" http://file ")
    assert told.text("base_url", None, "A_URL", "B_URL") == "http://file"
    monkeypatch.setenv("B_URL", "http://b")
    assert told.text("base_url", None, "A_URL", "B_URL") == "http://b"
    monkeypatch.setenv("A_URL", "http://a\n")
    assert told.text("base_url", None, "A_URL", "B_URL") == "http://a"
    assert told.text("base_url", "http://argument", "A_URL") == "http://argument"
    assert told.text("base_url", " ", "A_URL") == "http://a"
    assert told.text("api_key", None) is None


def test_other_kinds() -> None:
    """Numbers, flags and choices have defaults."""
    told = settings(read_timeout=5, background=False, api="chat")
    assert told.number("read_timeout", None, 300) == 5
    assert told.number("read_timeout", 7, 300) == 7
    assert settings().number("read_timeout", None, 300) == 300
    assert told.flag("background", None, default=True) is False
    assert settings().flag("background", None, default=True) is True
    assert told.choice("api", None, ("responses", "chat")) == "chat"
    assert settings().choice("api", None, ("responses", "chat")) == "responses"


def ask_all(given: dict[str, Any]) -> None:
    """Ask for each setting once."""
    told = settings(**given)
    told.text("base_url", None)
    told.number("read_timeout", None, 300)
    told.flag("background", None, default=True)
    told.choice("api", None, ("responses", "chat"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"api_kee": "x"}, "api_kee: there is no such setting; did you mean 'api_key'?"),
        ({"zzz": 1}, "zzz: there is no such setting; there are: api, api_key"),
        ({"base_url": 7}, "base_url: must be text"),
        ({"read_timeout": "5"}, "read_timeout: must be a number above 0"),
        ({"read_timeout": -1}, "read_timeout: must be a number above 0"),
        ({"read_timeout": True}, "read_timeout: must be a number above 0"),
        ({"background": "no"}, "background: must be true or false"),
        ({"api": "soap"}, "api: must be one of chat, responses"),
    ],
)
def test_mistakes(given: dict[str, Any], says: str) -> None:
    """They are named, with the platform, and disable that platform only."""
    with pytest.raises(NotConfigured) as caught:
        ask_all(given)
    assert says in str(caught.value)
    assert str(caught.value).startswith("the platform 'claude': ")


@pytest.mark.parametrize("adapter", [ClaudeAdapter, CompatibleAdapter])
def test_no_key_goes_where_a_file_says(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that came with somebody's project can't have the environment's keys sent to it."""
    for variable in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(variable, "sk-environment")
    monkeypatch.setenv("PERDURE_COMPATIBLE_API_KEY", "sk-environment")
    for variable in ("ANTHROPIC_BASE_URL", "OPENAI_BASE_URL", "PERDURE_COMPATIBLE_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    elsewhere = {"base_url": "http://elsewhere.example/v1"}
    assert adapter(settings=elsewhere)._endpoint.key is None
    assert adapter(settings={**elsewhere, "api_key": "sk-file"})._endpoint.key == "sk-file"
    assert adapter(settings=elsewhere, api_key="sk-mine")._endpoint.key == "sk-mine"
    own = "http://own.example/v1"
    assert adapter(settings=elsewhere, base_url=own)._endpoint.key == "sk-environment"
