"""One box of real processes: brokers, agent and worker, and a console that records."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from sqlalchemy import text

from agent.commands import new_id
from agent.repository import ModelRepository
from agent.store.database import open_reader
from agent.topics import Topics
from benchmarks.tiny_model import write_tiny_model
from console.up import AGENT_ENVIRONMENT
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.known_box import seed_platform
from tests.harness.waiting import wait_until

DEVICE = "box-1"
MODEL = "tiny"
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.25] * 64}


def make_body(**changes: Any) -> dict[str, Any]:
    """Return the body of a good job for the tiny model, changed as asked."""
    return {"handler": "infer", "model": MODEL, "input": {"tensors": [TENSOR]}, **changes}


def make_envelope(body: dict[str, Any], kind: str = "job.submit", **changes: Any) -> bytes:
    """Return an envelope around `body`."""
    return json.dumps({"v": 1, "id": new_id(), "type": kind, "body": body, **changes}).encode()


class RecordingConsole:
    """An MQTT console that keeps every message, in the order of arrival."""

    def __init__(self, port: int, device: str = DEVICE) -> None:
        self.topics = Topics(device)
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[str, list[dict[str, Any]]] = {}
        self.states: dict[str, list[dict[str, Any]]] = {}
        self._lock = threading.Lock()
        self._up = threading.Event()
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=f"console-{new_id()}", protocol=MQTTv5
        )
        self._client.max_inflight_messages_set(0)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_message = self._on_message
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", port, clean_start=False, properties=properties)
        self._client.loop_start()
        assert self._up.wait(10), "the console could not connect"

    def _on_connect(self, client: Client, *_: Any) -> None:
        client.subscribe([(self.topics.reports, 1)])
        self._up.set()

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        document = json.loads(message.payload)
        kind = self.topics.report_kind(message.topic)
        with self._lock:
            self.messages.append((message.topic, document))
            if kind is not None and kind[0] == "result":
                self.results.setdefault(kind[1], []).append(document["body"])
            if kind is not None and kind[0] == "job":
                self.states.setdefault(kind[1], []).append(document["body"])

    def publish(self, topic: str, payload: bytes, **properties: Any) -> None:
        """Publish with QoS 1 and wait for the broker's acknowledgement."""
        packed = Properties(PacketTypes.PUBLISH)
        for name, value in properties.items():
            setattr(packed, name, value)
        info = self._client.publish(topic, payload, qos=1, properties=packed)
        info.wait_for_publish(10)

    def submit(self, body: dict[str, Any] | None = None, job_id: str | None = None) -> str:
        """Submit a job and return its id."""
        job_id = job_id or new_id()
        self.publish(self.topics.submit(job_id), make_envelope(body or make_body()))
        return job_id

    def submit_many(self, count: int) -> list[str]:
        """Submit good jobs without waiting for each acknowledgement."""
        ids = [new_id() for _ in range(count)]
        for job_id in ids:
            self._client.publish(self.topics.submit(job_id), make_envelope(make_body()), qos=1)
        return ids

    def last_state(self, job_id: str) -> dict[str, Any] | None:
        """Return the state with the highest rev that was reported of a job."""
        with self._lock:
            states = self.states.get(job_id, [])
            return max(states, key=lambda state: state["rev"], default=None)

    def wait_end(self, job_id: str, timeout_s: float = 20) -> dict[str, Any]:
        """Wait until a job has ended and return its last state."""

        def has_ended() -> bool:
            state = self.last_state(job_id)
            return state is not None and state["state"] not in ("queued", "running")

        wait_until(has_ended, timeout_s, f"job {job_id} ends")
        state = self.last_state(job_id)
        assert state is not None
        return state

    def find(self, kind: str) -> list[dict[str, Any]]:
        """Return the documents received on a d2c topic, such as `status` or `event`."""
        with self._lock:
            messages = list(self.messages)
        return [
            document
            for topic, document in messages
            if (found := self.topics.report_kind(topic)) is not None and found[0] == kind
        ]

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


class Box:
    """Agent and worker as processes on given brokers, with the tiny model installed."""

    def __init__(
        self, folder: Path, mqtt: MqttProcess, queue: QueueProcess, **settings: str
    ) -> None:
        self.data_dir = folder / "data"
        seed_platform(self.data_dir)
        self.mqtt = mqtt
        self.queue = queue
        self._log = folder / "box.log"
        self._env = {
            "EDGEWARD_DATA_DIR": str(self.data_dir),
            "EDGEWARD_DEVICE_ID": DEVICE,
            "EDGEWARD_MQTT__PORT": str(mqtt.port),
            "EDGEWARD_MQTT__RECONNECT_MAX_S": "1",
            "EDGEWARD_QUEUE__URL": queue.url,
            "EDGEWARD_INBOX__SETTLE_S": "0.1",
            "EDGEWARD_INBOX__SCAN_S": "0.1",
            **settings,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.launcher: Sequence[str] = (str(Path(sys.executable).with_name("edgeward")),)
        """Starts `edgeward`; a test may put a command of its own there."""
        write_tiny_model(folder / "model")
        ModelRepository(self.data_dir / "models").add(folder / "model")

    @property
    def environment(self) -> dict[str, str]:
        """Its settings, as environment variables."""
        return dict(self._env)

    def start(self, name: str, **environment: str) -> None:
        """Start `agent` or `worker`."""
        commands: dict[str, Sequence[str]] = {
            "agent": ["agent"],
            "worker": ["worker", "--lane", "inference", "--lane", "batch"],
            "maintenance": ["worker", "--lane", "maintenance", "--slot", f"{DEVICE}/maintenance"],
        }
        if name == "agent":
            environment = {**AGENT_ENVIRONMENT, **environment}
        with self._log.open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*self.launcher, *commands[name]],
                env={**os.environ, **self._env, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill(self, name: str) -> None:
        """End a process as a power cut would."""
        self._end(name, signal.SIGKILL)

    def stop(self, name: str) -> None:
        """End a process as systemd would."""
        self._end(name, signal.SIGTERM)

    def _end(self, name: str, number: signal.Signals) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(20)

    def supervise(self) -> None:
        """Start again what has ended by itself, as systemd would."""
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                self.start(name)

    def close(self) -> None:
        """Stop everything."""
        for name in list(self.processes):
            self.stop(name)

    def read_log(self) -> str:
        """Return what agent and worker have logged."""
        return self._log.read_text(errors="replace")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Read the ledger, as anybody may."""
        engine = open_reader(self.data_dir / "ledger.db")
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(text(sql))]
        finally:
            engine.dispose()

    def is_ready(self) -> bool:
        """Say whether the agent serves."""
        return (self.data_dir / "run" / "status.json").exists()
