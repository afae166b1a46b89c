"""What the samplers of a session are set to."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "sampler_settings",
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("template", sa.JSON()),
        sa.Column("weights", sa.String()),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_sampler_settings_session_id"
        ),
        sa.PrimaryKeyConstraint("session_id", "base_model", "adapter", name="pk_sampler_settings"),
    )
