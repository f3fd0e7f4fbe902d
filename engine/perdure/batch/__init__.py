"""Bulk runs: the rows of a JSONL or CSV file as one batch of tasks, of whatever size.

::

    source = open_source("tasks.jsonl")
    intake = Intake(engine, source.batch, Defaults({"platform": "demo"}))
    await intake.take(source.rows())

Each row has a key, its `id` or a digest of what it says, so taking the same input in again submits
only what isn't there: that is how a batch is resumed.
"""

from __future__ import annotations

from perdure.batch.intake import Counts, Intake, Taken
from perdure.batch.reading import Layout
from perdure.batch.results import Ledger, each_result, result_line
from perdure.batch.rows import Defaults, batch_name
from perdure.batch.runs import Run, latest_runs
from perdure.batch.source import Source, open_source
from perdure.batch.tally import Failures, Tally, Tallying, count_batch, count_failures

__all__ = [
    "Counts",
    "Defaults",
    "Failures",
    "Intake",
    "Layout",
    "Ledger",
    "Run",
    "Source",
    "Taken",
    "Tally",
    "Tallying",
    "batch_name",
    "count_batch",
    "count_failures",
    "each_result",
    "latest_runs",
    "open_source",
    "result_line",
]
