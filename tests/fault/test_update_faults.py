"""The box ends at every step of an update, by SIGKILL, and either version serves, whole.

`CASES` has one row for each point of `agent.faults.UPDATE_POINTS`. Each row: a signed release is
published, an update to it is asked for, the process that owns the point ends there and is started
again, and then the update has one end, the version that serves is the one which that end says, its
files are what its manifest says, and nothing of the update is left behind.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.choice import compute_digest
from agent.faults import UPDATE_POINTS, VARIABLE
from agent.manifest import read_manifest, verify_files
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.publishing import Publisher
from tests.harness.releases import write_digits, write_garbage
from tests.harness.update_box import UpdateBox
from tests.harness.waiting import wait_until

WORKER_POINTS = {"update.fetching", "update.fetched", "update.staging", "update.told"}
ROLLBACK_POINTS = {"update.rolling_back", "update.restored", "update.reset", "update.rolled_back"}


@dataclass(frozen=True)
class Case:
    """How a point is reached.

    Attributes:
        is_good: the update ends well.
        process: that owns the point.
    """

    is_good: bool = True
    process: str = "agent"
    settings: dict[str, str] = field(default_factory=dict)


def make_case(point: str) -> Case:
    process = "maintenance" if point in WORKER_POINTS else "agent"
    return Case(point not in ROLLBACK_POINTS, process)


CASES = {point: make_case(point) for point in UPDATE_POINTS}


class Stage:
    """A publisher, and a box that trusts it."""

    def __init__(self, folder: Path, mqtt: MqttProcess, queue: QueueProcess) -> None:
        self.folder = folder
        self.publisher = Publisher(folder / "publisher")
        self.publisher.now = _now()
        self.publisher.sign()
        root = folder / "root.json"
        root.write_bytes(self.publisher.root)
        self.box = UpdateBox(
            folder,
            mqtt,
            queue,
            EDGEWARD_UPDATES__URL=str(self.publisher.folder),
            EDGEWARD_UPDATES__ROOT_FILE=str(root),
            EDGEWARD_UPDATES__RESERVE_BYTES="0",
            EDGEWARD_QUEUE__LOST_AFTER_S="1",
            EDGEWARD_OUTBOX__ACK="broker",
        )
        self.number = 1

    def publish(self) -> str:
        """Publish the next release."""
        self.number += 1
        release = f"{self.number}.0.0"
        version = write_digits(self.folder / "versions" / release, release)
        self.publisher.now = _now()
        self.publisher.repository.add_release("digits", release, version, "targets")
        self.publisher.sign()
        return release

    def publish_that_fails_late(self) -> tuple[str, dict[str, Any]]:
        """Publish a release that passes staging and not its shadow."""
        self.number += 1
        release = f"{self.number}.0.0"
        bad = write_garbage(self.folder / f"bad-{release}.onnx")
        source = self.folder / "versions" / release
        write_digits(source, release, files={"digits.onnx": bad}, golden=False)
        self.publisher.now = _now()
        self.publisher.repository.add_release("digits", release, source, "targets")
        self.publisher.sign()
        params = {
            "policy": {"max_slowdown": 1e6},
            "probation": {"duration_s": 60, "min_agreement": 0.99},
            "rollout": {"shadow_s": 60},
        }
        return release, params


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    mqtt = MqttProcess(tmp_path_factory.mktemp("mqtt"))
    queue = QueueProcess(tmp_path_factory.mktemp("queue"))
    mqtt.start()
    queue.start()
    stage = Stage(tmp_path_factory.mktemp("stage"), mqtt, queue)
    yield stage
    stage.box.close()
    mqtt.stop()
    queue.stop()


def test_every_point_has_its_case() -> None:
    assert set(CASES) == set(UPDATE_POINTS)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("point", UPDATE_POINTS)
def test_update_survives_the_end_of_its_process_at(stage: Stage, point: str) -> None:
    case, box = CASES[point], stage.box
    before = box.get_active()
    params: dict[str, Any] = {}
    if case.is_good:
        release = stage.publish()
    else:
        release, params = stage.publish_that_fails_late()
    box.box.stop(case.process)
    box.box.start(case.process, **{VARIABLE: point})
    wait_until(box.serves, 30, "the HTTP API answers")
    job_id = box.update(release, **params)

    def has_died() -> bool:
        if not case.is_good:
            box.answer()
        return box.box.processes[case.process].poll() is not None

    wait_until(has_died, 60, f"{case.process} ends at {point}; log:\n{box.box.read_log()[-3000:]}")
    box.box.processes.pop(case.process)
    box.box.start(case.process)

    def has_ended() -> bool:
        if not case.is_good:
            box.answer()
        state = box.console.last_state(job_id)
        return state is not None and state["state"] not in ("queued", "running")

    wait_until(has_ended, 60, f"the update ends; log:\n{box.box.read_log()[-3000:]}")
    state = box.console.last_state(job_id)
    assert state is not None
    expected = ("succeeded", "committed") if case.is_good else ("failed", "probation_disagreement")
    assert (state["state"], state["reason"]["code"]) == expected
    active = box.models.get_version("digits")
    assert active.release == (release if case.is_good else before)
    verify_files(read_manifest(active.folder), active.folder)
    assert compute_digest(active.folder)
    assert not (active.folder.parent / "traffic.json").exists()
    assert box.box.query("SELECT count(*) FROM deployments") == [(0,)]
    ends = box.box.query(
        f"SELECT count(*) FROM transitions WHERE job_id = '{job_id}' "
        "AND state NOT IN ('queued', 'running')"
    )
    assert ends == [(1,)]
    answered = time.monotonic() + 10
    while box.answer() != str(active.number):
        assert time.monotonic() < answered, "the version that serves is not the active one"
