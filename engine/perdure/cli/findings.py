"""What `perdure doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from perdure.cli.figures import count, things

if TYPE_CHECKING:
    from perdure.store.database import Database

__all__ = ["LOG", "Finding", "State", "of_defences", "of_log"]

State = Literal["ok", "note", "warning", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    state: State
    value: str
    hint: str | None = None
    """What to do about it."""


# How far the log goes, how much of that isn't in it, and whether that is because it is an archive.
LOG: Final = """
    SELECT position, archive_of IS NOT NULL AS archive,
        (SELECT coalesce(sum(last_position - first_position + 1), 0) FROM gaps) AS elsewhere
    FROM log_head
"""


def of_log(row: Any) -> Finding:  # noqa: ANN401 - of whatever driver
    """Return what there is to say of what `LOG` finds.

    Args:
        row: The only row there is; None where it is missing.
    """
    if row is None:
        return Finding("log", "broken", "it has lost its head row", "restore a backup")
    position, archive, elsewhere = row
    here = things(int(position - elsewhere), "event")
    if not elsewhere or archive:
        return Finding("log", "ok", here)
    return Finding("log", "ok", f"{here}, and {count(int(elsewhere))} more in archives")


def of_defences(database: Database) -> Finding:
    """Return what there is to say of triggers, unique indexes and views."""
    from perdure.store.defences import look

    with database.snapshot() as connection:
        standing = look(database, connection)
    if standing.flaws:
        more = f", and {len(standing.flaws) - 1} more" if len(standing.flaws) > 1 else ""
        hint = "`perdure verify` says what to do"
        return Finding("defences", "broken", f"{standing.flaws[0]}{more}", hint)
    if standing.unchecked:
        return Finding("defences", "note", f"not looked at: {'; '.join(standing.unchecked)}")
    return Finding("defences", "ok", "triggers, unique indexes and views are perdure's")
