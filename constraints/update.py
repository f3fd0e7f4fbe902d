"""Writes pinned.txt and lowest.txt anew from what pyproject.toml asks for.

    python constraints/update.py

pinned.txt
    The newest version of everything that perdure, its extras and its tools need. Set-up, tests and
    CI use it, so that a run today and a run next year are the same run.
lowest.txt
    The lowest version that pyproject.toml allows of everything it names for users, with the newest
    of all the rest. CI runs the tests with it once more, so that the ranges are honest.

Run it with the oldest Python that is supported: an older Python needs more packages, never fewer.
It changes nothing but the two files, and names no registry in them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT: Final = Path(__file__).resolve().parent.parent
OLDEST: Final = (3, 11)
NEWER: Final = ("3.12", "3.13", "3.14")
"""Pythons for which there has to be a wheel of each pinned version."""


def main() -> None:
    """Resolve both sets and write them."""
    if sys.version_info[:2] != OLDEST:
        sys.exit("update.py: run this with Python {}.{}".format(*OLDEST))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    bounds = lower_bounds(project)

    pinned = resolve(["--group", "dev", "--editable", f"{ROOT}[all]", "pip"], {})
    for version in NEWER:
        resolve(
            ["--python-version", version, "--only-binary", ":all:"]
            + [f"{name}=={pin}" for name, pin in pinned.items()],
            pinned,
        )
    write(
        "pinned.txt",
        "Everything that runs, tests and tools use. Made by constraints/update.py.",
        pinned,
    )

    groups = project["dependency-groups"].values()
    names = {
        canonicalize_name(Requirement(r).name) for g in groups for r in g if isinstance(r, str)
    }
    tools = {str(name): pinned[name] for name in names}
    lowest = resolve(
        ["--group", "test", "--editable", f"{ROOT}[all]", "pip"],
        tools | {"pip": pinned["pip"]} | bounds,
    )
    write(
        "lowest.txt",
        "What users' environments may have at the least. Made by constraints/update.py.\n"
        "# First the lower bounds of pyproject.toml, then what came with them.",
        {name: lowest.pop(name) for name in sorted(bounds)},
        lowest,
    )


def lower_bounds(project: Mapping[str, Any]) -> dict[str, str]:
    """Return the lower bound of each distribution that the project names for its users."""
    metadata = project["project"]
    named = [*metadata["dependencies"]]
    for extra in metadata["optional-dependencies"].values():
        named += extra
    bounds: dict[str, str] = {}
    for requirement in map(Requirement, named):
        name = str(canonicalize_name(requirement.name))
        if name == metadata["name"]:
            continue
        lower = [s.version for s in requirement.specifier if s.operator == ">="]
        if len(lower) != 1 or bounds.setdefault(name, lower[0]) != lower[0]:
            sys.exit(f"update.py: {requirement} needs one lower bound, the same wherever it stands")
    return bounds


def resolve(arguments: Iterable[str], constraints: Mapping[str, str]) -> dict[str, str]:
    """Return name and version of what pip would install, perdure itself left out."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        limits = Path(folder, "constraints.txt")
        limits.write_text("".join(f"{n}=={v}\n" for n, v in constraints.items()), "utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        pip += ["--ignore-installed", "--report", str(report), "--constraint", str(limits)]
        if subprocess.run([*pip, *arguments], cwd=ROOT, check=False).returncode:
            sys.exit("update.py: pip found no solution; its own message is above")
        found = [item["metadata"] for item in json.loads(report.read_text("utf-8"))["install"]]
    versions = {str(canonicalize_name(item["name"])): str(item["version"]) for item in found}
    return {name: versions[name] for name in sorted(versions) if name != "perdure"}


def write(name: str, comment: str, *parts: Mapping[str, str]) -> None:
    """Write one constraints file; an empty line stands between its parts."""
    blocks = ["".join(f"{n}=={v}\n" for n, v in part.items()) for part in parts]
    (ROOT / "constraints" / name).write_text(f"# {comment}\n" + "\n".join(blocks), "utf-8")


if __name__ == "__main__":
    main()
