"""`perdure.toml`: where it is looked for, what it may say, and what is said of mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure import Engine, InvalidConfig
from perdure.config import load_config, parse_config
from perdure.platforms import Platforms
from perdure.store.readonly import default_database


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PERDURE_CONFIG", raising=False)
    monkeypatch.delenv("PERDURE_DB", raising=False)


def test_nothing_is_needed() -> None:
    """Without any file everything has its default."""
    config = load_config()
    assert (config.path, config.database, config.platform, config.platforms) == (
        None,
        None,
        None,
        {},
    )


def test_the_first_of_three_places_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The named file before the one here, and that before the user's own."""
    own = tmp_path / "config" / "perdure" / "perdure.toml"
    own.parent.mkdir(parents=True)
    own.write_text('platform = "own"')
    monkeypatch.setattr("platformdirs.user_config_path", lambda *_a, **_k: own.parent)
    assert load_config().platform == "own"
    Path("perdure.toml").write_text('platform = "here"')
    assert load_config().platform == "here"
    Path("other.toml").write_text('platform = "named"')
    monkeypatch.setenv("PERDURE_CONFIG", "other.toml")
    assert load_config().platform == "named"
    monkeypatch.setenv("PERDURE_CONFIG", "")
    assert load_config().path is None


def test_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path begins at the file; `PERDURE_DB` comes before it."""
    Path("perdure.toml").write_text('database = "log/tasks.db"')
    monkeypatch.chdir("/")
    monkeypatch.setenv("PERDURE_CONFIG", str(tmp_path / "perdure.toml"))
    assert default_database() == str(tmp_path / "log" / "tasks.db")
    monkeypatch.setenv("PERDURE_DB", "mine.db")
    assert default_database() == "mine.db"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("platform =", "is no TOML"),
        ("datbase = 'x'", "datbase: there is no such setting; did you mean 'database'?"),
        ("zebra = 1", "there are: database, platform, platforms"),
        ("database = 7", "database: must be text"),
        ("platform = ' '", "platform: must be text"),
        ("platforms = 'claude'", "write a table for each"),
        ("platforms.claude = 'x'", "write a table for each"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    """Each is one line that names the file."""
    with pytest.raises(InvalidConfig) as caught:
        parse_config(text, Path("perdure.toml"))
    assert says in str(caught.value)
    assert str(caught.value).startswith("perdure.toml")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that was named and isn't there, or is no text, is an error, not an empty one."""
    monkeypatch.setenv("PERDURE_CONFIG", "missing.toml")
    with pytest.raises(InvalidConfig, match=r"can't read missing\.toml: No such file"):
        load_config()
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    monkeypatch.setenv("PERDURE_CONFIG", "bytes.toml")
    with pytest.raises(InvalidConfig, match="no UTF-8"):
        load_config()


def test_keys_are_not_shown() -> None:
    """What the file says of platforms may be secret."""
    assert "sk-1" not in repr(parse_config("platforms.claude.api_key = 'sk-1'", Path("x")))


def test_one_more_server_of_a_kind() -> None:
    """A name of one's own stands for a platform of the kind that is given."""
    config = parse_config(
        "[platforms.lab]\nkind = 'compatible'\nbase_url = 'http://lab:8000/v1'", Path("x")
    )
    platforms = Platforms(settings=config.platforms)
    assert {"lab", "compatible", "demo"} <= set(platforms.names)
    lab = platforms.get("lab")
    assert lab.platform == "lab"
    assert "http://lab:8000/v1" in repr(lab)


def test_no_such_kind() -> None:
    """A table for a platform that isn't there is an error that says which there are."""
    with pytest.raises(InvalidConfig, match=r"platforms\.lab: .* kind 'lab'; there are: .*demo"):
        Platforms(settings={"lab": {"base_url": "x"}})


def test_an_engine_uses_it(tmp_path: Path) -> None:
    """The default platform and the settings hold for engines that were told nothing else."""
    Path("perdure.toml").write_text("platform = 'lab'\nplatforms.lab.kind = 'demo'")
    engine = Engine.open(tmp_path / "a.db")
    assert "lab" in engine.platforms.names
    engine = Engine.open(tmp_path / "a.db", adapters=[])
    assert engine.platforms.names == ()
