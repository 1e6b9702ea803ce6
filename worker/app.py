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
from functools import cached_property, partial
from typing import Any

import redis
from celery import Celery, signals
from kombu.exceptions import KombuError

from agent.commands import new_id
from agent.config import Settings
from agent.faults import reach
from agent.jobs import Lane
from agent.platformfile import load_platform
from agent.sdnotify import notify, watchdog_period_s
from agent.tasks import INFER_TASK, cancel_key, celery_settings, lane_queue
from worker.control import RunControl
from worker.engine.engine import Engine
from worker.heartbeat import Heartbeat
from worker.journal import RunJournal
from worker.outcome import (
    build_outcome,
    build_stopped,
    now_ms,
    send_crash,
    send_outcomes,
    send_progress,
)
from worker.runner import Runner

log = logging.getLogger(__name__)

# A task shorter than this is not reported as running: its outcome says it all.
_STARTED_AFTER_S = 0.2
EXIT_HUNG = 70


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
        self._running: dict[str, RunControl] = {}
        self._lock = threading.Lock()
        name = slot or f"{socket.gethostname()}/{'+'.join(lanes)}"
        worker_id = new_id()
        self._journal = RunJournal(settings.runtime_dir / "workers", name, worker_id)
        self._runner = Runner(settings, lambda: self._engine, self._journal, self._send_progress)
        self._heartbeat = Heartbeat(
            settings.queue_url, name, worker_id, lanes, self._is_started, self._on_beat
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
        self._journal.open()
        controller.start()
        self._heartbeat.stop()
        self._journal.close()
        return int(controller.exitcode or 0)

    def _on_ready(self, **_: Any) -> None:
        # Before the first heartbeat, by which the agent sees that the last worker is gone.
        try:
            self._journal.report_dead(partial(send_crash, self._app))
        except (KombuError, OSError) as exc:
            log.warning("a crash could not be reported: %s; the next worker tries again", exc)
        self._heartbeat.start()
        notify("READY=1")
        log.info("worker of %s ready", ", ".join(self._lanes))

    def _on_stopping(self, **_: Any) -> None:
        notify("STOPPING=1")

    def _on_beat(self, client: redis.Redis) -> None:
        """Feed the watchdog; stop what is cancelled or over its time."""
        if watchdog_period_s():
            notify("WATCHDOG=1")
        with self._lock:
            controls = list(self._running.values())
        self._follow_cancels(client, controls)
        now = time.monotonic()
        hung = [control for control in controls if control.check(now)]
        if hung:
            self._end_hung(hung)

    def _follow_cancels(self, client: Any, controls: Sequence[RunControl]) -> None:
        jobs = [(control, job_id) for control in controls for job_id in control.job_ids]
        if not jobs:
            return
        try:
            found = client.mget([cancel_key(job_id) for _, job_id in jobs])
        except redis.RedisError as exc:
            # Limits count on without a broker; cancels come with it.
            log.info("cancels: %s", exc)
            return
        for (control, job_id), asked in zip(jobs, found, strict=True):
            if asked is not None and not control.is_cancelled(job_id):
                log.info("job %s is cancelled", job_id)
                control.cancel(job_id)

    def _end_hung(self, hung: Sequence[RunControl]) -> None:
        """End the process, for a thread cannot be: the supervisor starts a new one.

        A job that ran alone has its end. One of a bundle may be innocent: the
        agent finds the task lost and runs its jobs one by one.
        """
        for control in hung:
            log.error("task %s cannot be stopped: this process ends", control.task["task"])
            if len(control.running) == 1 and control.cause is not None:
                [item] = [item for item in control.task["jobs"] if item["id"] == control.running[0]]
                outcome = build_stopped(item, control.began_ms, control.cause)
                try:
                    send_outcomes(self._app, control.task, [outcome])
                except KombuError as exc:
                    log.warning("its outcome could not be sent: %s", exc)
        self._journal.close()
        os._exit(EXIT_HUNG)

    def _is_started(self, task_id: str) -> bool:
        with self._lock:
            item = self._running.get(task_id)
        return item is not None and time.monotonic() - item.began > _STARTED_AFTER_S

    def _send_progress(self, task: dict[str, Any], progress: dict[str, Any]) -> None:
        try:
            send_progress(self._app, task, progress)
        except KombuError as exc:
            log.info("progress: %s", exc)

    def _infer(self, payload: str) -> None:
        """Run one task; the boundary where an unknown error becomes an outcome."""
        task: dict[str, Any] = json.loads(payload)
        control = RunControl(task, self._settings.worker.cancel_grace_s)
        with self._lock:
            self._running[task["task"]] = control
        reach("worker.received")
        self._heartbeat.wake_if_idle()
        started_ms = now_ms()
        try:
            outcomes = self._runner.run(task, control)
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
