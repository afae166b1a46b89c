"""What samplers remember: shared weights, copies of a client, recorded sequences."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Add columns and tables; the samplers that are there have weights of their own."""
    op.add_column("samplers", sa.Column("follows_run_id", sa.String()))
    op.add_column(
        "samplers", sa.Column("num_joined", sa.Integer(), nullable=False, server_default="0")
    )
    op.create_table(
        "inflight_weights",
        sa.Column("checkpoint_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("checkpoint_id", name="pk_inflight_weights"),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name="fk_inflight_weights_run_id"),
    )
    op.create_index("ix_inflight_weights_run_id_seq", "inflight_weights", ["run_id", "seq"])
    op.create_table(
        "recorded_samples",
        sa.Column("ticket_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("content_path", sa.String()),
        sa.Column("content", sa.LargeBinary()),
        sa.PrimaryKeyConstraint("ticket_id", name="pk_recorded_samples"),
        sa.ForeignKeyConstraint(
            ["session_id"], ["sessions.id"], name="fk_recorded_samples_session_id"
        ),
    )
    op.create_index("ix_recorded_samples_session_id", "recorded_samples", ["session_id"])
