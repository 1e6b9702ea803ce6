"""A job that crashes its worker is found out; the jobs beside it end well."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.repository import ModelRepository
from tests.harness.box import Box, RecordingConsole, make_body
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.lone_worker import write_wild_model
from tests.harness.waiting import wait_until


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
    yield console
    console.close()


def wait_ends(box: Box, console: RecordingConsole, ids: list[str]) -> list[tuple[str, str]]:
    """Wait until all jobs have ended; return state and code of each."""

    def have_ended() -> bool:
        box.supervise()
        return all(
            (console.last_state(job_id) or {}).get("state") not in (None, "queued", "running")
            for job_id in ids
        )

    wait_until(have_ended, 90, f"all jobs end; log:\n{box.read_log()[-3000:]}")
    ends = [console.last_state(job_id) or {} for job_id in ids]
    return [(end["state"], end["reason"]["code"]) for end in ends]


@pytest.mark.timeout(240)
def test_job_that_crashes_its_worker_twice_is_poison_and_the_others_end_well(
    box: Box, console: RecordingConsole
) -> None:
    poison = console.submit(make_body(model="wild", params={"do": "segv"}))
    others = [console.submit(make_body(model="wild")) for _ in range(20)]
    ends = wait_ends(box, console, [poison, *others])
    assert ends == [("failed", "poison_job")] + [("succeeded", "ok")] * 20


@pytest.mark.timeout(240)
def test_model_that_crashes_while_it_loads_is_put_aside_and_its_jobs_are_not_called_poison(
    box: Box, console: RecordingConsole
) -> None:
    (box.data_dir / "models" / "wild" / "1" / "crash-on-load").touch()
    ids = [console.submit(make_body(model="wild")) for _ in range(3)]
    others = [console.submit() for _ in range(3)]
    ends = wait_ends(box, console, [*ids, *others])
    assert ends == [("failed", "model_quarantined")] * 3 + [("succeeded", "ok")] * 3
