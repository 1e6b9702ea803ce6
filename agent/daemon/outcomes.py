"""Outcomes: what workers report, from the queue broker into the writer's mailbox.

A message is acknowledged at the broker only after its outcome is committed.
If the agent dies in between, the task is found lost and its jobs run again:
the broker is never trusted to give a message back.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import redis
from kombu import Connection as QueueConnection
from kombu import Consumer, Queue
from kombu.exceptions import KombuError
from kombu.message import Message as QueueMessage

from agent.daemon.dispatch import Dispatcher
from agent.daemon.messages import JobProgress, Message, TaskOutcomes, WorkerCrashed
from agent.faults import reach
from agent.jobs import JobState, Reason
from agent.store.ledger import CrashReport, Outcome
from agent.tasks import CRASH, OUTCOME, PROGRESS, outcome_queue, transport_options

log = logging.getLogger(__name__)

_DRAIN_S = 1.0
_RETRY_S = 0.5
_PREFETCH = 128


class OutcomeConsumer(threading.Thread):
    """Reads the device's outcome queue; reconnects for ever.

    Args:
        device: the device's id.
        queue_url: the broker.
        dispatcher: learns how long jobs take.
        post: puts a message into the writer's mailbox.
    """

    def __init__(
        self,
        device: str,
        queue_url: str,
        dispatcher: Dispatcher,
        post: Callable[[Message], None],
    ) -> None:
        super().__init__(name="outcomes", daemon=True)
        self._queue_name = outcome_queue(device)
        self._queue_url = queue_url
        self._dispatcher = dispatcher
        self._post = post
        self._stopping = threading.Event()
        self._acks: deque[QueueMessage] = deque()
        self.turns = 0

    def run(self) -> None:
        """Consume until stopped."""
        while not self._stopping.is_set():
            try:
                self._consume()
            except (KombuError, redis.RedisError, OSError) as exc:
                log.info("outcome queue: %s", exc)
                self.turns += 1
                self._stopping.wait(_RETRY_S)

    def _consume(self) -> None:
        # Unacknowledged messages of an older connection are that connection's.
        self._acks.clear()
        queue = Queue(self._queue_name, durable=True)
        with (
            QueueConnection(self._queue_url, transport_options=transport_options()) as connection,
            Consumer(
                connection,
                queues=[queue],
                callbacks=[self._on_message],
                accept=["json"],
                prefetch_count=_PREFETCH,
            ),
        ):
            while not self._stopping.is_set():
                self.turns += 1
                with suppress(TimeoutError):
                    connection.drain_events(timeout=_DRAIN_S)
                self._send_acks()

    def _send_acks(self) -> None:
        while self._acks:
            self._acks.popleft().ack()
            reach("outcome.acked")

    def _on_message(self, body: Any, message: QueueMessage) -> None:
        try:
            self._post(self._read(body, message))
        except (KeyError, TypeError, ValueError) as exc:
            log.error("outcome message dropped: %r", exc)  # noqa: TRY400
            message.ack()

    def _read(self, body: dict[str, Any], message: QueueMessage) -> Message:
        match body["kind"]:
            case kind if kind == OUTCOME:
                reach("outcome.received")
                return self._read_outcome(body, message)
            case kind if kind == PROGRESS:
                # Worth nothing after a crash: the next one replaces it.
                self._acks.append(message)
                return _read_progress(body["job"])
            case kind if kind == CRASH:
                return WorkerCrashed(_read_crash(body), lambda: self._acks.append(message))
            case kind:
                msg = f"kind {kind!r}"
                raise ValueError(msg)

    def _read_outcome(self, body: dict[str, Any], message: QueueMessage) -> TaskOutcomes:
        jobs = tuple(_read_job(item) for item in body["jobs"])
        if jobs:
            spent_ms = max(item.ended_ms for item in jobs) - min(item.started_ms for item in jobs)
            self._dispatcher.observe_speed(body["model"], spent_ms / len(jobs))
        return TaskOutcomes(body["task"], jobs, lambda: self._acks.append(message))

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self.join(5.0)


def _read_job(item: dict[str, Any]) -> Outcome:
    reason = Reason(item["reason"]["code"], item["reason"].get("message", ""))
    return Outcome(
        job_id=item["id"],
        attempt=item["attempt"],
        state=JobState(item["state"]),
        reason=reason,
        started_ms=item["started_ms"],
        ended_ms=item["ended_ms"],
        result=item.get("result"),
        retryable=bool(item["reason"].get("retryable", False)),
    )


def _read_progress(item: dict[str, Any]) -> JobProgress:
    names = ("done", "total", "unit", "eta_s")
    return JobProgress(item["id"], item["attempt"], {name: item.get(name) for name in names})


def _read_crash(body: dict[str, Any]) -> CrashReport:
    return CrashReport(
        task_id=body["task"],
        model=body["model"],
        version=body["version"],
        signal=body["signal"],
        jobs=tuple((item["id"], int(item["attempt"])) for item in body["jobs"]),
    )
