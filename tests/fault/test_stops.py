"""Cancel and progress from the console's side, with agent and worker as they run."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.repository import ModelRepository
from tests.harness.box import Box, RecordingConsole, make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.lone_worker import FOR_EVER, write_row
from tests.harness.models import write_endless_model
from tests.harness.waiting import wait_until


@pytest.fixture
def box(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[Box]:
    settings = {
        "EDGEWARD_WORKER__CONCURRENCY": "1",
        "EDGEWARD_LIMITS__ROOTS": json.dumps([str(tmp_path / "pictures")]),
    }
    box = Box(tmp_path, mosquitto, queue_broker, **settings)
    write_endless_model(tmp_path / "endless")
    ModelRepository(box.data_dir / "models").add(tmp_path / "endless")
    yield box
    box.close()


@pytest.fixture
def console(box: Box, mosquitto: MqttProcess) -> Iterator[RecordingConsole]:
    console = RecordingConsole(mosquitto.port)
    box.start("agent")
    box.start("worker")
    wait_until(lambda: console.find("status"), 30, "online")
    yield console
    console.close()


@pytest.mark.timeout(180)
def test_cancelled_run_frees_its_worker_for_the_next_job(
    box: Box, console: RecordingConsole
) -> None:
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [FOR_EVER]}
    body = make_body(model="endless", input={"tensors": [tensor]})
    pid = box.processes["worker"].pid
    endless = console.submit(body)

    def is_running() -> bool:
        return (console.last_state(endless) or {}).get("state") == "running"

    wait_until(is_running, 30, "the job runs")
    waiting = console.submit()
    console.publish(console.topics.cancel(endless), make_envelope({}, "job.cancel"))
    assert console.wait_end(endless)["reason"]["code"] == "canceled"
    # There is one thread: the waiting job ends because the endless one has let it go.
    assert console.wait_end(waiting)["state"] == "succeeded"
    assert box.processes["worker"].pid == pid
    assert box.processes["worker"].poll() is None


@pytest.mark.timeout(180)
def test_list_of_files_brings_progress_and_one_result(
    tmp_path: Path, console: RecordingConsole
) -> None:
    paths = [tmp_path / "pictures" / f"{number:02}.npy" for number in range(21)]
    for path in paths:
        write_row(path)
    paths[20].write_bytes(b"no array")
    files = [str(path) for path in paths]
    job_id = console.submit(make_body(handler="infer.batch", input={"files": files}))
    assert console.wait_end(job_id)["state"] == "succeeded"
    wait_until(lambda: job_id in console.results, 20, "the result arrives")
    output: list[dict[str, Any]] = console.results[job_id][0]["output"]
    assert [entry["file"] for entry in output] == files
    assert ["error" in entry for entry in output] == [False] * 20 + [True]
    wait_until(lambda: console.find("progress"), 20, "progress arrives")
    body = console.find("progress")[-1]["body"]
    assert (body["job_id"], body["total"], body["unit"]) == (job_id, 21, "files")
