"""What a worker says of a task, to the agent that asked: outcome, progress, crash.

Owns the messages' forms and their sending. The queue is named by the task, so a
worker on another box of the site answers just the same.
"""

import time
from typing import Any

from celery import Celery
from kombu import Queue

from agent.tasks import CRASH, OUTCOME, PROGRESS
from worker.crashes import Crash

# The broker may be away for a while; the ledger's leases outlast this.
_RETRY = {"max_retries": 60, "interval_start": 0.1, "interval_step": 0.2, "interval_max": 1.0}

HANG = "hang"
"""In place of a signal: a run that does not end."""


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
    retryable: bool = False,
    result: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the outcome of one job of a task.

    Args:
        item: the job as the task carries it.
        started_ms: when its run began.
        state: the state that it ends in.
        code: the stable code of the reason.
        message: the reason for people.
        retryable: whether the same attempt may go better later.
        result: the result record, where there is one.
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


def send_outcomes(app: Celery, task: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
    """Send the outcomes of a task's jobs to the agent's queue.

    Raises:
        kombu.exceptions.OperationalError: the broker was away for a minute; the
            agent will find the task lost and run its jobs again.
    """
    body = {"kind": OUTCOME, "task": task["task"], "model": task["model"], "jobs": jobs}
    _publish(app, task["reply"], body, retry=True)


def send_progress(app: Celery, task: dict[str, Any], job: dict[str, Any]) -> None:
    """Send how far a job is; tried once, for the next one replaces it.

    Raises:
        kombu.exceptions.OperationalError: the broker is away.
    """
    body = {"kind": PROGRESS, "task": task["task"], "job": job}
    _publish(app, task["reply"], body, retry=False)


def send_crash(app: Celery, crash: Crash) -> None:
    """Tell the agent that asked for it which task crashed its worker.

    Raises:
        kombu.exceptions.OperationalError: the broker was away for a minute.
    """
    record = crash.record
    body = {
        "kind": CRASH,
        "task": record.task,
        "model": record.model,
        "version": record.version if crash.counts else None,
        "signal": crash.signal,
        "jobs": [{"id": job_id, "attempt": attempt} for job_id, attempt in crash.jobs],
    }
    _publish(app, record.reply, body, retry=True)


def send_death(
    app: Celery, queue: str, process: str, signal: str, of: tuple[str, str] | None = None
) -> None:
    """Tell an agent that a worker process has died, or must, and on which version if that is known.

    Args:
        app: this process's.
        queue: the agent's.
        process: a name that no other process has; a message that comes twice counts once.
        signal: what it died of.
        of: model and version.

    Raises:
        kombu.exceptions.OperationalError: the broker was away for a minute.
    """
    model, version = of or ("", None)
    body: dict[str, Any] = {
        "kind": CRASH,
        "task": f"process:{process}",
        "model": model,
        "version": version,
        "signal": signal,
        "jobs": [],
    }
    _publish(app, queue, body, retry=True)


def _publish(app: Celery, queue: str, body: dict[str, Any], *, retry: bool) -> None:
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            body,
            routing_key=queue,
            exchange="",
            serializer="json",
            declare=[Queue(queue, durable=True)],
            retry=retry,
            retry_policy=_RETRY,
        )
