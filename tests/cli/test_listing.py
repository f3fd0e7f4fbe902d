"""`perdure list`."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
    OnTerminal,
    five_tasks,
    submit,
)

from perdure import TaskFilter, TaskStatus
from perdure.cli.finding import Status
from perdure.cli.records import TASK_COLUMNS
from perdure.cli.tables import cell_width
from perdure.store.database import Database
from perdure.store.records import find_tasks
from perdure.store.schema import tasks


@pytest.fixture
def story(database: Path, migrated_file: Path) -> Path:
    """Five tasks, one of each status, the second run again as the fourth."""
    database.write_bytes(migrated_file.read_bytes())
    five_tasks(database)
    return database


class TestList:
    """`perdure list`."""

    def test_newest_first(self, story: Path, perdure: Perdure) -> None:
        """Tasks come in the order of submission, the latest first, their id in front."""
        ended = perdure("list")
        assert ended.code == 0
        assert ended.err == ""
        assert [line.split("\t")[0] for line in ended.lines] == [FIVE, FOUR, THREE, TWO, ONE]

    def test_fields_in_a_pipe(self, story: Path, perdure: Perdure) -> None:
        r"""In a pipe a task is one line of eleven tab-separated fields, NULL as \N."""
        fields = perdure("list").lines[-1].split("\t")
        moment = "2026-11-20T12:00:00.000000Z"
        assert fields[:6] == [ONE, "completed", "demo", "demo-1", "b1", moment]
        assert fields[6:] == ["2.0", "10", "20", "0.25", "What is a log?"]
        assert perdure("list", "--status", "pending").lines[0].split("\t")[3:5] == [r"\N", r"\N"]

    @pytest.mark.parametrize(
        ("options", "found"),
        [
            (["--status", "failed"], [TWO]),
            (["-s", "failed", "-s", "cancelled"], [THREE, TWO]),
            (["-s", "running", "-s", "completed"], [FIVE, ONE]),
            (["--platform", "other"], [THREE]),
            (["--batch", "b1"], [TWO, ONE]),
            (["--batch", "b2"], []),
            (["--label", "team=red"], [FIVE, ONE]),
            (["--label", "team=red", "--label", "size=1"], [ONE]),
            (["--label", "team=red", "--label", "size=2"], []),
            (["--label", 'a"b=x'], []),
            (["--since", "2026-11-20T15:00Z"], [FIVE, FOUR]),
            (["--until", "2026-11-20T13:00:00Z"], [ONE]),
            (["--since", "2026-11-20T13:00Z", "--until", "2026-11-20T15:00Z"], [THREE, TWO]),
            (["--search", "LEDGER"], [ONE]),
            (["--search", "partly done"], [THREE]),
            (["--search", "100%"], [FOUR, TWO]),
            (["--search", "1__%"], []),
            (["--search", "über strassen"], [THREE]),
            (["--latest"], [FIVE, FOUR, THREE, ONE]),
            (["--latest", "-s", "failed"], []),
        ],
    )
    def test_filters(
        self, story: Path, perdure: Perdure, options: list[str], found: list[str]
    ) -> None:
        """Each filter leaves what it names, and several together leave what all of them do."""
        ended = perdure("list", *options)
        assert ended.code == 0
        assert [line.split("\t")[0] for line in ended.lines] == found

    def test_agrees_with_the_engine(self, story: Path, perdure: Perdure) -> None:
        """The plain queries find what `Engine.list_tasks` finds by the same filters."""
        both: list[tuple[list[str], TaskFilter]] = [
            ([], TaskFilter()),
            (["-s", "failed"], TaskFilter(statuses=(TaskStatus.FAILED,))),
            (["-p", "demo", "-b", "b1"], TaskFilter(platform="demo", batch="b1")),
            (["-l", "team=blue"], TaskFilter(labels={"team": "blue"})),
            (["--search", "LOG"], TaskFilter(search="LOG")),
            (["--search", "%"], TaskFilter(search="%")),
            (["--latest"], TaskFilter(latest=True)),
            (["--since", "2026-11-20T14:00Z"], TaskFilter(since=NOON + timedelta(hours=2))),
            (["--until", "2026-11-20T14:00Z"], TaskFilter(until=NOON + timedelta(hours=2))),
        ]

        async def expected(which: TaskFilter) -> list[str]:
            database = Database(story)
            found = await find_tasks(database, which)
            await database.close()
            return [record.task_id for record in found]

        for options, which in both:
            listed = [line.split("\t")[0] for line in perdure("list", *options).lines]
            assert listed == asyncio.run(expected(which)), options

    @pytest.mark.parametrize("search", ["äpfel", "ÄPFEL", "pfe", "ÄPFEL, straße", "birne"])
    def test_upper_and_lower_case(self, story: Path, perdure: Perdure, search: str) -> None:
        """Of all letters, not of ASCII's alone, for the command as for the engine."""
        submit(story, "demo_20261122_eeee6666", "Äpfel, STRASSE")

        async def found() -> list[str]:
            database = Database(story)
            records = await find_tasks(database, TaskFilter(search=search))
            await database.close()
            return [record.task_id for record in records]

        expected = [] if search == "birne" else ["demo_20261122_eeee6666"]
        assert asyncio.run(found()) == expected
        ended = perdure("list", "--search", search)
        assert [line.split("\t")[0] for line in ended.lines] == expected

    def test_relative_times(self, story: Path, perdure: Perdure) -> None:
        """A span counts back from now."""
        submit(story, "demo_20261122_eeee6666", "just now", at=datetime.now(UTC))
        ended = perdure("list", "--since", "1h")
        assert [line.split("\t")[0] for line in ended.lines] == ["demo_20261122_eeee6666"]

    def test_limit(self, story: Path, perdure: Perdure) -> None:
        """What is left out for the limit is said on stderr; 0 is no limit."""
        ended = perdure("list", "--limit", "2")
        assert len(ended.lines) == 2
        assert "--limit" in ended.err
        assert perdure("list", "--limit", "5").err == ""
        assert len(perdure("list", "--limit", "0").lines) == 5

    def test_json(self, story: Path, perdure: Perdure) -> None:
        """With --json a line is a task with every column, its labels an object."""
        found = [json.loads(line) for line in perdure("list", "--json").lines]
        assert [task["task_id"] for task in found] == [FIVE, FOUR, THREE, TWO, ONE]
        assert tuple(found[0]) == TASK_COLUMNS
        assert found[-1]["labels"] == {"team": "red", "size": "1"}
        assert found[-1]["output"] == "A log is a ledger."
        assert found[-1]["cancel_requested"] is False
        assert found[-1]["files_created"] == []
        assert found[2]["partial_output"] == "Partly Done"

    def test_columns_are_those_of_the_table(self) -> None:
        """What is handed on are the columns of `tasks`, all but the key of its stream."""
        assert ("stream_id", *TASK_COLUMNS) == tuple(tasks.c.keys())
        assert {*Status} == {*TaskStatus} - {TaskStatus.UNKNOWN}

    def test_nothing_found(self, story: Path, perdure: Perdure) -> None:
        """Nothing found is no error, and no output."""
        ended = perdure("list", "--batch", "none", "--json")
        assert (ended.code, ended.out, ended.err) == (0, "", "")

    @pytest.mark.parametrize("width", [32, 40, 60, 80, 100, 130, 200])
    def test_table_fits(self, story: Path, on_terminal: OnTerminal, width: int) -> None:
        """On a terminal no line is wider than it, whatever is in the prompts."""
        submit(story, "demo_20261122_eeee6666", "日本語のとても長い質問です。" * 20)
        submit(story, "demo_20261122_ffff7777", "a\tb\nc " + "long " * 100)
        ended = on_terminal("list", width=width)
        assert ONE in ended.out
        assert max(cell_width(line) for line in ended.lines) <= width
        assert "\x1b" not in ended.out

    def test_escapes_are_shown_not_obeyed(self, story: Path, on_terminal: OnTerminal) -> None:
        """What a prompt holds can't drive the terminal; the only escapes are our colours."""
        submit(story, "demo_20261122_eeee6666", ESCAPES)
        shown = on_terminal("list", width=200, colours=True).out
        assert r"\x1b[31mred\x1b]0;title\x07 \x9b1m \u202eback" in shown
        assert "\x1b[31mred" not in shown
        assert "\x1b[32mcompleted\x1b[0m" in shown

    @pytest.mark.parametrize(
        "options",
        [
            ["--since", "someday"],
            ["--until", "2026-13-01"],
            ["--since", "25:00"],
            ["--since", "99999999999d"],
            ["--label", "team"],
            ["--label", "=x"],
            ["--status", "done"],
            ["--limit", "-1"],
            ["--limit", "few"],
            ["--no-such-option"],
            ["stray"],
        ],
    )
    def test_bad_options(self, story: Path, perdure: Perdure, options: list[str]) -> None:
        """An option that makes no sense is one line on stderr and exit code 2."""
        ended = perdure("list", *options)
        assert ended.code == 2
        assert ended.out == ""
        assert ended.err.count("\n") == 1
        assert ended.err.startswith("perdure: ")

    def test_text_that_is_no_text(self, story: Path, perdure: Perdure) -> None:
        """An argument that is no UTF-8 finds nothing, in one line."""
        for arguments in (["show", "\udcff"], ["list", "--batch", "\udcff"]):
            ended = perdure(*arguments)
            assert (ended.code, ended.err.count("\n")) == (1, 1)
            assert "UTF-8" in ended.err
