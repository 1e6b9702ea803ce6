"""A job that crashes its worker is found out; the jobs beside it end well."""

import os
from pathlib import Path

import pytest

from agent.repository import ModelRepository
from tests.harness.box import Box, RecordingConsole, make_body
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.lone_worker import write_wild_model
from tests.harness.waiting import wait_until


@pytest.mark.timeout(240)
def test_job_that_crashes_its_worker_twice_is_poison_and_the_others_end_well(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    site = tmp_path / "site"
    write_wild_model(tmp_path / "wild", site)
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    box = Box(tmp_path, mosquitto, queue_broker, PYTHONPATH=paths)
    ModelRepository(box.data_dir / "models").add(tmp_path / "wild")
    console = RecordingConsole(mosquitto.port)
    try:
        box.start("agent")
        box.start("worker")
        wait_until(lambda: console.find("status"), 30, "online")
        poison = console.submit(make_body(model="wild", params={"do": "segv"}))
        others = [console.submit(make_body(model="wild")) for _ in range(20)]

        def has_ended() -> bool:
            box.supervise()
            return all(
                (console.last_state(job_id) or {}).get("state") not in (None, "queued", "running")
                for job_id in [poison, *others]
            )

        wait_until(has_ended, 90, f"all jobs end; log:\n{box.read_log()[-3000:]}")
    finally:
        box.close()
        console.close()
    end = console.last_state(poison)
    assert end is not None
    assert (end["state"], end["reason"]["code"]) == ("failed", "poison_job")
    ends = [state["state"] for job_id in others if (state := console.last_state(job_id))]
    assert ends == ["succeeded"] * 20
