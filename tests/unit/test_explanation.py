from typing import Any

import pytest

from console.boxstate import BoxStatus
from console.explanation import explain_job, list_steps

NOW_MS = 1_800_000_000_000
RUNNING = BoxStatus(NOW_MS, True, {"queue_broker": "reachable", "workers": 1})


def job(**changes: Any) -> dict[str, Any]:
    return {
        "job_id": "01M828YRXD24KGBPQAVBA31ETP",
        "state": "queued",
        "lane": "inference",
        "attempt": 0,
        "interruptions": 0,
        "task_id": None,
        "reason_code": None,
        "reason": None,
        "created_ms": NOW_MS - 2_000,
        "started_ms": None,
        "ended_ms": None,
        "not_before_ms": None,
        "run_timeout_s": 120.0,
    } | changes


def status(**values: Any) -> BoxStatus:
    return BoxStatus(NOW_MS, True, RUNNING.values | values)


@pytest.mark.parametrize(
    ("row", "box", "ahead", "expected"),
    [
        (job(), BoxStatus(None, False, {}), 0, "The agent does not run"),
        (job(), status(workers=0), 0, "No worker is alive: start one with `edgeward worker"),
        (job(), status(queue_broker="refused"), 0, "The queue broker is unreachable: refused."),
        (job(not_before_ms=NOW_MS + 1000), RUNNING, 0, "It may not start before 2027-01-15T08:00"),
        (job(), RUNNING, 7, "7 jobs of lane inference go before it."),
        (job(task_id="T"), RUNNING, 0, "It is in the queue broker or at a worker"),
        (job(interruptions=2, reason="gone"), RUNNING, 0, "2 attempts were interrupted; the last"),
        (job(), RUNNING, 0, "It is about to be dispatched."),
    ],
)
def test_queued_job_says_what_it_waits_for(
    row: dict[str, Any], box: BoxStatus, ahead: int, expected: str
) -> None:
    assert explain_job(row, box, ahead, NOW_MS)[0].startswith(expected)


def test_not_before_that_has_passed_is_no_reason() -> None:
    row = job(not_before_ms=NOW_MS - 1)
    assert explain_job(row, RUNNING, 0, NOW_MS) == ["It is about to be dispatched."]


def test_stale_status_is_not_believed() -> None:
    stale = BoxStatus(NOW_MS - 60_000, False, {"queue_broker": "refused", "workers": 0})
    (only,) = explain_job(job(), stale, 0, NOW_MS)
    assert only.startswith("The agent does not run")


def test_running_job_says_for_how_long() -> None:
    row = job(state="running", started_ms=NOW_MS - 1_500, attempt=2)
    (only,) = explain_job(row, RUNNING, 0, NOW_MS)
    assert only == "It runs since 1.5 s, in attempt 2; its limit is 120 s."


def test_failed_job_gives_its_reason_with_its_code() -> None:
    row = job(
        state="failed",
        attempt=3,
        started_ms=NOW_MS - 1_000,
        ended_ms=NOW_MS,
        reason="no picture",
        reason_code="bad_image",
    )
    assert explain_job(row, RUNNING, 0, NOW_MS) == [
        "It ended failed after 2000 ms: no picture [bad_image].",
        "It waited 1000 ms for a worker, and took 3 attempts.",
    ]


def test_rejected_job_never_ran() -> None:
    row = job(state="rejected", ended_ms=NOW_MS, reason="no model", reason_code="unknown_model")
    assert explain_job(row, RUNNING, 0, NOW_MS)[1] == "It never ran."


def test_steps_count_from_the_step_before() -> None:
    history = [
        {"at_ms": NOW_MS, "state": "queued", "attempt": 0, "reason_code": None},
        {"at_ms": NOW_MS + 40, "state": "running", "attempt": 1, "reason_code": None},
        {"at_ms": NOW_MS + 45, "state": "succeeded", "attempt": 1, "reason_code": "ok"},
    ]
    assert [(step.after_ms, step.state) for step in list_steps(history)] == [
        (0, "queued"),
        (40, "running"),
        (5, "succeeded"),
    ]
    assert list_steps([]) == []
