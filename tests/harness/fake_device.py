"""A device played by a script, written from docs/protocol.md and from nothing else.

It numbers its records, keeps them until the console's cumulative acknowledgement, replays
from `acked_seq`, and answers each submit with a state. It runs no jobs: a test says how
they go.
"""

import json
import threading
from typing import Any

from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.commands import new_id
from agent.daemon.mqtt import set_no_delay

_AT = "2026-11-22T10:00:00.000Z"


class FakeDevice:
    """One device on a real broker."""

    def __init__(self, port: int, device: str = "box-7", ledger: str | None = None) -> None:
        self.device = device
        self.ledger = ledger or new_id()
        self.boot = 1
        self.conn = 0
        self.seq = 0
        self.acked = 0
        self.records: dict[int, tuple[str, str]] = {}
        self.jobs: dict[str, tuple[str, int]] = {}
        """State and rev of each job in the ledger."""
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.refuses_states = False
        """Take submits without a word, as a device does whose answers are lost."""
        self.runs_jobs = False
        """Let every new job succeed at once."""
        self._head = f"edgeward/v1/{device}/"
        self._lock = threading.RLock()
        self._port = port
        self._client: Client | None = None

    # --- connection ------------------------------------------------------------------------

    def connect(self) -> None:
        """Come online: status, info, sync, as after each connect."""
        up = threading.Event()
        client = Client(CallbackAPIVersion.VERSION2, client_id=self.device, protocol=MQTTv5)
        client.max_inflight_messages_set(0)
        client.on_socket_open = set_no_delay
        client.on_message = self._on_message
        client.on_subscribe = lambda *_: up.set()
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        client.connect("127.0.0.1", self._port, clean_start=False, properties=properties)
        client.subscribe([(f"{self._head}c2d/#", 1)])
        self._client = client
        self.conn += 1
        client.loop_start()
        assert up.wait(10), "the device could not connect"
        self._say("info", "info", {"ledger": self.ledger}, retain=True)
        self._say_status("online")
        self.sync()

    @property
    def is_online(self) -> bool:
        """Say whether it is connected."""
        return self._client is not None

    def leave(self) -> None:
        """Stop cleanly."""
        assert self._client is not None
        self._say_status("stopped")
        client, self._client = self._client, None
        client.disconnect()
        client.loop_stop()

    def lose_ledger(self) -> None:
        """Begin with a new ledger, as after its file was deleted. While offline."""
        self.ledger = new_id()
        self.boot, self.conn, self.seq, self.acked = 1, 0, 0, 0
        self.records.clear()
        self.jobs.clear()

    # --- what it says ----------------------------------------------------------------------

    def _say_status(self, state: str) -> None:
        body = {"state": state, "boot": self.boot, "conn": self.conn, "ledger": self.ledger}
        self._publish("d2c/status", json.dumps(body), retain=True)

    def _say(self, topic: str, kind: str, body: dict[str, Any], *, retain: bool = False) -> None:
        envelope = {"v": 1, "id": new_id(), "type": kind, "ts": _AT, "boot": self.boot}
        self._publish(f"d2c/{topic}", json.dumps({**envelope, "body": body}), retain=retain)

    def _publish(self, topic: str, payload: str, *, retain: bool = False) -> None:
        if self._client is not None:
            self._client.publish(self._head + topic, payload, qos=1, retain=retain)

    def record(self, topic: str, kind: str, body: dict[str, Any]) -> int:
        """Number a record, keep it, and send it if online."""
        with self._lock:
            self.seq += 1
            envelope = {"v": 1, "id": new_id(), "type": kind, "ts": _AT, "seq": self.seq}
            payload = json.dumps({**envelope, "boot": self.boot, "hist": False, "body": body})
            self.records[self.seq] = (f"d2c/{topic}", payload)
            self._publish(f"d2c/{topic}", payload)
            return self.seq

    def move(self, job_id: str, state: str) -> int:
        """Take a job to a state, and report it."""
        with self._lock:
            rev = self.jobs.get(job_id, ("", 0))[1] + 1
            self.jobs[job_id] = (state, rev)
            return self._report(job_id)

    def _report(self, job_id: str) -> int:
        state, rev = self.jobs[job_id]
        body = {"job_id": job_id, "state": state, "rev": rev, "attempt": 1, "reason": None}
        return self.record(f"job/{job_id}", "job.state", body)

    def succeed(self, job_id: str, output: object) -> None:
        """Let a job succeed, with its result."""
        self.move(job_id, "succeeded")
        self.give_result(job_id, output)

    def give_result(self, job_id: str, output: object) -> None:
        self.record(f"result/{job_id}", "job.result", {"job_id": job_id, "output": output})

    def drop(self, first: int, last: int) -> None:
        """Drop records for good and say so."""
        for seq in range(first, last + 1):
            self.records.pop(seq, None)
        body = {"class": "P2", "from_seq": first, "to_seq": last, "count": last - first + 1}
        self.record("event/gap", "event.gap", {**body, "reason": "outbox_full"})

    def sync(self) -> None:
        """Ask for a reconcile."""
        with self._lock:
            jobs = self.jobs.items()
            open_jobs = [[key, rev] for key, (state, rev) in jobs if self._is_open(state)]
            body = {"ledger": self.ledger, "seq": self.seq, "open": open_jobs[-200:]}
            depth = len(self.records)
            self._say("sync", "sync", {**body, "open_count": len(open_jobs), "outbox_depth": depth})

    # --- what it hears ---------------------------------------------------------------------

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        topic = message.topic.removeprefix(f"{self._head}c2d/")
        document = json.loads(message.payload)
        with self._lock:
            self.heard.append((topic, document))
            match topic.split("/"):
                case ["job", job_id]:
                    self._take_submit(job_id)
                case ["job", job_id, "cancel"]:
                    self._take_cancel(job_id)
                case ["ack"]:
                    self._take_ack(document["body"].get("ledger"), document["body"]["seq"])
                case ["sync"]:
                    self._take_sync(document["body"])
                case ["cmd", "rebirth"]:
                    self.sync()

    def _take_submit(self, job_id: str) -> None:
        if self.refuses_states:
            return
        if job_id in self.jobs:
            self._report(job_id)
        else:
            self.move(job_id, "queued")
            if self.runs_jobs:
                self.move(job_id, "running")
                self.succeed(job_id, job_id)

    def _take_cancel(self, job_id: str) -> None:
        if self._is_open(self.jobs.get(job_id, ("queued", 0))[0]):
            self.move(job_id, "canceled")
        else:
            self._report(job_id)

    def _take_ack(self, ledger: str | None, seq: int) -> None:
        if ledger in (None, self.ledger) and seq <= self.seq:
            self.acked = max(self.acked, seq)
            for number in [number for number in self.records if number <= seq]:
                del self.records[number]

    def _take_sync(self, body: dict[str, Any]) -> None:
        if "acked_seq" in body:
            self._take_ack(body.get("ledger"), body["acked_seq"])
            for seq in sorted(self.records):
                if seq > body["acked_seq"]:
                    self._publish(*self.records[seq])
        for envelope in body.get("missing", ()):
            self._take_submit(envelope["body"]["job_id"])
        for job_id in body.get("unknown", ()):
            if job_id in self.jobs:
                self._report(job_id)
        for job_id in body.get("cancel", ()):
            self._take_cancel(job_id)

    @staticmethod
    def _is_open(state: str) -> bool:
        return state in ("queued", "running")

    def find(self, topic: str) -> list[dict[str, Any]]:
        """Return what was heard on a c2d topic."""
        with self._lock:
            return [document for heard, document in self.heard if heard == topic]
