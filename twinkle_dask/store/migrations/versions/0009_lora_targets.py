"""What else an adapter may be asked to be: targets by name, dropout, another scale."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns; NULL stands for what every adapter was so far."""
    for table in ("runs", "checkpoints"):
        op.add_column(table, sa.Column("targets", sa.JSON()))
        op.add_column(table, sa.Column("dropout", sa.Float()))
        op.add_column(table, sa.Column("rslora", sa.Boolean()))
