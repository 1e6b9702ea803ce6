"""Stopping one call of the engine from another thread, and seeing what it is at.

Owns which jobs of a call are at work just now, for how long each has been, and
which are to be stopped, and why. Never decides that a job must stop, and ends
nothing but a model's run.

Invariants: a job that was stopped before it is at work never gets there; a stop
reaches the run of the jobs it was meant for, never the one after it. `enter`
and `begin` are called by the thread that runs; everything else by any.
"""

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from threading import Lock

from platforms.runtimes.base import RunStop

JobIds = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InferError:
    """Why a request has no value."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class AtWork:
    """What a call is at."""

    job_ids: JobIds
    since: float
    """When these jobs came to work, seconds on the monotonic clock."""
    spent_s: float
    """What a job that is alone at work has used before."""
    is_loading: bool
    """They wait for their model."""


def _ignore(_: JobIds) -> None:
    return None


class RunControl:
    """One call of the engine, as other threads see and stop it.

    Args:
        entered: told of each change of what is at work; called by the running thread.
    """

    def __init__(self, entered: Callable[[JobIds], None] = _ignore) -> None:
        self._entered = entered
        self._lock = Lock()
        self._stops: dict[str, InferError] = {}
        self._spent: dict[str, float] = {}
        self._at_work: JobIds = ()
        self._since = time.monotonic()
        self._stop: RunStop | None = None
        self._is_loading = False

    # --- the thread that runs -------------------------------------------------------------

    def enter(self, job_ids: Iterable[str], *, is_loading: bool = False) -> None:
        """Say which jobs are at work from now on; equal ids count once."""
        ids = tuple(dict.fromkeys(job_ids))
        self._entered(ids)
        now = time.monotonic()
        with self._lock:
            # Time beside others is nobody's: of a stacked run none can tell whose it was.
            if len(self._at_work) == 1:
                job_id = self._at_work[0]
                self._spent[job_id] = self._spent.get(job_id, 0.0) + now - self._since
            self._at_work, self._since, self._stop = ids, now, None
            self._is_loading = is_loading

    def begin(self) -> RunStop:
        """Return the switch of the run that the jobs at work begin now."""
        stop = RunStop()
        with self._lock:
            self._stop = stop
            is_wanted = any(job_id in self._stops for job_id in self._at_work)
        if is_wanted:
            stop.set()
        return stop

    def find_stop(self, job_id: str) -> InferError | None:
        """Return why a job must stop, if it must."""
        return self._stops.get(job_id)

    # --- any thread -----------------------------------------------------------------------

    def see(self) -> AtWork:
        """Return what is at work now."""
        with self._lock:
            ids = self._at_work
            spent_s = self._spent.get(ids[0], 0.0) if len(ids) == 1 else 0.0
            return AtWork(ids, self._since, spent_s, self._is_loading)

    def stop(self, job_ids: Collection[str], why: InferError) -> None:
        """Stop jobs: those at work as soon as the runtime can, the others before they begin."""
        with self._lock:
            for job_id in job_ids:
                self._stops.setdefault(job_id, why)
            if self._stop is not None and any(job_id in job_ids for job_id in self._at_work):
                self._stop.set()

    def interrupt(self, seen: AtWork) -> None:
        """End the run of the jobs seen at work, and stop none of them: each gets a run alone."""
        with self._lock:
            is_same = (self._at_work, self._since) == (seen.job_ids, seen.since)
            if is_same and self._stop is not None:
                self._stop.set()
