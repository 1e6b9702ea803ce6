"""A worker that is paused, or gone for good: each job ends once, and soon."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.repository import ModelRepository
from tests.harness.box import Box, RecordingConsole, make_body
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.lone_worker import write_wild_model
from tests.harness.waiting import wait_until

PAUSE_S = 6.0


@pytest.fixture
def box(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[Box]:
    site = tmp_path / "site"
    write_wild_model(tmp_path / "wild", site)
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    box = Box(tmp_path, mosquitto, queue_broker, PYTHONPATH=paths)
    ModelRepository(box.data_dir / "models").add(tmp_path / "wild")
    yield box
    box.close()


@pytest.fixture
def console(box: Box, mosquitto: MqttProcess) -> Iterator[RecordingConsole]:
    console = RecordingConsole(mosquitto.port)
    box.start("agent")
    box.start("worker")
    wait_until(lambda: console.find("status"), 30, "online")
    # The model is loaded and the box known, so that what follows is the jobs' own time.
    console.wait_end(console.submit(make_body(model="wild")))
    yield console
    console.close()


def is_running(console: RecordingConsole, job_id: str) -> bool:
    state: dict[str, Any] | None = console.last_state(job_id)
    return state is not None and state["state"] == "running"


def was_requeued(console: RecordingConsole, job_id: str) -> bool:
    reasons = [(state["reason"] or {}).get("code") for state in console.states.get(job_id, [])]
    return "worker_lost" in reasons


@pytest.mark.timeout(180)
def test_paused_worker_doubles_no_result(box: Box, console: RecordingConsole) -> None:
    slow = console.submit(make_body(model="wild", params={"sleep_s": 3}))
    wait_until(lambda: is_running(console, slow), 20, "the job runs")
    others = [console.submit(make_body(model="wild")) for _ in range(10)]
    worker = box.processes["worker"]
    worker.send_signal(signal.SIGSTOP)
    paused = time.monotonic()
    wait_until(lambda: time.monotonic() - paused > PAUSE_S, 20, "the pause is over")
    worker.send_signal(signal.SIGCONT)
    ids = [slow, *others]
    wait_until(lambda: all(job_id in console.results for job_id in ids), 60, box.read_log()[-2000:])
    for job_id in ids:
        assert console.wait_end(job_id)["state"] == "succeeded"
        assert len({str(body) for body in console.results[job_id]}) == 1
    ends = box.query(
        "SELECT count(*) FROM transitions WHERE state NOT IN ('queued', 'running') GROUP BY job_id"
    )
    assert {count for (count,) in ends} == {1}


@pytest.mark.timeout(180)
def test_job_of_a_worker_that_never_comes_back_is_soon_with_another(
    box: Box, console: RecordingConsole
) -> None:
    slow = console.submit(make_body(model="wild", params={"sleep_s": 10}))
    wait_until(lambda: is_running(console, slow), 20, "the job runs")
    program = str(Path(sys.executable).with_name("edgeward"))
    other = subprocess.Popen(
        [program, "worker", "--lane", "inference", "--slot", "another"],
        env={**os.environ, **box.environment},
        stdin=subprocess.DEVNULL,
    )
    try:
        box.kill("worker")
        killed = time.monotonic()
        wait_until(lambda: was_requeued(console, slow), 30, "the job is free again")
        # 3 s of life and 1 s until the agent looks; with the idle life it were 10 s.
        assert time.monotonic() - killed < 7
        assert console.wait_end(slow, 60)["state"] == "succeeded"
    finally:
        other.terminate()
        other.wait(20)
