"""The contract between agent and workers: task names, queues and what travels.

Both sides import this module and nothing else of each other. A task carries
all it needs as one JSON text, so a worker is stateless; its outcome names the
queue of the agent that asked, so a worker may run on another box.

Celery's settings live here too, because both sides must agree on them. Their
reasons: design notes "pitfalls", and docs/adr/0003.
"""

from typing import Any

import redis
from pydantic import BaseModel, ConfigDict, Field
from ulid import ULID

from agent.jobs import Lane

INFER_TASK = "edgeward.infer"
MAINTAIN_TASK = "edgeward.maintain"
OUTCOME = "outcome"
PROGRESS = "progress"
CRASH = "crash"
STAGED = "staged"
"""Key of a maintenance worker's result that is for the agent's updater."""
CANCEL_PREFIX = "edgeward:cancel:"
CANCEL_LIFE_S = 3600
# Workers say that they live in a key of short life: often while they hold tasks.
EPOCH_KEY = "edgeward:epoch"
HEARTBEAT_PREFIX = "edgeward:worker:"
FIGURES_PREFIX = "edgeward:figures:"
HEARTBEAT_BUSY_S = 0.5
HEARTBEAT_IDLE_S = 3.0
# A pause of a worker that is longer than this looks like its death: its tasks run again.
HEARTBEAT_BUSY_LIFE_S = 3
HEARTBEAT_LIFE_S = 10
_VISIBILITY_S = 100 * 365 * 86_400


def lane_queue(lane: Lane) -> str:
    """Return the name of the Celery queue of a lane."""
    return f"edgeward.{lane}"


def outcome_queue(device: str) -> str:
    """Return the name of the queue that a device's outcomes go to."""
    return f"outcomes.{device}"


def transport_options() -> dict[str, Any]:
    """Return kombu's options for Redis: short timeouts, no redelivery by the wall clock."""
    return {
        # Longer than any jump of a clock, also from 1970 to now: redelivery is the ledger's
        # business, and this one uses the wall clock. With a day, a jump of a year let the next
        # worker that started run every task in flight a second time.
        "visibility_timeout": _VISIBILITY_S,
        "socket_timeout": 5,
        "socket_connect_timeout": 2,
        "health_check_interval": 5,
        "queue_order_strategy": "priority",
        "max_retries": 0,
    }


def celery_settings(queue_url: str) -> dict[str, Any]:
    """Return the settings that agent and workers share."""
    return {
        "broker_url": queue_url,
        "broker_transport_options": transport_options(),
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        "result_backend": None,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_acks_late": False,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_create_missing_queues": True,
        "worker_prefetch_multiplier": 1,
        "worker_send_task_events": False,
        "task_send_sent_event": False,
        "worker_enable_remote_control": False,
        "worker_hijack_root_logger": False,
        "enable_utc": True,
    }


def celery_message(task_name: str, task_id: str, payload: str) -> tuple[Any, dict[str, Any]]:
    """Return body and headers of a task with one argument, as Celery's workers read them.

    The agent speaks Celery's documented message protocol through kombu instead
    of importing Celery: 4 MB less, and a third of the time per task.

    Source: Celery 5.7 documentation, "Message Protocol", version 2; a contract
    test compares it with what Celery itself sends.
    """
    headers = {
        "lang": "py",
        "task": task_name,
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "group": None,
        "shadow": None,
        "eta": None,
        "expires": None,
        "retries": 0,
        "timelimit": [None, None],
        "argsrepr": "(…)",
        "kwargsrepr": "{}",
        "origin": "edgeward-agent",
        "ignore_result": True,
    }
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return [[payload], {}, embed], headers


class HeartbeatBody(BaseModel):
    """What a worker says of itself in its key."""

    # Pydantic would keep each id of a task for ever, or until 16,384 others came: a megabyte, and
    # many more of half-empty pages, as each one holds its page.
    model_config = ConfigDict(strict=True, frozen=True, cache_strings="keys")

    worker: str
    """The process's own id."""
    slot: str
    """Its place; a successor has the same."""
    held: list[str]
    """Ids of the tasks that it has taken and not finished."""
    started: list[str]
    """Those of them whose run has begun, and lasts."""


class VersionFigures(BaseModel):
    """What a model version has done in one worker process since that began."""

    model_config = ConfigDict(strict=True, frozen=True, cache_strings="keys")

    model: str
    version: str
    success: int
    failed: int
    """Runs that the version failed; faults of requests do not count."""
    latencies: dict[str, int] = Field(default_factory=dict)
    """Answers by `agent.latency.find_step` of their time."""
    compared: int = 0
    """Copies that the version saw in shadow and answered."""
    agreed: int = 0
    shadow_failed: int = 0


class FiguresBody(BaseModel):
    """What a worker says of versions that somebody watches."""

    model_config = ConfigDict(strict=True, frozen=True, cache_strings="keys")

    worker: str
    """The process's own id: its counts begin with it."""
    rss_mb: float
    versions: list[VersionFigures]


def cancel_key(job_id: str) -> str:
    """Return the broker key that asks workers to stop running a job."""
    return CANCEL_PREFIX + job_id


def figures_key(slot: str) -> str:
    """Return the broker key in which the worker of a slot says what watched versions do."""
    return FIGURES_PREFIX + slot


def heartbeat_key(slot: str) -> str:
    """Return the broker key in which the worker of a slot says that it lives."""
    return HEARTBEAT_PREFIX + slot


def read_epoch(client: redis.Redis) -> str:
    """Return the broker's epoch: a token that is lost with everything else it holds.

    A restarted or flushed memory-only broker has none, so a new one is made; a
    broker that kept its data kept its tasks too, and has its old one. Costs one
    GET, where `INFO server` (for `run_id`) costs a millisecond to parse.

    Raises:
        redis.RedisError: the broker does not answer.
    """
    found: Any = client.get(EPOCH_KEY)
    if found is None:
        client.set(EPOCH_KEY, str(ULID()), nx=True)
        found = client.get(EPOCH_KEY)
    return bytes(found or b"").decode()


def connect_redis(queue_url: str) -> redis.Redis:
    """Return a client for the queue broker with short timeouts. Does not connect yet."""
    url = queue_url.replace("redis+socket://", "unix://", 1)
    return redis.Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=1.0)
