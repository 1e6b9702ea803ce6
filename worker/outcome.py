"""Outcomes: what a worker says of a task, to the agent that asked.

Owns the message's form and its sending. The queue is named by the task, so a
worker on another box of the site answers just the same.
"""

import time
from typing import Any

from celery import Celery
from kombu import Queue

from agent.tasks import CRASH, OUTCOME, PROGRESS
from worker.control import StopCause
from worker.journal import Crash

# The broker may be away for a while; the ledger's leases outlast this.
_RETRY = {"interval_start": 0.1, "interval_step": 0.2, "interval_max": 1.0}


def now_ms() -> int:
    """Return wall-clock milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def build_outcome(
    item: dict[str, Any],
    started_ms: int,
    *,
    state: str,
    code: str,
    message: str = "",
    result: dict[str, Any] | None = None,
    retryable: bool = False,
) -> dict[str, Any]:
    """Return the outcome of one job of a task.

    Args:
        item: the job as the task carries it.
        started_ms: when its run began.
        state: the state that it ends in.
        code: the stable code of the reason.
        message: the reason for people.
        result: the result record, where there is one.
        retryable: whether the same job may do better another time.
    """
    return {
        "id": item["id"],
        "attempt": item["attempt"],
        "state": state,
        "reason": {"code": code, "message": message, "retryable": retryable},
        "started_ms": started_ms,
        "ended_ms": now_ms(),
        "result": result,
    }


def build_stopped(item: dict[str, Any], started_ms: int, cause: StopCause) -> dict[str, Any]:
    """Return the outcome of a job whose run was stopped."""
    if cause is StopCause.CANCELED:
        return build_outcome(
            item, started_ms, state="canceled", code="canceled", message="its run was stopped"
        )
    if cause is StopCause.PROGRESS_TIMEOUT:
        message = f"it made no progress for {item['progress_timeout_s']:g} s"
    else:
        message = f"it ran longer than {item['timeout_s']:g} s"
    return build_outcome(item, started_ms, state="timed_out", code=cause.value, message=message)


def send_outcomes(app: Celery, task: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
    """Send the outcomes of a task's jobs to the agent's queue.

    Raises:
        kombu.exceptions.OperationalError: the broker was away for a minute; the
            agent will find the task lost and run its jobs again.
    """
    body = {"kind": OUTCOME, "task": task["task"], "model": task["model"], "jobs": jobs}
    _send(app, task["reply"], body)


def send_progress(app: Celery, task: dict[str, Any], progress: dict[str, Any]) -> None:
    """Send how far one job of a task is.

    Raises:
        kombu.exceptions.OperationalError: the broker is away; the next one may get through.
    """
    body = {"kind": PROGRESS, "task": task["task"], "job": progress}
    _send(app, task["reply"], body, max_retries=0)


def send_crash(app: Celery, crash: Crash) -> None:
    """Send what a predecessor crashed on.

    Raises:
        kombu.exceptions.OperationalError: the broker was away for a minute.
    """
    run = dict(crash.run)
    reply = run.pop("reply")
    _send(app, reply, {"kind": CRASH, "signal": crash.signal, **run})


def _send(app: Celery, queue: str, body: dict[str, Any], max_retries: int = 60) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            body,
            routing_key=queue,
            exchange="",
            serializer="json",
            declare=[Queue(queue, durable=True)],
            retry=True,
            retry_policy={**_RETRY, "max_retries": max_retries},
        )
