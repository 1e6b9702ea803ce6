"""Tells agents that this worker lives and which tasks it holds.

One key in the queue broker a worker slot, with a short life, written twice a
second while there is work and now and then while there is none. An agent whose
task is neither in the broker nor in such a key knows that it is lost. A new
worker in the same slot overwrites the key, which frees the old one's tasks at
once.

The thread also restarts the process after a restart of the queue broker:
Celery's consumer sometimes stalls or dies on a reconnect (seen 2 times in 40),
and a new process is sure.
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
    HEARTBEAT_BUSY_S,
    HEARTBEAT_IDLE_S,
    HEARTBEAT_LIFE_S,
    HeartbeatBody,
    connect_redis,
    heartbeat_key,
    lane_queue,
    read_epoch,
)

log = logging.getLogger(__name__)

STALL_S = 5.0
STALL_STOP_S = 10.0
EXIT_STALLED = 70


class Heartbeat(threading.Thread):
    """Writes the worker's key until stopped.

    Args:
        queue_url: the broker.
        slot: this worker's place, such as `box/inference`; a successor has the same.
        worker_id: this process's own id.
        lanes: the lanes that this worker serves.
        is_started: says of a task id whether its run has begun.
        turned: called on each turn, for the watchdog and the limits of running tasks.
    """

    def __init__(
        self,
        queue_url: str,
        slot: str,
        worker_id: str,
        lanes: Sequence[Lane],
        is_started: Callable[[str], bool],
        turned: Callable[[redis.Redis], None],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._queue_url = queue_url
        self._slot = slot
        self._worker_id = worker_id
        self._queues = [lane_queue(lane) for lane in lanes]
        self._waiting_since: float | None = None
        self._is_started = is_started
        self._turned = turned
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._epoch: str | None = None
        self._is_idle = True

    def run(self) -> None:
        """Write the key again and again."""
        client = connect_redis(self._queue_url)
        while not self._stopping.is_set():
            try:
                busy = self._beat(client)
                self._check_broker(client)
            except redis.RedisError as exc:
                log.info("heartbeat: %s", exc)
                busy = True
            # Also without a broker: a worker that waits for it is healthy.
            self._turned(client)
            self._is_idle = not busy
            if not busy and celery_state.reserved_requests:
                # It came while the key was written, and found nobody idle to wake.
                continue
            self._wake.wait(HEARTBEAT_BUSY_S if busy else HEARTBEAT_IDLE_S)
            self._wake.clear()
        self._withdraw(client)

    def _beat(self, client: redis.Redis) -> bool:
        held = [request.id for request in tuple(celery_state.reserved_requests)]
        started = [task_id for task_id in held if self._is_started(task_id)]
        body = HeartbeatBody(worker=self._worker_id, slot=self._slot, held=held, started=started)
        client.set(heartbeat_key(self._slot), body.model_dump_json(), ex=HEARTBEAT_LIFE_S)
        return self._is_waited_for(client, is_idle=not held) or bool(held)

    def _is_waited_for(self, client: Any, *, is_idle: bool) -> bool:
        """Say whether tasks wait while this worker holds none; end it where that lasts.

        Celery's consumer sometimes stalls after a reconnect: it lives and takes nothing.
        """
        waiting = sum(client.llen(queue) for queue in self._queues) if is_idle else 0
        now = time.monotonic()
        if not waiting:
            self._waiting_since = None
            return False
        self._waiting_since = self._waiting_since or now
        waited_s = now - self._waiting_since
        if waited_s > STALL_S + STALL_STOP_S:
            log.critical("the consumer stands still and does not stop: this process ends")
            os._exit(EXIT_STALLED)
        if waited_s > STALL_S:
            log.error("%d tasks wait and the consumer takes none: this worker restarts", waiting)
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    def _check_broker(self, client: redis.Redis) -> None:
        epoch = read_epoch(client)
        if self._epoch not in (None, epoch):
            log.warning("queue broker was restarted: this worker restarts too")
            os.kill(os.getpid(), signal.SIGTERM)
        self._epoch = epoch

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
