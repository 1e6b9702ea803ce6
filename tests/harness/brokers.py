"""Real brokers as subprocesses, with the settings that the product ships."""

import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import redis

from console.embedded import (
    MqttBroker,
    MqttBrokerKind,
    QueueBroker,
    prepare_mqtt_broker,
    prepare_queue_broker,
)
from tests.harness.waiting import wait_until

_START_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 10.0


class BrokerProcess:
    """A broker that a test can stop, kill and start again on the same address and store."""

    def __init__(self, argv: Sequence[str], is_ready: Callable[[], bool], log_path: Path) -> None:
        self.log_path = log_path
        self._argv = argv
        self._is_ready = is_ready
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the broker is not running"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it serves."""
        assert self._process is None, "the broker is running already"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            wait_until(self._has_started, _START_TIMEOUT_S, f"{self._argv[0]} serves")
        except AssertionError as exc:
            self.kill()
            raise AssertionError(f"{exc}\n{self.log_path.read_text(errors='replace')}") from exc

    def stop(self) -> None:
        """End it as an operator would; does nothing to one that has ended."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would; does nothing to one that has ended."""
        self._end(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        """Send any other signal, such as SIGSTOP."""
        assert self._process is not None, "the broker is not running"
        self._process.send_signal(number)

    def _has_started(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the broker ended while it was starting"
        return self._is_ready()

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(number)
        # A stopped process receives SIGTERM only once it runs again.
        process.send_signal(signal.SIGCONT)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class MqttProcess(BrokerProcess):
    """An MQTT broker on a loopback port of its own."""

    def __init__(
        self,
        folder: Path,
        kind: MqttBrokerKind = MqttBrokerKind.MOSQUITTO,
        *,
        durable: bool = False,
    ) -> None:
        self.broker: MqttBroker = prepare_mqtt_broker(folder, folder, kind=kind, durable=durable)
        self.host = self.broker.host
        self.port = self.broker.port
        super().__init__(self.broker.argv, self.broker.is_ready, folder / "mqtt.log")


class QueueProcess(BrokerProcess):
    """A Valkey or Redis server on a Unix socket."""

    def __init__(self, folder: Path) -> None:
        self.broker: QueueBroker = prepare_queue_broker(folder)
        self.socket_path = self.broker.socket_path
        self.url = self.broker.url
        super().__init__(self.broker.argv, self.broker.is_ready, folder / "queue.log")

    def client(self) -> redis.Redis:
        """Return a client; its owner closes it."""
        return redis.Redis(unix_socket_path=str(self.socket_path), socket_timeout=5)
