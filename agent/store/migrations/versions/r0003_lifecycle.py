"""Deployments, how the last update of each model ended, and versions that failed here."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "deployments",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("job_id", sa.String, nullable=False, unique=True),
        sa.Column("release", sa.String, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("previous", sa.Integer),
        sa.Column("older", sa.Integer),
        sa.Column("phase", sa.String, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("params", sa.String, nullable=False),
        sa.Column("boot_id", sa.String, nullable=False),
        sa.Column("since_ms", sa.Integer, nullable=False),
        sa.Column("since_boot_ms", sa.Integer, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
    )
    op.create_table(
        "model_states",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("release", sa.String, nullable=False),
        sa.Column("code", sa.String, nullable=False),
        sa.Column("message", sa.String, nullable=False),
        sa.Column("at_ms", sa.Integer, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
    )
    op.create_table(
        "bad_versions",
        sa.Column("digest", sa.String, primary_key=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("release", sa.String, nullable=False),
        sa.Column("code", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("since_ms", sa.Integer, nullable=False),
    )
