"""The ledger: every job, its history, and what is reported of it, in one transaction.

The rules, each kept by one method and tested by name:

- a job exists once its row is committed, and its first outbox row with it;
- the same id and body again: the present state is reported again; another
  body: the original stands and an event says so;
- the same `dedupe_key` as an open job: what the policy says, decided in the
  transaction that would accept the job;
- every transition raises `rev` by one and writes its history and outbox rows;
- the attempt number is written before its task is dispatched, and an outcome
  counts only for the current attempt of a job that has not ended (fencing);
- an attempt that was lost, or ended with an error worth another try, is tried
  again after a back-off until `max_attempts`;
- a job whose attempts crashed their worker twice ends `failed: poison_job`.

All methods run inside the caller's transaction (`agent.store.database`), and
only the agent calls those that write. Nothing here touches MQTT or Celery.
When jobs may start is `agent.store.schedule`'s matter.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, func, select, update

from agent.clock import Clock
from agent.commands import encode, is_same_body
from agent.jobs import ENDS, JobState, Lane, Reason, Source, path_to
from agent.retry import RetryClass, compute_delay_ms
from agent.store import bounds, outbox, quarantine
from agent.store.options import read_options
from agent.store.records import (
    KEPT_RESULT,
    build_event,
    build_progress,
    build_result,
    build_state,
)
from agent.store.schedule import ReadyJob, Schedule
from agent.store.statements import Bulk, Statement
from agent.store.transitions import (
    JOBS,
    Changes,
    EndedJob,
    Row,
    build_history,
    insert_history,
    insert_into,
    moved_ms,
    read_jobs,
    read_task_jobs,
)
from agent.topics import Topics

_SYNC_OPEN = 200
POISON_AFTER = 2


class Verdict(StrEnum):
    """What became of a submitted job."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"
    DROPPED = "dropped"
    """Refused for an open job of the same `dedupe_key`."""


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
    ready_boot_ms: int | None = None
    expires_ms: int | None = None
    expires_boot_ms: int | None = None
    max_attempts: int = 5
    on_interrupt: str = "retry"
    run_timeout_s: float = 120.0
    dedupe_key: str | None = None
    dedupe: str = "run_all"
    options: str | None = None


class Outcome(NamedTuple):
    """How one attempt of one job ended, as a worker reports it."""

    job_id: str
    attempt: int
    state: JobState
    reason: Reason
    started_ms: int
    ended_ms: int
    result: dict[str, Any] | None = None
    retryable: bool = False
    """Whether the same job may do better another time."""


class CrashReport(NamedTuple):
    """What a worker found of its predecessor's crash."""

    task_id: str
    model: str
    version: str | None
    signal: str
    jobs: tuple[tuple[str, int], ...]
    """Ids and attempts of the jobs that ran in that moment."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """What became of a batch of new jobs."""

    verdicts: list[Verdict]
    """One a job, in order."""
    ended: list[EndedJob] = field(default_factory=list)
    """Jobs that gave way to a new one of the same `dedupe_key`."""


@dataclass(frozen=True)
class LedgerPolicy:
    """How the ledger decides, where a job does not say."""

    aging_s: float = 60.0
    retry_delay_s: float = 1.0
    retry_delay_max_s: float = 300.0


_INSERTED = (
    "job_id",
    "source",
    "handler",
    "lane",
    "model",
    "version",
    "urgency",
    "due_ms",
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
    "ready_boot_ms",
    "expires_ms",
    "expires_boot_ms",
    "max_attempts",
    "on_interrupt",
    "run_timeout_s",
    "dedupe_key",
    "options",
)
_INSERT_JOB = Bulk(_INSERTED, insert_into(JOBS))
_SET_PROGRESS = Statement(
    update(JOBS).where(JOBS.c.seq == bindparam("b_seq")).values(progress=bindparam("b_progress"))
)


class Ledger:
    """Reads and changes jobs inside a transaction that the caller owns.

    Args:
        topics: where changes are reported.
        clock: wall and boot time.
        policy: how it decides.
    """

    def __init__(self, topics: Topics, clock: Clock, policy: LedgerPolicy | None = None) -> None:
        self._topics = topics
        self._clock = clock
        self._policy = policy or LedgerPolicy()
        self.schedule = Schedule(topics, clock, self._policy.aging_s)
        self.results_full = False
        """Whether the outbox has no room for results; kept by who measures it."""

    def wall_ms(self) -> int:
        """Return the time as this ledger writes it."""
        return self._clock.wall_ms()

    # --- acceptance --------------------------------------------------------------------------

    def accept(
        self, tx: Connection, jobs: Sequence[NewJob], *, with_results: Collection[str] = ()
    ) -> Accepted:
        """Write new jobs; meet known ones by their id and body.

        A duplicate inside `jobs` meets the first of its id like any other.

        Args:
            tx: the caller's transaction.
            jobs: the jobs, in order.
            with_results: ids whose result is reported again too, where they are known.
        """
        now_ms = self._clock.wall_ms()
        known = {row["job_id"]: row for row in read_jobs(tx, [job.job_id for job in jobs])}
        accepted = Accepted([])
        rows: list[Row] = []
        again: set[str] = set()
        events: list[dict[str, object]] = []
        for job in jobs:
            row = known.get(job.job_id)
            if row is None:
                if job.dedupe_key is not None and job.state is JobState.QUEUED:
                    # It may meet a job of this very batch.
                    self._insert(tx, rows, now_ms)
                    rows.clear()
                    job = self._deduplicate(tx, job, known, accepted)
                known[job.job_id] = row = self._new_row(job, now_ms)
                rows.append(row)
                dropped = job.reason is not None and job.reason.code == "dedupe_dropped"
                accepted.verdicts.append(Verdict.DROPPED if dropped else Verdict.ACCEPTED)
            elif self._is_same(tx, row, job):
                again.add(job.job_id)
                accepted.verdicts.append(Verdict.DUPLICATE)
            else:
                events.append(self._conflict(job, row, now_ms))
                accepted.verdicts.append(Verdict.CONFLICT)
        self._insert(tx, rows, now_ms)
        # Last: a job of this batch may have ended one that was met before it.
        self._report_again(tx, [known[job_id] for job_id in sorted(again)], with_results)
        outbox.add_records(tx, events)
        return accepted

    def _is_same(self, tx: Connection, row: Row, job: NewJob) -> bool:
        """Say whether a known id came with its own body; a tombstone takes any."""
        if row["body_hash"] is None or row["body_hash"] == job.body_hash:
            return True
        # The sender may have spelt the same value another way (key order, numbers).
        query = select(JOBS.c.body).where(JOBS.c.job_id == job.job_id)
        known = row.get("body") or tx.execute(query).scalar()
        return bool(known and job.body) and is_same_body(str(known), job.body)

    def _deduplicate(
        self, tx: Connection, job: NewJob, known: dict[str, Row], accepted: Accepted
    ) -> NewJob:
        """Apply a job's `dedupe` policy to the open jobs of its key; return what it became.

        Jobs that end by it are brought up to date in `known`.
        """
        if job.dedupe == "run_all":
            return job
        query = select(JOBS.c.job_id).where(
            JOBS.c.dedupe_key == job.dedupe_key, JOBS.c.ended_ms.is_(None)
        )
        others = read_jobs(tx, list(tx.execute(query).scalars()))
        if job.dedupe == "drop_new" and others:
            text = f"job {others[0]['job_id']} with the same dedupe_key has not ended"
            reason = Reason("dedupe_dropped", text)
            return job._replace(state=JobState.REJECTED, reason=reason)
        changes = Changes(self._topics)
        reason = Reason("replaced", f"job {job.job_id} with the same dedupe_key took its place")
        for row in others:
            if row["state"] == JobState.QUEUED:
                changes.move(row, JobState.CANCELED, reason, self._clock.wall_ms())
        accepted.ended.extend(changes.write(tx))
        known.update({row["job_id"]: row for row in others})
        return job

    def _new_row(self, job: NewJob, now_ms: int) -> Row:
        ended = job.state in ENDS
        reason = job.reason
        urgency = 9 - job.priority
        return {
            "job_id": job.job_id,
            "source": job.source.value,
            "handler": job.handler,
            "lane": job.lane.value,
            "model": job.model,
            "version": job.version,
            "urgency": urgency,
            "due_ms": self.schedule.compute_due(urgency),
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
            "ready_boot_ms": job.ready_boot_ms,
            "expires_ms": job.expires_ms,
            "expires_boot_ms": job.expires_boot_ms,
            "max_attempts": job.max_attempts,
            "on_interrupt": job.on_interrupt,
            "run_timeout_s": job.run_timeout_s,
            "dedupe_key": job.dedupe_key,
            "options": job.options,
        }

    def _insert(self, tx: Connection, rows: list[Row], now_ms: int) -> None:
        if not rows:
            return
        _INSERT_JOB.run(tx, rows)
        insert_history(tx, [build_history(row, row["state"], now_ms) for row in rows])
        outbox.add_states(tx, [build_state(self._topics, row, now_ms) for row in rows])

    def _report_again(
        self, tx: Connection, rows: Iterable[Row], with_results: Collection[str]
    ) -> None:
        """Report states that somebody asked for, and results to those who lost theirs."""
        known = list(rows)
        outbox.add_states(tx, [build_state(self._topics, row, moved_ms(row)) for row in known])
        results = [
            build_result(self._topics, row["job_id"], row["result"], moved_ms(row))
            for row in known
            if row["job_id"] in with_results and row.get("result")
        ]
        outbox.add_records(tx, results)

    def report_again(
        self, tx: Connection, job_ids: Collection[str], *, with_results: bool = False
    ) -> None:
        """Report the present states of these jobs again; unknown ones are passed over."""
        self._report_again(tx, read_jobs(tx, job_ids), job_ids if with_results else ())

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
        known = {row["job_id"]: row for row in read_jobs(tx, job_ids)}
        reason = Reason("canceled", "canceled by request")
        tombstones = [
            NewJob(job_id, source, state=JobState.CANCELED, reason=reason)
            for job_id in dict.fromkeys(job_ids)
            if job_id not in known
        ]
        self.accept(tx, tombstones)
        changes = Changes(self._topics)
        now_ms = self._clock.wall_ms()
        for row in known.values():
            if row["state"] in ENDS:
                changes.report(row)
            else:
                changes.move(row, JobState.CANCELED, reason, now_ms)
        return changes.write(tx)

    # --- attempts ----------------------------------------------------------------------------

    def record_started(self, tx: Connection, task_ids: Collection[str]) -> None:
        """Move the queued jobs of these tasks to `running`."""
        changes = Changes(self._topics)
        now_ms = self._clock.wall_ms()
        for row in read_task_jobs(tx, task_ids):
            if row["state"] == JobState.QUEUED:
                changes.move(row, JobState.RUNNING, None, now_ms)
        changes.write(tx)

    def record_progress(
        self, tx: Connection, job_id: str, attempt: int, progress: dict[str, Any]
    ) -> None:
        """Take note of how far the current attempt of a job is, and report it."""
        now_ms = self._clock.wall_ms()
        for row in read_jobs(tx, [job_id]):
            # Without a task the attempt is over, and the job waits for its next one.
            if row["state"] in ENDS or row["attempt"] != attempt or row["task_id"] is None:
                return
            if row["state"] == JobState.QUEUED:
                changes = Changes(self._topics)
                changes.move(row, JobState.RUNNING, None, now_ms)
                changes.write(tx)
            body = {"job_id": job_id, "attempt": attempt, **progress}
            _SET_PROGRESS.run(tx, b_seq=row["seq"], b_progress=encode(progress))
            outbox.add_progress(tx, [build_progress(self._topics, job_id, body, now_ms)])

    def record_outcomes(self, tx: Connection, outcomes: Sequence[Outcome]) -> list[EndedJob]:
        """End jobs by their outcomes, or try again what may do better.

        Outcomes of an attempt that is not current, or of an ended job, are ignored.
        """
        known = {row["job_id"]: row for row in read_jobs(tx, [item.job_id for item in outcomes])}
        changes = Changes(self._topics)
        dropped: list[Row] = []
        for outcome in outcomes:
            row = known.get(outcome.job_id)
            if row is None or row["state"] in ENDS or row["attempt"] != outcome.attempt:
                continue
            if (
                outcome.state is JobState.FAILED
                and outcome.retryable
                and self._try_again(changes, row, outcome)
            ):
                continue
            self._record(changes, row, outcome, dropped)
        ended = changes.write(tx)
        if dropped:
            bounds.drop_new(tx, self._topics, dropped, self._clock.wall_ms())
        return ended

    def hold(self, tx: Connection, outcome: Outcome) -> Row | None:
        """Take an outcome that does not end its job: it runs on, and no task carries it.

        Returns:
            The job's row; None where the attempt is not current, or the job has ended.
        """
        for row in read_jobs(tx, [outcome.job_id]):
            if row["state"] in ENDS or row["attempt"] != outcome.attempt or row["task_id"] is None:
                continue
            changes = Changes(self._topics)
            row["task_id"] = None
            if row["state"] == JobState.QUEUED:
                changes.move(row, JobState.RUNNING, None, outcome.started_ms)
            else:
                changes.jobs.append(row)
            changes.write(tx)
            return row
        return None

    def finish(
        self,
        tx: Connection,
        job_id: str,
        state: JobState,
        reason: Reason,
        result: dict[str, Any] | None = None,
    ) -> list[EndedJob]:
        """End a job that `hold` has kept running; one that has ended stays as it is."""
        now_ms = self._clock.wall_ms()
        changes = Changes(self._topics)
        for row in read_jobs(tx, [job_id]):
            if row["state"] in ENDS:
                continue
            if result is not None:
                started_ms = row["started_ms"] or now_ms
                outcome = Outcome(job_id, row["attempt"], state, reason, started_ms, now_ms, result)
                changes.results.append(self._build_result(row, outcome))
            for step in path_to(JobState(row["state"]), state):
                changes.move(row, step, reason if step is state else None, now_ms)
        return changes.write(tx)

    def find_open(self, tx: Connection, job_ids: Collection[str]) -> set[str]:
        """Return which of these jobs have not ended."""
        return {row["job_id"] for row in read_jobs(tx, job_ids) if row["state"] not in ENDS}

    def _try_again(self, changes: Changes, row: Row, outcome: Outcome) -> bool:
        """Queue a job again after an error worth it; say whether there is another attempt."""
        options = read_options(row["options"])
        if options.on_error == "fail":
            return False
        if row["task_id"] is None:
            # This attempt was counted before: it was given up as lost, or is reported twice.
            return True
        used = row["failures"] + row["interruptions"] + 1
        if used >= row["max_attempts"]:
            return False
        row["failures"] += 1
        row["task_id"] = None
        self._back_off(row, RetryClass.ERROR, row["failures"], options.retry_delay_s)
        if row["state"] == JobState.QUEUED:
            changes.move(row, JobState.RUNNING, None, outcome.started_ms)
        changes.move(row, JobState.QUEUED, outcome.reason, outcome.ended_ms)
        return True

    def _back_off(self, row: Row, kind: RetryClass, count: int, base_s: float | None) -> None:
        policy = self._policy
        base = policy.retry_delay_s if base_s is None else base_s
        delay_ms = compute_delay_ms(kind, count, base, policy.retry_delay_max_s)
        row["ready_boot_ms"] = self._clock.boot_ms() + delay_ms if delay_ms else None

    def _record(self, changes: Changes, row: Row, outcome: Outcome, dropped: list[Row]) -> None:
        row["started_ms"] = row["started_ms"] or outcome.started_ms
        state, reason = outcome.state, outcome.reason
        on_full = read_options(row["options"]).on_full if self.results_full else "keep_newest"
        if outcome.result is not None and on_full == "fail":
            state = JobState.FAILED
            reason = Reason("outbox_full", "the outbox holds as many results as it may")
        steps = path_to(JobState(row["state"]), state)
        row["task_id"] = None
        for step in steps[:-1]:
            changes.move(row, step, None, outcome.started_ms)
        if outcome.result is not None and state is JobState.SUCCEEDED:
            record = self._build_result(row, outcome)
            (dropped if on_full == "keep_oldest" else changes.results).append(record)
        changes.move(row, state, reason, outcome.ended_ms)

    def _build_result(self, row: Row, outcome: Outcome) -> Row:
        result = outcome.result or {}
        timings = {
            "queue": max(0, outcome.started_ms - row["created_ms"]),
            **result.get("timings_ms", {}),
        }
        body = {
            "job_id": row["job_id"],
            "attempt": row["attempt"],
            **result,
            "timings_ms": timings,
        }
        row["result"] = encode(body)
        keep = read_options(row["options"]).on_full == "keep_oldest"
        return build_result(self._topics, row["job_id"], row["result"], outcome.ended_ms, keep=keep)

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
        changes = Changes(self._topics)
        for row in read_task_jobs(tx, task_ids):
            row["task_id"] = None
            row["interruptions"] += int(counts)
            self._requeue(changes, row, reason)
        return changes.write(tx)

    def _interrupt(self, changes: Changes, row: Row, reason: Reason) -> None:
        row["task_id"] = None
        row["interruptions"] += 1
        self._requeue(changes, row, reason)

    def _requeue(self, changes: Changes, row: Row, reason: Reason) -> None:
        now_ms = self._clock.wall_ms()
        used = row["interruptions"] + row["failures"]
        if row["interruptions"] and used >= row["max_attempts"]:
            text = f"{used} attempts ended without an outcome; the last: "
            final = Reason("attempts_exhausted", text + reason.message)
            changes.move(row, JobState.FAILED, final, now_ms)
            return
        if row["on_interrupt"] == "fail" and row["interruptions"]:
            changes.move(row, JobState.FAILED, Reason("interrupted", reason.message), now_ms)
            return
        base_s = read_options(row["options"]).retry_delay_s
        self._back_off(row, RetryClass.INTERRUPTED, row["interruptions"], base_s)
        if row["state"] == JobState.RUNNING:
            changes.move(row, JobState.QUEUED, reason, now_ms)
        else:
            changes.jobs.append(row)

    def record_crash(self, tx: Connection, crash: CrashReport) -> list[EndedJob]:
        """Count a crash for the jobs that ran and for their model version.

        The jobs' attempts may be over already, given up as lost: a crash counts
        once for each attempt all the same. Jobs that the task carried beside them
        are tried again.
        """
        attempts = dict(crash.jobs)
        changes = Changes(self._topics)
        now_ms = self._clock.wall_ms()
        for row in read_jobs(tx, attempts):
            attempt = attempts[row["job_id"]]
            if row["state"] in ENDS or attempt <= row["crashed_attempt"]:
                continue
            row["crashes"] += 1
            row["crashed_attempt"] = attempt
            changes.jobs.append(row)
            if row["crashes"] >= POISON_AFTER:
                text = f"its attempts crashed their worker {row['crashes']} times: {crash.signal}"
                row["task_id"] = None
                changes.move(row, JobState.FAILED, Reason("poison_job", text), now_ms)
            elif row["task_id"] == crash.task_id:
                text = f"its worker crashed: {crash.signal}"
                self._interrupt(changes, row, Reason("worker_crashed", text))
        for row in read_task_jobs(tx, [crash.task_id]):
            if row["job_id"] not in attempts:
                text = f"its worker crashed on another job: {crash.signal}"
                self._interrupt(changes, row, Reason("worker_lost", text))
        if crash.version is not None:
            self._count_crash(tx, crash, crash.version, now_ms)
        return changes.write(tx)

    def _count_crash(self, tx: Connection, crash: CrashReport, version: str, now_ms: int) -> None:
        if quarantine.record_crash(tx, crash.task_id, crash.model, version, crash.signal, now_ms):
            body: dict[str, object] = {
                "code": "model_quarantined",
                "model": crash.model,
                "version": version,
                "message": quarantine.read_quarantine(tx)[crash.model, version],
            }
            self.add_event(tx, "model_quarantined", body)

    # --- reading -----------------------------------------------------------------------------

    def count_open(self, tx: Connection) -> dict[JobState, int]:
        """Return how many jobs are queued and running."""
        query = (
            select(JOBS.c.state, func.count())
            .where(JOBS.c.ended_ms.is_(None))
            .group_by(JOBS.c.state)
        )
        return {JobState(state): count for state, count in tx.execute(query)}

    def find_tasks(self, tx: Connection) -> dict[str, tuple[Lane, int, int]]:
        """Return the tasks under way: lane, number of jobs and bytes of bodies."""
        query = (
            select(
                JOBS.c.task_id,
                func.max(JOBS.c.lane),
                func.count(),
                func.sum(func.length(JOBS.c.body)),
            )
            .where(JOBS.c.task_id.is_not(None))
            .group_by(JOBS.c.task_id)
        )
        return {task: (Lane(lane), jobs, size) for task, lane, jobs, size in tx.execute(query)}

    def describe_open(self, tx: Connection) -> dict[str, Any]:
        """Return the open jobs as a sync request names them: the newest 200, and a digest of all.

        The digest is sha256 over `job_id:rev` of all open jobs, sorted by id, joined by commas.
        """
        query = (
            select(JOBS.c.job_id, JOBS.c.rev)
            .where(JOBS.c.ended_ms.is_(None))
            .order_by(JOBS.c.job_id)
        )
        rows = [(job_id, rev) for job_id, rev in tx.execute(query)]
        text = ",".join(f"{job_id}:{rev}" for job_id, rev in rows)
        seq = outbox.read_counter(tx, "seq")
        return {
            "seq": seq,
            "oldest_seq": outbox.find_oldest(tx) or seq + 1,
            "desired_version": None,
            "epoch": None,
            "open": [list(row) for row in rows[-_SYNC_OPEN:]],
            "open_count": len(rows),
            "digest": hashlib.sha256(text.encode()).hexdigest(),
        }

    def find_jobs(self, tx: Connection, job_ids: Collection[str]) -> dict[str, Row]:
        """Return what is known of these jobs, by id."""
        return {row["job_id"]: row for row in read_jobs(tx, job_ids)}


__all__ = ["KEPT_RESULT", "EndedJob", "Ledger", "NewJob", "Outcome", "ReadyJob", "Verdict"]
