"""A ledger on a real file with a clock to turn, for tests of the store."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, text

from agent.commands import new_id
from agent.jobs import JobState, Lane, Reason, Source
from agent.store import outbox
from agent.store.database import migrate, open_engine, transaction
from agent.store.ledger import (
    Accepted,
    CrashReport,
    EndedJob,
    Ledger,
    LedgerPolicy,
    NewJob,
    Outcome,
)
from agent.topics import Topics
from tests.harness.clocks import FakeClock

BODY = '{"model":"digits"}'
FAR_FUTURE_MS = 2**60
BACK_OFF_MS = 300_000


class Store:
    """A ledger on disk and a clock to turn."""

    def __init__(
        self,
        path: Path,
        clock: FakeClock | None = None,
        policy: LedgerPolicy | None = None,
        synchronous: str = "FULL",
    ) -> None:
        self.clock = clock or FakeClock()
        self.path = path
        self.engine: Engine = open_engine(path, synchronous)
        migrate(self.engine)
        self.topics = Topics("dev")
        self.ledger = Ledger(self.topics, self.clock, policy)
        self.run(self.ledger.schedule.begin)

    def close(self) -> None:
        self.engine.dispose()

    def run(self, call: Callable[[Connection], Any]) -> Any:
        with transaction(self.engine) as tx:
            return call(tx)

    def accept(self, **changes: Any) -> str:
        job_id: str = changes.pop("job_id", None) or new_id()
        job = make_job(job_id, **changes)
        self.run(lambda tx: self.ledger.accept(tx, [job]))
        return job_id

    def accept_all(self, *jobs: NewJob, with_results: Sequence[str] = ()) -> Accepted:
        """Hand over jobs as one batch."""
        accepted: Accepted = self.run(
            lambda tx: self.ledger.accept(tx, jobs, with_results=with_results)
        )
        return accepted

    def dispatch(self, task_id: str = "task-1") -> list[str]:
        """Put every ready job into one task."""

        def assign(tx: Connection) -> list[str]:
            ready = self.ledger.schedule.find_ready(tx, Lane.INFERENCE, 100)
            self.ledger.schedule.assign(tx, [(task_id, ready)])
            return [job.job_id for job in ready]

        return list(self.run(assign))

    def finish(self, job_id: str, attempt: int = 1, state: JobState = JobState.SUCCEEDED) -> int:
        outcome = Outcome(
            job_id,
            attempt,
            state,
            Reason("ok"),
            self.clock.wall,
            self.clock.wall + 5,
            {"output": 1},
        )
        return len(self.run(lambda tx: self.ledger.record_outcomes(tx, [outcome])))

    def fail(
        self, job_id: str, attempt: int = 1, *, code: str = "input_error", retryable: bool = True
    ) -> list[EndedJob]:
        """Report that an attempt ended in an error."""
        outcome = Outcome(
            job_id,
            attempt,
            JobState.FAILED,
            Reason(code, "no luck"),
            self.clock.wall,
            self.clock.wall + 5,
            retryable=retryable,
        )
        ended: list[EndedJob] = self.run(lambda tx: self.ledger.record_outcomes(tx, [outcome]))
        return ended

    def crash(
        self, task_id: str, *jobs: tuple[str, int], model: str = "digits", version: str = "1"
    ) -> list[EndedJob]:
        """Report that the worker crashed while these attempts ran."""
        report = CrashReport(task_id, model, version, "SIGSEGV", jobs)
        ended: list[EndedJob] = self.run(lambda tx: self.ledger.record_crash(tx, report))
        return ended

    def progress(self, job_id: str, attempt: int, done: int) -> None:
        """Report how far an attempt is."""
        step = {"done": done, "total": 9, "unit": "files", "eta_s": None}
        self.run(lambda tx: self.ledger.record_progress(tx, job_id, attempt, step))

    def cancel(self, *job_ids: str) -> list[EndedJob]:
        ended: list[EndedJob] = self.run(lambda tx: self.ledger.cancel(tx, job_ids, Source.MQTT))
        return ended

    def requeue(self, task_id: str, *, counts: bool = True) -> None:
        reason = Reason("worker_lost", "gone")
        self.run(lambda tx: self.ledger.requeue(tx, [task_id], reason, counts=counts))

    def job(self, job_id: str) -> Any:
        query = text("SELECT * FROM jobs WHERE job_id = :id")
        return self.run(lambda tx: tx.execute(query, {"id": job_id}).mappings().one())

    def state(self, job_id: str) -> tuple[str, str | None]:
        """Return a job's state and the code of its reason."""
        row = self.job(job_id)
        return row["state"], row["reason_code"]

    def history(self, job_id: str) -> list[tuple[int, str]]:
        query = text("SELECT rev, state FROM transitions WHERE job_id = :id ORDER BY rev")
        return [tuple(row) for row in self.run(lambda tx: tx.execute(query, {"id": job_id}).all())]

    def reports(self) -> list[tuple[str, dict[str, Any]]]:
        query = text("SELECT kind, body FROM outbox ORDER BY id")
        rows = self.run(lambda tx: tx.execute(query).all())
        return [(kind, json.loads(body)) for kind, body in rows]

    def pending_states(self, job_id: str) -> list[tuple[str, int]]:
        """Return state and rev of a job's reports that wait in the outbox."""
        return [
            (body["state"], body["rev"])
            for kind, body in self.reports()
            if kind == "state" and body["job_id"] == job_id
        ]

    def take(self, limit: int = 100) -> list[outbox.Record]:
        records: list[outbox.Record] = self.run(
            lambda tx: outbox.take_unsent(tx, limit, FAR_FUTURE_MS)
        )
        return records


def make_job(job_id: str, **changes: Any) -> NewJob:
    job = NewJob(job_id, Source.MQTT, BODY, "hash-1", "infer", Lane.INFERENCE, "digits")
    return job._replace(**changes)
