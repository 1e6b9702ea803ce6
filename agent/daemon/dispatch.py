"""Dispatch: queued jobs into bounded, self-contained Celery tasks, and lost tasks back.

Two halves. `select` runs in the writer's transaction: it bundles ready jobs
and writes their new attempt before anything is sent. The thread sends what was
committed, and looks every second for tasks that are neither in the broker nor
held by a worker: those are lost, and their jobs are tried again. So Redis may
be wiped and workers killed at any moment.

Invariants: at most `window_tasks` tasks a lane are under way; a job is in at
most one of them; nothing is sent that was not committed first.
"""

import json
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from queue import Empty, SimpleQueue
from typing import Any

import redis
from kombu import Connection as QueueConnection
from kombu import Producer, Queue
from kombu.exceptions import KombuError
from pydantic import ValidationError
from sqlalchemy import Connection

from agent.clock import Clock
from agent.commands import UPDATE, describe, encode, hash_text, new_id
from agent.daemon.messages import Message, TasksLost, TasksStarted, Wake
from agent.errors import QuarantinedError
from agent.faults import reach
from agent.jobs import Lane, Reason
from agent.sections import QueueSettings
from agent.store.facts import FLOORS, read_fact
from agent.store.ledger import EndedJob, Ledger, ReadyJob
from agent.store.options import read_options
from agent.tasks import (
    CANCEL_LIFE_S,
    HEARTBEAT_PREFIX,
    INFER_TASK,
    MAINTAIN_TASK,
    HeartbeatBody,
    cancel_key,
    celery_message,
    connect_redis,
    lane_queue,
    outcome_queue,
    read_epoch,
    transport_options,
)
from agent.window import BoxView, find_closed

log = logging.getLogger(__name__)

# A bundle should not hold a worker's thread much longer, so that urgent work gets its turn.
_BUNDLE_TARGET_MS = 250.0
_CHECK_PERIOD_S = 1.0
# A closed window is looked at again so often: the wall clock may be set meanwhile, and where
# daylight saving begins, an opening comes an hour sooner than it seemed.
_WINDOW_RECHECK_S = 300.0
_IDLE_CHECK_S = 3.0
_LOOK_SHARE = 0.4
# So many tasks keep the workers of a lane busy until the next turn.
_FED = 4
_GROW_MS = 50
_SPREAD = 4
_READ_JOBS = 256
_EWMA = 0.3
# Celery names every task, queue and header; a generous bound per job beside its body.
_JOB_OVERHEAD_BYTES = 256


@dataclass(frozen=True, slots=True)
class Task:
    """One Celery task that is committed and may be sent."""

    task_id: str
    lane: Lane
    payload: str
    name: str = INFER_TASK


@dataclass(frozen=True, slots=True)
class _Stop:
    """Jobs whose runs workers are asked to stop."""

    job_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What a turn dispatches, and which jobs it ended instead."""

    tasks: Sequence[Task] = ()
    ended: Sequence[EndedJob] = ()


@dataclass(slots=True)
class _UnderWay:
    """What is known of a task between its commit and its outcome."""

    lane: Lane
    seen_ms: int
    """When it was last known to be somewhere, on the boot clock."""
    sent: bool = False
    """What is not sent yet waits in this process, and cannot be lost in another."""


@dataclass
class BrokerState:
    """The queue broker as last seen."""

    reachable: bool = False
    epoch: str | None = None
    why: str = "not contacted yet"


class Dispatcher(threading.Thread):
    """Sends tasks and watches over those under way.

    Args:
        device: the device's id, named in each task for its outcome's way back.
        queue_url: the broker.
        limits: window and bundle sizes.
        ledger: where jobs come from.
        clock: boot time for leases.
        post: puts a message into the writer's mailbox.
        verify_served: raises where a model version is in quarantine.
        view_box: says what the predicates of maintenance windows ask.
    """

    def __init__(
        self,
        device: str,
        queue_url: str,
        limits: QueueSettings,
        ledger: Ledger,
        clock: Clock,
        post: Callable[[Message], None],
        verify_served: Callable[[str, str | None], None] = lambda _model, _version: None,
        view_box: Callable[[], BoxView] = BoxView,
    ) -> None:
        super().__init__(name="dispatch", daemon=True)
        self._device = device
        self._queue_url = queue_url
        self._limits = limits
        self._ledger = ledger
        self._clock = clock
        self._post = post
        self._verify_served = verify_served
        self._view_box = view_box
        self._lock = threading.Lock()
        self._under_way: dict[str, _UnderWay] = {}
        self._workers: dict[str, HeartbeatBody] = {}
        self._announced: set[str] = set()
        self._per_job_ms: dict[str, float] = {}
        self._to_send: SimpleQueue[Task | _Stop | None] = SimpleQueue()
        self._producer: Producer | None = None
        self._redis: redis.Redis | None = None
        self._next_check_ms = 0
        self.broker = BrokerState()
        self.turns = 0

    # --- inside the writer's transaction -------------------------------------------------

    def adopt(self, tasks: Iterable[tuple[str, Lane]]) -> None:
        """Take over tasks that were under way when the agent last stopped."""
        now_ms = self._clock.boot_ms()
        with self._lock:
            for task_id, lane in tasks:
                self._under_way[task_id] = _UnderWay(lane, now_ms, sent=True)

    def select(self, tx: Connection) -> Dispatched:
        """Bundle ready jobs into tasks, as far as the window allows, and write their attempts."""
        if not self.broker.reachable:
            return Dispatched()
        tasks: list[Task] = []
        ended: list[EndedJob] = []
        for lane in Lane:
            with self._lock:
                used = sum(task.lane is lane for task in self._under_way.values())
            room = self._limits.window_tasks - used
            if room > 0:
                limit = min(room * self._limits.bundle_jobs, _READ_JOBS)
                found = self._ledger.schedule.find_ready(tx, lane, limit)
                ready = self._admit(tx, found, ended)
                tasks += self._bundle(tx, lane, self._split(ready, is_fed=used >= _FED), room)
        return Dispatched(tasks, ended)

    def _admit(
        self, tx: Connection, found: Sequence[ReadyJob], ended: list[EndedJob]
    ) -> list[ReadyJob]:
        """Return the jobs that may run now; end what never may, postpone what may later."""
        ready: list[ReadyJob] = []
        refused: list[tuple[str, Reason]] = []
        postponed: list[tuple[ReadyJob, float]] = []
        for job in found:
            reason = self._find_obstacle(job)
            if reason is not None:
                refused.append((job.job_id, reason))
            elif job.options and (wait_s := self._find_wait(job.options)) > 0:
                postponed.append((job, wait_s))
            else:
                ready.append(job)
        if postponed:
            self._ledger.schedule.postpone(tx, postponed)
        if refused:
            ended += self._ledger.schedule.fail(tx, refused)
        for job_id, reason in refused:
            body: dict[str, object] = {
                "code": reason.code,
                "job_id": job_id,
                "message": reason.message,
            }
            if reason.code == "payload_damaged":
                self._ledger.add_event(tx, "payload_damaged", body)
        return ready

    def _find_obstacle(self, job: ReadyJob) -> Reason | None:
        # A flipped bit passes SQLite's own checks; the hash was made when the job came.
        if hash_text(job.body) != job.body_hash:
            return Reason(
                "payload_damaged", "the stored body no longer fits its hash: submit again"
            )
        if job.handler == UPDATE:
            return None
        try:
            self._verify_served(job.model, job.version)
        except QuarantinedError as exc:
            return Reason(exc.code, str(exc))
        return None

    def _find_wait(self, options: str) -> float:
        """Return for how many seconds a job's maintenance window stays closed."""
        window = read_options(options).window
        if window is None:
            return 0.0
        closed = find_closed(window, self._local_time(), self._view_box())
        return min(closed.wait_s, _WINDOW_RECHECK_S) if closed else 0.0

    def _local_time(self) -> datetime:
        # Windows are in the local time of the people near the box.
        return datetime.fromtimestamp(self._clock.wall_ms() / 1000)

    def _bundle(
        self, tx: Connection, lane: Lane, split: Sequence[list[ReadyJob]], room: int
    ) -> list[Task]:
        bundles = [(new_id(), jobs) for jobs in split[:room]]
        self._ledger.schedule.assign(tx, bundles)
        return [
            Task(task_id, lane, self._encode(tx, task_id, jobs), _name_task(jobs[0].handler))
            for task_id, jobs in bundles
        ]

    def _split(self, ready: Sequence[ReadyJob], *, is_fed: bool) -> list[list[ReadyJob]]:
        """Group jobs of one model into bundles.

        While the workers have little to do, bundles are small and go at once.
        While they are fed, a bundle that is not full may grow a moment: each
        task costs about what thirty jobs in it cost.
        """
        grown_ms = self._clock.wall_ms() - _GROW_MS
        groups: dict[tuple[str, str | None, str], list[ReadyJob]] = {}
        for job in ready:
            groups.setdefault((job.model, job.version, job.handler), []).append(job)
        bundles: list[list[ReadyJob]] = []
        for (model, _, handler), jobs in groups.items():
            # An update is a task by itself: its bundle would live and die with it.
            largest = 1 if handler == UPDATE else self._largest_bundle(model)
            size = largest if is_fed else max(1, min(largest, -(-len(jobs) // _SPREAD)))
            cut = _cut(jobs, size, self._limits.bundle_bytes)
            last = cut[-1]
            # A clock that was set back must not hold a job: what is in the future goes too.
            may_grow = grown_ms < last[0].created_ms <= grown_ms + _GROW_MS
            if is_fed and len(last) < size and may_grow:
                cut.pop()
            bundles += cut
        return bundles

    def _largest_bundle(self, model: str) -> int:
        per_job_ms = self._per_job_ms.get(model) or 1e-3
        return max(1, min(self._limits.bundle_jobs, int(_BUNDLE_TARGET_MS / per_job_ms)))

    def _encode(self, tx: Connection, task_id: str, jobs: Sequence[ReadyJob]) -> str:
        # Bodies are JSON already: they are pasted in, not decoded and encoded again.
        first = jobs[0]
        floors = read_fact(tx, FLOORS) if first.handler == UPDATE else None
        head = encode(
            {
                **({} if floors is None else {"floors": json.loads(floors)}),
                "v": 1,
                "task": task_id,
                "device": self._device,
                "reply": outcome_queue(self._device),
                "handler": first.handler,
                "model": first.model,
                "version": first.version,
            }
        )
        items = ",".join(
            f'{{"id":"{job.job_id}","attempt":{job.attempt + 1},'
            f'"timeout_s":{job.run_timeout_s},'
            f'"progress_timeout_s":{_find_progress_timeout(job)},"body":{job.body.decode()}}}'
            for job in jobs
        )
        return f'{head[:-1]},"jobs":[{items}]}}'

    # --- after the commit, any thread ------------------------------------------------------

    def send(self, tasks: Iterable[Task]) -> None:
        """Hand committed tasks to the sending thread, and watch them from now on."""
        now_ms = self._clock.boot_ms()
        for task in tasks:
            with self._lock:
                self._under_way[task.task_id] = _UnderWay(task.lane, now_ms)
            self._to_send.put(task)

    def stop_runs(self, ended: Iterable[EndedJob]) -> None:
        """Ask workers to stop running jobs that were cancelled while a task carried them."""
        job_ids = tuple(job.job_id for job in ended if job.task_id is not None)
        if job_ids:
            self._to_send.put(_Stop(job_ids))

    def forget(self, task_ids: Iterable[str]) -> None:
        """Stop watching tasks whose outcome is committed, or which were given up."""
        with self._lock:
            for task_id in task_ids:
                self._under_way.pop(task_id, None)

    def observe_speed(self, model: str, per_job_ms: float) -> None:
        """Take note of how long a job of a model takes, for the size of bundles."""
        known = self._per_job_ms.get(model, per_job_ms)
        self._per_job_ms[model] = known + _EWMA * (per_job_ms - known)

    def _follow_workers(self) -> None:
        """Read what the workers hold. A new worker in a slot frees what the old one held."""
        now_ms = self._clock.boot_ms()
        found = self._read_heartbeats()
        started: list[str] = []
        with self._lock:
            for slot, old in self._workers.items():
                new = found.get(slot)
                if new is None or new.worker != old.worker:
                    self._release(old, now_ms)
            self._workers = found
            for state in found.values():
                for task_id in state.held:
                    if task_id in self._under_way:
                        self._under_way[task_id].seen_ms = now_ms
                started += state.started
        fresh = tuple(task_id for task_id in started if task_id not in self._announced)
        self._announced = set(started)
        if fresh:
            self._post(TasksStarted(fresh))

    def _read_heartbeats(self) -> dict[str, HeartbeatBody]:
        client: Any = self._redis
        keys = list(client.scan_iter(HEARTBEAT_PREFIX + "*", count=100))
        texts = client.mget(keys) if keys else []
        found: dict[str, HeartbeatBody] = {}
        for text in texts:
            try:
                if text is not None:
                    body = HeartbeatBody.model_validate_json(text)
                    found[body.slot] = body
            except ValidationError as exc:
                log.warning("a worker's heartbeat cannot be read: %s", describe(exc))
        return found

    def _release(self, worker: HeartbeatBody, now_ms: int) -> None:
        # What a dead worker held is due for a check at once, unless the broker has it.
        for task_id in worker.held:
            if task_id in self._under_way:
                self._under_way[task_id].seen_ms = now_ms - int(self._limits.lost_after_s * 1000)

    def count_workers(self) -> int:
        """Return how many workers live."""
        return len(self._workers)

    def count_under_way(self) -> int:
        """Return how many tasks are in the broker or at workers."""
        with self._lock:
            return len(self._under_way)

    def stop(self) -> None:
        """End the thread; what was not sent is found lost at the next start, and sent again."""
        self._to_send.put(None)
        self.join(5.0)

    # --- the thread ------------------------------------------------------------------------

    def run(self) -> None:
        """Send and check until stopped."""
        self._check()
        while True:
            try:
                idle = not self._under_way and self.broker.reachable
                task = self._to_send.get(timeout=_IDLE_CHECK_S if idle else _CHECK_PERIOD_S)
            except Empty:
                self._check()
                continue
            if task is None:
                return
            if isinstance(task, _Stop):
                self._ask_to_stop(task)
            else:
                self._send(task)
            if self._clock.boot_ms() >= self._next_check_ms:
                self._check()

    def _ask_to_stop(self, stop: _Stop) -> None:
        try:
            client: Any = self._redis or connect_redis(self._queue_url)
            for job_id in stop.job_ids:
                client.set(cancel_key(job_id), "1", ex=CANCEL_LIFE_S)
        except (redis.RedisError, OSError) as exc:
            # The job has ended all the same; what still runs brings an outcome that nobody wants.
            self._mark_unreachable(exc)

    def _send(self, task: Task) -> None:
        with self._lock:
            state = self._under_way.get(task.task_id)
            if state is not None:
                state.seen_ms, state.sent = self._clock.boot_ms(), True
        try:
            self._publish(task)
            reach("dispatch.sent")
        except (KombuError, redis.RedisError, OSError) as exc:
            self._mark_unreachable(exc)
            self.forget([task.task_id])
            # It may have arrived all the same; its attempt is fenced then.
            self._post(TasksLost((task.task_id,), "queue_unreachable", "not sent", counts=False))

    def _publish(self, task: Task) -> None:
        if self._producer is None:
            connection = QueueConnection(self._queue_url, transport_options=transport_options())
            self._producer = Producer(connection.channel(), serializer="json")
        body, headers = celery_message(task.name, task.task_id, task.payload)
        self._producer.publish(
            body,
            routing_key=lane_queue(task.lane),
            headers=headers,
            correlation_id=task.task_id,
            declare=[Queue(lane_queue(task.lane), durable=True)],
        )

    def _mark_unreachable(self, exc: Exception) -> None:
        if self.broker.reachable:
            log.warning("queue broker: %s; jobs wait in the ledger", exc)
        self.broker.reachable = False
        self.broker.why = str(exc)
        # Connections may be half dead: the next contact makes new ones.
        self._redis = None
        self._producer = None

    def _check(self) -> None:
        self.turns += 1
        self._next_check_ms = self._clock.boot_ms() + int(_CHECK_PERIOD_S * 1000)
        if not self._contact():
            return
        try:
            self._follow_workers()
            self._find_lost()
        except (redis.RedisError, OSError) as exc:
            self._mark_unreachable(exc)

    def _contact(self) -> bool:
        """Ask the broker whether it is there, and whether it is the one it was."""
        try:
            if self._redis is None:
                self._redis = connect_redis(self._queue_url)
            epoch = read_epoch(self._redis)
        except (redis.RedisError, OSError) as exc:
            self._mark_unreachable(exc)
            return False
        back = not self.broker.reachable
        if self.broker.epoch not in (None, epoch):
            log.warning("queue broker was restarted: its tasks are dispatched again")
            self._give_up_unheld()
        self.broker = BrokerState(reachable=True, epoch=epoch, why="")
        if back:
            log.info("queue broker reached")
            self._post(Wake())
        return True

    def _give_up_unheld(self) -> None:
        """A new broker has none of the old one's messages: what no worker holds is lost."""
        held = self._held_now()
        with self._lock:
            lost = tuple(
                task_id
                for task_id, task in self._under_way.items()
                if task.sent and task_id not in held
            )
        self._lose(lost, "queue_restarted", "the queue broker was restarted", counts=False)

    def _held_now(self) -> set[str]:
        return {task_id for state in self._workers.values() for task_id in state.held}

    def _find_lost(self) -> None:
        """Give up tasks that nobody has known of for `lost_after_s`."""
        now_ms = self._clock.boot_ms()
        limit_ms = now_ms - int(self._limits.lost_after_s * 1000)
        # Looked for sooner than given up: else a task seen in the broker long ago, and taken just
        # now by a worker that has not told yet, would be lost at once, and run twice.
        look_ms = now_ms - int(self._limits.lost_after_s * 1000 * _LOOK_SHARE)
        held = self._held_now()
        with self._lock:
            suspects = {
                task_id: task.lane
                for task_id, task in self._under_way.items()
                if task.sent and task.seen_ms <= look_ms and task_id not in held
            }
        if not suspects:
            return
        queued = self._read_queued(set(suspects.values()))
        with self._lock:
            for task_id in queued & suspects.keys():
                if task_id in self._under_way:
                    self._under_way[task_id].seen_ms = now_ms
            lost = tuple(
                task_id
                for task_id in suspects.keys() - queued
                if task_id in self._under_way and self._under_way[task_id].seen_ms <= limit_ms
            )
        self._lose(lost, "worker_lost", "the worker that ran it is gone", counts=True)

    def _lose(self, lost: tuple[str, ...], code: str, message: str, *, counts: bool) -> None:
        if lost:
            log.warning("%d tasks are lost (%s): dispatching their jobs again", len(lost), code)
            self.forget(lost)
            self._post(TasksLost(lost, code, message, counts=counts))

    def _read_queued(self, lanes: Collection[Lane]) -> set[str]:
        """Return the ids of the tasks that wait in the broker."""
        client: Any = self._redis
        found = {
            _find_task_id(message)
            for lane in lanes
            for message in client.lrange(lane_queue(lane), 0, -1)
        }
        return {task_id for task_id in found if task_id is not None}


def _find_task_id(message: bytes) -> str | None:
    """Return the id of a task in a lane's list, or None for what is no task of ours."""
    try:
        return str(json.loads(message)["headers"]["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _find_progress_timeout(job: ReadyJob) -> str:
    timeout_s = read_options(job.options).progress_timeout_s if job.options else None
    return "null" if timeout_s is None else repr(timeout_s)


def _cut(jobs: Sequence[ReadyJob], size: int, max_bytes: int) -> list[list[ReadyJob]]:
    """Cut jobs into bundles; one that was interrupted goes alone, in case it is the culprit."""
    bundles: list[list[ReadyJob]] = []
    room_bytes = 0
    for job in jobs:
        cost = len(job.body) + _JOB_OVERHEAD_BYTES
        alone = job.interruptions > 0
        if alone or not bundles or len(bundles[-1]) >= size or cost > room_bytes:
            bundles.append([])
            room_bytes = max_bytes
        bundles[-1].append(job)
        room_bytes = 0 if alone else room_bytes - cost
    return bundles


def _name_task(handler: str) -> str:
    return MAINTAIN_TASK if handler == UPDATE else INFER_TASK
