"""A worker that dies leaves what its successor tells the agent: whose fault it was, if any."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.brokers import QueueProcess
from tests.harness.lone_worker import FOR_EVER, LoneWorker, make_item, make_loop
from tests.harness.waiting import wait_until


@pytest.fixture
def worker(tmp_path: Path, queue_broker: QueueProcess) -> Iterator[LoneWorker]:
    worker = LoneWorker(tmp_path, queue_broker)
    worker.start()
    yield worker
    worker.close()


def as_named(*items: dict[str, object]) -> list[dict[str, object]]:
    return [{"id": item["id"], "attempt": item["attempt"]} for item in items]


@pytest.mark.parametrize(("do", "name"), [("segv", "SIGSEGV"), ("abort", "SIGABRT")])
def test_successor_tells_which_job_of_the_bundle_crashed_the_worker(
    worker: LoneWorker, do: str, name: str
) -> None:
    good, bad, other = make_item(), make_item(params={"do": do}, attempt=3), make_item()
    task_id = worker.send("wild", [good, bad, other])
    assert worker.wait_end() < 0
    assert worker.count_said() == 0
    worker.start()
    # It was told before the first heartbeat, which frees the dead one's tasks.
    assert worker.count_said() == 1
    assert worker.hear("crash") == {
        "kind": "crash",
        "task": task_id,
        "model": "wild",
        "version": "1",
        "signal": name,
        "jobs": as_named(bad),
    }
    assert "acme_wild.py" in worker.read_log()
    assert len(worker.journals) == 2
    worker.send("tiny", [make_item()])
    assert worker.hear()["jobs"][0]["state"] == "succeeded"


def test_job_in_another_thread_is_not_to_blame(worker: LoneWorker) -> None:
    innocent = worker.send("endless", [make_loop(FOR_EVER)])
    worker.wait_held(innocent)
    guilty = worker.send("wild", [make_item(params={"do": "segv"})])
    worker.wait_end()
    worker.start()
    assert worker.hear("crash")["task"] == guilty
    assert worker.count_said() == 0


def test_worker_killed_from_outside_is_nobody_s_fault(worker: LoneWorker) -> None:
    task_id = worker.send("endless", [make_loop(FOR_EVER)])
    worker.wait_held(task_id)
    left = worker.journals
    worker.kill()
    assert worker.journals == left
    worker.start()
    assert worker.count_said() == 0
    assert not {*left} & {*worker.journals}


def test_clean_end_leaves_no_files(worker: LoneWorker) -> None:
    assert len(worker.journals) == 2
    assert worker.process is not None
    worker.process.terminate()
    worker.wait_end()
    assert worker.journals == []


def test_crash_of_a_thread_that_runs_no_job_is_told_of_the_process_and_of_no_job(
    worker: LoneWorker,
) -> None:
    """As when systemd's watchdog aborts it: the main thread gets the signal and runs no job."""
    import signal

    task_id = worker.send("endless", [make_loop(FOR_EVER)])
    worker.wait_held(task_id)
    assert worker.process is not None
    worker.process.send_signal(signal.SIGABRT)
    worker.wait_end()
    worker.start()
    # A version on probation is to blame for it; no job is.
    told = worker.hear("crash")
    assert (told["signal"], told["model"], told["version"], told["jobs"]) == (
        "SIGABRT",
        "",
        None,
        [],
    )
    assert "Fatal Python error: Aborted" in worker.read_log()


def test_crash_is_told_where_the_first_successor_was_killed_as_well(worker: LoneWorker) -> None:
    worker.send("wild", [make_item(params={"do": "segv"})])
    worker.wait_end()
    # A successor that is stopped before it serves: its files and the first one's lie there.
    left = worker.journals
    worker.start()
    worker.kill()
    assert worker.hear("crash")["signal"] == "SIGSEGV"
    assert not {*left} & {*worker.journals}
    worker.start()
    assert worker.count_said() == 0
    wait_until(lambda: len(worker.journals) == 2, 5, "only the living one's files are there")


def test_model_that_crashes_while_it_loads_is_to_blame_and_no_job(worker: LoneWorker) -> None:
    (worker.data_dir / "models" / "wild" / "1" / "crash-on-load").touch()
    task_id = worker.send("wild", [make_item(), make_item()])
    worker.wait_end()
    worker.start()
    crash = worker.hear("crash")
    assert (crash["task"], crash["version"], crash["jobs"]) == (task_id, "1", [])
