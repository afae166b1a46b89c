"""Loss functions that tenants define."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "custom_losses",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("loss_seq", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("ranks", sa.JSON(), nullable=False),
        sa.Column("graph", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_custom_losses_session_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_custom_losses"),
        sa.UniqueConstraint("session_id", "loss_seq", name="uq_custom_losses_session_id_loss_seq"),
    )
