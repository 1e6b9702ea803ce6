"""The tasks that this process runs now: their limits, and who must stop.

A run is one task between its arrival and its outcome. Owns the decision that a
job is past its time or was cancelled, and the one that a run does not obey, so
that the process must end. Three limits: a job's run, its progress, and, for
jobs that are at work together (a load, a stacked run), the longest of theirs:
then each runs alone, for nobody can tell whose fault it is. Progress is whatever
goes on from one step to the next; loading the model is no want of it.

Invariants: a job is first stopped in the engine, which costs nobody else
anything; the process ends only when that did not help within the grace, and
for a cancelled job only while no other job needs what runs.
"""

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from agent.jobs import JobState
from worker.engine.control import AtWork, InferError, JobIds, RunControl
from worker.journal import Journal, JournalEntry
from worker.outcome import now_ms

# A task shorter than this is not reported as running: its outcome says it all.
_STARTED_AFTER_S = 0.2
# Past its limit a run has so long to come back before the process ends.
_GRACE_S = 2.0
_PROGRESS_PERIOD_S = 1.0

CANCELED = InferError("canceled", "cancelled while it was with a worker", retryable=False)
_RUN_TIMEOUT, _PROGRESS_TIMEOUT = "run_timeout", "progress_timeout"
# The ends, other than `failed`, that an error of this code means.
STATES = {
    CANCELED.code: JobState.CANCELED,
    _RUN_TIMEOUT: JobState.TIMED_OUT,
    _PROGRESS_TIMEOUT: JobState.TIMED_OUT,
}

SendProgress = Callable[[dict[str, Any], dict[str, Any]], None]


@dataclass(slots=True)
class _Progress:
    """How far a job is that says so."""

    began: float
    sent: float


class Run:
    """One task that runs.

    Args:
        task: as the agent sent it.
        entry: this thread's part of the journal, where there is one.
        send_progress: sends a progress message of the task; called at most once a second a job.
    """

    def __init__(
        self, task: dict[str, Any], entry: JournalEntry | None, send_progress: SendProgress
    ) -> None:
        self.task = task
        self.began = time.monotonic()
        self.began_ms = now_ms()
        self._entry = entry
        self._send_progress = send_progress
        self._items = {item["id"]: item for item in task["jobs"]}
        self._progress: dict[str, _Progress] = {}
        self._canceled_at: float | None = None
        self.control = RunControl(entry.mark if entry else _ignore)
        self.enter_all()

    # --- the thread that runs ---------------------------------------------------------------

    def enter_all(self) -> None:
        """Say that all jobs of the task are at work together."""
        self.control.enter(self._items)

    def open_journal(self, version: str | None) -> None:
        """Write into the journal that this task runs, on this version's folder."""
        if self._entry is not None:
            self._entry.open(self.task, version)
            self._entry.mark(self.control.see().job_ids)

    def report(self, job_id: str, done: int, total: int, unit: str) -> None:
        """Say how far a job is: at most once a second, and when it is through."""
        now = time.monotonic()
        seen = self._progress.setdefault(job_id, _Progress(now, now))
        if done < total and now - seen.sent < _PROGRESS_PERIOD_S:
            return
        if done:
            seen.sent = now
            eta_s = (now - seen.began) / done * (total - done)
            attempt = self._items[job_id]["attempt"]
            job = {"id": job_id, "attempt": attempt, "done": done, "total": total, "unit": unit}
            self._send_progress(self.task, {**job, "eta_s": round(eta_s, 3)})

    # --- any thread -------------------------------------------------------------------------

    @property
    def job_ids(self) -> Collection[str]:
        """Ids of the task's jobs."""
        return self._items.keys()

    def is_started(self) -> bool:
        """Say whether it has run long enough to be reported as running."""
        return time.monotonic() - self.began > _STARTED_AFTER_S

    def cancel(self, job_ids: Collection[str]) -> None:
        """Stop jobs that nobody wants any more."""
        if any(self.control.find_stop(job_id) is None for job_id in job_ids):
            self._canceled_at = time.monotonic()
            self.control.stop(job_ids, CANCELED)

    def check(self, cancel_grace_s: float) -> InferError | None:
        """Stop what is past its time; return why the process must end, if it must."""
        now = time.monotonic()
        seen = self.control.see()
        if not seen.job_ids:
            return None
        over_s, why = self._find_overrun(seen, now)
        still_s, why_still = self._find_stillness(seen, now)
        if max(over_s, still_s) > 0:
            self._stop(seen, why if over_s > 0 else why_still)
        if over_s > _GRACE_S:
            return why
        # Several may be innocent of one's short limit: alone it will meet it.
        if still_s > _GRACE_S and len(seen.job_ids) == 1:
            return why_still
        stops = [self.control.find_stop(job_id) for job_id in seen.job_ids]
        if self._canceled_at is None or any(stop is not CANCELED for stop in stops):
            return None
        is_late = now - max(self._canceled_at, seen.since) > cancel_grace_s
        return CANCELED if is_late else None

    def find_guilty(self) -> dict[str, Any] | None:
        """Return the job whose outcome may be told where the process ends: one that is alone."""
        return self.task["jobs"][0] if len(self._items) == 1 else None

    def _stop(self, seen: AtWork, why: InferError) -> None:
        if len(seen.job_ids) == 1:
            self.control.stop(seen.job_ids, why)
        else:
            self.control.interrupt(seen)

    def _find_overrun(self, seen: AtWork, now: float) -> tuple[float, InferError]:
        """Return how long the jobs at work are past their run's limit; negative before it."""
        limit_s = max(self._items[job_id]["timeout_s"] for job_id in seen.job_ids)
        message = f"it ran longer than {limit_s:g} s"
        why = InferError(_RUN_TIMEOUT, message, retryable=False)
        return now - seen.since + seen.spent_s - limit_s, why

    def _find_stillness(self, seen: AtWork, now: float) -> tuple[float, InferError]:
        """Return for how long the jobs at work have stood still beyond what one allows."""
        limits = [self._items[job_id].get("progress_timeout_s") for job_id in seen.job_ids]
        limit_s = min((limit for limit in limits if limit is not None), default=math.inf)
        message = f"it made no progress for {limit_s:g} s"
        why = InferError(_PROGRESS_TIMEOUT, message, retryable=False)
        return -math.inf if seen.is_loading else now - seen.since - limit_s, why


def _ignore(_: JobIds) -> None:
    return None


class Runs:
    """All tasks that this process runs now; thread-safe.

    Args:
        cancel_grace_s: a cancelled run that goes on so long ends the process.
        send_progress: sends a progress message of a task.
    """

    def __init__(self, cancel_grace_s: float, send_progress: SendProgress) -> None:
        self._cancel_grace_s = cancel_grace_s
        self._send_progress = send_progress
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self.journal: Journal | None = None

    @contextmanager
    def hold(self, task: dict[str, Any]) -> Iterator[Run]:
        """Run a task in the calling thread for the length of the block."""
        with _take_entry(self.journal) as entry:
            run = Run(task, entry, self._send_progress)
            with self._lock:
                self._runs[task["task"]] = run
            try:
                yield run
            finally:
                with self._lock:
                    del self._runs[task["task"]]

    def _list(self) -> Sequence[Run]:
        with self._lock:
            return tuple(self._runs.values())

    def is_started(self, task_id: str) -> bool:
        """Say whether a task's run has begun, and lasts."""
        with self._lock:
            run = self._runs.get(task_id)
        return run is not None and run.is_started()

    def job_ids(self) -> Sequence[str]:
        """Return the ids of the jobs of all tasks that run."""
        return [job_id for run in self._list() for job_id in run.job_ids]

    def cancel(self, job_ids: Collection[str]) -> None:
        """Stop jobs that were cancelled, in whichever task they are."""
        for run in self._list():
            mine = [job_id for job_id in job_ids if job_id in run.job_ids]
            if mine:
                run.cancel(mine)

    def check(self) -> Sequence[tuple[Run, InferError]]:
        """Stop what is past its time; return the runs that do not obey, and why they should."""
        found = [(run, run.check(self._cancel_grace_s)) for run in self._list()]
        return [(run, why) for run, why in found if why is not None]


@contextmanager
def _take_entry(journal: Journal | None) -> Iterator[JournalEntry | None]:
    if journal is None:
        yield None
        return
    with journal.take() as entry:
        yield entry
