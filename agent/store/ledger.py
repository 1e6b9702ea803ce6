"""The ledger: every job, its history, and what is reported of it, in one transaction.

The rules, each kept by one method and tested by name:

- a job exists once its row is committed, and its first outbox row with it;
- the same id and body again: the present state is reported again; another
  body: the original stands and an event says so;
- every transition raises `rev` by one and writes its history and outbox rows;
- the attempt number is written before its task is dispatched, and an outcome
  counts only for the current attempt of a job that has not ended (fencing);
- an attempt that was lost is tried again until `max_attempts`, then the job
  ends `failed: attempts_exhausted`.

All methods run inside the caller's transaction (`agent.store.database`), and
only the agent calls those that write. Nothing here touches MQTT or Celery.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    Integer,
    Table,
    TableClause,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    update,
)

from agent.clock import Clock
from agent.commands import encode, is_same_body
from agent.jobs import ENDS, JobState, Lane, Reason, Source, path_to
from agent.store import outbox
from agent.store.records import build_event, build_result, build_state
from agent.store.statements import Bulk, Statement
from agent.store.tables import Job, Transition
from agent.topics import Topics

_JOBS = Job.__table__  # type: ignore[attr-defined]
_TRANSITIONS = Transition.__table__  # type: ignore[attr-defined]
_SYNC_OPEN = 200

Row = dict[str, Any]


class Verdict(StrEnum):
    """What became of a submitted job."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class NewJob(NamedTuple):
    """A job as intake hands it over; ended already where intake refused it."""

    job_id: str
    source: Source
    body: str = ""
    body_hash: str | None = None
    handler: str = ""
    lane: Lane = Lane.INFERENCE
    model: str = ""
    version: str | None = None
    priority: int = 5
    state: JobState = JobState.QUEUED
    reason: Reason | None = None
    not_before_ms: int | None = None
    expires_ms: int | None = None
    expires_boot_ms: int | None = None
    max_attempts: int = 5
    on_interrupt: str = "retry"
    run_timeout_s: float = 120.0


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
    body: str


class Outcome(NamedTuple):
    """How one attempt of one job ended, as a worker reports it."""

    job_id: str
    attempt: int
    state: JobState
    reason: Reason
    started_ms: int
    ended_ms: int
    result: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that ended in this transaction."""

    job_id: str
    source: Source
    state: JobState


@dataclass
class _Changes:
    """Rows that a batch of transitions writes."""

    jobs: list[Row] = field(default_factory=list)
    history: list[Row] = field(default_factory=list)
    reported: dict[str, int] = field(default_factory=dict)
    """When each job whose state is to be reported last moved."""
    results: list[Row] = field(default_factory=list)
    ended: list[EndedJob] = field(default_factory=list)


_STATE_NAMES = (
    "seq",
    "job_id",
    "source",
    "model",
    "state",
    "rev",
    "attempt",
    "interruptions",
    "task_id",
    "reason_code",
    "reason",
    "body_hash",
    "created_ms",
    "started_ms",
    "ended_ms",
    "max_attempts",
    "on_interrupt",
    "result",
)
_STATE_COLUMNS = [_JOBS.c[name] for name in _STATE_NAMES]
_CHANGED = (
    "state",
    "rev",
    "reason_code",
    "reason",
    "task_id",
    "interruptions",
    "started_ms",
    "ended_ms",
    "result",
)
_INSERTED = (
    "job_id",
    "source",
    "handler",
    "lane",
    "model",
    "version",
    "urgency",
    "body",
    "body_hash",
    "state",
    "rev",
    "reason_code",
    "reason",
    "attempt",
    "interruptions",
    "created_ms",
    "ended_ms",
    "not_before_ms",
    "expires_ms",
    "expires_boot_ms",
    "boot_id",
    "max_attempts",
    "on_interrupt",
    "run_timeout_s",
)


def _insert_into(table: Table) -> Callable[[TableClause, Mapping[str, ColumnElement[Any]]], Insert]:
    return lambda rows, values: insert(table).from_select(
        list(values), select(*values.values()).select_from(rows)
    )


_INSERT_JOB = Bulk(_INSERTED, _insert_into(_JOBS))
_INSERT_TRANSITION = Bulk(
    ("job_id", "rev", "state", "at_ms", "attempt", "reason_code"), _insert_into(_TRANSITIONS)
)
_UPDATE = Bulk(
    ("seq", *_CHANGED),
    lambda rows, values: (
        update(_JOBS)
        .where(_JOBS.c.seq == values["seq"])
        .values({name: values[name] for name in _CHANGED})
    ),
)
_ASSIGN = Bulk(
    ("seq", "task_id"),
    lambda rows, values: (
        update(_JOBS)
        .where(_JOBS.c.seq == values["seq"])
        .values(attempt=_JOBS.c.attempt + literal_column("1"), task_id=values["task_id"])
    ),
)
_READY = Statement(
    select(*(_JOBS.c[name] for name in ReadyJob._fields))
    .where(
        # Written out, not a parameter: SQLite uses a partial index only where it can see why.
        _JOBS.c.state == literal_column("'queued'"),
        _JOBS.c.task_id.is_(None),
        _JOBS.c.lane == bindparam("b_lane"),
        (_JOBS.c.not_before_ms.is_(None)) | (_JOBS.c.not_before_ms <= bindparam("b_now")),
    )
    .order_by(_JOBS.c.urgency, _JOBS.c.seq)
    .limit(bindparam("b_limit", type_=Integer))
)
_is_this_boot = _JOBS.c.boot_id == bindparam("b_boot_id")
_LATE = Statement(
    select(*_STATE_COLUMNS).where(
        _JOBS.c.state == literal_column("'queued'"),
        _JOBS.c.expires_boot_ms.is_not(None),
        (_is_this_boot & (_JOBS.c.expires_boot_ms <= bindparam("b_boot_ms")))
        | (~_is_this_boot & (_JOBS.c.expires_ms <= bindparam("b_wall_ms"))),
    )
)
# A JSON list as one parameter: the statement's text stays the same for any number of values.
_BY_ID, _BY_TASK = (
    Statement(
        select(*_STATE_COLUMNS).where(
            column.in_(select(func.json_each(bindparam("b_values")).table_valued("value")))
        )
    )
    for column in (_JOBS.c.job_id, _JOBS.c.task_id)
)


class Ledger:
    """Reads and changes jobs inside a transaction that the caller owns."""

    def __init__(self, topics: Topics, clock: Clock) -> None:
        self._topics = topics
        self._clock = clock

    def accept(self, tx: Connection, jobs: Sequence[NewJob]) -> list[Verdict]:
        """Write new jobs; meet known ones by their id and body.

        Returns one verdict a job, in order. A duplicate inside `jobs` meets
        the first of its id like any other.
        """
        now_ms = self._clock.wall_ms()
        known = {row["job_id"]: row for row in self._read(tx, [job.job_id for job in jobs])}
        verdicts: list[Verdict] = []
        rows: list[Row] = []
        again: dict[str, Row] = {}
        events: list[dict[str, object]] = []
        for job in jobs:
            row = known.get(job.job_id)
            if row is None:
                known[job.job_id] = row = self._new_row(job, now_ms)
                rows.append(row)
                verdicts.append(Verdict.ACCEPTED)
            elif self._is_same(tx, row, job):
                again[job.job_id] = row
                verdicts.append(Verdict.DUPLICATE)
            else:
                events.append(self._conflict(job, row, now_ms))
                verdicts.append(Verdict.CONFLICT)
        self._insert(tx, rows, now_ms)
        outbox.add_states(
            tx, [build_state(self._topics, row, _moved_ms(row)) for row in again.values()]
        )
        outbox.add_records(tx, events)
        return verdicts

    def _is_same(self, tx: Connection, row: Row, job: NewJob) -> bool:
        """Say whether a known id came with its own body; a tombstone takes any."""
        if row["body_hash"] is None or row["body_hash"] == job.body_hash:
            return True
        # The sender may have spelt the same value another way (key order, numbers).
        query = select(_JOBS.c.body).where(_JOBS.c.job_id == job.job_id)
        known = row.get("body") or tx.execute(query).scalar()
        return bool(known and job.body) and is_same_body(str(known), job.body)

    def _new_row(self, job: NewJob, now_ms: int) -> Row:
        ended = job.state in ENDS
        reason = job.reason
        return {
            "job_id": job.job_id,
            "source": job.source.value,
            "handler": job.handler,
            "lane": job.lane.value,
            "model": job.model,
            "version": job.version,
            "urgency": 9 - job.priority,
            "body": job.body,
            "body_hash": job.body_hash,
            "state": job.state.value,
            "rev": 1,
            "reason_code": reason and reason.code,
            "reason": reason and reason.message,
            "attempt": 0,
            "interruptions": 0,
            "created_ms": now_ms,
            "ended_ms": now_ms if ended else None,
            "not_before_ms": job.not_before_ms,
            "expires_ms": job.expires_ms,
            "expires_boot_ms": job.expires_boot_ms,
            "boot_id": self._clock.boot_id() if job.expires_boot_ms is not None else None,
            "max_attempts": job.max_attempts,
            "on_interrupt": job.on_interrupt,
            "run_timeout_s": job.run_timeout_s,
        }

    def _insert(self, tx: Connection, rows: list[Row], now_ms: int) -> None:
        if not rows:
            return
        _INSERT_JOB.run(tx, rows)
        _INSERT_TRANSITION.run(tx, [_history(row, row["state"], now_ms) for row in rows])
        outbox.add_states(tx, [build_state(self._topics, row, now_ms) for row in rows])

    def _conflict(self, job: NewJob, row: Row, now_ms: int) -> dict[str, object]:
        body = {
            "code": "id_conflict",
            "job_id": job.job_id,
            "message": "this job id is known with another body; the original stands",
            "state": row["state"],
            "rev": row["rev"],
        }
        return build_event(self._topics, "id_conflict", body, now_ms)

    def add_event(self, tx: Connection, kind: str, body: dict[str, object]) -> None:
        """Write an event for the console."""
        event = build_event(self._topics, kind, body, self._clock.wall_ms())
        outbox.add_records(tx, [event])

    def cancel(self, tx: Connection, job_ids: Collection[str], source: Source) -> list[EndedJob]:
        """Cancel jobs that have not ended; leave a tombstone for unknown ids.

        The answer is always a state: an ended job's is reported again.
        """
        known = {row["job_id"]: row for row in self._read(tx, job_ids)}
        reason = Reason("canceled", "canceled by request")
        tombstones = [
            NewJob(job_id, source, state=JobState.CANCELED, reason=reason)
            for job_id in dict.fromkeys(job_ids)
            if job_id not in known
        ]
        self.accept(tx, tombstones)
        changes = _Changes()
        now_ms = self._clock.wall_ms()
        for row in known.values():
            if row["state"] in ENDS:
                changes.jobs.append(row)
                changes.reported[row["job_id"]] = _moved_ms(row)
            else:
                self._move(changes, row, JobState.CANCELED, reason, now_ms)
        return self._write(tx, changes)

    def expire(self, tx: Connection) -> list[EndedJob]:
        """End queued jobs whose time to start by has passed."""
        wall_ms = self._clock.wall_ms()
        late = _LATE.fetch(
            tx,
            b_boot_id=self._clock.boot_id(),
            b_boot_ms=self._clock.boot_ms(),
            b_wall_ms=wall_ms,
        )
        changes = _Changes()
        reason = Reason("deadline_passed", "the job was not started before its deadline")
        for values in late:
            row = dict(zip(_STATE_NAMES, values, strict=True))
            self._move(changes, row, JobState.EXPIRED, reason, wall_ms)
        return self._write(tx, changes)

    def find_ready(self, tx: Connection, lane: Lane, limit: int) -> list[ReadyJob]:
        """Return queued jobs that wait for dispatch, most urgent and oldest first."""
        params = {"b_lane": lane.value, "b_limit": limit, "b_now": self._clock.wall_ms()}
        return [ReadyJob._make(row) for row in _READY.fetch(tx, **params)]

    def assign(self, tx: Connection, tasks: Iterable[tuple[str, Sequence[ReadyJob]]]) -> None:
        """Start a new attempt of each job, carried by the task of that id."""
        rows = [{"seq": job.seq, "task_id": task} for task, jobs in tasks for job in jobs]
        _ASSIGN.run(tx, rows)

    def record_started(self, tx: Connection, task_ids: Collection[str]) -> None:
        """Move the queued jobs of these tasks to `running`."""
        changes = _Changes()
        now_ms = self._clock.wall_ms()
        for row in self._read_tasks(tx, task_ids):
            if row["state"] == JobState.QUEUED:
                self._move(changes, row, JobState.RUNNING, None, now_ms)
        self._write(tx, changes)

    def record_outcomes(self, tx: Connection, outcomes: Sequence[Outcome]) -> list[EndedJob]:
        """End jobs by their outcomes; ignore those of an attempt that is not current."""
        known = {row["job_id"]: row for row in self._read(tx, [item.job_id for item in outcomes])}
        changes = _Changes()
        for outcome in outcomes:
            row = known.get(outcome.job_id)
            if row is None or row["state"] in ENDS or row["attempt"] != outcome.attempt:
                continue
            self._record(changes, row, outcome)
        return self._write(tx, changes)

    def _record(self, changes: _Changes, row: Row, outcome: Outcome) -> None:
        row["started_ms"] = row["started_ms"] or outcome.started_ms
        row["task_id"] = None
        steps = path_to(JobState(row["state"]), outcome.state)
        for step in steps[:-1]:
            self._move(changes, row, step, None, outcome.started_ms)
        if outcome.result is not None:
            timings = {
                "queue": max(0, outcome.started_ms - row["created_ms"]),
                **outcome.result.get("timings_ms", {}),
            }
            body = {
                "job_id": row["job_id"],
                "attempt": row["attempt"],
                **outcome.result,
                "timings_ms": timings,
            }
            row["result"] = encode(body)
            changes.results.append(
                build_result(self._topics, row["job_id"], row["result"], outcome.ended_ms)
            )
        self._move(changes, row, outcome.state, outcome.reason, outcome.ended_ms)

    def requeue(
        self, tx: Connection, task_ids: Collection[str], reason: Reason, *, counts: bool
    ) -> list[EndedJob]:
        """Free the jobs of tasks that will bring no outcome, to be tried again.

        Args:
            tx: the caller's transaction.
            task_ids: the tasks that were lost.
            reason: why, for the history.
            counts: whether the attempt may have run, and so counts against `max_attempts`.
        """
        changes = _Changes()
        now_ms = self._clock.wall_ms()
        for row in self._read_tasks(tx, task_ids):
            row["task_id"] = None
            row["interruptions"] += int(counts)
            self._requeue(changes, row, reason, now_ms)
        return self._write(tx, changes)

    def _requeue(self, changes: _Changes, row: Row, reason: Reason, now_ms: int) -> None:
        if row["interruptions"] >= row["max_attempts"]:
            text = f"{row['interruptions']} attempts ended without an outcome; the last: "
            final = Reason("attempts_exhausted", text + reason.message)
            self._move(changes, row, JobState.FAILED, final, now_ms)
        elif row["on_interrupt"] == "fail" and row["interruptions"]:
            final = Reason("interrupted", reason.message)
            self._move(changes, row, JobState.FAILED, final, now_ms)
        elif row["state"] == JobState.RUNNING:
            self._move(changes, row, JobState.QUEUED, reason, now_ms)
        else:
            changes.jobs.append(row)

    def _move(
        self, changes: _Changes, row: Row, state: JobState, reason: Reason | None, at_ms: int
    ) -> None:
        path_to(JobState(row["state"]), state)
        row["state"] = state.value
        row["rev"] += 1
        row["reason_code"] = reason and reason.code
        row["reason"] = reason and reason.message
        if state is JobState.RUNNING:
            row["started_ms"] = row["started_ms"] or at_ms
        if state in ENDS:
            row["ended_ms"] = at_ms
            row["task_id"] = None
            changes.ended.append(EndedJob(row["job_id"], Source(row["source"]), state))
        changes.history.append(_history(row, state.value, at_ms))
        changes.reported[row["job_id"]] = at_ms
        changes.jobs.append(row)

    def _write(self, tx: Connection, changes: _Changes) -> list[EndedJob]:
        # A job may have moved twice in one batch: its row and its report are written once.
        rows = {row["seq"]: row for row in changes.jobs}
        _UPDATE.run(tx, list(rows.values()))
        _INSERT_TRANSITION.run(tx, changes.history)
        outbox.add_states(
            tx,
            [
                build_state(self._topics, row, changes.reported[row["job_id"]])
                for row in rows.values()
                if row["job_id"] in changes.reported
            ],
        )
        outbox.add_records(tx, changes.results)
        return changes.ended

    def _read(self, tx: Connection, job_ids: Collection[str]) -> list[Row]:
        return _read_rows(tx, _BY_ID, job_ids)

    def _read_tasks(self, tx: Connection, task_ids: Collection[str]) -> list[Row]:
        return _read_rows(tx, _BY_TASK, task_ids)

    def count_open(self, tx: Connection) -> dict[JobState, int]:
        """Return how many jobs are queued and running."""
        query = (
            select(_JOBS.c.state, func.count())
            .where(_JOBS.c.ended_ms.is_(None))
            .group_by(_JOBS.c.state)
        )
        return {JobState(state): count for state, count in tx.execute(query)}

    def find_tasks(self, tx: Connection) -> dict[str, tuple[Lane, int, int]]:
        """Return the tasks under way: lane, number of jobs and bytes of bodies."""
        query = (
            select(
                _JOBS.c.task_id,
                func.max(_JOBS.c.lane),
                func.count(),
                func.sum(func.length(_JOBS.c.body)),
            )
            .where(_JOBS.c.task_id.is_not(None))
            .group_by(_JOBS.c.task_id)
        )
        return {task: (Lane(lane), jobs, size) for task, lane, jobs, size in tx.execute(query)}

    def describe_open(self, tx: Connection) -> dict[str, Any]:
        """Return the open jobs as a sync request names them: the newest 200, and a digest of all.

        The digest is sha256 over `job_id:rev` of all open jobs, sorted by id, joined by commas.
        """
        query = (
            select(_JOBS.c.job_id, _JOBS.c.rev)
            .where(_JOBS.c.ended_ms.is_(None))
            .order_by(_JOBS.c.job_id)
        )
        rows = [(job_id, rev) for job_id, rev in tx.execute(query)]
        text = ",".join(f"{job_id}:{rev}" for job_id, rev in rows)
        return {
            "desired_version": None,
            "epoch": None,
            "open": [list(row) for row in rows[-_SYNC_OPEN:]],
            "open_count": len(rows),
            "digest": hashlib.sha256(text.encode()).hexdigest(),
        }

    def find_jobs(self, tx: Connection, job_ids: Collection[str]) -> dict[str, Row]:
        """Return what is known of these jobs, by id."""
        return {row["job_id"]: row for row in self._read(tx, job_ids)}

    def delete_old(self, tx: Connection, before_ms: int, limit: int) -> int:
        """Forget up to `limit` jobs that ended before `before_ms`; return how many."""
        query = (
            select(_JOBS.c.job_id)
            .where(_JOBS.c.ended_ms.is_not(None), _JOBS.c.ended_ms < before_ms)
            .limit(limit)
        )
        job_ids = list(tx.execute(query).scalars())
        for table in (_TRANSITIONS, _JOBS):
            tx.execute(table.delete().where(table.c.job_id.in_(job_ids)))
        return len(job_ids)


def _moved_ms(row: Row) -> int:
    """Return when a job came to its present state, as far as its row tells."""
    return int(row.get("ended_ms") or row.get("started_ms") or row["created_ms"])


def _history(row: Row, state: str, at_ms: int) -> Row:
    return {
        "job_id": row["job_id"],
        "rev": row["rev"],
        "state": state,
        "at_ms": at_ms,
        "attempt": row["attempt"],
        "reason_code": row["reason_code"],
    }


def _read_rows(tx: Connection, query: Statement, values: Collection[str]) -> list[Row]:
    if not values:
        return []
    rows = query.fetch(tx, b_values=encode(list(values)))
    return [dict(zip(_STATE_NAMES, row, strict=True)) for row in rows]
