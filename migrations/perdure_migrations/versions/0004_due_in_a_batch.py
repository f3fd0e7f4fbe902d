"""What is due in a batch, in the order in which it is claimed.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_CONDITION = sa.text("status = 'pending' AND batch IS NOT NULL")


def upgrade() -> None:
    """Add the index. Without it each claim in a batch sorted all of the batch that waited."""
    op.create_index(
        "tasks_due_in_batch",
        "tasks",
        ["batch", "priority", "stream_id"],
        sqlite_where=_CONDITION,
        postgresql_where=_CONDITION,
    )
    compatible = sa.table("compatible", sa.column("revision", sa.Text()))
    op.bulk_insert(compatible, [{"revision": revision}])


def downgrade() -> None:
    """Remove the index."""
    compatible = sa.table("compatible", sa.column("revision", sa.Text()))
    op.execute(compatible.delete().where(compatible.c.revision == revision))
    op.drop_index("tasks_due_in_batch", "tasks")
