"""What is published is whole, says the truth about itself, and is light to import."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, entry_points
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PACKAGES = {
    "perdure": ROOT / "engine" / "perdure",
    "perdure_adapters": ROOT / "adapters" / "perdure_adapters",
    "perdure_migrations": ROOT / "migrations" / "perdure_migrations",
}

SDKS = {"anthropic", "google.genai", "httpx2", "openai"}
DATABASE = {"aiosqlite", "alembic", "psycopg", "sqlalchemy"}


def python(code: str) -> str:
    """Run ``code`` in an interpreter of its own and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def requirements() -> Iterator[Requirement]:
    """Yield what the project asks of its users' environments, extras included."""
    metadata = PROJECT["project"]
    named = [*metadata["dependencies"]]
    for extra in metadata["optional-dependencies"].values():
        named += extra
    for requirement in map(Requirement, named):
        if requirement.name != "perdure":
            yield requirement


def pins(name: str) -> dict[str, str]:
    """Return name -> version of a constraints file."""
    lines = (ROOT / "constraints" / name).read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


# The wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel as it would be published now."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return ZipFile(next(folder.glob("perdure-*.whl")))


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: ZipFile) -> None:
    """No top-level folder of ours can overwrite one of somebody else's."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_wheel_holds_every_source_file(wheel: ZipFile, package: str) -> None:
    """Nothing that works in the checkout is missing after `pip install`."""
    folder = PACKAGES[package]
    sources = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources - set(wheel.namelist()) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(wheel: ZipFile, package: str) -> None:
    """Type checkers only read a package's annotations where it has a `py.typed`."""
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_holds_the_migrations(wheel: ZipFile) -> None:
    """A database can be created and upgraded from an installed wheel alone."""
    names = wheel.namelist()
    assert "perdure_migrations/env.py" in names
    assert [n for n in names if re.fullmatch(r"perdure_migrations/versions/\d+_\w+\.py", n)]


def test_wheel_holds_the_licence(wheel: ZipFile) -> None:
    """The licence goes along, and is the one that the metadata names."""
    text = next(n for n in wheel.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
    assert b"Apache License" in wheel.read(text)
    metadata = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    assert b"\nLicense-Expression: Apache-2.0\n" in wheel.read(metadata)


# The names


@pytest.mark.parametrize("package", ["perdure", "perdure_adapters"])
def test_public_names_are_sorted_and_there(package: str) -> None:
    """`__all__` is a list to be read: sorted, without repetition, each name with a meaning."""
    module = importlib.import_module(package)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("package", ["perdure", "perdure_adapters"])
def test_nothing_is_public_by_accident(package: str) -> None:
    """Whatever of ours can be seen in the package is in `__all__`, or begins with an underscore."""
    code = (
        f"import {package} as p\n"
        "print(*[n for n in dir(p) if not n.startswith('_') and n not in p.__all__\n"
        "        and getattr(getattr(p, n), '__module__', '').startswith('perdure')])"
    )
    assert python(code).split() == []


def test_promised_names_are_public() -> None:
    """What the documentation tells people to import can be imported."""
    perdure = importlib.import_module("perdure")
    adapters = importlib.import_module("perdure_adapters")
    errors = importlib.import_module("perdure.errors")
    promised = {
        *("Engine", "Task", "TaskType", "TaskConstraints", "TaskStatus", "Usage", "Result"),
        *("StreamingResult", "collect_stream", "execute"),
        *errors.__all__,
    }
    assert promised - set(perdure.__all__) == set()
    assert {
        *("AsyncBasePlatformAdapter", "BasePlatformAdapter", "CompatibleAdapter", "DemoAdapter")
    } - set(adapters.__all__) == set()


# What an import costs


def imported_by(code: str) -> set[str]:
    """Return the modules that are loaded after ``code`` ran in an interpreter of its own."""
    report = "\nimport sys\nprint('', *sys.modules, sep='\\n')"
    return set(python(code + report).splitlines())


@pytest.mark.parametrize("package", ["perdure", "perdure_adapters"])
def test_import_loads_no_sdk(package: str) -> None:
    """An SDK takes a second or two to import: only its adapter does so, when it is used."""
    assert imported_by(f"import {package}") & SDKS == set()


def test_adapters_are_imported_without_their_sdks() -> None:
    """Looking at a platform, as `perdure platforms` does, needs none of the SDKs."""
    code = "import perdure_adapters as a\nfor name in a.__all__: getattr(a, name)"
    assert imported_by(code) & SDKS == set()


def test_help_loads_neither_sdk_nor_database() -> None:
    """`perdure --help` answers at once."""
    code = (
        "import sys\n"
        "from perdure.cli.main import main\n"
        "sys.argv = ['perdure', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
    )
    assert imported_by(code) & (SDKS | DATABASE) == set()


# What the metadata says


def test_console_script_is_declared() -> None:
    """Installing perdure puts `perdure` on the PATH."""
    (script,) = distribution("perdure").entry_points.select(group="console_scripts")
    assert script.name == "perdure"
    assert callable(script.load())


def test_platforms_are_declared_under_their_own_names() -> None:
    """The built-in platforms are found the way those of third parties are."""
    found = {e.name: e.load() for e in entry_points(group="perdure.platforms")}
    assert {"claude", "claude_code", "compatible", "demo"} <= set(found)
    assert {name: adapter.platform for name, adapter in found.items()} == {n: n for n in found}


def test_pinned_versions_are_within_the_ranges() -> None:
    """What we test with is something users can get."""
    pinned = pins("pinned.txt")
    outside = [
        str(r) for r in requirements() if pinned[canonicalize_name(r.name)] not in r.specifier
    ]
    assert outside == []


def test_lowest_versions_are_the_lower_bounds() -> None:
    """CI tests with exactly what pyproject.toml allows at the least."""
    lowest = pins("lowest.txt")
    bounds = {
        canonicalize_name(r.name): str(r.specifier).removeprefix(">=") for r in requirements()
    }
    assert {n: b for n, b in bounds.items() if Version(lowest[n]) != Version(b)} == {}


def test_every_dependency_has_a_reason() -> None:
    """CONTRIBUTING.md says what each dependency is for."""
    groups = PROJECT["dependency-groups"].values()
    tools = [Requirement(r).name for group in groups for r in group if isinstance(r, str)]
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = {*tools, *(r.name for r in requirements())}
    assert [name for name in sorted(named) if f"`{name}`" not in text] == []


# The checkout


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    """A clone works on any machine and with any package index."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    machine = re.compile(r"(?<![\w.~*-])/(?:home|root|Users|work)/")
    registry = re.compile(
        r"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian"
        r"|-index-url|--find-links|index-strategy"
    )
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in listed.stdout.splitlines()
        if (path := ROOT / name).is_file() and path != Path(__file__).resolve()
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1)
        if machine.search(line) or registry.search(line)
    ]
    assert found == []


def test_readme_commands_are_there() -> None:
    """The two commands of the README name files that exist."""
    text = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^sh (\S+)", text, re.MULTILINE)
    assert {"examples/quickstart.sh", "tests/run.sh"} <= set(commands)
    assert [name for name in commands if not (ROOT / name).is_file()] == []


def set_up(tmp_path: Path, interpreter: str) -> subprocess.CompletedProcess[str]:
    """Run the quickstart with an ``interpreter`` that is a shell script."""
    fake = tmp_path / "python3"
    fake.write_text(f"#!/bin/sh\n{interpreter}\n", "utf-8")
    fake.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PERDURE_")}
    environment |= {"PYTHON": str(fake), "PERDURE_VENV": str(tmp_path / "venv")}
    return subprocess.run(
        ["sh", str(ROOT / "examples" / "quickstart.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_set_up_refuses_an_old_python(tmp_path: Path) -> None:
    """Python 3.10 gets one line that says so, and nothing is left behind."""
    done = set_up(tmp_path, "exit 1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "is no Python of version 3.11 or newer" in line
    assert not (tmp_path / "venv").exists()


def test_set_up_says_what_to_do_without_venv(tmp_path: Path) -> None:
    """Debian's Python comes without `venv`: the last line names the package."""
    done = set_up(tmp_path, 'case "$*" in *venv*) mkdir -p "$3"; exit 1;; esac')
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "venv").exists()
