"""The first schema: jobs, their history, the outbox and counters."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create every table and index."""
    _create_jobs()
    _create_outbox()
    op.create_table(
        "transitions",
        sa.Column("job_id", sa.String, primary_key=True),
        sa.Column("rev", sa.Integer, primary_key=True),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("at_ms", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("reason_code", sa.String),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "counters",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.Integer, nullable=False),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.String, nullable=False, unique=True),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("handler", sa.String, nullable=False),
        sa.Column("lane", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("version", sa.String),
        sa.Column("urgency", sa.Integer, nullable=False),
        sa.Column("body", sa.String, nullable=False),
        sa.Column("body_hash", sa.String),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("rev", sa.Integer, nullable=False),
        sa.Column("reason_code", sa.String),
        sa.Column("reason", sa.String),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("interruptions", sa.Integer, nullable=False),
        sa.Column("task_id", sa.String),
        sa.Column("created_ms", sa.Integer, nullable=False),
        sa.Column("started_ms", sa.Integer),
        sa.Column("ended_ms", sa.Integer),
        sa.Column("not_before_ms", sa.Integer),
        sa.Column("expires_boot_ms", sa.Integer),
        sa.Column("expires_ms", sa.Integer),
        sa.Column("boot_id", sa.String),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("on_interrupt", sa.String, nullable=False),
        sa.Column("run_timeout_s", sa.Float, nullable=False),
        sa.Column("result", sa.String),
        sqlite_autoincrement=True,
    )
    queued, carried = "state = 'queued'", "task_id IS NOT NULL"
    _create_partial_index(
        "ix_jobs_ready", "jobs", ["lane", "urgency", "seq"], f"{queued} AND task_id IS NULL"
    )
    _create_partial_index(
        "ix_jobs_expiring",
        "jobs",
        ["expires_boot_ms"],
        f"{queued} AND expires_boot_ms IS NOT NULL",
    )
    _create_partial_index("ix_jobs_open", "jobs", ["job_id", "rev", "state"], "ended_ms IS NULL")
    _create_partial_index("ix_jobs_task", "jobs", ["task_id"], carried)
    _create_partial_index("ix_jobs_ended", "jobs", ["ended_ms"], "ended_ms IS NOT NULL")


def _create_outbox() -> None:
    op.create_table(
        "outbox",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("seq", sa.Integer),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("job_id", sa.String),
        sa.Column("topic", sa.String, nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("retained", sa.Boolean, nullable=False),
        sa.Column("ttl_s", sa.Integer),
        sa.Column("body", sa.String, nullable=False),
        sa.Column("created_ms", sa.Integer, nullable=False),
        sqlite_autoincrement=True,
    )
    _create_partial_index("ix_outbox_unsent", "outbox", ["rank", "id"], "seq IS NULL")
    _create_partial_index("ux_outbox_seq", "outbox", ["seq"], "seq IS NOT NULL", unique=True)
    _create_partial_index(
        "ux_outbox_pending_state",
        "outbox",
        ["job_id"],
        "kind = 'state' AND seq IS NULL",
        unique=True,
    )


def _create_partial_index(
    name: str, table: str, columns: list[str], where: str, *, unique: bool = False
) -> None:
    op.create_index(name, table, columns, unique=unique, sqlite_where=sa.text(where))
