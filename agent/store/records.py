"""Builds the outbox rows of jobs: their states, results and events.

Pure: turns a job's row into the JSON that docs/protocol.md describes. Topics
come from `agent.topics`.
"""

from collections.abc import Mapping
from typing import Any

from agent.clock import format_ms
from agent.commands import encode
from agent.jobs import ENDS, JobState
from agent.store.outbox import Rank
from agent.topics import Topics

STATE_TTL_AFTER_END_S = 7 * 86400
PROGRESS_TTL_S = 60
KEPT_RESULT = "kept_result"

Row = Mapping[str, Any]


def build_state(topics: Topics, job: Row, at_ms: int) -> dict[str, object]:
    """Return the outbox row that reports a job's present state."""
    state = JobState(job["state"])
    reason = job["reason_code"] and {"code": job["reason_code"], "message": job["reason"] or ""}
    body = {
        "job_id": job["job_id"],
        "state": state.value,
        "rev": job["rev"],
        "attempt": job["attempt"],
        "model": job["model"] or None,
        "source": job["source"],
        "at": format_ms(at_ms),
        "reason": reason,
    }
    ended = state in ENDS
    return {
        "rank": Rank.END if ended else Rank.EARLY,
        "kind": "state",
        "job_id": job["job_id"],
        "topic": topics.state(job["job_id"]),
        "type": "job.state",
        "retained": True,
        "ttl_s": STATE_TTL_AFTER_END_S if ended else None,
        "body": encode(body),
        "created_ms": at_ms,
    }


def build_result(
    topics: Topics, job_id: str, body: str, at_ms: int, *, keep: bool = False
) -> dict[str, object]:
    """Return the outbox row that carries a job's result.

    Args:
        topics: the device's topics.
        job_id: the job.
        body: the result record's body.
        at_ms: when it was made.
        keep: whether newer results may not push it out of a full outbox.
    """
    return {
        "rank": Rank.RESULT,
        "kind": KEPT_RESULT if keep else "result",
        "job_id": job_id,
        "topic": topics.result(job_id),
        "type": "job.result",
        "retained": False,
        "ttl_s": None,
        "body": body,
        "created_ms": at_ms,
    }


def build_event(
    topics: Topics, kind: str, body: Mapping[str, object], at_ms: int
) -> dict[str, object]:
    """Return the outbox row of an event."""
    return {
        "rank": Rank.EVENT,
        "kind": "event",
        "job_id": None,
        "topic": topics.event(kind),
        "type": f"event.{kind}",
        "retained": False,
        "ttl_s": None,
        "body": encode(body),
        "created_ms": at_ms,
    }


def build_progress(
    topics: Topics, job_id: str, body: Mapping[str, object], at_ms: int
) -> dict[str, object]:
    """Return the outbox row that reports how far a running job is."""
    return {
        "rank": Rank.TELEMETRY,
        "kind": "progress",
        "job_id": job_id,
        "topic": topics.progress(job_id),
        "type": "job.progress",
        "retained": False,
        "ttl_s": PROGRESS_TTL_S,
        "body": encode(body),
        "created_ms": at_ms,
    }


def build_telemetry(topics: Topics, body: str, at_ms: int) -> dict[str, object]:
    """Return the outbox row of a heartbeat that could not be sent when it was due."""
    return {
        "rank": Rank.TELEMETRY,
        "kind": "telemetry",
        "job_id": None,
        "topic": topics.heartbeat,
        "type": "heartbeat",
        "retained": False,
        "ttl_s": None,
        "body": body,
        "created_ms": at_ms,
    }
