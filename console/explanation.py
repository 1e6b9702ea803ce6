"""Why a job is where it is, in sentences.

Pure: a job's row, its history, the agent's status and the time in, words out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agent.clock import format_ms
from agent.jobs import ENDS, JobState
from console.boxstate import BoxStatus

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of a job's history, in words."""

    at: str
    after_ms: int
    """Since the step before; 0 for the first."""
    state: str
    attempt: int
    reason: str


def explain_job(row: Row, status: BoxStatus, ahead: int, now_ms: int) -> list[str]:
    """Return why a job is in its state, most important first.

    Args:
        row: the job.
        status: what the agent last said.
        ahead: how many queued jobs of its lane go before it.
        now_ms: the time.
    """
    state = JobState(row["state"])
    if state in ENDS:
        return [_word_end(row), *_word_timings(row)]
    sentences = _word_box(status)
    if state is JobState.RUNNING:
        running_s = (now_ms - (row["started_ms"] or now_ms)) / 1000
        limit = f"its limit is {row['run_timeout_s']:g} s"
        return [
            f"It runs since {running_s:.1f} s, in attempt {row['attempt']}; {limit}.",
            *sentences,
        ]
    return _word_waiting(row, status, ahead, now_ms)


def _word_end(row: Row) -> str:
    took_ms = row["ended_ms"] - row["created_ms"]
    text = f"It ended {row['state']} after {took_ms} ms"
    code = row["reason_code"]
    if code in (None, "ok"):
        return f"{text}."
    return f"{text}: {row['reason'] or code} [{code}]."


def _word_timings(row: Row) -> list[str]:
    if row["started_ms"] is None:
        return ["It never ran."]
    waited_ms = max(0, row["started_ms"] - row["created_ms"])
    attempts = row["attempt"]
    tries = "in the first attempt" if attempts <= 1 else f"and took {attempts} attempts"
    return [f"It waited {waited_ms} ms for a worker, {tries}."]


def _word_box(status: BoxStatus) -> list[str]:
    if not status.is_running:
        return ["The agent does not run: start it with `edgeward up` or its systemd unit."]
    return []


def _word_waiting(row: Row, status: BoxStatus, ahead: int, now_ms: int) -> list[str]:
    """Return what a queued job waits for."""
    sentences = _word_box(status)
    values = status.values if status.is_running else {}
    not_before_ms = row["not_before_ms"]
    if not_before_ms is not None and not_before_ms > now_ms:
        sentences.append(f"It may not start before {format_ms(not_before_ms)} (not_before).")
    if values.get("queue_broker", "reachable") != "reachable":
        sentences.append(f"The queue broker is unreachable: {values['queue_broker']}.")
    elif values.get("workers", 1) == 0:
        lane = row["lane"]
        sentences.append(f"No worker is alive: start one with `edgeward worker --lane {lane}`.")
    if row["interruptions"]:
        last = row["reason"] or row["reason_code"] or "interrupted"
        sentences.append(f"{row['interruptions']} attempts were interrupted; the last: {last}.")
    if ahead:
        sentences.append(f"{ahead} jobs of lane {row['lane']} go before it.")
    if row["task_id"] is not None:
        sentences.append("It is in the queue broker or at a worker, which has not begun it yet.")
    return sentences or ["It is about to be dispatched."]


def list_steps(history: Sequence[Row]) -> list[Step]:
    """Return a job's history in words, oldest first."""
    steps = []
    before_ms = history[0]["at_ms"] if history else 0
    for row in history:
        steps.append(
            Step(
                format_ms(row["at_ms"]),
                row["at_ms"] - before_ms,
                row["state"],
                row["attempt"],
                row["reason_code"] or "",
            )
        )
        before_ms = row["at_ms"]
    return steps
