"""Rows of jobs and how they change: one place writes state, history and report together.

A `Changes` collects the moves of one transaction and writes them in bulk: the
job's row, its line of history, and the outbox row that reports it. So no
caller can do one without the others. All run inside the caller's transaction.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Insert,
    Table,
    TableClause,
    bindparam,
    func,
    insert,
    select,
    update,
)

from agent.commands import encode
from agent.jobs import ENDS, JobState, Reason, Source, path_to
from agent.store import outbox
from agent.store.records import build_state
from agent.store.statements import Bulk, Statement
from agent.store.tables import Job, Transition
from agent.topics import Topics

JOBS = Job.__table__  # type: ignore[attr-defined]
TRANSITIONS = Transition.__table__  # type: ignore[attr-defined]

Row = dict[str, Any]

STATE_NAMES = (
    "seq",
    "job_id",
    "source",
    "model",
    "version",
    "state",
    "rev",
    "attempt",
    "interruptions",
    "failures",
    "crashes",
    "crashed_attempt",
    "task_id",
    "reason_code",
    "reason",
    "body_hash",
    "created_ms",
    "started_ms",
    "ended_ms",
    "ready_boot_ms",
    "max_attempts",
    "on_interrupt",
    "options",
    "result",
)
STATE_COLUMNS = [JOBS.c[name] for name in STATE_NAMES]
_CHANGED = (
    "state",
    "rev",
    "reason_code",
    "reason",
    "task_id",
    "interruptions",
    "failures",
    "crashes",
    "crashed_attempt",
    "started_ms",
    "ended_ms",
    "ready_boot_ms",
    "result",
)


def insert_into(table: Table) -> Callable[[TableClause, Mapping[str, ColumnElement[Any]]], Insert]:
    """Return what builds an INSERT of a bulk's rows into a table."""
    return lambda rows, values: insert(table).from_select(
        # The rest of the columns have defaults of SQLite's own.
        list(values),
        select(*values.values()).select_from(rows),
        include_defaults=False,
    )


_INSERT_TRANSITION = Bulk(
    ("job_id", "rev", "state", "at_ms", "attempt", "reason_code"), insert_into(TRANSITIONS)
)
_UPDATE = Bulk(
    ("seq", *_CHANGED),
    lambda rows, values: (
        update(JOBS)
        .where(JOBS.c.seq == values["seq"])
        .values({name: values[name] for name in _CHANGED})
    ),
)
# A JSON list as one parameter: the statement's text stays the same for any number of values.
_BY_ID, _BY_TASK = (
    Statement(
        select(*STATE_COLUMNS).where(
            column.in_(select(func.json_each(bindparam("b_values")).table_valued("value")))
        )
    )
    for column in (JOBS.c.job_id, JOBS.c.task_id)
)


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that ended in this transaction."""

    job_id: str
    source: Source
    state: JobState
    task_id: str | None = None
    """The task that carried it to the end; it may still run where the job was cancelled."""
    took_ms: int = 0
    """From its acceptance to its end, on the wall clock."""


class Changes:
    """The moves of one transaction.

    Args:
        topics: where states are reported.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self.jobs: list[Row] = []
        """Rows to write, also those that changed without a move."""
        self._history: list[Row] = []
        self._reported: dict[str, int] = {}
        self.results: list[Row] = []
        """Outbox rows of results."""
        self.ended: list[EndedJob] = []

    def move(self, row: Row, state: JobState, reason: Reason | None, at_ms: int) -> None:
        """Move a job one step.

        Raises:
            IllegalTransitionError: the state machine has no such arrow.
        """
        path_to(JobState(row["state"]), state)
        row["state"] = state.value
        row["rev"] += 1
        row["reason_code"] = reason and reason.code
        row["reason"] = reason and reason.message
        if state is JobState.RUNNING:
            row["started_ms"] = row["started_ms"] or at_ms
        if state in ENDS:
            source, took_ms = Source(row["source"]), at_ms - row["created_ms"]
            self.ended.append(EndedJob(row["job_id"], source, state, row["task_id"], took_ms))
            row["ended_ms"] = at_ms
            row["task_id"] = None
        self._history.append(build_history(row, state.value, at_ms))
        self.report(row, at_ms)

    def report(self, row: Row, at_ms: int | None = None) -> None:
        """Report a job's present state, again where it did not change."""
        self._reported[row["job_id"]] = moved_ms(row) if at_ms is None else at_ms
        self.jobs.append(row)

    def write(self, tx: Connection) -> list[EndedJob]:
        """Write everything; return the jobs that ended."""
        # A job may have moved twice in one batch: its row and its report are written once.
        rows = {row["seq"]: row for row in self.jobs}
        _UPDATE.run(tx, list(rows.values()))
        insert_history(tx, self._history)
        outbox.add_states(
            tx,
            [
                build_state(self._topics, row, self._reported[row["job_id"]])
                for row in rows.values()
                if row["job_id"] in self._reported
            ],
        )
        outbox.add_records(tx, self.results)
        return self.ended


def build_history(row: Row, state: str, at_ms: int) -> Row:
    """Return the line of history for a job's present `rev`."""
    return {
        "job_id": row["job_id"],
        "rev": row["rev"],
        "state": state,
        "at_ms": at_ms,
        "attempt": row["attempt"],
        "reason_code": row["reason_code"],
    }


def insert_history(tx: Connection, rows: list[Row]) -> None:
    """Write lines of history."""
    _INSERT_TRANSITION.run(tx, rows)


def moved_ms(row: Row) -> int:
    """Return when a job came to its present state, as far as its row tells."""
    return int(row.get("ended_ms") or row.get("started_ms") or row["created_ms"])


def read_jobs(tx: Connection, job_ids: Collection[str]) -> list[Row]:
    """Return the rows of the jobs that are known."""
    return _read_rows(tx, _BY_ID, job_ids)


def read_task_jobs(tx: Connection, task_ids: Collection[str]) -> list[Row]:
    """Return the rows of the jobs that these tasks carry."""
    return _read_rows(tx, _BY_TASK, task_ids)


def _read_rows(tx: Connection, query: Statement, values: Collection[str]) -> list[Row]:
    if not values:
        return []
    rows = query.fetch(tx, b_values=encode(list(values)))
    return [dict(zip(STATE_NAMES, row, strict=True)) for row in rows]
