"""The calls that a model asked for, as a column of `tasks`.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Logs from before know no such calls, so there is nothing to fill in."""
    op.add_column("tasks", sa.Column("tool_calls", sa.Text().with_variant(JSONB(), "postgresql")))


def downgrade() -> None:
    """Remove the column; the calls stay in the log."""
    op.drop_column("tasks", "tool_calls")
