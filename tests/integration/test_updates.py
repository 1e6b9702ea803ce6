"""An update on a real box: staged, switched, watched, committed, or rolled back by itself."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from agent.repository import ModelRepository
from console.embedded import find_free_port
from tests.harness.box import Box, RecordingConsole, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.releases import make_pixels, write_digits, write_garbage, write_slow
from tests.harness.waiting import wait_until

QUICK = {"EDGEWARD_UPDATES__POINT_S": "0.05"}
PROBATION = {"duration_s": 1.0, "min_failures": 2}


class Fleet:
    """One box with its console, and clients of its HTTP API."""

    def __init__(self, tmp_path: Path, mqtt: MqttProcess, queue: QueueProcess) -> None:
        self.tmp_path = tmp_path
        self.port = find_free_port()
        self.box = Box(tmp_path, mqtt, queue, EDGEWARD_HTTP__PORT=str(self.port), **QUICK)
        self.models = ModelRepository(self.box.data_dir / "models")
        self.models.add(write_digits(tmp_path / "v1"))
        self.console = RecordingConsole(mqtt.port)
        self.box.start("agent")
        self.box.start("worker")
        self.box.start("maintenance")
        wait_until(lambda: self.console.find("status"), 30, "online")

    def close(self) -> None:
        self.console.close()
        self.box.close()

    def add(self, version: str, **options: Any) -> None:
        """Put a version into the repository, inactive, as a fetch would."""
        self.models.add(write_digits(self.tmp_path / version, version, **options), activate=False)

    def update(self, version: str, **params: Any) -> str:
        params = {"probation": PROBATION, **params}
        body = {"handler": "update", "model": "digits", "version": version, "params": params}
        return self.console.submit(body)

    def wait_end(self, job_id: str) -> dict[str, Any]:
        try:
            return self.console.wait_end(job_id, 60)
        except AssertionError:
            print(self.box.read_log()[-6000:])
            raise

    def get_active(self) -> str:
        return self.models.get_version("digits").release

    def get_reported(self, name: str = "digits") -> dict[str, Any]:
        documents = self.console.find("reported")
        return documents[-1]["body"]["models"].get(name, {}) if documents else {}

    def answer(self) -> str:
        """Ask the HTTP API for one answer; return the version that gave it."""
        client = InferenceServerClient(f"127.0.0.1:{self.port}")
        given = InferInput("pixels", [1, 64], "FP32")
        given.set_data_from_numpy(make_pixels(1))
        return str(client.infer("digits", [given]).get_response()["model_version"])


class Load:
    """Clients that ask without a pause, and count."""

    def __init__(self, fleet: Fleet, clients: int = 8) -> None:
        self.versions: list[str] = []
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(fleet,), daemon=True) for _ in range(clients)
        ]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(20)

    def _ask(self, fleet: Fleet) -> None:
        client = InferenceServerClient(f"127.0.0.1:{fleet.port}")
        given = InferInput("pixels", [1, 64], "FP32")
        given.set_data_from_numpy(make_pixels(1))
        while not self._over.is_set():
            try:
                found = client.infer("digits", [given]).get_response()
                self.versions.append(str(found["model_version"]))
            except (InferenceServerException, OSError) as exc:
                self.failures.append(str(exc))


@pytest.fixture
def fleet(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path, mosquitto, queue_broker)
    yield fleet
    fleet.close()


@pytest.mark.timeout(240)
def test_good_update_under_load_fails_no_request_and_is_committed(fleet: Fleet) -> None:
    fleet.add("2.0.0")
    wait_until(lambda: _serves(fleet), 30, "the HTTP API answers")
    with Load(fleet) as load:
        state = fleet.wait_end(fleet.update("2.0.0"))
    assert (state["state"], state["reason"]["code"]) == ("succeeded", "committed")
    assert load.failures == []
    assert set(load.versions) == {"1", "2"}
    # Each client sees the switch once, and never the old version again.
    assert fleet.get_active() == "2.0.0"
    assert not (fleet.box.data_dir / "models" / "digits" / "traffic.json").exists()
    wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 10, "it is reported")
    reported = fleet.get_reported()
    assert reported["active"] == {"version": 2, "release": "2.0.0"}
    assert reported["previous"]["release"] == "1.0.0"
    assert reported["last"]["choice"]["candidates"][0]["verdict"] == "chosen"


def _serves(fleet: Fleet) -> bool:
    try:
        return fleet.answer() == "1"
    except (InferenceServerException, OSError):
        return False


@pytest.mark.timeout(240)
def test_garbage_is_refused_at_staging_reported_and_not_tried_again(fleet: Fleet) -> None:
    bad = write_garbage(fleet.tmp_path / "bad.onnx")
    fleet.add("2.0.0", files={"digits.int8.onnx": bad})
    state = fleet.wait_end(fleet.update("2.0.0"))
    assert (state["state"], state["reason"]["code"]) == ("failed", "update_refused")
    assert "agreement" in state["reason"]["message"]
    assert fleet.get_active() == "1.0.0"
    wait_until(lambda: fleet.get_reported().get("status") == "failed", 10, "it is reported")
    assert fleet.get_reported()["bad"][0]["release"] == "2.0.0"


@pytest.mark.timeout(240)
def test_slow_version_that_staging_was_told_to_pass_is_rolled_back_in_probation(
    fleet: Fleet,
) -> None:
    slow = write_slow(fleet.tmp_path / "slow.onnx")
    fleet.add("2.0.0", files={"digits.onnx": slow})
    wait_until(lambda: _serves(fleet), 30, "the HTTP API answers")
    policy = {"max_slowdown": 1e6}
    probation = {"duration_s": 60.0, "max_slowdown": 2.0}
    with Load(fleet) as load:
        wait_until(lambda: len(load.versions) > 300, 30, "the old version has a latency")
        state = fleet.wait_end(fleet.update("2.0.0", policy=policy, probation=probation))
    assert (state["state"], state["reason"]["code"]) == ("failed", "probation_slow")
    assert load.failures == []
    assert fleet.get_active() == "1.0.0"
    # Quarantined by its digest, until somebody forces it.
    again = fleet.wait_end(fleet.update("2.0.0", policy=policy))
    assert again["reason"]["code"] == "version_bad"
    forced = fleet.wait_end(fleet.update("2.0.0", policy=policy, force=True))
    assert forced["reason"]["code"] == "committed"


@pytest.mark.timeout(240)
def test_update_waits_for_its_window_and_a_cancel_leaves_everything_as_it_was(
    fleet: Fleet,
) -> None:
    fleet.add("2.0.0")
    window = {"cron": "0 0 30 2 *", "duration_s": 60}
    job_id = fleet.update("2.0.0", window={**window, "cron": "0 3 1 1 *"})
    wait_until(
        lambda: fleet.get_reported().get("status") == "deferred", 60, "it waits, and says so"
    )
    assert "window opens" in fleet.get_reported()["reason"]["message"]
    fleet.console.publish(
        fleet.console.topics.cancel(job_id), make_envelope({"job_id": job_id}, "job.cancel")
    )
    assert fleet.wait_end(job_id)["state"] == "canceled"
    wait_until(lambda: "candidate" not in fleet.get_reported(), 20, "it is over")
    assert fleet.get_active() == "1.0.0"


@pytest.mark.timeout(240)
def test_canary_takes_its_share_and_then_all(fleet: Fleet) -> None:
    fleet.add("2.0.0")
    wait_until(lambda: _serves(fleet), 30, "the HTTP API answers")
    probation = {"duration_s": 12.0}
    with Load(fleet, 2) as load:
        job_id = fleet.update("2.0.0", probation=probation, rollout={"canary": [30]})
        assert fleet.wait_end(job_id)["reason"]["code"] == "committed"
    assert load.failures == []
    # Between its first answer and the old version's last one it was a canary.
    last = len(load.versions) - load.versions[::-1].index("1")
    canary = load.versions[load.versions.index("2") : last]
    assert len(canary) > 50
    assert 0.1 < canary.count("2") / len(canary) < 0.6
    result = fleet.console.results[job_id][0]["update"]
    assert result["canary_0"]["candidate"]["success"] > 0


@pytest.mark.timeout(240)
def test_shadow_that_disagrees_never_answers_anybody(fleet: Fleet) -> None:
    bad = write_garbage(fleet.tmp_path / "bad.onnx")
    fleet.add("2.0.0", files={"digits.onnx": bad}, golden=False)
    wait_until(lambda: _serves(fleet), 30, "the HTTP API answers")
    with Load(fleet, 2) as load:
        state = fleet.wait_end(
            fleet.update(
                "2.0.0",
                policy={"max_slowdown": 1e6},
                probation={"duration_s": 60, "min_agreement": 0.9},
                rollout={"shadow_s": 60},
            )
        )
    assert state["reason"]["code"] == "probation_disagreement"
    assert load.failures == []
    assert set(load.versions) == {"1"}


@pytest.mark.timeout(240)
def test_desired_document_is_converged_to_and_only_the_newest_counts(fleet: Fleet) -> None:
    fleet.add("2.0.0")
    topic = "edgeward/v1/box-1/c2d/desired"

    def want(version: int, release: str | None, epoch: str = "e1") -> None:
        models = {"digits": {"release": release, "probation": {"duration_s": 0.5}}}
        body = {"epoch": epoch, "version": version, "models": models}
        fleet.console.publish(topic, make_envelope(body, "desired"))

    want(2, "2.0.0")
    wait_until(lambda: fleet.get_active() == "2.0.0", 60, "the release that is wanted serves")
    wait_until(lambda: fleet.get_reported().get("status") == "in_sync", 20, "it is reported")
    body = fleet.console.find("reported")[-1]["body"]
    assert (body["epoch"], body["desired_version"], body["status"]) == ("e1", 2, "in_sync")
    want(1, "1.0.0")
    want(3, "1.0.0")
    wait_until(lambda: fleet.get_active() == "1.0.0", 60, "and back again, by version 3")
    want(4, None)
    wait_until(lambda: "digits" not in fleet.models.list_models(), 30, "it is removed")
    assert fleet.models.list_models() == ["tiny"]
