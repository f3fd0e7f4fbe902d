"""Rows to tasks: reading, recognising, taking in, and giving results back."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import resource
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure import Completed, Engine, InvalidTask, Scope, TaskFilter, TaskStatus
from perdure.batch import (
    Counts,
    Defaults,
    Intake,
    Layout,
    Ledger,
    Taken,
    Tallying,
    batch_name,
    count_batch,
    each_result,
    latest_runs,
    open_source,
    result_line,
)
from perdure.batch.reading import RawRow, detect_layout, read_rows
from perdure.batch.rows import identify, make_task, remarks, same_content
from perdure.batch.source import gather
from perdure.testing import ScriptedAdapter

NO_DEFAULTS = Defaults()
DEMO = Defaults({"platform": "demo"})


# Reading


def read(data: bytes, layout: Layout = Layout.JSONL) -> list[RawRow]:
    """Return the rows of ``data``."""
    return list(read_rows(io.BytesIO(data), layout, name="rows"))


def fields(data: bytes, layout: Layout = Layout.JSONL) -> list[dict[str, Any]]:
    """Return what the rows of ``data`` hold; none of them may be bad."""
    rows = read(data, layout)
    assert [row.error for row in rows] == [None] * len(rows)
    return [dict(row.fields) for row in rows]


texts = st.text(st.characters(codec="utf-8"), max_size=40)
plain_objects = st.dictionaries(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12),
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | texts | st.lists(texts),
    max_size=5,
)


@given(st.lists(plain_objects, max_size=8), st.sampled_from(["\n", "\r\n", "\n\n \n"]))
def test_json_lines_come_back_as_they_were(objects: list[dict[str, Any]], end: str) -> None:
    """Whatever JSON lines hold, with whatever line ends and blank lines, is what is read."""
    data = "".join(json.dumps(one) + end for one in objects).encode()
    assert fields(data) == objects


@given(
    st.lists(
        st.fixed_dictionaries({"prompt": texts.filter(bool), "note": texts, "lang": texts}),
        max_size=8,
    ),
    st.sampled_from(",;\t"),
    st.booleans(),
)
def test_csv_comes_back_as_it_was(
    rows: list[dict[str, str]], delimiter: str, with_mark: bool
) -> None:
    """Quotes, newlines in cells, any delimiter, a byte order mark: the cells come back."""
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, ["prompt", "note", "lang"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    data = written.getvalue().encode("utf-8-sig" if with_mark else "utf-8")
    assert fields(data, Layout.CSV) == [{k: v for k, v in row.items() if v} for row in rows]


def test_marks_and_line_ends_are_no_content() -> None:
    """A byte order mark, Windows line ends and blank lines don't get into a row."""
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}'
    assert [(row.line, dict(row.fields)) for row in read(data)] == [
        (1, {"prompt": "a"}),
        (4, {"prompt": "b"}),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"not json", "is not JSON"),
        (b'{"prompt": "a"', "is not JSON"),
        (b'{"prompt": "a"} {"prompt": "b"}', "is not JSON"),
        (b'["a"]', "is an array"),
        (b'"a"', "is no object"),
        (b"null", "is no object"),
        (b'{"prompt": "\xff"}', "is not UTF-8: byte 13"),
        (b'{"prompt": "\x00"}', "is not JSON"),
        (b"\x00\x00\x00", "is not JSON"),
        (b"[" * 5000, "is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "gives 'prompt' twice"),
        (b'\xef\xbb\xbf{"a": NaN, "a": {"b": 1}}', "gives 'a' twice"),
    ],
)
def test_a_bad_line_is_one_bad_row(line: bytes, problem: str) -> None:
    """A line that can't be read says why, has its number, and doesn't stop those after it."""
    good, bad, after = read(b'{"prompt": "a"}\n' + line + b'\n{"prompt": "b"}\n')
    assert (good.error, after.error) == (None, None)
    assert bad.line == 2
    assert problem in (bad.error or "")


def test_what_is_nested_too_deep_is_left_to_the_task() -> None:
    """Looking for names that come twice doesn't fail before the task's own check can."""
    deep = b'{"a": ' * 990 + b"1" + b"}" * 990
    (row,) = read(deep)
    assert row.error is None


def test_a_name_may_come_again_inside() -> None:
    """In a value, or quoted, it is no second field."""
    line = rb'{"prompt": "\"prompt\":", "metadata": {"prompt": "prompt", "tags": ["metadata"]}}'
    (row,) = read(line)
    assert (row.error, row.fields["prompt"]) == (None, '"prompt":')


def test_csv_rows_have_the_number_of_their_first_line() -> None:
    """A cell with newlines doesn't confuse the line numbers of the rows after it."""
    data = b'prompt,note\n"one\ntwo\nthree",x\n\nlast,y\n'
    assert [(row.line, row.fields["prompt"]) for row in read(data, Layout.CSV)] == [
        (2, "one\ntwo\nthree"),
        (6, "last"),
    ]


def test_csv_cells_of_structured_fields_hold_json() -> None:
    """What is an object or a list in JSON lines is one in a cell; of texts one may stand alone."""
    structured: dict[str, Any] = {
        "context": {"unit": "mm"},
        "labels": {"team": "storage"},
        "metadata": {"from": 1},
        "options": {"top_k": 3},
        "constraints": {"max_attempts": 2},
        "stop_sequences": ["END", "STOP"],
        "output_schema": {"type": "object", "properties": {"a": {"type": "string"}}},
        "tools": [{"name": "look_up", "parameters": {"type": "object"}}],
    }
    written = io.StringIO()
    writer = csv.DictWriter(written, ["prompt", *structured])
    writer.writeheader()
    writer.writerow(
        {"prompt": "x", **{name: json.dumps(value) for name, value in structured.items()}}
    )
    writer.writerow({"prompt": "y", "stop_sequences": "END"})
    first, second = fields(written.getvalue().encode(), Layout.CSV)
    assert first == {"prompt": "x", **structured}
    assert second["stop_sequences"] == ["END"]
    for text in ("[DONE]", "{", "[", " [x]"):
        (row,) = fields(f"prompt,stop_sequences\nx,{text}\n".encode(), Layout.CSV)
        assert row["stop_sequences"] == [text]
    (row,) = fields(b'prompt,stop_sequences\nx,"[ ""END"" ]"\n', Layout.CSV)
    assert row["stop_sequences"] == ["END"]
    task = task_of(first)
    assert (task.output_schema, task.constraints.stop_sequences) == (
        structured["output_schema"],
        ("END", "STOP"),
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"a,b,c", "has 3 cells, but the header has 2"),
        (b"\xff,b", "is not UTF-8: column 'prompt'"),
        (b'a,"b"c', "is not CSV"),
    ],
)
def test_a_bad_csv_line_is_one_bad_row(line: bytes, problem: str) -> None:
    """A line of CSV that makes no sense doesn't stop those after it."""
    good, bad, after = read(b"prompt,note\nfirst,1\n" + line + b"\nlast,2\n", Layout.CSV)
    assert (good.fields["prompt"], after.fields["prompt"]) == ("first", "last")
    assert bad.line == 3
    assert problem in (bad.error or "")


def test_quotes_that_are_never_closed_are_named() -> None:
    """The row that swallows the rest of the file is the one that is reported."""
    *_, bad = read(b'prompt\nfine\n"open\nmore\n', Layout.CSV)
    assert (bad.line, bad.error) == (3, "opens quotes that are never closed")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"prompt,note,note\n", "the column 'note' more than once"),
        (b"question,answer\n", "no column 'prompt'"),
        (b"pro\x00mpt,x\n", "no text"),
        (b"\xff\xfeprompt\n", "no text"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header: bytes, problem: str) -> None:
    """Nothing is run of a CSV file whose columns are unclear."""
    with pytest.raises(InvalidTask, match=problem):
        read(header + b"a,b,c\n", Layout.CSV)


def test_a_column_without_a_name_is_left_out() -> None:
    """The index column that pandas writes is no label, and that is said."""
    said: list[str] = []
    data = io.BytesIO(b",prompt\n0,a\n")
    (row,) = read_rows(data, Layout.CSV, name="rows", remark=said.append)
    assert row.fields == {"prompt": "a"}
    assert said == ["column 1 has no name and is left out"]


def test_cells_may_hold_json_where_it_means_something() -> None:
    """Messages, options and the like are JSON in a CSV cell; files may be one plain path."""
    data = io.StringIO(newline="")
    writer = csv.writer(data)
    writer.writerow(["prompt", "options", "files", "note"])
    writer.writerow(["a", '{"words": 3}', "notes.txt", "{not json}"])
    (row,) = fields(data.getvalue().encode(), Layout.CSV)
    assert row == {
        "prompt": "a",
        "options": {"words": 3},
        "files": ["notes.txt"],
        "note": "{not json}",
    }
    (bad,) = read(b"prompt,options\na,{x\n", Layout.CSV)
    assert "options: the cell is not JSON" in (bad.error or "")


@pytest.mark.parametrize(
    ("name", "head", "layout"),
    [
        ("rows.jsonl", b"", Layout.JSONL),
        ("rows.csv", b"prompt\n", Layout.CSV),
        ("rows.tsv", b"prompt\n", Layout.CSV),
        ("stdin", b'  {"prompt": "a"}', Layout.JSONL),
        ("stdin", b"\xef\xbb\xbfprompt,note\n", Layout.CSV),
        ("stdin", b"", Layout.JSONL),
    ],
)
def test_the_layout_is_found_out(name: str, head: bytes, layout: Layout) -> None:
    """By the name where it says so, else by the first bytes."""
    assert detect_layout(name, head) is layout


@pytest.mark.parametrize(
    ("head", "advice"),
    [
        (b"\xff\xfe{\x00", "UTF-16"),
        (b"\x1f\x8b\x08", "compressed"),
        (b' [{"prompt": "a"}]', "one JSON array"),
    ],
)
def test_what_is_no_rows_at_all_is_refused_with_advice(head: bytes, advice: str) -> None:
    """Another encoding, an archive, a JSON array: one error, not one for every line."""
    with pytest.raises(InvalidTask, match=advice):
        detect_layout("rows.jsonl", head)


# Rows


def row_of(given_fields: dict[str, Any], defaults: Defaults = NO_DEFAULTS) -> Any:
    """Return the row that says so."""
    return identify(RawRow(1, given_fields), "b", defaults)


def task_of(given_fields: dict[str, Any], defaults: Defaults = NO_DEFAULTS) -> Any:
    """Return the task that such a row asks for."""
    return make_task(row_of(given_fields, defaults), "b", defaults)


def test_a_row_may_say_all_that_a_task_can() -> None:
    """Every field of a row gets to its place in the task."""
    task = task_of(
        {
            "id": 7,
            "messages": [{"role": "user", "content": "a"}],
            "platform": "demo",
            "model": "m-1",
            "system": "s",
            "max_tokens": 5,
            "constraints": {"temperature": 0.5, "recovery": "fail"},
            "stop_sequences": ["END"],
            "reasoning_effort": "low",
            "output_schema": {"type": "object"},
            "tools": [{"name": "look_up"}],
            "timeout_seconds": "9",
            "max_attempts": 2,
            "priority": 1,
            "type": "testing",
            "labels": {"team": "docs", "size": 3},
            "context": {"manual": "…"},
            "metadata": {"any": [1]},
            "files": ["a.txt"],
            "options": {"seed": 1},
            "fallbacks": ["other"],
            "customer": 12,
            "nothing": None,
        }
    )
    assert (task.batch, task.key) == ("b", "b:7")
    assert task.messages[0].content == "a"
    assert task.constraints.model_dump(mode="json") == {
        "max_tokens": 5,
        "timeout_seconds": 9.0,
        "temperature": 0.5,
        "model": "m-1",
        "max_attempts": 2,
        "recovery": "fail",
        "stop_sequences": ["END"],
        "reasoning_effort": "low",
    }
    assert task.output_schema == {"type": "object"}
    assert [tool.name for tool in task.tools] == ["look_up"]
    assert task.labels == {"team": "docs", "size": "3", "customer": "12"}
    assert (task.priority, task.type, task.system) == (1, "testing", "s")
    assert (task.context, task.metadata) == ({"manual": "…"}, {"any": [1]})
    assert (task.files, task.options, task.fallbacks) == (("a.txt",), {"seed": 1}, ("other",))


def test_defaults_hold_where_a_row_says_nothing() -> None:
    """The row's own word counts; options and labels are joined item by item."""
    defaults = Defaults(
        {"model": "m", "max_tokens": 9, "options": {"a": 1, "b": 1}, "labels": {"x": "1"}}
    )
    own = {"prompt": "p", "constraints": {"max_tokens": 3}, "options": {"b": 2}, "y": "2"}
    task = task_of(own, defaults)
    assert (task.limits.model, task.limits.max_tokens) == ("m", 3)
    assert task.options == {"a": 1, "b": 2}
    assert task.labels == {"x": "1", "y": "2"}


@pytest.mark.parametrize(
    ("given_fields", "problem"),
    [
        ({}, "has no prompt"),
        ({"promt": "a"}, "has no prompt; did you mean 'prompt' by 'promt'"),
        ({"Prompt": "a"}, "did you mean 'prompt' by 'Prompt'"),
        ({"question": "a"}, "has no prompt \\(its fields: 'question'\\)"),
        ({"prompt": " "}, "prompt: must not be empty"),
        ({"prompt": 3}, "prompt: should be a valid string"),
        ({"prompt": "a\x00"}, "a NUL character"),
        ({"prompt": "x" * (33 * 2**20)}, "the limit is"),
        ({"prompt": "a", "max_token": 1}, "max_token: .* did you mean 'max_tokens'"),
        ({"prompt": "a", "timeout": 1}, "timeout: .* did you mean 'timeout_seconds'"),
        ({"prompt": "a", "constraints": {"max_tokns": 1}}, "did you mean 'max_tokens'"),
        ({"prompt": "a", "constraints": [1]}, "constraints: must be an object"),
        ({"prompt": "a", "max_tokens": 1, "constraints": {"max_tokens": 2}}, "given twice"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens: "),
        ({"prompt": "a", "temperature": 1e9}, "temperature: "),
        ({"prompt": "a", "timeout_seconds": 0}, "timeout_seconds: "),
        ({"prompt": "a", "priority": 11}, "priority: "),
        ({"prompt": "a", "labels": "x"}, "labels: must be an object"),
        ({"prompt": "a", "customer": 1.5e300}, "customer: the number is not exact"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "not both"),
        ({"messages": [{"role": "system", "content": "b"}]}, "messages"),
        ({"id": 1.5, "prompt": "a"}, "id: must be text"),
        ({"id": True, "prompt": "a"}, "id: must be text"),
        ({"id": "", "prompt": "a"}, "id: must not be empty"),
        ({"id": "x" * 300, "prompt": "a"}, "id: is longer"),
        ({"id": "a\x00b", "prompt": "a"}, "id: contains a NUL"),
        ({"prompt": "\ud800"}, "no Unicode"),
        ({"prompt": "a", "continue_from": "demo_1"}, "continue_from: a row can't"),
    ],
)
def test_a_row_that_makes_no_sense_says_why(given_fields: dict[str, Any], problem: str) -> None:
    """One line that names the field; a misspelt constraint is never taken as a label."""
    with pytest.raises(InvalidTask, match=problem) as caught:
        task_of(given_fields)
    assert "\n" not in str(caught.value)


def test_what_is_odd_is_remarked() -> None:
    """A field that looks like one of ours, or like a parameter, is a label all the same."""
    row = row_of({"prompt": "a", "modle": "m", "top_p": 1, "customer": "c"})
    assert make_task(row, "b", NO_DEFAULTS).labels == {"modle": "m", "top_p": "1", "customer": "c"}
    said = list(remarks(row))
    assert len(said) == 2
    assert "did you mean 'model'" in said[0]
    assert "go into 'options'" in said[1]


@given(plain_objects, plain_objects)
def test_a_row_without_an_id_is_what_it_says(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal content is the same row, whatever the order of its fields; other content is another."""
    one, other = ({k: v for k, v in d.items() if k != "id"} for d in (one, other))
    backwards = dict(reversed(one.items()))
    assert row_of(one).key == row_of(backwards).key
    told = {k: v for k, v in one.items() if v is not None}
    others = {k: v for k, v in other.items() if v is not None}
    same = orjson.dumps(told, option=orjson.OPT_SORT_KEYS) == orjson.dumps(
        others, option=orjson.OPT_SORT_KEYS
    )
    assert (row_of(one).key == row_of(other).key) is same


def test_fingerprints_tell_content_and_defaults_apart() -> None:
    """Other defaults are no other content, and other content no other defaults."""
    plain, with_model = row_of({"prompt": "a"}), row_of({"prompt": "a"}, Defaults({"model": "m"}))
    assert plain.key == with_model.key
    assert plain.fingerprint != with_model.fingerprint
    assert same_content(plain.fingerprint, with_model.fingerprint)
    assert not same_content(plain.fingerprint, row_of({"prompt": "b"}).fingerprint)
    assert not same_content(None, None)


@pytest.mark.parametrize("name", ["", "  ", "a:b", "x" * 300, "new\nline", "retry"])
def test_a_batch_has_a_plain_name(name: str) -> None:
    """The name is part of the rows' keys: it can't hold what separates the two, nor be "retry"."""
    with pytest.raises(InvalidTask, match="--name"):
        batch_name(name)


# Where rows come from


def test_a_file_names_its_batch(tmp_path: Path) -> None:
    """The batch has the file's name; stdin and pipes are called so."""
    path = tmp_path / "my:tasks.v2.jsonl"
    path.write_text("")
    assert open_source(str(path)).batch == "my-tasks.v2"
    with pytest.raises(InvalidTask, match="No such file"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(InvalidTask, match="Is a directory"):
        open_source(str(tmp_path))


async def test_rows_of_a_slow_pipe_do_not_wait_for_each_other() -> None:
    """What has come is handed over in a moment, although more is expected."""
    reading, writing = os.pipe()

    def rows() -> Iterator[RawRow]:
        with os.fdopen(reading, "rb") as stream:
            yield from read_rows(stream, Layout.JSONL, name="pipe")

    groups: AsyncGenerator[list[RawRow], None] = gather(rows(), lambda row: row)
    os.write(writing, b'{"prompt": "a"}\n')
    async with asyncio.timeout(60):
        assert [row.fields["prompt"] for row in await anext(groups)] == ["a"]
        os.write(writing, b'{"prompt": "b"}\n{"prompt": "c"}\n')
        os.close(writing)
        rest = [row.fields["prompt"] async for group in groups for row in group]
    assert rest == ["b", "c"]


async def test_rows_are_read_no_faster_than_they_are_taken() -> None:
    """However many there are, only a group or two are in memory."""
    made = 0

    def rows() -> Iterator[RawRow]:
        nonlocal made
        for number in range(100_000):
            made += 1
            yield RawRow(number, {})

    groups = gather(rows(), lambda row: row)
    await anext(groups)
    await anext(groups)
    assert made <= 10_000
    await groups.aclose()


async def test_an_error_in_the_input_comes_after_what_was_read() -> None:
    """The rows before it are taken in; then it is raised."""

    def rows() -> Iterator[RawRow]:
        yield RawRow(1, {})
        raise OSError("the disk is gone")

    groups = gather(rows(), lambda row: row)
    assert len(await anext(groups)) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        await anext(groups)


# Taking in


@pytest.fixture
async def engine(make_database: Callable[[], Path]) -> AsyncGenerator[Engine, None]:
    """An engine that runs nothing."""
    async with Engine.open(
        make_database(), adapters=[ScriptedAdapter(platform="demo")], run=False
    ) as opened:
        yield opened


async def take(
    engine: Engine,
    rows: list[dict[str, Any]],
    defaults: Defaults = DEMO,
    *,
    retry: bool = False,
) -> tuple[Counts, list[Taken]]:
    """Take rows in; returns what was counted, and what became of each."""
    taken: list[Taken] = []
    intake = Intake(engine, "b", defaults, retry=retry, on_taken=taken.extend)
    await intake.take(iter([RawRow(n, one) for n, one in enumerate(rows, 1)]))
    return intake.counts, taken


async def run_all(engine: Engine) -> None:
    """Run everything there is to its end."""
    async with Engine.open(
        engine.database.path,
        adapters=[ScriptedAdapter("done", Completed(), platform="demo")],
        run=False,
    ) as other:
        await other.run_until_done()


async def test_taking_the_same_rows_in_again_submits_nothing(engine: Engine) -> None:
    """That is resuming: what is known stays as it is."""
    rows: list[dict[str, Any]] = [{"id": "a", "prompt": "1"}, {"prompt": "2"}]
    first, _ = await take(engine, rows)
    second, taken = await take(engine, rows)
    assert (first.new, first.known) == (2, 0)
    assert (second.new, second.known) == (0, 2)
    assert taken[0].key == "b:a"
    assert len(await engine.list_tasks()) == 2


async def test_a_changed_row_is_reported_and_not_run(engine: Engine) -> None:
    """The same id with other content is a problem of that row alone."""
    await take(engine, [{"id": "a", "prompt": "1"}, {"id": "b", "prompt": "1"}])
    rows = [{"id": "a", "prompt": "changed"}, {"id": "b", "prompt": "1"}]
    counts, taken = await take(engine, rows)
    assert (counts.bad, counts.known, counts.new) == (1, 1, 0)
    assert taken[0].key is None
    assert "other content" in (taken[0].problem or "")


@pytest.mark.parametrize("between", [0, 2500])
async def test_a_bad_row_does_not_speak_for_others_of_its_id(engine: Engine, between: int) -> None:
    """The good one runs, and is known the next time; each has its own problem or none."""
    filler = [{"prompt": f"{n}"} for n in range(between)]
    bad = {"id": "a", "prompt": "x", "timeout_seconds": -1}
    good = {"id": "a", "prompt": "good"}
    rows = [bad, *filler, good, {"id": "a", "prompt": "another"}, bad]
    for new in (1 + between, 0):
        counts, taken = await take(engine, rows)
        assert (counts.new, counts.bad) == (new, 3)
        first, last, another, again = (taken[n] for n in (0, -3, -2, -1))
        # Where it stands by itself, the one that is in the batch by then counts.
        assert first.problem is not None
        assert ("timeout_seconds" in first.problem) == (bool(new) or not between)
        assert last.key == "b:a"
        assert "other content" in (another.problem or "")
        assert again.problem is not None


async def test_a_row_that_can_not_be_sent_is_named(engine: Engine, tmp_path: Path) -> None:
    """Of two rows with one id the second one isn't blamed for the file of the first."""
    bad = {"id": "a", "prompt": "x", "files": [str(tmp_path / "missing")]}
    counts, taken = await take(engine, [bad, {"id": "a", "prompt": "good"}])
    assert (counts.new, counts.bad) == (0, 2)
    assert "missing" in (taken[0].problem or "")
    assert "line 1 has the same id" in (taken[1].problem or "")


@pytest.mark.parametrize("between", [0, 2500])
async def test_identical_rows_run_once(engine: Engine, between: int) -> None:
    """Also where one group of rows ends between them; each gets the same result."""
    filling = [{"prompt": f"filling {n}"} for n in range(between)]
    rows: list[dict[str, Any]] = [{"prompt": "same"}, *filling, {"prompt": "same"}]
    counts, taken = await take(engine, rows)
    assert (counts.new, counts.repeated) == (between + 1, 1)
    assert taken[0].key == taken[-1].key


@pytest.mark.parametrize("between", [0, 2500])
async def test_two_rows_of_one_id_are_a_mistake(engine: Engine, between: int) -> None:
    """The first one counts, the other is reported, wherever it is."""
    filling = [{"prompt": f"filling {n}"} for n in range(between)]
    rows: list[dict[str, Any]] = [{"id": 1, "prompt": "a"}, *filling, {"id": 1, "prompt": "b"}]
    counts, taken = await take(engine, rows)
    assert (counts.new, counts.bad) == (between + 1, 1)
    assert (taken[0].problem, taken[-1].key) == (None, None)


async def test_other_defaults_are_noticed_and_change_nothing(engine: Engine) -> None:
    """A row that was submitted keeps what it was submitted with."""
    await take(engine, [{"prompt": "a"}])
    other = Defaults({"platform": "demo", "model": "m"})
    counts, taken = await take(engine, [{"prompt": "a"}], other)
    assert (counts.known, counts.other_defaults, counts.bad) == (1, 1, 0)
    assert taken[0].problem is None


async def test_bad_rows_never_stop_the_good_ones(engine: Engine) -> None:
    """Each is told apart with its line, in order."""
    counts, taken = await take(
        engine,
        [{"prompt": "a"}, {"prompt": ""}, {"prompt": "a", "platform": "dmo"}, {"prompt": "b"}],
    )
    assert (counts.rows, counts.new, counts.bad) == (4, 2, 2)
    assert [one.line for one in taken if one.problem] == [2, 3]
    assert "did you mean 'demo'" in (taken[2].problem or "")


async def test_an_id_that_can_not_be_one_is_told_all_the_same(engine: Engine) -> None:
    """Cut and escaped, so that it can be written down; the row after it is run."""
    ids = ["x" * 100_000, "a\ud800", "a\x00b", "good"]
    counts, taken = await take(engine, [{"id": one, "prompt": "a"} for one in ids])
    assert (counts.new, counts.bad) == (1, 3)
    assert [one.id for one in taken] == ["x" * 40 + "…", "a\\ud800", "a\x00b", "good"]
    with Ledger() as ledger:
        ledger.add(taken)
        assert list(ledger) == taken


async def test_only_what_ended_badly_is_run_again(engine: Engine) -> None:
    """As a new task, linked to the old one, with the row as it is now; the old one stays."""
    rows: list[dict[str, Any]] = [{"id": "a", "prompt": "1"}, {"id": "b", "prompt": "1"}]
    await take(engine, rows)
    for task in await engine.list_tasks(TaskFilter(batch="b")):
        if task.key == "b:a":
            await engine.cancel_task(task.task_id)
    await run_all(engine)
    rows[0]["prompt"] = "better"
    counts, _ = await take(engine, rows, retry=True)
    assert (counts.retried, counts.known, counts.bad) == (1, 1, 0)
    again = [task for task in await engine.list_tasks() if task.retry_of is not None]
    assert [task.prompt for task in again] == ["better"]
    counts, _ = await take(engine, rows, retry=True)
    assert (counts.retried, counts.known) == (0, 2)
    latest = await latest_runs(engine.database, [again[0].retry_of or ""])
    assert [run.task_id for run in latest.values()] == [again[0].task_id]
    assert (await count_batch(engine.database, "b")).cancelled == 0


async def test_two_intakes_at_once_submit_each_row_once(engine: Engine) -> None:
    """Whoever comes second finds the other's tasks, also in the same moment."""
    rows: list[dict[str, Any]] = [{"id": n, "prompt": "a"} for n in range(300)]
    async with Engine.open(
        engine.database.path, adapters=[ScriptedAdapter(platform="demo")], run=False
    ) as other:
        (one, _), (two, _) = await asyncio.gather(take(engine, rows), take(other, rows))
    assert one.new + two.new == 300
    assert one.new + one.known == two.new + two.known == 300
    assert len(await engine.list_tasks(limit=None)) == 300


# Results, and how far it is


async def results(engine: Engine, taken: list[Taken]) -> list[dict[str, Any]]:
    """Return the results as a file would have them."""
    with Ledger() as ledger:
        ledger.add(taken)
        lines = [result_line(one) async for one in each_result(engine.database, ledger)]
    return [json.loads(line) for line in lines]


async def test_results_come_in_the_order_of_the_input(engine: Engine) -> None:
    """One for every row, bad and repeated ones too, each of its latest run."""
    rows: list[dict[str, Any]] = [
        {"id": "z", "prompt": "1", "team": "x"},
        {"prompt": ""},
        {"id": "a", "prompt": "2"},
        {"id": "z", "prompt": "1", "team": "x"},
    ]
    _, taken = await take(engine, rows)
    before = await results(engine, taken)
    assert [one["status"] for one in before] == ["pending", "invalid", "pending", "pending"]
    old = before[0]["task_id"]
    await engine.cancel_task(old)
    again = await engine.retry_task(old)
    await run_all(engine)
    found = await results(engine, taken)
    assert [(one["line"], one["id"]) for one in found] == [(1, "z"), (2, None), (3, "a"), (4, "z")]
    assert [one["status"] for one in found] == ["completed", "invalid", "completed", "completed"]
    assert found[0]["task_id"] == again.task_id
    assert found[0]["retry_of"] == old
    assert found[0] == {**found[3], "line": 1}
    assert (found[0]["output"], found[0]["labels"]) == ("done", {"team": "x"})
    assert found[1]["error"] == "prompt: must not be empty"


async def test_the_tally_follows_what_happens(engine: Engine) -> None:
    """What is counted on the way is what counting it all gives, retries included."""
    tallying = Tallying(engine.database, Scope(batch="b"))
    assert (await tallying.look()).total == 0
    await take(engine, [{"id": n, "prompt": "a b c"} for n in range(5)])
    assert (await tallying.look()).pending == 5
    first, *_ = [task.task_id for task in await engine.list_tasks()]
    await engine.cancel_task(first)
    seen = await tallying.look()
    assert (seen.pending, seen.cancelled, seen.ended, seen.left) == (4, 1, 1, 4)
    await engine.retry_task(first)
    await run_all(engine)
    seen = await tallying.look()
    counted = await count_batch(engine.database, "b")
    assert seen == counted
    assert (seen.completed, seen.cancelled, seen.total) == (5, 0, 5)
    assert (seen.unpriced, seen.priced) == (5, 0)
    assert await engine.get_status(first) is TaskStatus.CANCELLED


async def test_a_large_batch_needs_no_more_memory_than_a_small_one(engine: Engine) -> None:
    """Rows are read, taken in and given back in groups."""

    def rows(number: int) -> Iterator[RawRow]:
        for n in range(number):
            yield RawRow(n, {"id": n, "prompt": "p" * 2000}, None, 2000)

    with Ledger() as ledger:
        intake = Intake(engine, "b", DEMO, on_taken=ledger.add)
        await intake.take(rows(3000))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        intake = Intake(engine, "b", DEMO, on_taken=ledger.add)
        await intake.take(rows(20_000))
        count = sum([1 async for _ in each_result(engine.database, ledger)])
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert count == 23_000
    assert after - before < 60 * 1024  # KiB; the prompts alone are 40 MB, their tasks much more
