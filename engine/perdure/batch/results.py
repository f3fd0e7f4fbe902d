"""The results of a batch as JSON lines, in the order of the input, whatever its size."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, Final, Self

import orjson
import sqlalchemy as sa

from perdure.batch.intake import Taken
from perdure.batch.runs import latest_runs, select_where
from perdure.store.database import Database
from perdure.store.schema import tasks

__all__ = ["Ledger", "each_result", "result_line"]

_PAGE: Final = 200
_USAGE: Final = (
    *("input_tokens", "output_tokens", "cache_read_tokens"),
    *("cache_write_tokens", "reasoning_tokens"),
)
# All but the prompt, which the input has, and what is of no use outside of the database.
_LEFT_OUT: Final = frozenset(
    {
        *("stream_id", "prompt", "worker", "available_at", "cancel_requested"),
        *("key", "fingerprint", "parent", "priority", "batch"),
    }
)
_NAMES: Final = tuple(str(column.name) for column in tasks.c if column.name not in _LEFT_OUT)
_BY_ID: Final = sa.select(*(tasks.c[name] for name in _NAMES))
_BY_KEY: Final = sa.select(tasks.c.key, *(tasks.c[name] for name in _NAMES))


class Ledger:
    """What became of each row, in the order of the input; kept in a file, not in memory.

    Used as a context manager.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="perdure-")  # noqa: SIM115

    def add(self, rows: Iterable[Taken]) -> None:
        """Note what became of rows."""
        for taken in rows:
            self._file.write(orjson.dumps(tuple(taken), option=orjson.OPT_APPEND_NEWLINE))

    def __iter__(self) -> Iterator[Taken]:
        """Yield all rows, from the first."""
        self._file.seek(0)
        for line in self._file:
            yield Taken(*orjson.loads(line))

    def __enter__(self) -> Self:
        """Return the ledger."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Give the file back."""
        self._file.close()


async def each_result(database: Database, ledger: Ledger) -> AsyncGenerator[dict[str, Any], None]:
    """Yield one result a row, in the order of the input, each of the row's latest run."""
    page: list[Taken] = []
    for taken in ledger:
        page.append(taken)
        if len(page) == _PAGE:
            for result in await _results(database, page):
                yield result
            page = []
    for result in await _results(database, page):
        yield result


async def _results(database: Database, page: list[Taken]) -> list[dict[str, Any]]:
    keys = {one.key for one in page if one.key is not None}
    runs = {row[0]: row[1:] for row in await select_where(database, _BY_KEY, tasks.c.key, keys)}
    latest = await latest_runs(database, [run[0] for run in runs.values()])
    if latest:
        ids = {run.task_id for run in latest.values()}
        rows = await select_where(database, _BY_ID, tasks.c.task_id, ids)
        again = {row[0]: row for row in rows}
        for key, run in runs.items():
            if run[0] in latest:
                runs[key] = again[latest[run[0]].task_id]
    return [_result(one, None if one.key is None else runs.get(one.key)) for one in page]


def _result(taken: Taken, run: Sequence[Any] | None) -> dict[str, Any]:
    about: dict[str, Any] = {"line": taken.line, "id": taken.id}
    if run is None:
        return about | {"task_id": None, "status": "invalid", "error": taken.problem}
    about.update(zip(_NAMES, run, strict=True))
    about["usage"] = {name: about.pop(name) for name in _USAGE}
    about["labels"] = orjson.loads(about["labels"])
    for name in ("files_created", "tool_calls"):
        about[name] = [] if about[name] is None else orjson.loads(about[name])
    return about


def result_line(result: Mapping[str, Any]) -> bytes:
    """Return a result as a line of JSON."""
    return orjson.dumps(result, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE)
