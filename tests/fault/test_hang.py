"""An inference that never ends costs its job, not the box."""

from pathlib import Path
from typing import Any

import pytest

from agent.repository import ModelRepository
from tests.harness.box import Box, RecordingConsole, make_body
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.models import write_endless_model
from tests.harness.waiting import wait_until


def make_loop(times: int) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [times]}
    return make_body(model="endless", input={"tensors": [tensor]}, run_timeout_s=1)


@pytest.mark.timeout(180)
def test_endless_inference_times_out_and_its_neighbours_end_well(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    box = Box(tmp_path, mosquitto, queue_broker)
    write_endless_model(tmp_path / "endless")
    ModelRepository(box.data_dir / "models").add(tmp_path / "endless")
    console = RecordingConsole(mosquitto.port)
    try:
        box.start("agent")
        box.start("worker")
        wait_until(lambda: console.find("status"), 30, "online")
        good = console.submit(make_loop(10))
        hung = console.submit(make_loop(2**62))
        others = [console.submit() for _ in range(5)]

        def has_ended() -> bool:
            box.supervise()
            return all(
                (console.last_state(job_id) or {}).get("state") not in (None, "queued", "running")
                for job_id in [good, hung, *others]
            )

        wait_until(has_ended, 90, f"all jobs end; log:\n{box.read_log()[-2000:]}")
    finally:
        box.close()
        console.close()
    end = console.last_state(hung)
    assert end is not None
    assert (end["state"], end["reason"]["code"]) == ("timed_out", "run_timeout")
    states = [state["state"] for job_id in [good, *others] if (state := console.last_state(job_id))]
    assert states == ["succeeded"] * 6
