"""A fleet of devices played by a script, each with an MQTT client of its own.

Written from docs/protocol.md and from nothing else. A device announces itself, takes a newer
desired document, goes through its steps one tick at a time, and reports each. How it behaves
for a release is the test's choice. 240 such clients connect within a second and cost next to
nothing while they wait.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.commands import new_id
from agent.daemon.mqtt import set_no_delay
from tests.harness.waiting import wait_until

_AT = "2026-11-22T10:00:00.000Z"
_TICK_S = 0.01
_CONNECT_LIMIT_S = 20.0

Body = dict[str, Any]


class Behaviour(StrEnum):
    """How a device takes a release."""

    GOOD = "good"
    FAILS_STAGING = "fails_staging"
    ROLLS_BACK = "rolls_back"
    SILENT = "silent"
    """Takes the document and never says a word about it."""
    SLOW = "slow"
    """Stays in probation until the test lets it go on."""
    PINNED = "pinned"
    ECHOING = "echoing"
    """Good, and says everything twice, and an old word again at the end."""


@dataclass(frozen=True)
class Hardware:
    """What a device says of its platform."""

    arch: str
    cpu_model: str
    memory_mb: int
    board: str | None = None
    accelerator: str | None = None

    def to_platform(self) -> Body:
        accelerators = [{"kind": "jetson", "name": self.accelerator, "usable": True}]
        return {
            "os": "linux",
            "arch": self.arch,
            "cpu_model": self.cpu_model,
            "memory_mb": self.memory_mb,
            "board": self.board,
            "accelerators": accelerators if self.accelerator else [],
        }


PI = Hardware("aarch64", "Cortex-A76", 8324, board="Raspberry Pi 5 Model B Rev 1.0")
NUC = Hardware("x86_64", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 16_542)
ORIN = Hardware("aarch64", "Cortex-A78AE", 7990, accelerator="NVIDIA Orin Nano")
CLASSES = {
    PI: "aarch64/raspberry-pi-5-model-b/8g",
    NUC: "x86_64/core-i5-8250u/16g",
    ORIN: "aarch64/orin-nano/8g",
}
"""The class that each is to be in, typed out."""


@dataclass
class SimDevice:
    """One device: what it has, what it was asked for, and its connection."""

    name: str
    hardware: Hardware = PI
    behaviour: Behaviour = Behaviour.GOOD
    model: str = "detector"
    active: str | None = "2.2.1"
    epoch: str | None = None
    version: int = 0
    heard: list[Body] = field(default_factory=list)
    """The body of every desired document that came, replays too."""
    said: list[tuple[str, str]] = field(default_factory=list)
    bad: set[str] = field(default_factory=set)
    """Releases that failed here."""
    may_finish: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._client: Client | None = None
        self._conn = 0
        self._plan: list[Callable[[], None]] = []
        self._previous: str | None = None
        self._is_trying = False
        self._lock = threading.RLock()
        self._head = f"edgeward/v1/{self.name}/"

    # --- connection ------------------------------------------------------------------------

    def connect(self, port: int, ready: Callable[[], None]) -> None:
        """Come online; `ready` is called once it has said who it is."""
        self._conn += 1
        client = Client(CallbackAPIVersion.VERSION2, client_id=self.name, protocol=MQTTv5)
        client.on_socket_open = set_no_delay
        client.on_message = self._on_message
        client.on_connect = self._on_connect
        client.on_subscribe = lambda *_: self._announce(ready)
        client.will_set(f"{self._head}d2c/status", self._status("offline"), 1, retain=True)
        self._client = client
        client.connect("127.0.0.1", port, clean_start=True)
        client.loop_start()

    def _on_connect(self, client: Client, *_: object) -> None:
        client.subscribe(f"{self._head}c2d/#", 1)

    def _announce(self, ready: Callable[[], None]) -> None:
        self._say("info", {"device": self.name, "platform": self.hardware.to_platform()})
        if self.epoch is None:
            self.report("in_sync")
        self._publish("status", self._status("online"))
        ready()

    def vanish(self) -> None:
        """Lose the connection, so that the broker says `offline` by the will."""
        assert self._client is not None
        client, self._client = self._client, None
        with_will = ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message")
        client.disconnect(reasoncode=with_will, properties=Properties(PacketTypes.DISCONNECT))
        client.loop_stop()

    @property
    def is_online(self) -> bool:
        return self._client is not None

    # --- what it hears and does ------------------------------------------------------------

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        if message.topic != f"{self._head}c2d/desired" or not message.payload:
            return
        body = json.loads(message.payload)["body"]
        with self._lock:
            self.heard.append(body)
            if body["epoch"] == self.epoch and body["version"] <= self.version:
                return
            self.epoch, self.version = body["epoch"], body["version"]
            if self.model in body["models"]:
                self._plan = self._make_plan(body["models"][self.model]["release"])

    def _make_plan(self, release: str | None) -> list[Callable[[], None]]:
        def candidate(state: str) -> Callable[[], None]:
            return lambda: self.report("applying", release=release, candidate=state)

        def finish() -> None:
            self._previous, self.active = self.active, release
            self.report("in_sync")

        behaviour = self.behaviour
        self._is_trying = False
        if release is None or release == self.active or release == self._previous:
            return [finish]
        if release in self.bad:
            return [lambda: self._fail("failed", "staging_failed", release)]
        self._is_trying = behaviour is Behaviour.SLOW
        begun = [candidate("fetching"), candidate("staging")]
        match behaviour:
            case Behaviour.SILENT:
                return []
            case Behaviour.PINNED:
                return [lambda: self.report("pinned_local")]
            case Behaviour.FAILS_STAGING:
                return [*begun, lambda: self._fail("failed", "staging_failed", release)]
            case Behaviour.ROLLS_BACK:
                end = lambda: self._fail("rolled_back", "error_rate", release)  # noqa: E731
                return [*begun, candidate("probation"), end]
            case Behaviour.ECHOING:
                return [*begun, *begun[::-1], candidate("probation"), finish, self._echo]
        return [*begun, candidate("probation"), finish]

    def _fail(self, status: str, code: str, release: str) -> None:
        self.bad.add(release)
        self.report(status, reason={"code": code, "message": f"{release} is not good here"})

    def _echo(self) -> None:
        """Say again what was said, newest first, and the last word last."""
        old = [payload for topic, payload in self.said if topic == "reported"]
        for payload in [*old[::-1], *old]:
            self._publish("reported", payload)

    def tick(self) -> None:
        """Do the next step, if there is one."""
        with self._lock:
            is_held = self._is_trying and len(self._plan) == 1 and not self.may_finish.is_set()
            if self._client is None or not self._plan or is_held:
                return
            self._plan.pop(0)()

    # --- what it says ----------------------------------------------------------------------

    def report(
        self,
        status: str,
        *,
        release: str | None = None,
        candidate: str | None = None,
        reason: Body | None = None,
    ) -> None:
        """Publish the reported state."""
        entry: Body = {
            "active": self.active and {"version": 3, "release": self.active},
            "previous": None,
            "candidate": candidate and {"version": 4, "release": release, "state": candidate},
            "status": status,
            "reason": reason,
            "bad": [],
        }
        entries = {self.model: entry} if self.active or candidate or status != "in_sync" else {}
        document = {"epoch": self.epoch, "desired_version": self.version, "status": status}
        self._say("reported", {**document, "models": entries})

    def _say(self, kind: str, body: Body) -> None:
        envelope = {"v": 1, "id": new_id(), "type": kind, "ts": _AT, "boot": 1, "body": body}
        payload = json.dumps(envelope)
        self.said.append((kind, payload))
        self._publish(kind, payload)

    def _status(self, state: str) -> str:
        return json.dumps({"state": state, "boot": 1, "conn": self._conn, "ledger": self.name})

    def _publish(self, kind: str, payload: str) -> None:
        if self._client is not None:
            self._client.publish(f"{self._head}d2c/{kind}", payload, qos=1, retain=True)

    def asked_for(self, release: str) -> set[tuple[str, int]]:
        """Return the documents that named a release, by epoch and version."""
        with self._lock:
            return {
                (body["epoch"], body["version"])
                for body in self.heard
                if body["models"].get(self.model, {}).get("release") == release
            }


class SimFleet:
    """Many devices on one broker, moved by one thread."""

    def __init__(self, port: int, devices: Iterable[SimDevice]) -> None:
        self.devices = {device.name: device for device in devices}
        self._port = port
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._move, name="fleet", daemon=True)

    def __enter__(self) -> "SimFleet":
        self.connect(self.devices.values())
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for device in self.devices.values():
            if device.is_online:
                device.vanish()

    def connect(self, devices: Iterable[SimDevice]) -> None:
        """Bring devices online and wait until all have said who they are."""
        ready = threading.Semaphore(0)
        wanted = list(devices)
        for device in wanted:
            device.connect(self._port, ready.release)
        deadline = time.monotonic() + _CONNECT_LIMIT_S
        for _ in wanted:
            left_s = deadline - time.monotonic()
            assert ready.acquire(timeout=max(0.0, left_s)), "not all devices could connect"

    def _move(self) -> None:
        while not self._ended.wait(_TICK_S):
            for device in self.devices.values():
                device.tick()

    def with_release(self, release: str) -> set[str]:
        """Return the devices on which a release is active."""
        return {name for name, device in self.devices.items() if device.active == release}

    def asked_for(self, release: str) -> set[str]:
        """Return the devices that were ever asked for a release."""
        return {name for name, device in self.devices.items() if device.asked_for(release)}

    def wait_asked(self, release: str, count: int, limit_s: float = 20.0) -> None:
        """Wait until so many devices were asked for a release."""
        wait_until(
            lambda: len(self.asked_for(release)) >= count, limit_s, f"{count} are asked {release}"
        )


def make_devices(
    count: int, hardware: Hardware, prefix: str, behaviour: Behaviour = Behaviour.GOOD
) -> list[SimDevice]:
    """Return devices of one kind, named by a prefix and a number."""
    return [SimDevice(f"{prefix}-{number:03}", hardware, behaviour) for number in range(count)]
