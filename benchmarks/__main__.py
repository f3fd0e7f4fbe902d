"""`python -m benchmarks`: measure, write the results down, and bring the page up to date."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, Case
from benchmarks.machine import describe
from benchmarks.report import render, summary
from benchmarks.session import ROOT, Session

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; returns the exit code."""
    given = _parser().parse_args(arguments)
    if given.list:
        for case in CASES:
            print(f"{case.name:15}{case.about}")
        return 0
    known = {case.name: case for case in CASES}
    if given.small and given.results == RESULTS:
        return _fail("--small needs --results DIR: its numbers mean nothing, and must not be kept")
    unknown = [name for name in given.names if name not in known]
    if unknown:
        return _fail(f"there is no benchmark {unknown[0]!r}: --list shows which there are")
    if not given.small and not given.page.is_file():  # before an hour has gone into it
        return _fail(f"there is no {given.page}: --page names a file to bring up to date")
    try:
        if not given.render:
            _measure([known[name] for name in given.names or known], given)
        if not given.small:  # what means nothing never reaches the page
            render(given.results, given.page)
    except KeyboardInterrupt:
        return _fail("stopped; what was measured before is written down", 130)
    except Exception as error:
        if given.traceback:
            raise
        return _fail(f"{type(error).__name__}: {error}".splitlines()[0])
    return 0


def _measure(cases: Sequence[Case], given: argparse.Namespace) -> None:
    machine = describe()
    gc.set_threshold(50_000, 20, 20)  # as the program has it, for ours and the bare rivals alike
    given.results.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="perdure-bench-", dir=given.folder)
        folder = stack.enter_context(made)
        session = Session(
            Path(folder),
            rounds=given.rounds or (1 if given.small else 5),
            small=given.small,
            full=given.full,
            peers=given.peers,
            say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        )
        stack.callback(session.close)
        for number, case in enumerate(cases, 1):
            print(f"[{number}/{len(cases)}] {case.name}: {case.about}", file=sys.stderr, flush=True)
            began = time.monotonic()
            rows = [row.as_json() for row in case.run(session)]
            if given.small:  # sizes that mean nothing are not judged
                for row in rows:
                    row["met"] = None
            result: dict[str, Any] = {
                "case": case.name,
                "about": case.about,
                "seconds": round(time.monotonic() - began, 1),
                "rounds": max(len(row["ours"]["values"]) for row in rows),
                "small": given.small,
                "machine": machine,
                "rows": rows,
            }
            text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            (given.results / f"{case.name}.json").write_text(text, "utf-8")
            if given.json:
                print(json.dumps(result), flush=True)
            else:
                print(summary(result), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure how fast perdure is, as ratios within one run; write "
        "benchmarks/results/*.json, and the table and the plots of docs/performance.md.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="only these benchmarks; default: all")
    add("--list", action="store_true", help="list the benchmarks")
    more = "measure everything N times, tasks and streaming twice as often; default: 5"
    add("--rounds", type=_positive, metavar="N", help=more)
    add("--peers", action="store_true", help="measure other libraries too, installed on first use")
    add("--full", action="store_true", help="large sizes too: 10 million events; takes an hour")
    add("--small", action="store_true", help="see that everything runs; the numbers mean nothing")
    add("--json", action="store_true", help="results on stdout as JSON, one benchmark a line")
    add("--render", action="store_true", help="measure nothing, only write the page anew")
    add("--folder", type=Path, metavar="DIR", help="where databases are made; default: the usual")
    add("--results", type=Path, metavar="DIR", default=RESULTS, help="where results are written")
    add("--page", type=Path, metavar="FILE", default=PAGE, help="the page to bring up to date")
    add("--traceback", action="store_true", help="show where an error comes from")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _fail(message: str, code: int = 1) -> int:
    print(f"benchmarks: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
