"""The store's tables, as SQLModel classes.

The schema on disk is what the migrations make; a test compares the two.
Times ending in `_ms` are wall-clock milliseconds since 1970; those with
`boot_ms` count from the machine's boot and mean something only together with
the boot id they were written under.
"""

from sqlalchemy import Index, text
from sqlmodel import Field, SQLModel


class Job(SQLModel, table=True):
    """One job, from its acceptance to 30 days after its end."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(
            "ix_jobs_ready",
            "lane",
            "urgency",
            "seq",
            sqlite_where=text("state = 'queued' AND task_id IS NULL"),
        ),
        Index(
            "ix_jobs_expiring",
            "expires_boot_ms",
            sqlite_where=text("state = 'queued' AND expires_boot_ms IS NOT NULL"),
        ),
        Index("ix_jobs_open", "job_id", "rev", "state", sqlite_where=text("ended_ms IS NULL")),
        Index("ix_jobs_task", "task_id", sqlite_where=text("task_id IS NOT NULL")),
        Index("ix_jobs_ended", "ended_ms", sqlite_where=text("ended_ms IS NOT NULL")),
        {"sqlite_autoincrement": True},
    )

    seq: int | None = Field(default=None, primary_key=True)
    job_id: str = Field(unique=True)
    source: str
    handler: str
    lane: str
    model: str
    version: str | None = None
    urgency: int = 4
    """9 − priority, so that an ascending index gives the order of dispatch."""
    body: str = ""
    """The job's body, JSON as it came; empty for a rejected one."""
    body_hash: str | None = None
    """None for a tombstone: a cancel that came before its submit."""
    state: str
    rev: int = 1
    reason_code: str | None = None
    reason: str | None = None
    attempt: int = 0
    """Number of the newest attempt; written before it is dispatched."""
    interruptions: int = 0
    task_id: str | None = None
    """The task that carries the current attempt; None while the job waits."""
    created_ms: int
    started_ms: int | None = None
    ended_ms: int | None = None
    not_before_ms: int | None = None
    expires_boot_ms: int | None = None
    """Deadline to start by, on the boot clock of `boot_id`."""
    expires_ms: int | None = None
    """The same on the wall clock, for after a reboot."""
    boot_id: str | None = None
    max_attempts: int = 5
    on_interrupt: str = "retry"
    run_timeout_s: float = 120.0
    result: str | None = None
    """The result record's JSON body."""


class Transition(SQLModel, table=True):
    """One step of a job's history; `rev` counts from 1 without gaps."""

    __tablename__ = "transitions"
    __table_args__ = {"sqlite_with_rowid": False}

    job_id: str = Field(primary_key=True)
    rev: int = Field(primary_key=True)
    state: str
    at_ms: int
    attempt: int = 0
    reason_code: str | None = None


class OutboxRecord(SQLModel, table=True):
    """One record that waits for, or is on, its way to the console."""

    __tablename__ = "outbox"
    __table_args__ = (
        Index("ix_outbox_unsent", "rank", "id", sqlite_where=text("seq IS NULL")),
        Index("ux_outbox_seq", "seq", unique=True, sqlite_where=text("seq IS NOT NULL")),
        Index(
            "ux_outbox_pending_state",
            "job_id",
            unique=True,
            sqlite_where=text("kind = 'state' AND seq IS NULL"),
        ),
        {"sqlite_autoincrement": True},
    )

    id: int | None = Field(default=None, primary_key=True)
    seq: int | None = None
    """Number on the wire, given at the first publish; never reused, no gaps."""
    rank: int
    """Flush order: `agent.store.outbox.Rank`."""
    kind: str
    job_id: str | None = None
    topic: str
    type: str
    retained: bool = False
    ttl_s: int | None = None
    """Life of the message at the broker, from its end of the wire."""
    body: str
    created_ms: int


class Counter(SQLModel, table=True):
    """Numbers that only grow: `boot`, `conn`, `seq`."""

    __tablename__ = "counters"

    name: str = Field(primary_key=True)
    value: int
