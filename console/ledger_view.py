"""The ledger as the command line reads it: read-only, beside an agent that writes it.

Owns the queries that people ask. Never writes; never waits for the writer (WAL).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Select, func, select

from agent.config import Settings
from agent.jobs import ENDS, JobState
from agent.store.database import open_reader, transaction
from agent.store.facts import CONSOLE_ACKS, read_fact
from agent.store.tables import Deployment, Job, OutboxRecord, Transition
from console.errors import JobNotFoundError

_DEPLOYMENTS = Deployment.__table__  # type: ignore[attr-defined]
_JOBS = Job.__table__  # type: ignore[attr-defined]
_TRANSITIONS = Transition.__table__  # type: ignore[attr-defined]
_OUTBOX = OutboxRecord.__table__  # type: ignore[attr-defined]
_LISTED = [
    _JOBS.c[name]
    for name in (
        "job_id",
        "state",
        "rev",
        "model",
        "source",
        "lane",
        "attempt",
        "reason_code",
        "created_ms",
        "started_ms",
        "ended_ms",
    )
]
_POLL_S = 0.05
# Below SQLite's limit on variables of old builds (999).
_CHUNK = 500

Row = dict[str, Any]


class LedgerView:
    """Reads jobs; each call sees what is committed by then. Close it when done.

    Raises:
        StoreError: there is no ledger yet, or it cannot be read.
    """

    def __init__(self, settings: Settings) -> None:
        self._engine = open_reader(settings.ledger_file)

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    def get_job(self, job_id: str) -> Row:
        """Return everything about one job.

        Raises:
            JobNotFoundError: the ledger has no such job.
        """
        with transaction(self._engine) as tx:
            row = tx.execute(select(_JOBS).where(_JOBS.c.job_id == job_id)).mappings().first()
        if row is None:
            msg = f"no job {job_id!r} in this ledger; `edgeward jobs list` shows the newest"
            raise JobNotFoundError(msg)
        return dict(row)

    def list_transitions(self, job_id: str) -> list[Row]:
        """Return a job's history, oldest step first."""
        query = select(_TRANSITIONS).where(_TRANSITIONS.c.job_id == job_id)
        return self._read(query.order_by(_TRANSITIONS.c.rev))

    def list_jobs(
        self, state: JobState | None = None, model: str | None = None, limit: int = 20
    ) -> list[Row]:
        """Return jobs, newest first."""
        query = select(*_LISTED).order_by(_JOBS.c.seq.desc()).limit(limit)
        if state is not None:
            query = query.where(_JOBS.c.state == state.value)
        if model is not None:
            query = query.where(_JOBS.c.model == model)
        return self._read(query)

    def find_jobs(self, job_ids: Sequence[str]) -> dict[str, Row]:
        """Return what is known of these jobs, results included, by id."""
        found: dict[str, Row] = {}
        for start in range(0, len(job_ids), _CHUNK):
            query = select(_JOBS).where(_JOBS.c.job_id.in_(job_ids[start : start + _CHUNK]))
            found |= {row["job_id"]: row for row in self._read(query)}
        return found

    def count_states(self) -> dict[str, int]:
        """Return how many jobs are in each state."""
        query = select(_JOBS.c.state, func.count()).group_by(_JOBS.c.state)
        with transaction(self._engine) as tx:
            return {state: count for state, count in tx.execute(query)}

    def count_ahead(self, job: Row) -> int:
        """Return how many jobs of a queued job's lane are dispatched before it."""
        sooner = (_JOBS.c.due_ms < job["due_ms"]) | (
            (_JOBS.c.due_ms == job["due_ms"]) & (_JOBS.c.seq < job["seq"])
        )
        query = select(func.count()).where(
            _JOBS.c.state == JobState.QUEUED.value, _JOBS.c.lane == job["lane"], sooner
        )
        return self._count(query)

    def list_reports(self, job_id: str) -> list[Row]:
        """Return a job's records that wait for the console: kind, number, time of making."""
        columns = (_OUTBOX.c[name] for name in ("kind", "seq", "created_ms"))
        query = select(*columns).where(_OUTBOX.c.job_id == job_id)
        return self._read(query.order_by(_OUTBOX.c.id))

    def has_acknowledging_console(self) -> bool:
        """Say whether a console has ever acknowledged a record of this ledger."""
        with transaction(self._engine) as tx:
            return read_fact(tx, CONSOLE_ACKS) is not None

    def count_unreported(self) -> int:
        """Return how many records wait for the console."""
        return self._count(select(func.count()).select_from(_OUTBOX))

    def find_phase(self, job_id: str) -> str | None:
        """Return where a job's update is after its staging; None before, or once it is over."""
        query = select(_DEPLOYMENTS.c.phase).where(_DEPLOYMENTS.c.job_id == job_id)
        with transaction(self._engine) as tx:
            return tx.execute(query).scalar()

    def wait_for_ends(
        self, job_ids: Sequence[str], timeout_s: float, seen: Callable[[dict[str, Row]], None]
    ) -> dict[str, Row]:
        """Return the jobs once all have ended or the time is over; blocks.

        Args:
            job_ids: the jobs.
            timeout_s: how long to wait at most.
            seen: told after every look what is known.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            rows = self.find_jobs(job_ids)
            seen(rows)
            ended = sum(row["state"] in ENDS for row in rows.values())
            if ended == len(job_ids) or time.monotonic() >= deadline:
                return rows
            time.sleep(_POLL_S)

    def _count(self, query: Select[Any]) -> int:
        with transaction(self._engine) as tx:
            return int(tx.execute(query).scalar_one())

    def _read(self, query: Select[Any]) -> list[Row]:
        tx: Connection
        with transaction(self._engine) as tx:
            return [dict(row) for row in tx.execute(query).mappings()]


@contextmanager
def view_ledger(settings: Settings) -> Iterator[LedgerView]:
    """Open the ledger for reading and close it again.

    Raises:
        StoreError: there is no ledger yet.
    """
    view = LedgerView(settings)
    try:
        yield view
    finally:
        view.close()
