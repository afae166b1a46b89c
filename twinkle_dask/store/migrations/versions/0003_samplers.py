"""What samplers remember: shared weights, copies of a client, recorded sequences."""

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Nothing yet."""
