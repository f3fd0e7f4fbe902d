"""What the README and `examples/` show works as it stands there."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run_python(code: Path, folder: Path) -> str:
    """Run a file in an empty ``folder`` and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", str(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_library_example_runs(tmp_path: Path) -> None:
    """The example for Python streams one task, runs two more, and all of them complete."""
    printed = run_python(EXAMPLES / "library.py", tmp_path)
    assert printed.count("completed") == 3


def test_overnight_example_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    """Killed half-way and started again, it runs nothing twice that had completed."""
    killed = subprocess.Popen(
        [sys.executable, "-P", str(EXAMPLES / "overnight.py")], cwd=tmp_path, stdout=subprocess.PIPE
    )
    try:
        until = time.monotonic() + 120
        while not (before := completed(tmp_path / "overnight.db")):
            assert killed.poll() is None, "it ended by itself"
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        killed.kill()
        killed.communicate()
    printed = run_python(EXAMPLES / "overnight.py", tmp_path)
    assert "40 tasks, 40 of them known already, 0 refused" in printed
    assert "40 completed, in " in printed
    after = completed(tmp_path / "overnight.db")
    assert len(after) == 40
    assert after.items() >= before.items()
    assert "40 completed, in " in run_python(EXAMPLES / "overnight.py", tmp_path)
    assert completed(tmp_path / "overnight.db") == after


def completed(database: Path) -> dict[str, tuple[int, str]]:
    """Return the completed tasks: in which attempt, and when."""
    if not database.exists():
        return {}
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)) as connection:
        if (
            connection.execute("SELECT * FROM sqlite_master WHERE name = 'tasks'").fetchone()
            is None
        ):
            return {}
        found = connection.execute(
            "SELECT task_id, attempts, ended_at FROM tasks WHERE status = 'completed'"
        )
        return {task_id: (attempts, at) for task_id, attempts, at in found}


def test_readme_python_runs(tmp_path: Path) -> None:
    """The README's Python is a whole program."""
    text = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program = tmp_path / "readme.py"
    program.write_text(block, "utf-8")
    assert "completed" in run_python(program, tmp_path)


def test_readme_task_is_run(tmp_path: Path) -> None:
    """The README's task with all it may have falls back, is checked, and comes once."""
    text = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    program = tmp_path / "readme.py"
    program.write_text(AROUND_THE_TASK.replace("    BLOCK", textwrap.indent(block, " " * 12)))
    assert run_python(program, tmp_path) == "short='all is well'\n1\n" * 2


AROUND_THE_TASK = """
import asyncio
from pydantic import BaseModel
from perdure import Completed, Engine, InvalidRequest, Task, TaskConstraints
from perdure.testing import ScriptedAdapter

class Summary(BaseModel):
    short: str

async def main(report="All is well."):
    claude = ScriptedAdapter(InvalidRequest("no"), platform="claude")
    chatgpt = ScriptedAdapter('{"short": "all is well"}', Completed(), platform="chatgpt")
    for _ in range(2):
        async with Engine.open("readme.db", adapters=[claude, chatgpt]) as engine:
    BLOCK
            print(summary)
            print(len(await engine.list_tasks()))

asyncio.run(main())
"""


# question -> query
QUERIES = dict(
    re.findall(
        r"^-- ([^\n]+\?)[^\n]*\n((?:SELECT|WITH).*?);$",
        (EXAMPLES / "queries.sql").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the tasks of the example for Python."""
    folder = tmp_path_factory.mktemp("queries")
    run_python(EXAMPLES / "library.py", folder)
    return folder / "library.db"


@pytest.mark.parametrize("question", QUERIES)
def test_queries_are_answered(database: Path, question: str) -> None:
    """Each query of examples/queries.sql runs on the tables and views as they are."""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        assert connection.execute(QUERIES[question]).description


def test_every_query_has_its_question() -> None:
    """None of the queries is left out above."""
    assert (EXAMPLES / "queries.sql").read_text("utf-8").count(";\n") == len(QUERIES)


def test_tasks_run_to_the_end_and_only_once(tmp_path: Path) -> None:
    """The quickstart's command completes every row; said again, it has nothing left to do."""
    tasks = EXAMPLES / "tasks.jsonl"
    command = [sys.executable, "-P", "-m", "perdure.cli", "run", str(tasks)]
    command += ["--platform", "demo", "--db", "quickstart.db", "--out", "results.jsonl"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in tasks.read_text("utf-8").splitlines()]
    results = (tmp_path / "results.jsonl").read_text("utf-8").splitlines()
    assert len(results) == len(rows) == len({row["id"] for row in rows}) == 12
    with closing(sqlite3.connect(tmp_path / "quickstart.db")) as connection:
        counted = connection.execute("SELECT status, count(*) FROM tasks GROUP BY status")
        assert counted.fetchall() == [("completed", 12)]


def test_rooms_are_all_on_the_map() -> None:
    """The architecture's list of the engine's modules names each of them once, and no other."""
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    listed = text.partition("## The rooms")[2].partition("```")[2].partition("```")[0]
    rooms = re.findall(r"\b(\w+)(?:\.py|/)", listed)
    there = [
        path.stem
        for path in (ROOT / "engine/perdure").iterdir()
        if not path.name.startswith(("_", ".")) and path.suffix in ("", ".py")
    ]
    assert sorted(rooms) == sorted(there)


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Every link to a file, and to a heading in it, finds it."""
    text = document.read_text("utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [link for link in links if "://" not in link and not leads_somewhere(document, link)]
    assert broken == []


def leads_somewhere(document: Path, link: str) -> bool:
    """Return whether ``link`` in ``document`` names a file that is there, and a heading in it."""
    name, _, heading = link.partition("#")
    target = document.parent / name if name else document
    if not target.exists():
        return False
    headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE) if heading else []
    anchors = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings}
    return not heading or heading in anchors
