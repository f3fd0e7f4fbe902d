"""Names of tasks: `platform_yyyymmdd_uuid8`, as people read them."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

__all__ = ["generate_task_id"]


def generate_task_id(platform: str, at: datetime | None = None) -> str:
    """Return a new task id: the platform, the UTC date and eight random hexadecimal characters.

    Eight characters collide on busy days, so the id is a proposal: the database's unique
    constraint decides, and whoever submits the task draws again. A platform's name may contain
    underscores; the last two parts are always the date and the random one.

    Args:
        platform: The platform's name.
        at: The moment whose date counts; None takes the present one.
    """
    day = (at or datetime.now(UTC)).astimezone(UTC)
    return f"{platform}_{day:%Y%m%d}_{uuid.uuid4().hex[:8]}"
