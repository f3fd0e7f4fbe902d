"""How long each worker's signs of life hold.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column. Before, whoever looked for lost workers went by a lease of its own."""
    op.add_column("workers", sa.Column("lease_seconds", sa.Double()))
    compatible = sa.table("compatible", sa.column("revision", sa.Text()))
    op.bulk_insert(compatible, [{"revision": revision}])


def downgrade() -> None:
    """Remove the column."""
    compatible = sa.table("compatible", sa.column("revision", sa.Text()))
    op.execute(compatible.delete().where(compatible.c.revision == revision))
    op.drop_column("workers", "lease_seconds")
