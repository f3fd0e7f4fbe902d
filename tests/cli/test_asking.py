"""Options for conversations, schemas and tools, and `perdure.toml`, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invoking import Perdure

SCHEMA = {"type": "object", "required": ["n"]}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    """A file with a schema."""
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def test_a_schema(perdure: Perdure, schema: Path) -> None:
    """The value is in the JSON of the result, the schema in what is shown of the task."""
    done = perdure(
        *("ask", "x", "-p", "demo", "--json", "--schema", schema),
        *("--option", 'text="{\\"n\\": 1}"'),
        *("--effort", "low", "--stop", "END", "--stop", "\n"),
    )
    assert done.code == 0, done.err
    assert done.json["parsed"] == {"n": 1}
    shown = perdure("show", done.json["task_id"], "--json").json
    assert shown["definition"]["output_schema"] == SCHEMA
    assert shown["definition"]["constraints"]["stop_sequences"] == ["END", "\n"]
    assert shown["definition"]["constraints"]["reasoning_effort"] == "low"
    assert "schema" in perdure("show", done.json["task_id"]).out


def test_an_answer_that_does_not_fit(perdure: Perdure, schema: Path) -> None:
    """Says that it was handed back, then what is wrong; exit code 3."""
    done = perdure("ask", "x", "-p", "demo", "--schema", schema)
    assert done.code == 3
    assert "it is asked to correct it" in done.err
    assert "failed: OutputInvalid: the output is no JSON" in done.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ('{"type": "objekt"}', "output_schema: is no JSON schema"),
        ("[]", "output_schema: should be an object"),
        ('{"$ref": "#/$defs/nope"}', "output_schema: the reference '#/$defs/nope' leads nowhere"),
        ('{"items":' * 100 + "{}" + "}" * 100, "output_schema: is nested more than 64 levels deep"),
        ('{"items":' * 3000 + "{}" + "}" * 3000, "is nested "),  # how deep, by Python
    ],
)
def test_no_schema(perdure: Perdure, schema: Path, database: Path, text: str, says: str) -> None:
    """Is refused before anything is written, in one line."""
    schema.write_text(text)
    done = perdure("ask", "x", "-p", "demo", "--schema", schema)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert done.err.strip().count("\n") <= 1
    assert not database.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "tools: should be a list"),
        (
            '[{"name": "f", "parameters": {"type": "nope"}}]',
            "tools.0.parameters: is no JSON schema",
        ),
    ],
)
def test_no_tools(perdure: Perdure, schema: Path, text: str, says: str) -> None:
    """What a platform would refuse, or misunderstand, is refused before it is asked."""
    schema.write_text(text)
    done = perdure("ask", "x", "-p", "demo", "--tools", schema)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_rows_with_schemas_that_can_not_be(perdure: Perdure, tmp_path: Path) -> None:
    """Each row says so for itself, and the others run."""
    rows = tmp_path / "rows.jsonl"
    deep = '{"items":' * 100 + "{}" + "}" * 100
    rows.write_text(
        '{"prompt": "x"}\n'
        '{"prompt": "x", "output_schema": {"$ref": "#"}}\n'
        f'{{"prompt": "x", "output_schema": {deep}}}\n'
    )
    done = perdure("run", rows, "-p", "demo")
    assert "leads back to itself" in done.err
    assert "line 3: output_schema: is nested more than 64 levels deep" in done.err
    assert "1 completed" in done.err


def test_a_schema_that_is_not_there(perdure: Perdure, tmp_path: Path) -> None:
    """Is named."""
    done = perdure("run", "-", "-p", "demo", "--schema", tmp_path / "none.json")
    assert done.code == 2
    assert "can't read" in done.err


def test_tools(perdure: Perdure, tmp_path: Path) -> None:
    """They go along, and are shown by name."""
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"name": "look_up", "description": "Looks something up."}]))
    done = perdure("ask", "x", "-p", "demo", "--json", "--tools", tools)
    assert done.code == 0, done.err
    assert "look_up" in perdure("show", done.json["task_id"]).out


def test_a_conversation(perdure: Perdure) -> None:
    """`--continue` goes on from a task; one that isn't there is named."""
    first = perdure("ask", "one", "-p", "demo", "--json").json
    second = perdure("ask", "two", "--continue", first["task_id"], "--json")
    assert second.code == 0, second.err
    shown = perdure("show", second.json["task_id"], "--json").json
    assert [turn["content"] for turn in shown["definition"]["messages"]] == [
        "one",
        first["output"],
        "two",
    ]
    short = perdure("ask", "two", "--continue", first["task_id"][-8:], "--json")
    assert short.code == 0, short.err
    again = perdure("show", short.json["task_id"], "--json").json
    assert again["definition"]["continue_from"] == first["task_id"]
    refused = perdure("ask", "three", "--continue", "nobody")
    assert refused.code == 2
    assert "continue_from: there is no task 'nobody'" in refused.err


def test_the_defaults_of_a_batch(perdure: Perdure, schema: Path, tmp_path: Path) -> None:
    """Rows without a schema of their own get the one of the command."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"id": 1, "prompt": "a", "options": {"text": "{\\"n\\": 1}"}}\n'
        '{"id": 2, "prompt": "b", "options": {"text": "7"}, "output_schema": {"type": "integer"}}\n'
        '{"id": 3, "prompt": "c", "options": {"text": "7"}}\n'
    )
    done = perdure("run", rows, "-p", "demo", "--schema", schema, "--out", tmp_path / "out.jsonl")
    assert done.code == 3
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["status"] for row in found] == ["completed", "completed", "failed"]
    assert [row["tool_calls"] for row in found] == [[], [], []]


def test_the_file_for_settings(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default platform, and one more server, without an option or a variable."""
    config = tmp_path / "perdure.toml"
    config.write_text("platform = 'mine'\n[platforms.mine]\nkind = 'demo'\n")
    monkeypatch.setenv("PERDURE_CONFIG", str(config))
    listed = [json.loads(line) for line in perdure("platforms", "--json").lines]
    assert "mine" in {one["platform"] for one in listed}


def test_a_mistake_in_the_file_for_settings(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the file; exit code 2."""
    config = tmp_path / "perdure.toml"
    config.write_text("plattform = 'demo'\n")
    monkeypatch.setenv("PERDURE_CONFIG", str(config))
    for command in (["ask", "x"], ["platforms"], ["worker", "--until-done"]):
        done = perdure(*command)
        assert done.code == 2, done.err
        assert done.err.count("\n") == 1
        assert "plattform: there is no such setting; did you mean 'platform'?" in done.err


def test_a_label_that_is_named_redacted(perdure: Perdure) -> None:
    """It is a label, and nothing is gone."""
    asked = ("ask", "one", "-p", "demo", "--label", "redacted=no", "--system", "Be brief.")
    task_id = perdure(*asked, "--json").json["task_id"]
    known = perdure("show", task_id, "--json").json
    assert known["redacted"] is False
    assert known["definition"]["system"] == "Be brief."
    assert "redacted" not in perdure("log", task_id).out


def test_what_went_on_from_a_redacted_task_is_named(perdure: Perdure) -> None:
    """Its text is in the tasks that went on from it, too; who redacts is told."""
    first = perdure("ask", "one", "-p", "demo", "--json").json["task_id"]
    second = perdure("ask", "two", "--continue", first, "--json").json["task_id"]
    done = perdure("redact", first, "--yes")
    assert f"perdure redact {second}" in done.err
    assert "went on" not in perdure("redact", second, "--yes").err


def test_what_ran_a_redacted_task_again_is_named(perdure: Perdure) -> None:
    """Its text is in the task that it was run again as, and in the one that it ran again."""
    first = perdure("ask", "one", "-p", "demo", "--json").json["task_id"]
    second = json.loads(perdure("retry", first, "--json").lines[0])["task_id"]
    assert f"perdure redact {second}" in perdure("redact", first, "--yes").err
    third = json.loads(perdure("retry", second, "--json").lines[0])["task_id"]
    assert f"perdure redact {second}" in perdure("redact", third, "--yes").err
    assert "ran the same" not in perdure("redact", second, "--yes").err


@pytest.mark.parametrize("kind", ["chatgpt", "claude", "claude_code", "compatible", "gemini"])
def test_one_more_platform_of_a_kind(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Each of them can be had under a name of its own, with settings of its own."""
    config = tmp_path / "perdure.toml"
    config.write_text(f"[platforms.mine]\nkind = '{kind}'\ndefault_model = 'm-1'\n")
    monkeypatch.setenv("PERDURE_CONFIG", str(config))
    (mine,) = [
        known
        for line in perdure("platforms", "--json").lines
        if (known := json.loads(line))["platform"] == "mine"
    ]
    assert mine["default_model"] == "m-1"
    assert "can't be loaded" not in str(mine)


def test_settings_of_the_demonstration(
    perdure: Perdure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the file, too; a mistake in them is named with the file."""
    config = tmp_path / "perdure.toml"
    config.write_text("[platforms.mine]\nkind = 'demo'\ntext = 'as the file says'\n")
    monkeypatch.setenv("PERDURE_CONFIG", str(config))
    assert perdure("ask", "x", "-p", "mine").out == "as the file says"
    config.write_text("[platforms.demo]\ndelay = 'x'\n")
    done = perdure("ask", "x", "-p", "demo")
    assert done.code == 1
    assert "perdure.toml: demo: delay:" in done.err


@pytest.mark.parametrize("command", [["ask", "x"], ["run", "rows.jsonl"]], ids=" ".join)
def test_a_platform_without_a_key(
    perdure: Perdure,
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    """Is refused before a single task is written down, in a line that says what to set."""
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "x"}\n')
    done = perdure(*command, "-p", "claude")
    assert (done.code, done.out) == (1, "")
    assert done.err == "perdure: the platform 'claude' has no key: set ANTHROPIC_API_KEY\n"
    assert not database.exists()
    assert perdure("submit", "rows.jsonl", "-p", "claude").code == 0  # another machine may have it
