"""The library's examples of docs/console.md, run as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

from tests.architecture.documents import ROOT, read_document
from tests.conftest import wait_until
from tests.harness.brokers import MqttProcess
from tests.harness.commands import clean_environment
from tests.harness.fake_device import FakeDevice

DURABLE, LOOKING_ON = re.findall(
    r"^```python\n(.*?)^```$", read_document("console.md"), re.M | re.S
)


def run_script(script: str, folder: Path, port: int) -> str:
    env = clean_environment({"EDGEWARD_MQTT__PORT": str(port), "PYTHONPATH": str(ROOT)})
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_durable_example_keeps_ends_and_acknowledges_them(
    mosquitto: MqttProcess, tmp_path: Path
) -> None:
    device = FakeDevice(mosquitto.port, "box-7")
    device.runs_jobs = True
    device.connect()
    assert run_script(DURABLE, tmp_path, mosquitto.port) == "[('succeeded', 3)]\n"
    wait_until(lambda: not device.records, 10, "everything is acknowledged")
    device.leave()


def test_example_that_looks_on_acknowledges_nothing(mosquitto: MqttProcess, tmp_path: Path) -> None:
    device = FakeDevice(mosquitto.port, "box-7")
    device.connect()
    device.record("event/alarm", "event.alarm", {})
    assert "box-7 status" in run_script(LOOKING_ON, tmp_path, mosquitto.port)
    assert device.heard == []
    device.leave()
