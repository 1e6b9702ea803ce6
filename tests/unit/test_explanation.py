import json
from datetime import datetime
from typing import Any

import pytest

from agent.clock import format_ms
from console.boxstate import BoxStatus
from console.explanation import explain_job, explain_reports, list_steps

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


MORNING_MS = int(datetime(2026, 11, 22, 9, 0).timestamp() * 1000)
BOOT_MS = 5_000_000
WINDOW = {"cron": "0 3 * * *", "duration_s": 3600.0}
BUSY = {"idle": True, "on_mains": True, "max_temperature_c": 70.0, "duration_s": 3600.0}


def options(window: dict[str, Any]) -> str:
    return json.dumps({"window": window})


@pytest.mark.parametrize(
    ("row", "box", "expected"),
    [
        (
            job(options=options(WINDOW)),
            RUNNING,
            "Its maintenance window is closed: its window opens at 2026-11-23 03:00 local time.",
        ),
        (
            job(options=options(BUSY), ready_boot_ms=BOOT_MS + 30_000),
            RUNNING,
            "Its maintenance window asks for an idle box, mains power, at most 70 °C; it is "
            "looked at again in 30 s.",
        ),
        (
            job(failures=2, reason="again", ready_boot_ms=BOOT_MS + 4_500),
            RUNNING,
            f"It is tried again at {format_ms(MORNING_MS + 4_500)}, in 4.5 s (back-off).",
        ),
        (
            job(model="m", version="3"),
            status(quarantine={"m": {"3": "crashed"}}),
            "Version 3 of model m is in quarantine: crashed.",
        ),
        (job(), status(store="disk full"), "The ledger cannot be written: disk full."),
        (
            job(),
            status(storage={"low": True}),
            "The disk is low: new work is refused, what is accepted goes on.",
        ),
        (
            job(failures=2, reason="no room"),
            RUNNING,
            "2 attempts ended in an error; the last: no room.",
        ),
        (job(crashes=1), RUNNING, "1 of its attempts crashed the worker."),
    ],
)
def test_queued_job_says_what_holds_it_up(
    row: dict[str, Any], box: BoxStatus, expected: str
) -> None:
    assert explain_job(row, box, 0, MORNING_MS, BOOT_MS)[0] == expected


def test_back_off_that_is_over_and_window_that_is_open_are_no_reasons() -> None:
    row = job(ready_boot_ms=BOOT_MS, options=options({"duration_s": 60.0}))
    assert explain_job(row, RUNNING, 0, MORNING_MS, BOOT_MS) == ["It is about to be dispatched."]


def test_full_lane_says_how_many_are_ahead_and_under_way() -> None:
    assert explain_job(job(), status(tasks=16), 7, NOW_MS) == [
        "7 jobs of lane inference go before it.",
        "16 tasks are under way: its lane is full.",
    ]


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("dedupe_dropped", "Another job with its dedupe_key 'k' was open when it came."),
        ("replaced", "A newer job with its dedupe_key 'k' took its place."),
        ("poison_job", "Its attempts crashed the worker 2 times."),
    ],
)
def test_end_that_is_not_the_jobs_own_fault_says_whose(code: str, hint: str) -> None:
    row = job(state="rejected", ended_ms=NOW_MS, reason_code=code, dedupe_key="k", crashes=2)
    assert explain_job(row, RUNNING, 0, NOW_MS)[1] == hint


def test_running_job_says_how_far_it_is() -> None:
    progress = {"done": 12, "total": 40, "unit": "files", "eta_s": 3.1}
    row = job(state="running", started_ms=NOW_MS, attempt=1, progress=json.dumps(progress))
    assert explain_job(row, RUNNING, 0, NOW_MS)[1] == (
        "It has done 12 of 40 files; about 3.1 s are left."
    )


def test_reports_that_wait_are_named_with_their_numbers() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "state", "seq": 12},
        {"kind": "result", "seq": None},
    ]
    row = job(state="succeeded")
    assert explain_reports(row, records, "console", status(mqtt="offline")) == [
        "Still to be acknowledged by a console: state (number 12), result (not sent yet).",
        "MQTT is offline: its reports wait; the job itself does not need it.",
    ]
    assert explain_reports(row, [], "broker", status(mqtt="online")) == [
        "All of it is reported, and acknowledged by the MQTT broker."
    ]
    assert explain_reports(job(), [], "broker", RUNNING) == []
    assert explain_reports(row, records, "broker", status(mqtt="disabled")) == [
        "MQTT is disabled: nothing of it is reported."
    ]


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
