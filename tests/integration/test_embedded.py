import os
import queue
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import psutil
import pytest
import redis
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from console.children import Children
from console.embedded import (
    MAX_PACKET_BYTES,
    MAX_SOCKET_PATH_BYTES,
    MqttBrokerKind,
    find_free_port,
    is_mqtt_answering,
    prepare_mqtt_broker,
    prepare_queue_broker,
)
from console.errors import BrokerMissingError
from tests.conftest import require_binary, wait_until
from tests.harness.brokers import MqttProcess, QueueProcess

TIMEOUT_S = 15.0
PAYLOAD_LIMIT_BYTES = 256 * 1024


class Session:
    """One MQTT 5 connection whose messages are kept in a queue."""

    def __init__(self, port: int, client_id: str, *, persistent: bool = False) -> None:
        self.messages: queue.Queue[mqtt.MQTTMessage] = queue.Queue()
        self.connected: queue.Queue[bool] = queue.Queue()
        self.reasons: queue.Queue[str] = queue.Queue()
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        self.client.on_connect = lambda _c, _u, flags, _r, _p: self.connected.put(
            flags.session_present
        )
        self.client.on_message = lambda _c, _u, message: self.messages.put(message)
        self.client.on_disconnect = lambda _c, _u, _f, reason, _p: self.reasons.put(str(reason))
        self._port, self._persistent = port, persistent
        self.session_present = False

    def open(self) -> "Session":
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600 if self._persistent else 0
        self.client.connect(
            "127.0.0.1", self._port, 20, clean_start=not self._persistent, properties=properties
        )
        self.client.loop_start()
        self.session_present = self.connected.get(timeout=TIMEOUT_S)
        return self

    def subscribe(self, topic: str) -> "Session":
        done: queue.Queue[None] = queue.Queue()
        self.client.on_subscribe = lambda *_: done.put(None)
        self.client.subscribe(topic, qos=1)
        done.get(timeout=TIMEOUT_S)
        return self

    def publish(self, topic: str, payload: bytes, **options: Any) -> None:
        sent = self.client.publish(topic, payload, qos=1, **options)
        sent.wait_for_publish(TIMEOUT_S)
        assert sent.is_published(), f"{topic} was not acknowledged"

    def receive(self) -> mqtt.MQTTMessage:
        return self.messages.get(timeout=TIMEOUT_S)

    def close(self) -> None:
        """Disconnect as a clean stop does; an MQTT broker then drops the will."""
        self.client.disconnect()
        self.client.loop_stop()

    def vanish(self) -> None:
        """Lose the connection as a cut cable does."""
        self.client.loop_stop()
        connection = self.client.socket()
        assert connection is not None
        connection.close()


class Sessions:
    """Opens sessions to one broker and closes what is open at the end."""

    def __init__(self, broker: MqttProcess) -> None:
        self.broker = broker
        self._opened: list[Session] = []

    def prepare(self, client_id: str, *, persistent: bool = False) -> Session:
        session = Session(self.broker.port, client_id, persistent=persistent)
        self._opened.append(session)
        return session

    def open(self, client_id: str, *, persistent: bool = False) -> Session:
        return self.prepare(client_id, persistent=persistent).open()

    def close(self) -> None:
        for session in self._opened:
            session.close()


@pytest.fixture(params=list(MqttBrokerKind))
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MqttProcess]:
    if request.param is MqttBrokerKind.MOSQUITTO:
        require_binary("mosquitto")
    # A blank in the path, because a person's home folder may well have one.
    process = MqttProcess(tmp_path / "a folder", request.param)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def sessions(broker: MqttProcess) -> Iterator[Sessions]:
    opened = Sessions(broker)
    yield opened
    opened.close()


def test_offline_commands_arrive_in_order_after_the_reconnect(sessions: Sessions) -> None:
    device = sessions.open("device", persistent=True).subscribe("c2d/#")
    device.close()
    console = sessions.open("console")
    # More than mosquitto's default of 1,000, beyond which it drops silently.
    sent = [f"c2d/job/{number}" for number in range(1200)]
    pending = [console.client.publish(topic, b"{}", qos=1) for topic in sent]
    for message in pending:
        message.wait_for_publish(TIMEOUT_S)

    device = sessions.open("device", persistent=True)

    assert device.session_present
    assert [device.receive().topic for _ in sent] == sent


def test_a_retained_message_reaches_a_later_subscriber(sessions: Sessions) -> None:
    sessions.open("console").publish("c2d/desired", b"v2", retain=True)

    message = sessions.open("device").subscribe("c2d/#").receive()

    assert (message.payload, message.retain) == (b"v2", True)


def test_the_largest_payload_of_the_protocol_passes(sessions: Sessions) -> None:
    device = sessions.open("device").subscribe("c2d/#")

    sessions.open("console").publish("c2d/job/1", b"x" * PAYLOAD_LIMIT_BYTES)

    assert len(device.receive().payload) == PAYLOAD_LIMIT_BYTES


def test_a_packet_over_one_mebibyte_ends_the_connection_of_its_sender(
    sessions: Sessions,
) -> None:
    sender = sessions.prepare("sender")
    # Otherwise the refused message would be sent again on every reconnect.
    sender.client.reconnect_delay_set(60, 60)
    sender.open()

    sender.client.publish("c2d/job/1", b"x" * (MAX_PACKET_BYTES + 1), qos=1)

    assert sender.reasons.get(timeout=TIMEOUT_S) != "Success"
    assert is_mqtt_answering(sessions.broker.host, sessions.broker.port)


def prepare_will(sessions: Sessions, delay_s: int, client_id: str = "device") -> Session:
    device = sessions.prepare(client_id, persistent=True)
    properties = Properties(PacketTypes.WILLMESSAGE)
    properties.WillDelayInterval = delay_s
    device.client.will_set(
        f"d2c/{client_id}/status", b"offline", 1, retain=True, properties=properties
    )
    return device


def test_the_will_is_published_after_its_delay(sessions: Sessions) -> None:
    console = sessions.open("console").subscribe("d2c/+/status")

    prepare_will(sessions, delay_s=1).open().vanish()

    assert console.receive().payload == b"offline"


def test_a_reconnect_within_the_delay_cancels_the_will(sessions: Sessions) -> None:
    console = sessions.open("console").subscribe("d2c/+/status")
    prepare_will(sessions, delay_s=2, client_id="device").open().vanish()
    prepare_will(sessions, delay_s=2, client_id="device").open()

    # A second device goes for good: its will comes after the time of the first one's.
    prepare_will(sessions, delay_s=3, client_id="witness").open().vanish()

    assert console.receive().topic == "d2c/witness/status"


def test_properties_that_the_protocol_uses_are_forwarded(sessions: Sessions) -> None:
    device = sessions.open("device").subscribe("c2d/#")
    properties = Properties(PacketTypes.PUBLISH)
    properties.MessageExpiryInterval = 600
    properties.CorrelationData = b"01JZ"
    properties.ResponseTopic = "d2c/reply/1"
    properties.UserProperty = ("v", "1")

    sessions.open("console").publish("c2d/cmd/ping", b"{}", properties=properties)

    received: Any = device.receive().properties
    assert 0 < received.MessageExpiryInterval <= 600
    assert received.CorrelationData == b"01JZ"
    assert received.ResponseTopic == "d2c/reply/1"
    assert received.UserProperty == [("v", "1")]


def test_an_unacknowledged_command_comes_again_after_a_reconnect(sessions: Sessions) -> None:
    device = sessions.prepare("device", persistent=True)
    device.client.manual_ack_set(True)
    device.open().subscribe("c2d/#")
    sessions.open("console").publish("c2d/job/1", b"{}")
    device.receive()
    device.vanish()

    again = sessions.open("device", persistent=True)

    assert again.receive().topic == "c2d/job/1"


def test_the_brokers_listen_on_loopback_only(broker: MqttProcess) -> None:
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(broker.pid).net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]

    assert listening == ["127.0.0.1"]


def test_the_supervisor_runs_both_brokers_from_their_descriptions(tmp_path: Path) -> None:
    mqtt_broker = prepare_mqtt_broker(tmp_path, tmp_path)
    queue_server = prepare_queue_broker(tmp_path)

    with Children(tmp_path / "log") as children:
        children.add(queue_server.as_child())
        children.add(mqtt_broker.as_child())
        children.start()
        assert queue_server.is_ready()
        assert mqtt_broker.is_ready()

    assert not queue_server.is_ready()
    assert not mqtt_broker.is_ready()


def test_durable_mosquitto_keeps_all_but_its_last_turn_over_a_kill(tmp_path: Path) -> None:
    require_binary("mosquitto")
    mosquitto = MqttProcess(tmp_path, durable=True)
    mosquitto.start()
    before = Sessions(mosquitto)
    before.open("device", persistent=True).subscribe("c2d/#").close()
    console = before.open("console")
    console.publish("c2d/job/1", b"{}")
    console.publish("d2c/info", b"birth", retain=True)
    # mosquitto saves at the end of the turn that acknowledged, and this takes another turn.
    console.publish("last", b"")
    mosquitto.kill()
    mosquitto.start()

    after = Sessions(mosquitto)
    device = after.open("device", persistent=True)
    before.close()
    assert device.session_present
    assert device.receive().topic == "c2d/job/1"
    assert after.open("reader").subscribe("d2c/info").receive().payload == b"birth"
    after.close()
    mosquitto.stop()


def test_mosquitto_keeps_all_over_a_stop(mosquitto: MqttProcess) -> None:
    before = Sessions(mosquitto)
    before.open("device", persistent=True).subscribe("c2d/#").close()
    before.open("console").publish("c2d/job/1", b"{}")
    mosquitto.stop()
    before.close()
    mosquitto.start()

    after = Sessions(mosquitto)
    device = after.open("device", persistent=True)
    assert device.session_present
    assert device.receive().topic == "c2d/job/1"
    after.close()


def test_an_mqtt_broker_can_be_stopped_and_started_on_its_port(broker: MqttProcess) -> None:
    broker.stop()
    assert not is_mqtt_answering(broker.host, broker.port)

    broker.start()

    assert is_mqtt_answering(broker.host, broker.port)


def test_a_port_can_be_chosen(tmp_path: Path) -> None:
    port = find_free_port()

    assert prepare_mqtt_broker(tmp_path, tmp_path, port=port).port == port


def test_the_queue_broker_has_no_port_and_a_private_socket(queue_broker: QueueProcess) -> None:
    client = queue_broker.client()
    settings = client.config_get("*")
    client.close()

    assert settings["port"] == "0"
    assert (settings["appendonly"], settings["save"]) == ("no", "")
    assert settings["maxmemory"] == str(64 * 1024 * 1024)
    assert settings["maxmemory-policy"] == "noeviction"
    assert stat.S_IMODE(queue_broker.socket_path.stat().st_mode) == 0o700
    assert not psutil.Process(queue_broker.pid).net_connections("tcp")


def test_the_queue_broker_forgets_everything_when_it_is_killed(
    queue_broker: QueueProcess,
) -> None:
    client = queue_broker.client()
    client.set("job", "1")
    queue_broker.kill()
    queue_broker.start()

    assert client.get("job") is None
    client.close()


def test_a_long_path_moves_the_socket_to_a_private_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / ("long" * 30)
    prepared = prepare_queue_broker(run_dir)

    assert prepared.note is not None
    assert str(prepared.socket_path.parent) in prepared.note
    assert len(os.fsencode(prepared.socket_path)) <= MAX_SOCKET_PATH_BYTES
    assert stat.S_IMODE(prepared.socket_path.parent.stat().st_mode) == 0o700
    assert prepare_queue_broker(run_dir).socket_path == prepared.socket_path

    with Children(tmp_path / "log") as children:
        children.add(prepared.as_child())
        children.start()
        assert prepared.is_ready()
    prepared.socket_path.parent.rmdir()


def test_a_socket_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / ("long" * 30)
    folder = prepare_queue_broker(run_dir).socket_path.parent
    folder.chmod(0o755)

    with pytest.raises(PermissionError, match="not a private folder"):
        prepare_queue_broker(run_dir)
    folder.rmdir()


def test_a_broker_that_is_not_there_is_not_ready(tmp_path: Path) -> None:
    assert not prepare_queue_broker(tmp_path).is_ready()
    assert not prepare_mqtt_broker(tmp_path, tmp_path).is_ready()


def test_without_mosquitto_the_one_from_pip_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("console.embedded._SYSTEM_PATHS", ())

    assert prepare_mqtt_broker(tmp_path, tmp_path).kind is MqttBrokerKind.IOTCORE
    with pytest.raises(BrokerMissingError, match="mosquitto is not installed"):
        prepare_mqtt_broker(tmp_path, tmp_path, kind=MqttBrokerKind.MOSQUITTO)


def test_without_the_bundled_server_the_one_on_path_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("console.embedded._bundled_valkey", lambda: None)
    monkeypatch.setattr("console.embedded._SYSTEM_PATHS", ())
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\nexit 1\n")
    working = tmp_path / "redis-server"
    working.write_text("#!/bin/sh\nexit 0\n")
    for program in (broken, working):
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert prepare_queue_broker(tmp_path / "run").program == str(working)

    working.unlink()
    with pytest.raises(BrokerMissingError, match="no Valkey or Redis server runs here"):
        prepare_queue_broker(tmp_path / "run")


def test_the_embedded_broker_can_be_run_by_hand(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "console.embedded_mqtt", "--help"]
    shown = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    assert "--config" in shown.stdout


def test_a_queue_client_sees_a_new_run_after_a_restart(queue_broker: QueueProcess) -> None:
    client = queue_broker.client()
    before = client.info("server")["run_id"]
    queue_broker.stop()
    queue_broker.start()

    def run_id_changed() -> bool:
        try:
            return bool(client.info("server")["run_id"] != before)
        except redis.RedisError:
            return False

    wait_until(run_id_changed, TIMEOUT_S, "the client sees the new server")
    client.close()
