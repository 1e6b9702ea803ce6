"""The doctor's broker checks against real brokers, and against one that misbehaves on cue."""

import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from console.broker_checks import MqttTarget, check_mqtt, check_queue
from console.doctor import DoctorTargets, check_brokers, collect, run_checks
from platforms.preflight import Check, CheckStatus
from tests.conftest import free_port, require_binary, wait_until
from tests.harness.brokers import BrokerProcess, MqttProcess, QueueProcess

START_TIMEOUT_S = 15.0
MOSQUITTO_STAYS_ROOT = "user root"
"""Where it is started by root: its own user could not enter pytest's private folders."""


def accepts_tcp(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running_redis(folder: Path, *options: str) -> Iterator[Path]:
    """Run redis-server with the given options; yield its socket's path."""
    path = folder / "redis.sock"
    argv = [require_binary("redis-server"), "--port", "0", "--unixsocket", str(path)]
    argv += ["--dir", str(folder), *options]
    server = BrokerProcess(argv, path.exists, folder / "redis.log")
    server.start()
    try:
        yield path
    finally:
        server.stop()


@contextmanager
def running_mosquitto(folder: Path, *settings: str) -> Iterator[int]:
    """Run mosquitto with settings of its own; yield its port."""
    port = free_port()
    config = folder / "mosquitto.conf"
    config.write_text("\n".join((f"listener {port} 127.0.0.1", *settings, "")), encoding="utf-8")
    argv = [require_binary("mosquitto"), "-c", str(config)]
    broker = BrokerProcess(argv, lambda: accepts_tcp(port), folder / "mosquitto.log")
    broker.start()
    try:
        yield port
    finally:
        broker.stop()


class ScriptedBroker:
    """An MQTT broker that answers each connection as it is told, and knows nothing else."""

    def __init__(self, connacks: Sequence[bytes], suback_code: int = 1) -> None:
        self._connacks = connacks
        self._suback_code = suback_code
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> "ScriptedBroker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Closing does not wake a thread that waits in accept(); shutting down does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        for connack in self._connacks:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._answer(connection, connack)

    def _answer(self, connection: socket.socket, connack: bytes) -> None:
        while packet := connection.recv(4096):
            if packet[0] >> 4 == 1 and connack:
                connection.sendall(connack)
            elif packet[0] >> 4 == 8:
                connection.sendall(bytes([0x90, 4, *packet[2:4], 0, self._suback_code]))


def make_connack(*, present: bool = False, code: int = 0, properties: bytes = b"") -> bytes:
    """Return a CONNACK of MQTT 5, section 3.2."""
    body = bytes([present, code, len(properties)]) + properties
    return bytes([0x20, len(body)]) + body


def check_scripted(connacks: Sequence[bytes], suback_code: int = 1) -> Check:
    with ScriptedBroker(connacks, suback_code) as broker:
        return check_mqtt(MqttTarget("127.0.0.1", broker.port))


def test_queue_broker_with_the_shipped_settings_is_fine(queue_broker: QueueProcess) -> None:
    check = check_queue(queue_broker.url)
    assert check.status is CheckStatus.OK, check.summary
    assert "in memory only" in check.summary


@pytest.mark.parametrize("form", ["{}", "unix://{}", "redis+socket://{}"])
def test_every_form_of_a_sockets_address_is_understood(
    queue_broker: QueueProcess, form: str
) -> None:
    check = check_queue(form.format(queue_broker.socket_path))
    assert check.status is CheckStatus.OK, check.summary


def test_queue_broker_that_writes_to_disk_is_warned_of(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--appendonly", "yes", "--save", "60 1") as path:
        check = check_queue(f"unix://{path}")
    assert check.status is CheckStatus.WARN
    assert 'appendonly is "yes"' in check.summary
    assert 'save is "60 1"' in check.summary
    assert "appendonly no" in check.remedy


def test_queue_broker_that_evicts_is_warned_of(tmp_path: Path) -> None:
    options = ("--save", "", "--maxmemory-policy", "allkeys-lru")
    with running_redis(tmp_path, *options) as path:
        check = check_queue(f"unix://{path}")
    assert check.status is CheckStatus.WARN
    assert 'maxmemory-policy is "allkeys-lru"' in check.summary


def test_queue_broker_whose_settings_are_hidden_is_warned_of(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--save", "", "--rename-command", "CONFIG", "") as path:
        check = check_queue(f"unix://{path}")
    assert check.status is CheckStatus.WARN
    assert "settings cannot be read" in check.summary


def test_queue_broker_that_wants_a_password_fails_until_it_gets_it(tmp_path: Path) -> None:
    with running_redis(tmp_path, "--save", "", "--requirepass", "s3cret") as path:
        without = check_queue(f"unix://{path}")
        wrong = check_queue(f"unix://:wr0ng@{path}")
        right = check_queue(f"unix://:s3cret@{path}")
    assert without.status is CheckStatus.FAIL
    assert wrong.status is CheckStatus.FAIL
    assert "wr0ng" not in wrong.summary
    assert right.status is CheckStatus.OK, right.summary


def test_queue_check_leaves_no_key_behind(queue_broker: QueueProcess) -> None:
    check_queue(queue_broker.url)
    client: redis.Redis = queue_broker.client()
    assert client.dbsize() == 0
    client.close()


@pytest.mark.parametrize("url", ["unix:///nowhere/queue.sock", "redis://127.0.0.1:1", "http://x"])
def test_queue_broker_that_is_not_there_fails_with_a_remedy(url: str) -> None:
    check = check_queue(url)
    assert check.status is CheckStatus.FAIL
    assert check.remedy


def test_queue_broker_that_hangs_fails_and_does_not_hang_the_check(
    queue_broker: QueueProcess,
) -> None:
    queue_broker.send_signal(signal.SIGSTOP)
    check = check_queue(queue_broker.url)
    assert check.status is CheckStatus.FAIL
    assert "imeout" in check.summary


def test_mqtt_broker_that_keeps_sessions_is_fine(mosquitto: MqttProcess) -> None:
    check = check_mqtt(MqttTarget(mosquitto.host, mosquitto.port))
    assert check.status is CheckStatus.OK, check.summary
    assert "QoS up to 2" in check.summary


def test_embedded_mqtt_broker_keeps_sessions_too(tmp_path: Path) -> None:
    pytest.importorskip("iotcore")
    from console.embedded import MqttBrokerKind

    broker = MqttProcess(tmp_path, MqttBrokerKind.IOTCORE)
    broker.start()
    try:
        check = check_mqtt(MqttTarget(broker.host, broker.port))
    finally:
        broker.stop()
    assert check.status is CheckStatus.OK, check.summary


def test_probes_session_is_removed_from_the_broker(tmp_path: Path) -> None:
    settings = (
        "allow_anonymous true",
        "persistence true",
        f"persistence_location {tmp_path}/",
        MOSQUITTO_STAYS_ROOT,
    )
    with running_mosquitto(tmp_path, *settings) as port:
        assert check_mqtt(MqttTarget("127.0.0.1", port)).status is CheckStatus.OK
    # Mosquitto writes the sessions it still has when it ends.
    assert b"edgeward-doctor-" not in (tmp_path / "mosquitto.db").read_bytes()


def test_mqtt_broker_that_wants_a_password_fails_until_it_gets_it(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    tool = require_binary("mosquitto_passwd")
    subprocess.run([tool, "-b", "-c", str(passwords), "pi", "s3cret"], check=True)
    settings = ("allow_anonymous false", f"password_file {passwords}", MOSQUITTO_STAYS_ROOT)
    with running_mosquitto(tmp_path, *settings) as port:
        without = check_mqtt(MqttTarget("127.0.0.1", port))
        right = check_mqtt(MqttTarget("127.0.0.1", port, username="pi", password="s3cret"))
    assert without.status is CheckStatus.FAIL
    assert "Not authorized" in without.summary
    assert right.status is CheckStatus.OK, right.summary


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Return a self-signed certificate for 127.0.0.1 and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    argv = [require_binary("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    argv += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=127.0.0.1"]
    argv += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(argv, check=True, capture_output=True)
    return cert, key


# paho 2.2 drops a socket whose TLS handshake failed without closing it.
@pytest.mark.filterwarnings("ignore:.*ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning")
def test_certificate_of_the_mqtt_broker_is_verified(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    files = (f"certfile {cert}", f"keyfile {key}")
    settings = ("allow_anonymous true", *files, MOSQUITTO_STAYS_ROOT)
    with running_mosquitto(tmp_path, *settings) as port:
        unknown = check_mqtt(MqttTarget("127.0.0.1", port, tls=True))
        known = check_mqtt(MqttTarget("127.0.0.1", port, tls=True, ca_file=cert))
    assert unknown.status is CheckStatus.FAIL
    assert "CERTIFICATE_VERIFY_FAILED" in unknown.summary
    assert known.status is CheckStatus.OK, known.summary


def test_missing_file_of_a_certificate_fails_and_is_not_raised(mosquitto: MqttProcess) -> None:
    target = MqttTarget(mosquitto.host, mosquitto.port, tls=True, ca_file=Path("/nowhere.pem"))
    assert check_mqtt(target).status is CheckStatus.FAIL


def test_mqtt_broker_that_forgets_sessions_fails() -> None:
    check = check_scripted([make_connack(), make_connack(), make_connack()])
    assert check.status is CheckStatus.FAIL
    assert "forgets the session" in check.summary


def test_mqtt_broker_without_qos_1_fails() -> None:
    maximum_qos_0 = bytes([0x24, 0])
    first = make_connack(properties=maximum_qos_0)
    second = make_connack(present=True, properties=maximum_qos_0)
    check = check_scripted([first, second, first])
    assert check.status is CheckStatus.FAIL
    assert "QoS up to 0" in check.summary


def test_limits_of_the_mqtt_broker_are_told() -> None:
    receive_maximum_100 = bytes([0x21, 0, 100])
    first = make_connack(properties=receive_maximum_100)
    check = check_scripted([first, make_connack(present=True), make_connack()])
    assert check.status is CheckStatus.OK
    assert "100 messages in flight" in check.summary


def test_mqtt_broker_that_cuts_the_session_short_is_warned_of() -> None:
    expiry_10_s = bytes([0x11, 0, 0, 0, 10])
    first = make_connack(properties=expiry_10_s)
    check = check_scripted([first, make_connack(present=True), make_connack()])
    assert check.status is CheckStatus.WARN
    assert "10 s only" in check.summary


def test_mqtt_broker_that_refuses_the_devices_topics_is_warned_of() -> None:
    not_authorized = 0x87
    acks = [make_connack(), make_connack(present=True), make_connack()]
    check = check_scripted(acks, suback_code=not_authorized)
    assert check.status is CheckStatus.WARN
    assert "Not authorized" in check.summary


def test_mqtt_broker_that_refuses_the_second_connection_fails() -> None:
    server_busy = 0x89
    check = check_scripted([make_connack(), make_connack(code=server_busy), make_connack()])
    assert check.status is CheckStatus.FAIL
    assert "not the second: refused: Server busy" in check.summary


def test_mqtt_broker_that_never_answers_fails_and_does_not_hang() -> None:
    check = check_scripted([b""])
    assert check.status is CheckStatus.FAIL
    assert "no MQTT answer in time" in check.summary


def test_stopped_mqtt_broker_fails_and_does_not_hang(mosquitto: MqttProcess) -> None:
    target = MqttTarget(mosquitto.host, mosquitto.port)
    mosquitto.stop()
    wait_until(lambda: not accepts_tcp(target.port), START_TIMEOUT_S, "mosquitto is gone")
    check = check_mqtt(target)
    assert check.status is CheckStatus.FAIL
    assert "edgeward up" in check.remedy


def test_only_configured_brokers_are_checked(tmp_path: Path) -> None:
    assert check_brokers(DoctorTargets(tmp_path)) == ()


def test_healthy_box_with_both_brokers_gets_a_whole_report(
    tmp_path: Path, queue_broker: QueueProcess, mosquitto: MqttProcess
) -> None:
    pytest.importorskip("onnxruntime")
    target = MqttTarget(mosquitto.host, mosquitto.port)
    report = collect(DoctorTargets(tmp_path, queue_broker.url, target))
    assert [check.name for check in report.checks[-2:]] == ["queue-broker", "mqtt-broker"]
    failed = [check for check in report.checks if check.status is CheckStatus.FAIL]
    assert failed == []
    assert report.exit_code == 0
    assert any(found.name == "ort" for found in report.spec.runtimes)


def test_box_without_its_brokers_exits_with_1(tmp_path: Path) -> None:
    target = MqttTarget("127.0.0.1", free_port())
    targets = DoctorTargets(tmp_path, f"unix://{tmp_path}/queue.sock", target)
    statuses = {check.name: check.status for check in run_checks(targets)}
    assert statuses["queue-broker"] is CheckStatus.FAIL
    assert statuses["mqtt-broker"] is CheckStatus.FAIL
