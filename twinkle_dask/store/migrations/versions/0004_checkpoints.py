"""Checkpoints that are exported, copied and shared."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Find who shares a folder; remember when unnamed weights were last sampled."""
    op.add_column("checkpoints", sa.Column("last_used_at", sa.DateTime(timezone=True)))
    op.create_index("ix_checkpoints_path", "checkpoints", ["path"])
