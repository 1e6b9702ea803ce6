"""Signed releases on a real box: from a web server, from a stick, and from somebody else."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from console.release.bundle import write_bundle
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.file_server import Behaviour, FileServer
from tests.harness.publishing import Publisher
from tests.harness.releases import DIGITS, write_digits
from tests.harness.update_box import UpdateBox
from tests.harness.waiting import wait_until


class Site:
    """A publisher with a web server, and a box that trusts it."""

    def __init__(self, folder: Path, mqtt: MqttProcess, queue: QueueProcess) -> None:
        self.folder = folder
        self.publisher = make_publisher(folder / "publisher")
        root = folder / "root.json"
        root.write_bytes(self.publisher.root)
        self.server = FileServer(self.publisher.folder, Behaviour())
        self.server.__enter__()
        self.box = UpdateBox(
            folder,
            mqtt,
            queue,
            EDGEWARD_UPDATES__URL=self.server.address,
            EDGEWARD_UPDATES__ROOT_FILE=str(root),
            EDGEWARD_UPDATES__RESERVE_BYTES="0",
            EDGEWARD_UPDATES__PROBATION_S="1",
        )
        self.inbox = self.box.box.data_dir / "inbox" / "_releases"

    def close(self) -> None:
        self.box.close()
        self.server.__exit__(None, None, None)


def make_publisher(home: Path) -> Publisher:
    publisher = Publisher(home)
    publisher.now = datetime.now(UTC)
    publisher.sign()
    return publisher


def publish(publisher: Publisher, release: str, name: str = "digits") -> None:
    files = {
        "digits.onnx": DIGITS / "digits.onnx",
        "digits.tflite.onnx": DIGITS / "digits.int8.onnx",
    }
    version = write_digits(publisher.home / "sources" / name / release, release, files=files)
    publisher.now = datetime.now(UTC)
    publisher.repository.add_release(name, release, version, "targets")
    publisher.sign()


@pytest.fixture
def site(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[Site]:
    site = Site(tmp_path, mosquitto, queue_broker)
    yield site
    site.close()


def drop(site: Site, path: Path) -> None:
    site.inbox.mkdir(parents=True, exist_ok=True)
    part = site.inbox / f".{path.name}.part"
    shutil.copy(path, part)
    part.rename(site.inbox / path.name)


@pytest.mark.timeout(240)
def test_release_comes_from_a_web_server_and_what_is_here_is_not_fetched_again(site: Site) -> None:
    publish(site.publisher, "2.0.0")
    state = site.box.wait_end(site.box.update("2.0.0"))
    assert state["reason"]["code"] == "committed"
    assert site.box.get_active() == "2.0.0"
    fetched = site.server.sent_bytes
    publish(site.publisher, "3.0.0")
    assert site.box.wait_end(site.box.update("3.0.0"))["reason"]["code"] == "committed"
    # The net and its golden set are the same: metadata and a manifest came.
    assert site.server.sent_bytes - fetched < 40_000
    floors = site.box.box.query("SELECT value FROM facts WHERE name = 'floors'")
    assert '"timestamp":' in floors[0][0]


@pytest.mark.timeout(240)
def test_release_that_nobody_trusted_has_signed_is_refused(site: Site) -> None:
    state = site.box.wait_end(site.box.update("9.9.9"))
    assert (state["state"], state["reason"]["code"]) == ("failed", "release_unknown")
    thief = make_publisher(site.folder / "thief")
    publish(thief, "6.6.6")
    shutil.rmtree(site.publisher.folder)
    shutil.copytree(thief.folder, site.publisher.folder)
    state = site.box.wait_end(site.box.update("6.6.6"))
    assert (state["state"], state["reason"]["code"]) == ("failed", "release_untrusted")
    assert site.box.get_active() == "1.0.0"
    assert site.box.models.list_versions("digits")[-1].release == "1.0.0"


@pytest.mark.timeout(240)
def test_bundle_in_the_inbox_installs_a_model_without_a_network(site: Site) -> None:
    publish(site.publisher, "1.0.0", name="numbers")
    bundle = site.folder / "numbers.edgeward"
    write_bundle(site.publisher.repository, "numbers", "1.0.0", bundle)
    site.server.__exit__(None, None, None)
    drop(site, bundle)
    wait_until(lambda: (site.inbox / "done" / bundle.name).exists(), 90, "it is installed")
    assert site.box.models.get_version("numbers").release == "1.0.0"
    site.server = FileServer(site.publisher.folder, Behaviour())
    site.server.__enter__()


@pytest.mark.timeout(240)
def test_bundle_of_somebody_else_and_a_file_that_is_none_are_set_aside_with_a_reason(
    site: Site,
) -> None:
    thief = make_publisher(site.folder / "thief")
    publish(thief, "2.0.0")
    bundle = site.folder / "gift.edgeward"
    write_bundle(thief.repository, "digits", "2.0.0", bundle)
    drop(site, bundle)
    rubbish = site.folder / "rubbish.edgeward"
    rubbish.write_bytes(b"not a bundle" * 100)
    drop(site, rubbish)
    failed = site.inbox / "failed"
    for name, code in ((rubbish.name, "bad_release"), (bundle.name, "release_untrusted")):
        reason = failed / f"{name}.reason.json"
        wait_until(reason.exists, 60, f"{name} is set aside")
        assert f'"{code}"' in reason.read_text()
    assert site.box.get_active() == "1.0.0"


@pytest.mark.timeout(240)
def test_box_that_trusts_nobody_says_what_to_do(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    box = UpdateBox(
        tmp_path, mosquitto, queue_broker, EDGEWARD_UPDATES__URL=str(tmp_path / "nowhere")
    )
    try:
        state = box.wait_end(box.update("2.0.0"))
        assert state["reason"]["code"] == "release_untrusted"
        assert "1.root.json" in state["reason"]["message"]
    finally:
        box.close()
