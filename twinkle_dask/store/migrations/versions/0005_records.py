"""Audit events, usage, secrets, and what is told of API keys."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
    )
    op.create_table(
        "audit_events",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_events"),
    )
    op.create_index(
        "ix_audit_events_tenant_id_created_at", "audit_events", ["tenant_id", "created_at"]
    )
    op.create_table(
        "usage",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("hour", _TIME, nullable=False),
        sa.Column("key_id", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(
            *("tenant_id", "hour", "key_id", "kind", "base_model", "session_id"), name="pk_usage"
        ),
    )
    for name in ("key_id", "input_tokens", "output_tokens"):
        op.add_column("operations", sa.Column(name, sa.BigInteger()))
    op.add_column("tenant_keys", sa.Column("origin", sa.String()))
    op.add_column("tenant_keys", sa.Column("note", sa.Text()))
    op.add_column("tenant_keys", sa.Column("email", sa.Text()))
    op.add_column("tenant_keys", sa.Column("revoked_at", _TIME))
    # Until now a key that was not configured was made at a start.
    op.execute("UPDATE tenant_keys SET origin = 'start' WHERE tenant_id = 'local'")
