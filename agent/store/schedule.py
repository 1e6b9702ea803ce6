"""The schedule: which jobs may start, in which order, until when.

Time in three lines. The boot clock decides in this boot (deadlines, back-off,
`not_before`); the wall clock only carries deadlines over a reboot, where they
are placed anew (`begin`). The order of dispatch has a line of its own,
`due_ms`, which never runs backwards: arrival, plus `aging_s` for every level of
priority that a job lacks. So a job waits for a more urgent one only if that one
came less than so many levels later, and nothing waits for ever.

All run inside the caller's transaction.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sqlalchemy import (
    Connection,
    Integer,
    LargeBinary,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    select,
    update,
)

from agent.clock import Clock
from agent.jobs import JobState, Lane, Reason
from agent.store.facts import BOOT_ID, read_fact, save_fact
from agent.store.statements import Bulk, Statement
from agent.store.transitions import (
    JOBS,
    STATE_COLUMNS,
    STATE_NAMES,
    Changes,
    EndedJob,
    read_jobs,
)
from agent.topics import Topics


class ReadyJob(NamedTuple):
    """A queued job that may be dispatched."""

    seq: int
    job_id: str
    attempt: int
    interruptions: int
    handler: str
    model: str
    version: str | None
    run_timeout_s: float
    created_ms: int
    body_hash: str
    options: str | None
    body: bytes
    """As bytes: a damaged one may be no text any more."""


_ASSIGN = Bulk(
    ("seq", "task_id"),
    lambda rows, values: (
        update(JOBS)
        .where(JOBS.c.seq == values["seq"])
        .values(
            attempt=JOBS.c.attempt + literal_column("1"),
            task_id=values["task_id"],
            ready_boot_ms=literal_column("NULL"),
        )
    ),
)
_POSTPONE = Bulk(
    ("seq", "ready_boot_ms"),
    lambda rows, values: (
        update(JOBS)
        .where(JOBS.c.seq == values["seq"])
        .values(ready_boot_ms=values["ready_boot_ms"])
    ),
)
_READY = Statement(
    select(
        *(JOBS.c[name] for name in ReadyJob._fields if name != "body"),
        cast(JOBS.c.body, LargeBinary),
    )
    .where(
        # Written out, not a parameter: SQLite uses a partial index only where it can see why.
        JOBS.c.state == literal_column("'queued'"),
        JOBS.c.task_id.is_(None),
        JOBS.c.lane == bindparam("b_lane"),
        (JOBS.c.ready_boot_ms.is_(None)) | (JOBS.c.ready_boot_ms <= bindparam("b_boot_ms")),
    )
    .order_by(JOBS.c.due_ms, JOBS.c.seq)
    .limit(bindparam("b_limit", type_=Integer))
)
_LATE = Statement(
    select(*STATE_COLUMNS).where(
        JOBS.c.state == literal_column("'queued'"),
        JOBS.c.expires_boot_ms.is_not(None),
        JOBS.c.expires_boot_ms <= bindparam("b_boot_ms"),
    )
)


class Schedule:
    """Decides by time; one per ledger.

    Args:
        topics: where ends are reported.
        clock: boot and wall time.
        aging_s: in this time a waiting job gains one level of priority.
    """

    def __init__(self, topics: Topics, clock: Clock, aging_s: float) -> None:
        self._topics = topics
        self._clock = clock
        self._aging_ms = int(aging_s * 1000)
        self._line_offset_ms = 0

    def begin(self, tx: Connection) -> None:
        """Place times anew after a reboot, and go on with the order where it was.

        A back-off or a closed window ends with the boot it was counted in.
        """
        boot_id, boot_ms = self._clock.boot_id(), self._clock.boot_ms()
        if read_fact(tx, BOOT_ID) != boot_id:
            shift_ms = boot_ms - self._clock.wall_ms()
            tx.execute(
                update(JOBS)
                .where(JOBS.c.ended_ms.is_(None))
                .values(
                    expires_boot_ms=JOBS.c.expires_ms + shift_ms,
                    ready_boot_ms=case(
                        (JOBS.c.not_before_ms + shift_ms > boot_ms, JOBS.c.not_before_ms + shift_ms)
                    ),
                )
            )
            save_fact(tx, BOOT_ID, boot_id)
        newest = select(func.max(JOBS.c.due_ms - JOBS.c.urgency * self._aging_ms)).where(
            JOBS.c.ended_ms.is_(None)
        )
        self._line_offset_ms = max(0, (tx.execute(newest).scalar() or 0) + 1 - boot_ms)

    def compute_due(self, urgency: int) -> int:
        """Return a new job's place in the order of dispatch."""
        return self._clock.boot_ms() + self._line_offset_ms + urgency * self._aging_ms

    def expire(self, tx: Connection) -> list[EndedJob]:
        """End queued jobs whose time to start by has passed."""
        late = _LATE.fetch(tx, b_boot_ms=self._clock.boot_ms())
        if not late:
            return []
        changes = Changes(self._topics)
        reason = Reason("deadline_passed", "the job was not started before its deadline")
        now_ms = self._clock.wall_ms()
        for values in late:
            row = dict(zip(STATE_NAMES, values, strict=True))
            changes.move(row, JobState.EXPIRED, reason, now_ms)
        return changes.write(tx)

    def find_ready(self, tx: Connection, lane: Lane, limit: int) -> list[ReadyJob]:
        """Return queued jobs that wait for dispatch, in the order of dispatch."""
        params = {"b_lane": lane.value, "b_limit": limit, "b_boot_ms": self._clock.boot_ms()}
        return [ReadyJob._make(row) for row in _READY.fetch(tx, **params)]

    def assign(self, tx: Connection, tasks: Iterable[tuple[str, Sequence[ReadyJob]]]) -> None:
        """Start a new attempt of each job, carried by the task of that id."""
        rows = [{"seq": job.seq, "task_id": task} for task, jobs in tasks for job in jobs]
        _ASSIGN.run(tx, rows)

    def postpone(self, tx: Connection, jobs: Iterable[tuple[ReadyJob, float]]) -> None:
        """Let jobs wait so many seconds more."""
        now_ms = self._clock.boot_ms()
        rows = [
            {"seq": job.seq, "ready_boot_ms": now_ms + int(wait_s * 1000)} for job, wait_s in jobs
        ]
        _POSTPONE.run(tx, rows)

    def fail(self, tx: Connection, jobs: Sequence[tuple[str, Reason]]) -> list[EndedJob]:
        """End queued jobs that must not be dispatched."""
        reasons = dict(jobs)
        changes = Changes(self._topics)
        now_ms = self._clock.wall_ms()
        for row in read_jobs(tx, reasons):
            changes.move(row, JobState.FAILED, reasons[row["job_id"]], now_ms)
        return changes.write(tx)
