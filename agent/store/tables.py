"""The store's tables, as SQLModel classes.

The schema on disk is what the migrations make; a test compares the two.
Times ending in `_ms` are wall-clock milliseconds since 1970; those with
`boot_ms` count from the machine's boot and mean something only together with
the boot id they were written under.
"""

from sqlalchemy import Index, text
from sqlmodel import Field, SQLModel

# SQLite adds a column that may not be NULL only with a default of its own.
_ZERO = {"server_default": "0"}


class Job(SQLModel, table=True):
    """One job, from its acceptance to 30 days after its end."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(
            "ix_jobs_ready",
            "lane",
            "due_ms",
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
        Index(
            "ix_jobs_dedupe",
            "dedupe_key",
            sqlite_where=text("dedupe_key IS NOT NULL AND ended_ms IS NULL"),
        ),
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
    """9 − priority."""
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
    """Wall time before which it is not dispatched; for after a reboot."""
    expires_boot_ms: int | None = None
    """Deadline to start by, on this boot's clock."""
    expires_ms: int | None = None
    """The same on the wall clock, for after a reboot."""
    max_attempts: int = 5
    on_interrupt: str = "retry"
    run_timeout_s: float = 120.0
    result: str | None = None
    """The result record's JSON body."""
    due_ms: int = Field(default=0, sa_column_kwargs=_ZERO)
    """Order of dispatch: arrival, plus the time in which the job would gain its urgency by age.
    On the ledger's own line of time, which goes on from run to run."""
    ready_boot_ms: int | None = None
    """Not dispatched before, on this boot's clock: `not_before`, a back-off or a window."""
    failures: int = Field(default=0, sa_column_kwargs=_ZERO)
    """Attempts that ended with an error worth another try."""
    crashes: int = Field(default=0, sa_column_kwargs=_ZERO)
    """Attempts that crashed their worker, by evidence."""
    crashed_attempt: int = Field(default=0, sa_column_kwargs=_ZERO)
    """The newest attempt counted in `crashes`."""
    dedupe_key: str | None = None
    options: str | None = None
    """Rarely given wishes as JSON: `agent.store.options.JobOptions`."""
    progress: str | None = None
    """The newest progress, JSON."""


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
        Index(
            "ux_outbox_pending_progress",
            "job_id",
            unique=True,
            sqlite_where=text("kind = 'progress' AND seq IS NULL"),
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
    """Numbers that only grow: `boot`, `conn`, `seq`, `acked`, `horizon_ms`, `newest_id_ms`."""

    __tablename__ = "counters"

    name: str = Field(primary_key=True)
    value: int


class Fact(SQLModel, table=True):
    """What is true of this ledger: its identity, the boot it was last used in."""

    __tablename__ = "facts"

    name: str = Field(primary_key=True)
    value: str


class Crash(SQLModel, table=True):
    """A worker's crash while it ran a model version; kept for a day."""

    __tablename__ = "crashes"

    id: int | None = Field(default=None, primary_key=True)
    task_id: str = Field(unique=True)
    """The task that ran: a report that comes twice counts once."""
    model: str
    version: str
    signal: str
    at_ms: int


class Quarantine(SQLModel, table=True):
    """A model version that is not served, because it crashed its workers."""

    __tablename__ = "quarantine"

    model: str = Field(primary_key=True)
    version: str = Field(primary_key=True)
    reason: str
    since_ms: int


class Deployment(SQLModel, table=True):
    """A new version of a model on its way to be the active one; at most one a model."""

    __tablename__ = "deployments"

    model: str = Field(primary_key=True)
    job_id: str = Field(unique=True)
    """The update job that asked for it, running until this ends."""
    release: str
    number: int
    """Of the new version in the repository."""
    digest: str
    """Sha256 of its manifest."""
    previous: int | None = None
    """The version that is active until the switch, and again after a rollback."""
    older: int | None = None
    """What was `previous` before."""
    phase: str
    """`agent.lifecycle.Phase`; what is committed here happens next, and is harmless twice."""
    step: int = 0
    """Of a canary: which share."""
    params: str
    """JSON: `agent.lifecycle.UpdateParams`."""
    boot_id: str
    """The machine's boot in which the phase began."""
    since_ms: int
    since_boot_ms: int
    detail: str = "{}"
    """JSON: what the phase stands on, such as the previous version's latency."""


class ModelState(SQLModel, table=True):
    """How the last update of a model ended, for `reported`."""

    __tablename__ = "model_states"

    model: str = Field(primary_key=True)
    status: str
    release: str
    code: str
    message: str
    at_ms: int
    detail: str = "{}"


class BadVersion(SQLModel, table=True):
    """A version that failed on this box: not tried again unless somebody forces it."""

    __tablename__ = "bad_versions"

    digest: str = Field(primary_key=True)
    model: str
    release: str
    code: str
    reason: str
    since_ms: int
