"""A console's link to a device that is played by a plain MQTT client on a real broker."""

import json
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from agent.config import Settings
from agent.errors import BrokerUnavailableError
from agent.jobs import JobState
from agent.sections import MqttSettings
from agent.topics import Topics
from console.embedded import find_free_port
from console.link import ConsoleLink
from console.submission import Command, Wanted, build_cancel, build_submit
from tests.harness.brokers import MqttProcess

DEVICE = "box-7"
TOPICS = Topics(DEVICE)
LIMIT_S = 15.0


class PlayedDevice:
    """Says what a test tells it to, and keeps what it hears."""

    def __init__(self, port: int) -> None:
        self.heard: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.subscribe([(topic, 1) for topic in TOPICS.subscriptions])
        self._client.loop_start()

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self.heard.put((message.topic, bytes(message.payload)))

    def say_state(self, job_id: str, state: str, rev: int) -> None:
        body = {"job_id": job_id, "state": state, "rev": rev, "reason": None}
        document = {"ts": "2026-11-22T10:00:00.000Z", "body": body}
        self.say(TOPICS.state(job_id), json.dumps(document), retain=True)

    def say_result(self, job_id: str, output: Any) -> None:
        document = {"body": {"job_id": job_id, "output": output}}
        self.say(TOPICS.result(job_id), json.dumps(document))

    def say(self, topic: str, payload: str | bytes, *, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(5)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def device(mosquitto: MqttProcess) -> Iterator[PlayedDevice]:
    played = PlayedDevice(mosquitto.port)
    yield played
    played.close()


@pytest.fixture
def link(mosquitto: MqttProcess, device: PlayedDevice) -> Iterator[ConsoleLink]:
    with ConsoleLink(build_settings(mosquitto.port), 0.05) as connected:
        yield connected


def build_settings(port: int) -> Settings:
    return Settings(device_id=DEVICE, mqtt=MqttSettings(port=port))


def build_job() -> Command:
    return build_submit(Wanted("m"), {"data_b64": "AAAA"})


def test_job_is_followed_to_its_end_and_result(link: ConsoleLink, device: PlayedDevice) -> None:
    job = build_job()
    link.submit([job])
    topic, payload = device.heard.get(timeout=LIMIT_S)
    assert topic == TOPICS.submit(job.job_id)
    assert json.loads(payload)["body"]["model"] == "m"

    device.say_state(job.job_id, "queued", 1)
    device.say_state(job.job_id, "succeeded", 3)
    assert link.wait(lambda: link.jobs[job.job_id].has_ended, LIMIT_S)
    assert not link.jobs[job.job_id].is_complete

    device.say_result(job.job_id, [1])
    assert link.wait(lambda: link.jobs[job.job_id].is_complete, LIMIT_S)
    assert link.jobs[job.job_id].result == {"job_id": job.job_id, "output": [1]}


def test_state_of_a_lower_rev_changes_nothing(link: ConsoleLink, device: PlayedDevice) -> None:
    job, marker = build_job(), build_job()
    link.submit([job, marker])
    device.say_state(job.job_id, "failed", 3)
    device.say_state(job.job_id, "running", 2)
    device.say_state(job.job_id, "succeeded", 3)
    device.say_state(marker.job_id, "queued", 1)
    assert link.wait(lambda: link.jobs[marker.job_id].state is not None, LIMIT_S)
    assert (link.jobs[job.job_id].state, link.jobs[job.job_id].rev) == (JobState.FAILED, 3)


def test_job_is_sent_again_until_a_state_is_seen(link: ConsoleLink, device: PlayedDevice) -> None:
    job = build_job()
    link.submit([job])
    first = device.heard.get(timeout=LIMIT_S)
    assert link.wait(lambda: not device.heard.empty(), LIMIT_S)
    assert device.heard.get() == first


def test_running_jobs_retained_state_does_not_answer_a_cancel(
    link: ConsoleLink, device: PlayedDevice
) -> None:
    job_id = build_job().job_id
    device.say_state(job_id, "running", 2)
    link.cancel(build_cancel(job_id))
    first = device.heard.get(timeout=LIMIT_S)
    assert link.wait(lambda: link.jobs[job_id].state is not None, LIMIT_S)
    assert link.wait(lambda: not device.heard.empty(), LIMIT_S)
    assert device.heard.get() == first

    device.say_state(job_id, "canceled", 3)
    assert link.wait(lambda: link.jobs[job_id].state is JobState.CANCELED, LIMIT_S)


def test_link_comes_back_with_its_broker_and_hears_retained_states(
    link: ConsoleLink, device: PlayedDevice, mosquitto: MqttProcess
) -> None:
    job = build_job()
    mosquitto.stop()
    link.submit([job])
    mosquitto.start()
    returned = PlayedDevice(mosquitto.port)
    try:
        returned.say_state(job.job_id, "rejected", 1)
        assert link.wait(lambda: link.jobs[job.job_id].is_complete, LIMIT_S)
    finally:
        returned.close()


def test_noise_on_its_topics_disturbs_nothing(link: ConsoleLink, device: PlayedDevice) -> None:
    job = build_job()
    link.submit([job])
    for payload in (
        b"",
        b"\xff\xfe",
        b"[]",
        b"1",
        b'{"body": null}',
        b'{"ts": "2026-11-22T10:00:00Z", "body": {"rev": 9, "state": "nonsense"}}',
        b'{"ts": 7, "body": {"rev": 9, "state": "failed"}}',
    ):
        device.say(TOPICS.state(job.job_id), payload)
    device.say_state(job.job_id, "queued", 1)
    assert link.wait(lambda: link.jobs[job.job_id].rev == 1, LIMIT_S)


def test_unreachable_broker_is_named() -> None:
    port = find_free_port()
    with pytest.raises(BrokerUnavailableError, match=f"127.0.0.1:{port}"):
        ConsoleLink(build_settings(port)).connect()
