"""The benchmarks run, and what they write is what the page is made of. No times are judged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One process runs them all: what takes long is done once.
pytestmark = pytest.mark.xdist_group("benchmarks")

ROOT = Path(__file__).resolve().parent.parent
CASES = sorted(
    path.stem for path in (ROOT / "benchmarks/cases").glob("*.py") if path.stem != "__init__"
)
SAMPLE = {"name", "unit", "median", "low", "high", "values"}
PAGE = """# Performance

Before.

<!-- measured: written by `python -m benchmarks` -->
What was there.
<!-- end of what was measured -->

After.
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the benchmarks' command from the root of the repository."""
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of all benchmarks, run small."""
    folder = tmp_path_factory.mktemp("results")
    done = run("--small", "--results", folder, "--folder", folder, "--traceback")
    assert done.returncode == 0, done.stderr
    return folder


def canned(folder: Path, **changes: Any) -> Path:
    """Write one result such as a run writes, and return the folder it is in."""
    row = {
        "what": "through the log",
        "ours": sample("perdure", 20000.0),
        "rival": sample("bare sqlite3", 50000.0),
        "relation": "ratio",
        "figure": 0.4,
        "figure_low": 0.36,
        "figure_high": 0.44,
        "figure_unit": "x",
        "target": {"bound": "at least", "value": 0.5, "unit": "x", "text": "≥ 0.5 x"},
        "met": False,
        "note": "",
    }
    machine = {"cores": "2", "processor": "A <processor>", "system": "Linux x86_64"}
    machine |= {"python": "CPython 3.11.7", "sqlite": "3.40.1", "sqlalchemy": "2.0", "perdure": "1"}
    result = {
        "case": "appends",
        "about": "Durable appends by 100 producers",
        "seconds": 1.0,
        "rounds": 3,
        "small": False,
        "machine": machine,
        "rows": [row | changes],
    }
    (folder / "appends.json").write_text(json.dumps(result), "utf-8")
    return folder


def sample(name: str, median: float) -> dict[str, Any]:
    """Return a sample as it is written down."""
    values = [median * 0.9, median, median * 1.1]
    low, high = values[0], values[-1]
    measured = {"name": name, "unit": "appends/s", "median": median, "low": low, "high": high}
    return measured | {"values": values}


def test_lists_every_case_once() -> None:
    """`--list` names each file of cases, with what it measures."""
    listed = [line.split(maxsplit=1) for line in run("--list").stdout.splitlines()]
    assert sorted(name for name, _about in listed) == CASES
    assert all(about for _name, about in listed)


@pytest.mark.parametrize("case", CASES)
def test_writes_results_of_the_right_shape(results: Path, case: str) -> None:
    """Each case runs small and writes rows with figures, and no verdicts."""
    result = json.loads((results / f"{case}.json").read_text("utf-8"))
    assert result["case"] == case
    assert result["small"] is True
    assert result["machine"].keys() >= {"cores", "python", "sqlite"}
    assert result["rows"]
    for row in result["rows"]:
        assert row["ours"].keys() == SAMPLE
        assert row["rival"] is None or row["rival"].keys() == SAMPLE
        assert row["relation"] in {"ratio", "difference", "value"}
        assert row["figure_low"] <= row["figure"] <= row["figure_high"]
        assert row["met"] is None


def test_every_case_that_needs_no_peer_has_a_target(results: Path) -> None:
    """Two cases are judged against peers alone, and one at its full size alone."""
    judged = {
        case
        for case in CASES
        for row in json.loads((results / f"{case}.json").read_text("utf-8"))["rows"]
        if row["target"]
    }
    assert judged == {*CASES} - {"tasks", "stream_writes", "growth"}


def test_renders_the_table_between_the_markers(tmp_path: Path) -> None:
    """The page gets the table with figure, target and verdict; the prose around it stays."""
    page = tmp_path / "performance.md"
    page.write_text(PAGE, "utf-8")
    done = run("--render", "--results", canned(tmp_path), "--page", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text("utf-8")
    assert text.startswith("# Performance\n\nBefore.\n")
    assert text.endswith("\n\nAfter.\n")
    assert "What was there" not in text
    assert (
        "| through the log | 20,000 appends/s | 50,000 appends/s (bare sqlite3) "
        "| 0.4 x (0.36 … 0.44) | ≥ 0.5 x | **missed** |"
    ) in text
    assert "2 cores" in text
    assert "](performance/appends.svg)" in text


def test_renders_the_same_twice(tmp_path: Path) -> None:
    """The same results make the same page and the same plots, to the byte."""
    page = tmp_path / "performance.md"
    page.write_text(PAGE, "utf-8")
    made: list[tuple[bytes, bytes]] = []
    for _ in range(2):
        assert run("--render", "--results", canned(tmp_path), "--page", page).returncode == 0
        made.append((page.read_bytes(), (tmp_path / "performance/appends.svg").read_bytes()))
        shutil.rmtree(tmp_path / "performance")
    assert made[0] == made[1]
    assert made[0][1].startswith(b"<svg ")


def test_says_met_where_a_target_is_met(tmp_path: Path) -> None:
    """A figure that reaches its target is shown as met."""
    page = tmp_path / "performance.md"
    page.write_text(PAGE, "utf-8")
    run("--render", "--results", canned(tmp_path, figure=0.6, met=True), "--page", page)
    assert "≥ 0.5 x | met |" in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "there is no benchmark 'nothing'"),
        (("--small",), "--small needs --results"),
        (("--render", "--results", "{folder}"), "has no results"),
    ],
)
def test_says_in_one_line_what_is_wrong(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    """What can't be done is one line on stderr, and a failure."""
    done = run(*(argument.format(folder=tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr
