"""Order by age, back-off, crash counts, dedupe keys, facts and quarantine."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Change jobs and outbox, create the new tables."""
    op.drop_index("ix_jobs_ready", "jobs")
    op.drop_column("jobs", "boot_id")
    for column in (
        sa.Column("due_ms", sa.Integer, nullable=False, server_default="0"),
        sa.Column("ready_boot_ms", sa.Integer),
        sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("crashes", sa.Integer, nullable=False, server_default="0"),
        sa.Column("crashed_attempt", sa.Integer, nullable=False, server_default="0"),
        sa.Column("dedupe_key", sa.String),
        sa.Column("options", sa.String),
        sa.Column("progress", sa.String),
    ):
        op.add_column("jobs", column)
    op.execute("UPDATE jobs SET due_ms = created_ms + urgency * 60000")
    _create_partial_index(
        "ix_jobs_ready", "jobs", ["lane", "due_ms", "seq"], "state = 'queued' AND task_id IS NULL"
    )
    _create_partial_index(
        "ix_jobs_dedupe", "jobs", ["dedupe_key"], "dedupe_key IS NOT NULL AND ended_ms IS NULL"
    )
    _create_partial_index(
        "ux_outbox_pending_progress",
        "outbox",
        ["job_id"],
        "kind = 'progress' AND seq IS NULL",
        unique=True,
    )
    _create_tables()


def _create_tables() -> None:
    op.create_table(
        "facts",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
    op.create_table(
        "crashes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("task_id", sa.String, nullable=False, unique=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("signal", sa.String, nullable=False),
        sa.Column("at_ms", sa.Integer, nullable=False),
    )
    op.create_table(
        "quarantine",
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("version", sa.String, primary_key=True),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("since_ms", sa.Integer, nullable=False),
    )


def _create_partial_index(
    name: str, table: str, columns: list[str], where: str, *, unique: bool = False
) -> None:
    op.create_index(name, table, columns, unique=unique, sqlite_where=sa.text(where))
