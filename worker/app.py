"""The worker process: a Celery worker of one or more lanes.

Started by `edgeward worker`, never by `celery -A` (which puts the working
directory on the path, and would load a stray `worker.py`). Threads pool for
inference and batch: one copy of each model. Nothing here writes the store.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from celery import Celery, signals
from kombu.exceptions import KombuError

from agent.commands import new_id
from agent.config import Settings
from agent.faults import reach
from agent.jobs import Lane
from agent.platformfile import load_platform
from agent.sdnotify import notify, watchdog_period_s
from agent.tasks import INFER_TASK, celery_settings, lane_queue
from worker.engine.engine import Engine
from worker.heartbeat import Heartbeat
from worker.outcome import build_outcome, now_ms, send_outcomes
from worker.runner import Runner

log = logging.getLogger(__name__)

# A task shorter than this is not reported as running: its outcome says it all.
_STARTED_AFTER_S = 0.2
# Past its limit an inference has so long to come back before the process ends.
_GRACE_S = 2.0
EXIT_HUNG = 70


@dataclass(frozen=True, slots=True)
class _Running:
    """A task whose run has begun; `began` and `limit` are on the monotonic clock, in seconds."""

    task: dict[str, Any]
    began: float
    began_ms: int
    limit: float


def _start(task: dict[str, Any]) -> _Running:
    now = time.monotonic()
    longest_s = max(item["timeout_s"] for item in task["jobs"])
    return _Running(task, now, now_ms(), now + longest_s + _GRACE_S)


class Worker:
    """One worker process.

    Args:
        settings: this box's settings.
        lanes: the lanes it serves, the first one first.
        slot: its place among the box's workers; unique for each running one.
    """

    def __init__(self, settings: Settings, lanes: Sequence[Lane], slot: str | None = None) -> None:
        self._settings = settings
        self._lanes = lanes
        self._running: dict[str, _Running] = {}
        self._lock = threading.Lock()
        self._runner = Runner(settings, lambda: self._engine)
        name = slot or f"{socket.gethostname()}/{'+'.join(lanes)}"
        self._heartbeat = Heartbeat(
            settings.queue_url, name, new_id(), self._is_started, self._on_beat
        )
        self._app = Celery("edgeward-worker", set_as_current=True)
        self._app.conf.update(celery_settings(settings.queue_url))
        self._app.task(self._infer, name=INFER_TASK, ignore_result=True)

    @cached_property
    def _engine(self) -> Engine:
        return Engine(load_platform(self._settings.data_dir), self._concurrency)

    @cached_property
    def _concurrency(self) -> int:
        if self._settings.worker.concurrency:
            return self._settings.worker.concurrency
        return max(1, int(load_platform(self._settings.data_dir).cores))

    def run(self) -> int:
        """Serve until SIGTERM; return the exit code."""
        signals.worker_ready.connect(self._on_ready, weak=False)
        signals.worker_shutting_down.connect(self._on_stopping, weak=False)
        controller: Any = self._app.Worker(
            hostname=f"edgeward-{os.getpid()}@{socket.gethostname()}",
            pool="threads",
            concurrency=self._concurrency,
            queues=[lane_queue(lane) for lane in self._lanes],
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            loglevel=logging.getLogger().level,
        )
        controller.start()
        self._heartbeat.stop()
        return int(controller.exitcode or 0)

    def _on_ready(self, **_: Any) -> None:
        self._heartbeat.start()
        notify("READY=1")
        log.info("worker of %s ready", ", ".join(self._lanes))

    def _on_stopping(self, **_: Any) -> None:
        notify("STOPPING=1")

    def _on_beat(self) -> None:
        if watchdog_period_s():
            notify("WATCHDOG=1")
        now = time.monotonic()
        with self._lock:
            hung = [item for item in self._running.values() if now > item.limit]
        if hung:
            self._end_hung(hung)

    def _end_hung(self, hung: Sequence["_Running"]) -> None:
        """End the process, for a thread cannot be: the supervisor starts a new one.

        A job that ran alone is `timed_out`. One of a bundle may be innocent: the
        agent finds the task lost and runs its jobs one by one.
        """
        for item in hung:
            log.error("task %s runs past its limit: this process ends", item.task["task"])
            jobs = item.task["jobs"]
            if len(jobs) == 1:
                message = f"it ran longer than {jobs[0]['timeout_s']:g} s"
                outcome = build_outcome(
                    jobs[0], item.began_ms, state="timed_out", code="run_timeout", message=message
                )
                try:
                    send_outcomes(self._app, item.task, [outcome])
                except KombuError as exc:
                    log.warning("its outcome could not be sent: %s", exc)
        os._exit(EXIT_HUNG)

    def _is_started(self, task_id: str) -> bool:
        with self._lock:
            item = self._running.get(task_id)
        return item is not None and time.monotonic() - item.began > _STARTED_AFTER_S

    def _infer(self, payload: str) -> None:
        """Run one task; the boundary where an unknown error becomes an outcome."""
        task: dict[str, Any] = json.loads(payload)
        reach("worker.received")
        with self._lock:
            self._running[task["task"]] = _start(task)
        self._heartbeat.wake_if_idle()
        started_ms = now_ms()
        try:
            outcomes = self._runner.run(task)
        except Exception:  # the task boundary of style.md
            log.exception("internal_error in task %s", task["task"])
            message = "the worker failed; its log has the traceback"
            outcomes = [
                build_outcome(
                    item, started_ms, state="failed", code="internal_error", message=message
                )
                for item in task["jobs"]
            ]
        finally:
            with self._lock:
                del self._running[task["task"]]
        reach("worker.ran")
        send_outcomes(self._app, task, outcomes)
        reach("worker.sent")


def run_worker(settings: Settings, lanes: Sequence[Lane], slot: str | None = None) -> int:
    """Run a worker of these lanes until a signal ends it; return the exit code."""
    return Worker(settings, lanes, slot).run()
