"""Control of a run: what may end it early, shared by its thread and the heartbeat's.

The run's thread says what it is in and how long that may take; the heartbeat's
thread looks twice a second, stops what is cancelled or over its time, and tells
the process to end where that does not help: a thread cannot be killed.

    running ──limit or cancel──► stopping (token stopped) ──grace over──► hung

Thread-safe; times are on the monotonic clock, in seconds.
"""

import threading
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from platforms.runtimes.stop import StopToken

TIMEOUT_GRACE_S = 2.0


class StopCause(StrEnum):
    """Why a stretch is stopped; the codes of a job's reason."""

    RUN_TIMEOUT = "run_timeout"
    PROGRESS_TIMEOUT = "progress_timeout"
    CANCELED = "canceled"


class RunControl:
    """The run of one task.

    Args:
        task: the task.
        cancel_grace_s: a cancelled run that goes on so long is hung.
    """

    def __init__(self, task: dict[str, Any], cancel_grace_s: float) -> None:
        self.task = task
        self.began = time.monotonic()
        self.began_ms = time.time_ns() // 1_000_000
        self._cancel_grace_s = cancel_grace_s
        self._lock = threading.Lock()
        self._cancelled: set[str] = set()
        self._jobs: tuple[str, ...] = ()
        self._limit: float | None = None
        self._progress_limit_s: float | None = None
        self._moved = self.began
        self._hung_at: float | None = None
        self.cause: StopCause | None = None
        """Why the present stretch is stopped."""
        self.token = StopToken()

    @property
    def job_ids(self) -> tuple[str, ...]:
        """The jobs of the task."""
        return tuple(item["id"] for item in self.task["jobs"])

    @property
    def running(self) -> tuple[str, ...]:
        """The jobs of the present stretch."""
        return self._jobs

    def begin(
        self, jobs: Sequence[str], limit_s: float, progress_limit_s: float | None = None
    ) -> StopToken:
        """Begin a stretch: these jobs, so long at most; return its token."""
        now = time.monotonic()
        with self._lock:
            self._jobs = tuple(jobs)
            self._limit, self._progress_limit_s, self._moved = now + limit_s, progress_limit_s, now
            self._hung_at, self.cause = None, None
            self.token = StopToken()
        if self._cancelled.intersection(jobs):
            self._stop(StopCause.CANCELED, now)
        return self.token

    def end(self) -> None:
        """End a stretch."""
        with self._lock:
            self._jobs, self._limit, self._hung_at = (), None, None

    def note_progress(self) -> None:
        """Take note that the run has moved."""
        self._moved = time.monotonic()

    def cancel(self, job_id: str) -> None:
        """Stop a job, now or when its turn comes."""
        self._cancelled.add(job_id)
        if job_id in self._jobs:
            self._stop(StopCause.CANCELED, time.monotonic())

    def is_cancelled(self, job_id: str) -> bool:
        """Say whether a job is to be stopped."""
        return job_id in self._cancelled

    def check(self, now: float) -> bool:
        """Stop what is over its time; say whether the process must end."""
        with self._lock:
            limit, hung_at, moved = self._limit, self._hung_at, self._moved
        if limit is None:
            return False
        if hung_at is not None:
            return now > hung_at
        if now > limit:
            self._stop(StopCause.RUN_TIMEOUT, now)
        elif self._progress_limit_s is not None and now > moved + self._progress_limit_s:
            self._stop(StopCause.PROGRESS_TIMEOUT, now)
        return False

    def _stop(self, cause: StopCause, now: float) -> None:
        grace_s = self._cancel_grace_s if cause is StopCause.CANCELED else TIMEOUT_GRACE_S
        with self._lock:
            if self.cause is not None:
                return
            self.cause, self._hung_at = cause, now + grace_s
            token = self.token
        token.stop()
