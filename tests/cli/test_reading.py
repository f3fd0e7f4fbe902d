"""`perdure show`, `log` and `output`, and how ids are given."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from invoking import Perdure
from stories import (
    ESCAPES,
    FIVE,
    FOUR,
    NOON,
    ONE,
    THREE,
    TWO,
    USAGE,
    OnTerminal,
    cancel,
    complete,
    fail,
    five_tasks,
    retry_later,
    running,
    submit,
    tell,
)

from perdure.cli.records import event_rows
from perdure.events import Chunk, Completed
from perdure.store.database import Database
from perdure.store.readonly import Reader
from perdure.store.redaction import redact
from perdure.store.transaction import FoldCache, Transaction


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Five tasks, one of each status, the second run again as the fourth."""
    database.write_bytes(migrated_file.read_bytes())
    five_tasks(database)
    return database


def redact_content(path: Path, task_id: str) -> None:
    """Remove a task's content as `perdure redact` does."""
    writer = Database(path).writer()
    with writer.transaction() as connection:
        transaction = Transaction(connection, FoldCache(), lambda: NOON)
        redact(transaction, task_id, "me", None)
        transaction.flush()
    writer.close()


def test_more_events_than_a_page(
    story: Path, perdure: Perdure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, each comes once and in order."""
    whole = perdure("log", ONE).lines
    monkeypatch.setattr("perdure.cli.paging.PAGE_ROWS", 2)
    assert perdure("log", ONE).lines == whole
    assert len(whole) > 2


def test_whoever_is_slow_to_read_holds_nothing_back(story: Path) -> None:
    """A pager that waits for its user keeps no other process from its checkpoints."""
    with Reader.open(str(story)) as reader:
        events = event_rows(reader, ONE)
        assert next(events)["version"] == 1
        with contextlib.closing(sqlite3.connect(story, timeout=0.2, isolation_level=None)) as other:
            other.execute("CREATE TABLE of_somebody_else (a)")
            busy, frames, _ = other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert (busy, frames) == (0, 0)
        assert next(events)["version"] == 2


class TestIds:
    """Ids given in part, as git takes them."""

    @pytest.mark.parametrize(
        "given",
        [
            ONE,
            "demo_20261120_aaaa1",
            "aaaa1111",
            "aaaa1",
            "20261120_aaaa1111",
        ],
    )
    def test_found(self, story: Path, perdure: Perdure, given: str) -> None:
        """The whole id, its beginning, its last part, the beginning of that, several last parts."""
        assert perdure("output", given).out == "A log is a ledger."

    @pytest.mark.parametrize("given", ["demo", "demo_20261120", "aaaa"])
    def test_ambiguous(self, story: Path, perdure: Perdure, given: str) -> None:
        """What several tasks answer to is refused in a line that names them."""
        ended = perdure("output", given)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err.count("\n") == 1
        assert ONE in ended.err
        assert TWO in ended.err

    def test_many_candidates(self, story: Path, perdure: Perdure) -> None:
        """Of many candidates some are named."""
        for n in range(9):
            submit(story, f"many_20261120_{n}{n}{n}{n}0000", "x")
        ended = perdure("show", "many")
        assert ended.err.count("many_2026") == 5
        assert "and more" in ended.err

    @pytest.mark.parametrize("given", ["nothing", "", "_", "%", "AAAA1111", "a' OR 1=1 --"])
    def test_unknown(self, story: Path, perdure: Perdure, given: str) -> None:
        """What no task answers to is one line that says where to look."""
        ended = perdure("output", given)
        assert (ended.code, ended.out) == (1, "")
        assert ended.err.count("\n") == 1
        assert "perdure list" in ended.err

    def test_whole_id_wins(self, story: Path, perdure: Perdure) -> None:
        """An id that is the beginning of another one means itself."""
        submit(story, "task", "short")
        submit(story, "task_2", "long")
        assert json.loads(perdure("show", "task", "--json").out)["prompt"] == "short"


class TestShow:
    """`perdure show`."""

    def test_everything(self, story: Path, perdure: Perdure) -> None:
        """Status, times, attempts, usage, cost, labels, prompt and output are there."""
        shown = perdure("show", ONE).out
        for part in (ONE, "completed", "demo-1", "waited 1.0 s", "ran 2.0 s", "team=red", "b1"):
            assert part in shown
        for part in ("10 tokens in", "20 out", "$0.25", "What is a log?", "A log is a ledger."):
            assert part in shown

    def test_definition(self, story: Path, perdure: Perdure) -> None:
        """What was asked for is there as it was submitted, long shared texts in their place."""
        system = "Be brief. " * 1000
        submit(
            story,
            "demo_1",
            "Well?",
            system=system,
            context={"manual": "page one"},
            constraints={"max_tokens": 7},
            parents=(ONE, THREE),
            options={"words": 3},
            priority=2,
            fallbacks=("other",),
        )
        shown = perdure("show", "demo_1", "--full").out
        assert system in shown
        for part in ("max_tokens=7", "page one", f"{ONE}, {THREE}", "words=3", "demo, then other"):
            assert part in shown
        known = perdure("show", "demo_1", "--json").json
        assert known["definition"]["system"] == system
        assert known["definition"]["parents"] == [ONE, THREE]
        assert known["definition"]["platforms"] == ["demo", "other"]

    def test_conversation(self, story: Path, perdure: Perdure) -> None:
        """Of a conversation the earlier turns are shown too."""
        turns = [("user", "first"), ("assistant", "second"), ("user", "third")]
        messages = [{"role": role, "content": content} for role, content in turns]
        submit(story, "demo_1", "", messages=messages)
        shown = perdure("show", "demo_1").out
        assert shown.index("first") < shown.index("second") < shown.index("third")

    def test_error_and_retries(self, story: Path, perdure: Perdure) -> None:
        """A failed task shows its error and partial output; retries are linked both ways."""
        shown = perdure("show", TWO).out
        for part in ("Overloaded: overloaded, try later", f"as {FOUR}", "half an ans"):
            assert part in shown
        assert f"of {TWO}" in perdure("show", FOUR).out

    def test_attempts(self, story: Path, perdure: Perdure) -> None:
        """Each attempt has a line, with how it ended."""
        tell(story, FOUR, running(), retry_later())
        tell(story, FOUR, running(2, model="demo-2"), at=NOON + timedelta(minutes=1))
        shown = perdure("show", FOUR).out
        assert "attempt_failed, Overloaded: try again" in shown
        assert "2 on demo (demo-2)" in shown
        assert "under way" in shown
        runs = perdure("show", FOUR, "--json").json["runs"]
        assert [run["outcome"] for run in runs] == ["attempt_failed", "running"]

    def test_output_so_far(self, story: Path, perdure: Perdure) -> None:
        """A running task shows what it has written so far."""
        assert "output so far\nso far\n" in perdure("show", FIVE).out
        assert perdure("show", FIVE, "--json").json["partial_output"] == "so far"

    def test_long_texts(self, story: Path, perdure: Perdure) -> None:
        """Long texts are shortened, with what is missing, unless --full asks for them."""
        submit(story, "demo_1", "x" * 5000)
        submit(story, "demo_2", "line\n" * 100 + "the end")
        short = perdure("show", "demo_1").out
        assert "x" * 2000 + "\n… 3,000 more characters; --full shows them" in short
        assert "the end" not in perdure("show", "demo_2").out
        assert "x" * 5000 in perdure("show", "demo_1", "--full").out
        assert "the end" in perdure("show", "demo_2", "--full").out

    def test_several(self, story: Path, perdure: Perdure) -> None:
        """Of several tasks those that are found are shown, and the others named: exit code 1."""
        ended = perdure("show", ONE, "nothing", TWO)
        assert ended.code == 1
        assert "What is a log?" in ended.out
        assert "100% sure?" in ended.out
        assert ended.err.count("\n") == 1
        assert "nothing" in ended.err
        lines = perdure("show", ONE, TWO, "--json").lines
        assert [json.loads(line)["task_id"] for line in lines] == [ONE, TWO]

    def test_redacted(self, story: Path, perdure: Perdure) -> None:
        """Of a redacted task there is what happened, and nothing that was said."""
        redact_content(story, ONE)
        ended = perdure("show", ONE)
        assert ended.code == 0
        assert "redacted" in ended.out
        assert "ledger" not in ended.out
        known = perdure("show", ONE, "--json").json
        assert known["redacted"] is True
        assert known["definition"] is None
        assert known["cost_usd"] == 0.25

    def test_escapes(self, story: Path, on_terminal: OnTerminal) -> None:
        """Escapes are neutralised on a terminal wherever a task may carry them."""
        fields: dict[str, Any] = {"labels": {"l": ESCAPES}, "batch": ESCAPES, "key": ESCAPES}
        submit(story, "demo_1", ESCAPES, system=ESCAPES, context={ESCAPES: ESCAPES}, **fields)
        fail(story, "demo_1", ESCAPES)
        for command in ("show", "log"):
            shown = on_terminal(command, "demo_1", width=300).out
            assert r"\x1b[31mred\x1b]0;title\x07 \x9b1m \u202eback" in shown
            assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*shown}

    def test_row_is_missing(self, story: Path, perdure: Perdure) -> None:
        """A task that the projection has lost is no riddle: the line says what mends it."""
        with sqlite3.connect(story) as connection:
            connection.execute("DELETE FROM tasks WHERE task_id = ?", (ONE,))
        connection.close()
        for command in ("show", "output"):
            ended = perdure(command, ONE)
            assert ended.code == 1
            assert "perdure rebuild" in ended.err


class TestLog:
    """`perdure log`."""

    def test_lines(self, story: Path, perdure: Perdure) -> None:
        """In a pipe an event is one line: version, time, type, and what it says."""
        lines = [line.split("\t") for line in perdure("log", ONE).lines]
        assert [line[0] for line in lines] == ["1", "2", "3", "4", "5"]
        assert lines[0][1] == "2026-11-20T12:00:00.000000Z"
        types = ["submitted", "running", "accepted", "chunk", "completed"]
        assert [line[2] for line in lines] == types
        assert lines[3][3] == "at 0: 'A log is a ledger.'"
        assert lines[4][3] == "stop, 18 characters, 10 tokens in, 20 out, $0.2500"

    def test_every_event_has_words(self, story: Path, perdure: Perdure) -> None:
        """No event of any kind is shown empty."""
        from perdure.events import (
            CancelRequested,
            FileCreated,
            Interrupted,
            UsageReported,
        )

        more = Interrupted(
            worker="worker_1", attempt=2, reason="worker_lost", outcome="unknown", next="restart"
        )
        tell(story, FOUR, running(), UsageReported(usage=USAGE), retry_later(), running(2), more)
        tell(story, FOUR, running(3), FileCreated(path="plan.md", size=2048))
        tell(story, FOUR, CancelRequested(by="me", reason="enough"))
        cancel_line = ["cancelled", "by me@here, enough"]
        cancel(story, FOUR)
        redact_content(story, FOUR)
        lines = [line.split("\t")[2:] for line in perdure("log", FOUR).lines]
        said: dict[str, str] = dict(lines)
        assert all(said.values())
        assert ["cancelled", said["cancelled"]] == cancel_line
        assert said["usage"] == "10 tokens in, 20 out"
        assert "it begins again" in said["interrupted"]
        assert said["submitted"].startswith("(content redacted)")
        assert said["redacted"].endswith("by me")

    def test_json(self, story: Path, perdure: Perdure) -> None:
        """With --json each event is whole, its data as it is stored."""
        found = [json.loads(line) for line in perdure("log", ONE, "--json").lines]
        assert [event["version"] for event in found] == [1, 2, 3, 4, 5]
        assert found[3]["data"] == {"kind": "text", "offset": 0, "text": "A log is a ledger."}
        assert found[0]["task_id"] == ONE
        assert all(len(event["digest"]) == 64 for event in found)

    def test_unreadable_event(self, story: Path, perdure: Perdure) -> None:
        """An event that somebody has spoilt doesn't hide the others."""
        with sqlite3.connect(story) as connection:
            connection.execute("DROP TRIGGER events_no_update")
            connection.execute("UPDATE events SET data = '{' WHERE position = 3")
            connection.execute("UPDATE events SET data = x'ff' WHERE position = 4")
        connection.close()
        lines = perdure("log", ONE).lines
        assert len(lines) == 5
        assert "perdure verify" in lines[2]
        found = [json.loads(line) for line in perdure("log", ONE, "--json").lines]
        assert found[2]["data"] == "{"

    def test_table(self, story: Path, on_terminal: OnTerminal) -> None:
        """On a terminal what is quoted is cut so that an event fits on its line."""
        tell(story, FOUR, running(), Chunk(text="word " * 100))
        chunk = on_terminal("log", FOUR).lines[-1]
        assert 70 < len(chunk) <= 80
        assert "word…" in chunk


class TestOutput:
    """`perdure output`."""

    def test_to_the_last_byte(self, story: Path, perdure: Perdure) -> None:
        """In a pipe it is the text and nothing else, without a newline of ours."""
        submit(story, "demo_1", "x")
        complete(story, "demo_1", f"  {ESCAPES}\r\n\n")
        ended = perdure("output", "demo_1")
        assert ended.out == f"  {ESCAPES}\r\n\n"
        assert ended.err == ""

    def test_on_a_terminal(self, story: Path, on_terminal: OnTerminal) -> None:
        """On a terminal its escapes are neutralised, and the prompt gets a line of its own."""
        submit(story, "demo_1", "x")
        complete(story, "demo_1", ESCAPES)
        assert on_terminal("output", "demo_1").out == (
            "\\x1b[31mred\\x1b]0;title\\x07 \\x9b1m \\u202eback\n"
        )

    @pytest.mark.parametrize(
        ("task_id", "text", "said"),
        [
            (TWO, "half an ans", "failed"),
            (THREE, "Partly Done", "cancelled"),
            (FIVE, "so far", "so far"),
            (FOUR, "", "no output"),
        ],
    )
    def test_partial(
        self, story: Path, perdure: Perdure, task_id: str, text: str, said: str
    ) -> None:
        """What a task that isn't completed has written is given too; stderr says what it is."""
        ended = perdure("output", task_id)
        assert (ended.code, ended.out) == (0, text)
        assert ended.err.count("\n") == 1
        assert said in ended.err

    def test_after_a_restart(self, story: Path, perdure: Perdure) -> None:
        """What a lost attempt wrote is not part of the output of the next one."""
        tell(story, FOUR, running(), Chunk(text="lost"), retry_later(), running(2))
        assert perdure("output", FOUR).out == ""
        tell(story, FOUR, Chunk(text="kept"), Completed(output_length=4))
        assert perdure("output", FOUR).out == "kept"

    def test_redacted(self, story: Path, perdure: Perdure) -> None:
        """Of a redacted task there is no text, and stderr says why."""
        redact_content(story, ONE)
        ended = perdure("output", ONE)
        assert (ended.code, ended.out) == (0, "")
        assert "redacted" in ended.err

    def test_json(self, story: Path, perdure: Perdure) -> None:
        """With --json it says whether the text is all there is."""
        known = perdure("output", ONE, "--json").json
        assert known == {
            "task_id": ONE,
            "status": "completed",
            "complete": True,
            "text": "A log is a ledger.",
        }
        assert perdure("output", FIVE, "--json").json["complete"] is False
