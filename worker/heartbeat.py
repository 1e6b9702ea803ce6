"""Tells agents that this worker lives and which tasks it holds.

One key in the queue broker a worker slot, with a short life, written twice a
second while there is work and now and then while there is none. An agent whose
task is neither in the broker nor in such a key knows that it is lost. A new
worker in the same slot overwrites the key, which frees the old one's tasks at
once.

While there is work the thread also looks for the keys by which an agent asks
to stop a job that was cancelled.

And it restarts the process where Celery's consumer cannot be trusted: after a
restart of the queue broker (it sometimes stalls or dies on a reconnect, seen
2 times in 40), and where tasks wait that an idle worker does not take.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from celery.worker import state as celery_state

from agent.jobs import Lane
from agent.tasks import (
    HEARTBEAT_BUSY_LIFE_S,
    HEARTBEAT_BUSY_S,
    HEARTBEAT_IDLE_S,
    HEARTBEAT_LIFE_S,
    FiguresBody,
    HeartbeatBody,
    VersionFigures,
    cancel_key,
    connect_redis,
    figures_key,
    heartbeat_key,
    lane_queue,
    read_epoch,
)
from worker.runs import Runs

log = logging.getLogger(__name__)

# A healthy idle worker takes a waiting task within milliseconds.
_STALLED_AFTER_S = 5.0
# Asked to end, a worker that holds nothing needs no longer.
_END_WITHIN_S = 10.0
EXIT_HUNG = 70

Watched = Callable[[], tuple[float, list[VersionFigures]] | None]
"""Returns the process's memory in MB and what watched versions did; None where none is watched."""


class StallWatch:
    """Decides that a consumer takes no tasks although some wait and it has none."""

    def __init__(self, after_s: float = _STALLED_AFTER_S) -> None:
        self._after_s = after_s
        self._since: float | None = None
        self._taken = 0

    @property
    def is_suspicious(self) -> bool:
        """Say whether tasks waited at the last look, with nobody at them."""
        return self._since is not None

    def observe(self, now: float, *, waiting: int, holding: int, taken: int) -> bool:
        """Look once; say whether it has stood still for too long.

        Args:
            now: seconds on the monotonic clock.
            waiting: tasks in the broker that this worker may take.
            holding: tasks that it has.
            taken: tasks that it has ever begun.
        """
        if not waiting or holding or taken != self._taken:
            self._since, self._taken = None, taken
            return False
        if self._since is None:
            self._since = now
        return now - self._since > self._after_s


class Heartbeat(threading.Thread):
    """Writes the worker's key until stopped.

    Args:
        queue_url: the broker.
        slot: this worker's place, such as `box/inference`; a successor has the same.
        worker_id: this process's own id.
        lanes: the lanes it serves.
        runs: the tasks that it runs.
        turned: called on each turn, for the watchdog and the limits of running tasks.
        watched: returns what versions do that the agent watches.
    """

    def __init__(
        self,
        queue_url: str,
        slot: str,
        worker_id: str,
        lanes: Sequence[Lane],
        runs: Runs,
        turned: Callable[[], None],
        watched: Watched | None = None,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._queue_url = queue_url
        self._slot = slot
        self._worker_id = worker_id
        self._lanes = lanes
        self._runs = runs
        self._turned = turned
        self._watched = watched
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._epoch: str | None = None
        self._stall = StallWatch()
        self._end_by: float | None = None
        self._is_idle = True

    def run(self) -> None:
        """Write the key again and again; a defect here ends the process.

        A worker without its heartbeat would take tasks that nobody knows it has.
        """
        try:
            self._run()
        except Exception:
            log.exception("the heartbeat failed: this process ends")
            os._exit(EXIT_HUNG)

    def _run(self) -> None:
        client = connect_redis(self._queue_url)
        while not self._stopping.is_set():
            try:
                busy = self._turn(client)
            except redis.RedisError as exc:
                log.info("heartbeat: %s", exc)
                busy = True
            # Also without a broker: a worker that waits for it is healthy.
            self._turned()
            self._is_idle = not busy
            if not busy and celery_state.reserved_requests:
                # It came while the key was written, and found nobody idle to wake.
                continue
            self._wake.wait(HEARTBEAT_BUSY_S if busy else HEARTBEAT_IDLE_S)
            self._wake.clear()
        self._withdraw(client)

    def _turn(self, client: redis.Redis) -> bool:
        """Do everything that needs the broker; say whether to come back soon."""
        held = _read_held()
        self._beat(client, held)
        self._look_for_cancels(client)
        self._check_broker(client)
        self._check_consumer(client, len(held))
        self._check_end(held)
        is_watched = self._tell_figures(client)
        return bool(held) or is_watched or self._stall.is_suspicious or self._end_by is not None

    def _beat(self, client: redis.Redis, held: list[str]) -> None:
        started = [task_id for task_id in held if self._runs.is_started(task_id)]
        body = HeartbeatBody(worker=self._worker_id, slot=self._slot, held=held, started=started)
        life_s = HEARTBEAT_BUSY_LIFE_S if held else HEARTBEAT_LIFE_S
        client.set(heartbeat_key(self._slot), body.model_dump_json(), ex=life_s)

    def _tell_figures(self, client: redis.Redis) -> bool:
        """Say what watched versions do; say whether there are any."""
        figures = self._watched() if self._watched is not None else None
        if figures is None:
            return False
        body = FiguresBody(worker=self._worker_id, rss_mb=figures[0], versions=figures[1])
        client.set(figures_key(self._slot), body.model_dump_json(), ex=HEARTBEAT_LIFE_S)
        return True

    def _look_for_cancels(self, client: redis.Redis) -> None:
        job_ids = self._runs.job_ids()
        if job_ids:
            found: Any = client.mget([cancel_key(job_id) for job_id in job_ids])
            canceled = [job_id for job_id, flag in zip(job_ids, found, strict=True) if flag]
            if canceled:
                self._runs.cancel(canceled)

    def _check_broker(self, client: redis.Redis) -> None:
        epoch = read_epoch(client)
        if self._epoch not in (None, epoch):
            self._ask_end("queue broker was restarted")
        self._epoch = epoch

    def _check_consumer(self, client: redis.Redis, holding: int) -> None:
        """Restart where tasks wait and the idle consumer does not take them."""
        if holding or _is_closing():
            waiting = 0
        else:
            waiting = sum(int(str(client.llen(lane_queue(lane)))) for lane in self._lanes)
        taken = celery_state.all_total_count[0]
        now = time.monotonic()
        if self._stall.observe(now, waiting=waiting, holding=holding, taken=taken):
            self._ask_end(f"{waiting} tasks wait, and the consumer takes none")

    def _ask_end(self, why: str) -> None:
        if self._end_by is None:
            log.warning("%s: this worker restarts", why)
            self._end_by = time.monotonic() + _END_WITHIN_S
            os.kill(os.getpid(), signal.SIGTERM)

    def _check_end(self, held: Sequence[str]) -> None:
        """End by force where asking did not help; what runs may finish first."""
        now = time.monotonic()
        if self._end_by is not None and held:
            self._end_by = now + _END_WITHIN_S
        elif self._end_by is not None and now > self._end_by:
            log.error("the worker does not end when asked: this process ends")
            os._exit(EXIT_HUNG)

    def _withdraw(self, client: redis.Redis) -> None:
        try:
            client.delete(heartbeat_key(self._slot))
        except redis.RedisError as exc:
            log.info("heartbeat: %s", exc)

    def wake_if_idle(self) -> None:
        """Write the key now, if the last one said that there was no work."""
        if self._is_idle:
            self._is_idle = False
            self._wake.set()

    def stop(self) -> None:
        """Withdraw the key and end the thread."""
        self._stopping.set()
        self._wake.set()
        self.join(3.0)


def _read_held() -> list[str]:
    """Return the ids of the tasks that this worker has taken and not finished."""
    while True:
        try:
            return [request.id for request in tuple(celery_state.reserved_requests)]
        except RuntimeError:
            # Another thread took or finished one meanwhile: Celery's set has no lock.
            continue


def _is_closing() -> bool:
    """Say whether the worker was asked to end, and so takes no more tasks."""
    flags = (celery_state.should_stop, celery_state.should_terminate)
    return any(flag not in (None, False) for flag in flags)
