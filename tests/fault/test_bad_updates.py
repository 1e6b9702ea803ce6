"""Versions that turn bad only after they serve: each is rolled back by itself, the old one answers.

The versions run on a test's own runtime, which crashes, hangs, leaks or fails from the moment on
in which a file beside the model says so.
"""

import http.client
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.releases import DIGITS
from tests.harness.update_box import UpdateBox
from tests.harness.waiting import wait_until
from tests.harness.wild_runtime import install_wild_runtime

ARMED = {"armed.onnx": DIGITS / "digits.onnx"}
PROBATION: dict[str, Any] = {
    "duration_s": 120.0,
    "min_failures": 3,
    "hang_s": 20.0,
    "max_growth_mb": 100.0,
    "max_slowdown": 1e6,
}


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory,
    module_mosquitto: MqttProcess,
    module_queue: QueueProcess,
) -> Iterator[UpdateBox]:
    folder = tmp_path_factory.mktemp("box")
    install_wild_runtime(folder / "site")
    paths = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    box = UpdateBox(
        folder,
        module_mosquitto,
        module_queue,
        runtimes=("wild",),
        files=ARMED,
        PYTHONPATH=paths,
    )
    yield box
    box.close()


@pytest.fixture(scope="module")
def module_mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MqttProcess]:
    broker = MqttProcess(tmp_path_factory.mktemp("mqtt"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def module_queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QueueProcess]:
    broker = QueueProcess(tmp_path_factory.mktemp("queue"))
    broker.start()
    yield broker
    broker.stop()


class Clients:
    """Ask all the time; what fails while a worker is away is no matter here."""

    def __init__(self, box: UpdateBox) -> None:
        self._box = box
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self.versions: list[str] = []

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _ask(self) -> None:
        while not self._over.wait(0.005):
            try:
                self.versions.append(self._box.answer())
            except (OSError, http.client.HTTPException):
                self._over.wait(0.05)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("number", "do", "code"),
    [
        (2, "error", "probation_errors"),
        (3, "leak", "probation_memory"),
        (4, "segv", "probation_crash"),
        (5, "hang", "probation_hang"),
    ],
)
def test_version_that_turns_bad_is_rolled_back_by_itself(
    box: UpdateBox, number: int, do: str, code: str
) -> None:
    release = f"{number}.0.0"
    box.add(release, files=ARMED)
    version = str(box.models.get_version("digits", release).number)
    wait_until(box.serves, 60, "the HTTP API answers")
    with Clients(box) as clients:
        hang_s = 1.5 if do == "hang" else PROBATION["hang_s"]
        job_id = box.update(release, probation={**PROBATION, "hang_s": hang_s})
        wait_until(lambda: version in clients.versions, 60, "the new version answers")
        folder = box.models.get_folder("digits", release)
        (folder / f"armed-{do}").touch()

        def has_ended() -> bool:
            box.box.supervise()
            state = box.console.last_state(job_id)
            return state is not None and state["state"] not in ("queued", "running")

        wait_until(has_ended, 60, f"it is rolled back; log:\n{box.box.read_log()[-3000:]}")
        seen = len(clients.versions)

        def answers_again() -> bool:
            box.box.supervise()
            return "1" in clients.versions[seen:]

        wait_until(answers_again, 60, "the old version answers")
        assert set(clients.versions[seen + 50 :]) <= {"1"}
    state = box.console.last_state(job_id)
    assert state is not None
    assert (state["state"], state["reason"]["code"]) == ("failed", code)
    assert box.get_active() == "1.0.0"
    wait_until(
        lambda: release in {one["release"] for one in box.get_reported().get("bad", [])},
        10,
        "it is marked bad",
    )


def test_old_version_is_as_it_was(box: UpdateBox) -> None:
    versions = box.models.list_versions("digits")
    assert [item.number for item in versions if item.is_active] == [1]
    assert not (box.box.data_dir / "models" / "digits" / "traffic.json").exists()
