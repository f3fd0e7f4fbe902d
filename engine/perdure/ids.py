"""Names of tasks, `platform_yyyymmdd_uuid8`, as people read them; and the key of a retry."""

from __future__ import annotations

import os
import random
import time
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Final

__all__ = ["RETRY", "generate_task_id", "retry_key"]

# No batch may be named so, for keys of its rows begin with its name.
RETRY: Final = "retry"

# Nobody has to be unable to guess an id, and asking the kernel for every one takes a tenth of the
# time that a task takes. A generator of our own, so that nobody's `random.seed` repeats ids.
_chance = random.Random(os.urandom(16))  # noqa: S311 - see above
if hasattr(os, "register_at_fork"):  # else a child would draw what its parent draws
    os.register_at_fork(after_in_child=lambda: _chance.seed(os.urandom(16)))


def generate_task_id(platform: str, at: datetime | None = None) -> str:
    """Return a new task id: the platform, the UTC date and eight random hexadecimal characters.

    Eight characters collide on busy days, so the id is a proposal: the database's unique
    constraint decides, and whoever submits the task draws again. A platform's name may contain
    underscores; the last two parts are always the date and the random one.

    Args:
        platform: The platform's name.
        at: The moment whose date counts; None takes the present one.
    """
    days = int((time.time() if at is None else at.timestamp()) // 86_400)
    return f"{platform}_{_date(days)}_{_chance.getrandbits(32):08x}"


def retry_key(task_id: str) -> str:
    """Return the key of the one task that runs this one again."""
    return f"{RETRY}:{task_id}"


@lru_cache(maxsize=8)
def _date(days: int) -> str:
    """Return the date (UTC) so many days after 1970 began."""
    return f"{date(1970, 1, 1) + timedelta(days=days):%Y%m%d}"
