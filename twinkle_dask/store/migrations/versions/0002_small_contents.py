"""Small requests and results lie in their row of the journal."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add their columns; what stands there keeps its blobs."""
    op.add_column("operations", sa.Column("payload", sa.LargeBinary()))
    op.add_column("operations", sa.Column("result", sa.LargeBinary()))
