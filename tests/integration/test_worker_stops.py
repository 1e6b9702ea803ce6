"""Runs that are cancelled, late or stand still: stopped in the process, ended with it at worst."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.brokers import QueueProcess
from tests.harness.lone_worker import FOR_EVER, LoneWorker, make_item, make_loop
from worker.heartbeat import EXIT_HUNG


@pytest.fixture
def worker(tmp_path: Path, queue_broker: QueueProcess) -> Iterator[LoneWorker]:
    worker = LoneWorker(tmp_path, queue_broker, EDGEWARD_WORKER__CANCEL_GRACE_S="1")
    worker.start()
    # From here on a run's time is its own: the box is known, and the models are loaded.
    worker.send("wild", [make_item()])
    worker.send("endless", [make_loop(1)])
    assert [find_ends(worker.hear()) for _ in range(2)] == [[("succeeded", "ok")]] * 2
    yield worker
    worker.close()


def find_ends(outcome: dict[str, Any]) -> list[tuple[str, str]]:
    return [(job["state"], job["reason"]["code"]) for job in outcome["jobs"]]


def check_serves(worker: LoneWorker, pid: int) -> None:
    """The same process still takes and runs tasks."""
    worker.send("tiny", [make_item()])
    assert find_ends(worker.hear()) == [("succeeded", "ok")]
    assert worker.pid == pid
    assert worker.process is not None
    assert worker.process.poll() is None


def test_cancelled_run_stops_and_the_process_serves_on(worker: LoneWorker) -> None:
    pid, job = worker.pid, make_loop(FOR_EVER)
    worker.wait_held(worker.send("endless", [job]))
    worker.cancel(job["id"])
    assert find_ends(worker.hear()) == [("canceled", "canceled")]
    check_serves(worker, pid)


def test_cancelled_job_of_a_bundle_harms_no_other(worker: LoneWorker) -> None:
    pid, job = worker.pid, make_loop(FOR_EVER)
    worker.wait_held(worker.send("endless", [make_loop(3), job, make_loop(4)]))
    worker.cancel(job["id"])
    ends = find_ends(worker.hear())
    assert ends == [("succeeded", "ok"), ("canceled", "canceled"), ("succeeded", "ok")]
    check_serves(worker, pid)


def test_job_cancelled_before_its_turn_never_runs(worker: LoneWorker) -> None:
    first, second = make_loop(FOR_EVER, timeout_s=2.0), make_loop(FOR_EVER)
    worker.cancel(second["id"])
    worker.send("endless", [first, second])
    assert find_ends(worker.hear()) == [("timed_out", "run_timeout"), ("canceled", "canceled")]


def test_late_run_times_out_and_the_process_serves_on(worker: LoneWorker) -> None:
    pid = worker.pid
    worker.send("endless", [make_loop(FOR_EVER, timeout_s=1.0)])
    outcome = worker.hear()
    assert find_ends(outcome) == [("timed_out", "run_timeout")]
    [job] = outcome["jobs"]
    assert 1000 <= job["ended_ms"] - job["started_ms"] < 3000
    assert job["reason"]["message"] == "it ran longer than 1 s"
    assert job["reason"]["retryable"] is False
    check_serves(worker, pid)


def test_each_job_of_a_bundle_has_its_own_time(worker: LoneWorker) -> None:
    pid = worker.pid
    items = [make_loop(FOR_EVER, timeout_s=1.0), make_loop(FOR_EVER, timeout_s=1.0), make_loop(5)]
    worker.send("endless", items)
    ends = find_ends(worker.hear())
    assert ends == [("timed_out", "run_timeout")] * 2 + [("succeeded", "ok")]
    check_serves(worker, pid)


def test_run_without_progress_is_stopped(worker: LoneWorker) -> None:
    pid = worker.pid
    worker.send("endless", [make_loop(FOR_EVER, progress_timeout_s=1.0)])
    assert find_ends(worker.hear()) == [("timed_out", "progress_timeout")]
    check_serves(worker, pid)


def test_cancelled_run_that_cannot_stop_ends_the_process_after_the_grace(
    worker: LoneWorker,
) -> None:
    job = make_item(params={"sleep_s": 60})
    worker.wait_held(worker.send("wild", [job]))
    worker.cancel(job["id"])
    assert worker.wait_end() == EXIT_HUNG
    assert find_ends(worker.hear()) == [("canceled", "canceled")]
    assert worker.journals == []
    worker.start()
    assert worker.count_said() == 0


def test_late_run_that_cannot_stop_ends_the_process_with_its_outcome(worker: LoneWorker) -> None:
    worker.send("wild", [make_item(params={"sleep_s": 60}, timeout_s=1.0)])
    assert worker.wait_end() == EXIT_HUNG
    assert find_ends(worker.hear()) == [("timed_out", "run_timeout")]


def test_bundle_that_cannot_stop_ends_the_process_and_accuses_nobody(worker: LoneWorker) -> None:
    items = [make_item(), make_item(params={"sleep_s": 60}, timeout_s=1.0)]
    worker.send("wild", items)
    assert worker.wait_end() == EXIT_HUNG
    assert worker.count_said() == 0


def test_cancelled_neighbour_of_a_run_that_cannot_stop_ends_nothing(worker: LoneWorker) -> None:
    pid = worker.pid
    slow, other = make_item(params={"sleep_s": 3}), make_item()
    worker.wait_held(worker.send("wild", [slow, other]))
    worker.cancel(other["id"])
    # Its inference ran together with the slow one's, and only its last step is left.
    assert find_ends(worker.hear())[0] == ("succeeded", "ok")
    check_serves(worker, pid)
