"""A console that behaves as docs/protocol.md asks, and then as badly as it allows.

Owns one MQTT connection, what it knows of its jobs, and the journal's lines about both. paho's
callbacks only put what they hear into a queue; one thread takes it out, writes it down, and
only then acts on it.

As the protocol asks: a job is sent again until a state of it is seen, a cancel until its end;
a state counts only if its `rev` is higher; records are acknowledged by the highest number
below which nothing is missing; a reconcile request is answered, and one's own holes are named.
As badly as it allows: submits come twice, with their keys in another order, in any order, with
another body, after their cancel, after their time; what is heard is read in another order than
it came.
"""

import heapq
import itertools
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from tests.fault.chaos.jobs import (
    ChaosJob,
    encode_envelope,
    encode_submit,
    make_job,
    make_probe,
    make_ulid,
)
from tests.fault.chaos.journal import Journal
from tests.fault.chaos.plan import Kind

_POLL_S = 0.02
_ACK_S = 0.1
_RETRY_FACTOR, _RETRY_MAX_S = 1.5, 8.0
_HOLE_S, _SYNC_S, _SYNC_MAX_S = 1.5, 2.0, 16.0
_MISSING_S, _MISSING_AT_ONCE = 5.0, 40
_CANCEL_FIRST_PATIENCE = 3
_CONNECT_LIMIT_S = 10.0


@dataclass(frozen=True)
class _Heard:
    topic: str
    text: str
    retain: bool


@dataclass(frozen=True)
class _Taken:
    mid: int


@dataclass(frozen=True)
class _Up:
    """A connection was made; what was heard before may have been lost at the broker."""


@dataclass
class Records:
    """Which numbered records of one ledger were received."""

    ledger: str | None = None
    upto: int = 0
    """Every record up to this one was received, or is known to be dropped."""
    above: set[int] = field(default_factory=set)
    hole_since: float | None = None
    acked: int = 0

    def add(self, first: int, last: int) -> None:
        """Take note of the records from `first` to `last`."""
        self.above.update(range(max(first, self.upto + 1), last + 1))
        before = self.upto
        while self.upto + 1 in self.above:
            self.upto += 1
            self.above.discard(self.upto)
        if not self.above:
            self.hole_since = None
        elif self.hole_since is None or self.upto != before:
            self.hole_since = time.monotonic()


class ChaosConsole(threading.Thread):
    """One console of one device.

    Args:
        port: the MQTT broker's, on loopback; not the proxy's.
        device: the device's id.
        journal: its log.
        seed: of its ids and its bad manners.
        resend: whether a command is sent again until it is answered.
        acks: whether records are acknowledged and reconcile requests answered.
    """

    def __init__(
        self,
        port: int,
        device: str,
        journal: Journal,
        seed: int = 0,
        *,
        resend: bool = True,
        acks: bool = True,
    ) -> None:
        super().__init__(name="chaos-console", daemon=True)
        self.jobs: dict[str, ChaosJob] = {}
        self.counts: Counter[str] = Counter()
        self.device_state: str | None = None
        self.device_boot = 0
        self.speaks_acks = False
        """Whether the device has named its ledger: then it keeps records until they are acked."""
        self.is_healing = False
        """Whether to ask again for the end of jobs that were accepted."""
        self._c2d, self._d2c = f"edgeward/v1/{device}/c2d/", f"edgeward/v1/{device}/d2c/"
        self._port = port
        self._journal = journal
        self._resend, self._acks = resend, acks
        # Submitting and serving are two threads: each has its own source of chance.
        self._rng, self._maker = random.Random(seed), random.Random(seed + 1)
        self._numbers = itertools.count(1)
        self._tags = itertools.count(1)
        self._tag_of: dict[int, int] = {}
        self._inbox: SimpleQueue[_Heard | _Taken | _Up | ChaosJob] = SimpleQueue()
        self._due: list[tuple[float, int, str]] = []
        self._order = itertools.count()
        self._records = Records()
        self._next_ack = self._next_sync = 0.0
        self._sync_s, self._synced_at = _SYNC_S, 0
        self._is_up = threading.Event()
        self._stopping = threading.Event()
        self._client = self._build_client()

    def _build_client(self) -> Client:
        name = f"chaos-console-{make_ulid(self._rng)}"
        client = Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTv5)
        client.max_inflight_messages_set(0)
        # It only ever sleeps for the value, though it is declared as an int.
        client.reconnect_delay_set(0.1, 0.5)  # type: ignore[arg-type]
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    # --- paho's thread -----------------------------------------------------------------------

    def _on_connect(
        self,
        client: Client,
        _data: object,
        _flags: ConnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if not code.is_failure:
            # What is retained comes with a new subscription, not with every connection.
            options = SubscribeOptions(
                qos=1, retainHandling=SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
            )
            client.subscribe(self._d2c + "#", options=options)
            self._is_up.set()
            self._inbox.put(_Up())

    def _on_disconnect(self, *_: object) -> None:
        self._is_up.clear()

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        text = message.payload.decode(errors="replace")
        self._inbox.put(_Heard(message.topic, text, bool(message.retain)))

    def _on_publish(self, _client: Client, _data: object, mid: int, *_: object) -> None:
        self._inbox.put(_Taken(mid))

    # --- any thread ----------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect, subscribe and begin to serve."""
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 3600
        self._client.connect(
            "127.0.0.1", self._port, keepalive=5, clean_start=False, properties=properties
        )
        self._client.loop_start()
        assert self._is_up.wait(_CONNECT_LIMIT_S), "the chaos console could not connect"
        self.start()

    def submit(self, kinds: Iterable[Kind]) -> list[ChaosJob]:
        """Submit new jobs in any order, without waiting."""
        jobs = [self.make(kind) for kind in kinds]
        self._maker.shuffle(jobs)
        self.add(jobs)
        return jobs

    def make(self, kind: Kind) -> ChaosJob:
        """Return a new job, to be changed and then given to `add`."""
        return make_job(self._maker, kind, next(self._numbers))

    def add(self, jobs: Iterable[ChaosJob]) -> None:
        """Submit jobs as they are."""
        for job in jobs:
            self._inbox.put(job)

    def probe(self) -> ChaosJob:
        """Submit a job that measures a recovery."""
        job = make_probe(self._maker, next(self._numbers))
        self._inbox.put(job)
        return job

    def list_open(self) -> list[ChaosJob]:
        """Return the jobs whose end, or result, was not heard yet."""
        return [job for job in list(self.jobs.values()) if not job.is_complete]

    def is_all_taken(self) -> bool:
        """Say whether the broker has acknowledged all that was sent."""
        return self._inbox.empty() and not self._tag_of

    def close(self) -> None:
        """Serve what has come so far, then disconnect."""
        self._stopping.set()
        if self.is_alive():
            self.join(_CONNECT_LIMIT_S)
        self._client.disconnect()
        self._client.loop_stop()

    # --- the console's thread -------------------------------------------------------------------

    def run(self) -> None:
        """Serve until closed."""
        while not self._stopping.is_set() or not self._inbox.empty():
            self._take_in(self._collect())
            self._do_due()
            self._acknowledge()

    def _collect(self) -> list[_Heard | _Taken | _Up | ChaosJob]:
        """Wait a moment for something, and take all there is."""
        items: list[_Heard | _Taken | _Up | ChaosJob] = []
        try:
            items.append(self._inbox.get(timeout=_POLL_S))
            while True:
                items.append(self._inbox.get_nowait())
        except Empty:
            return items

    def _take_in(self, items: list[_Heard | _Taken | _Up | ChaosJob]) -> None:
        heard: list[_Heard] = []
        for item in items:
            match item:
                case ChaosJob():
                    self.jobs[item.job_id] = item
                    self._schedule(item, 0.0)
                case _Taken():
                    self._journal.write("puback", tag=self._tag_of.pop(item.mid, 0))
                case _Up():
                    self._journal.note("console connected")
                    self._next_sync = time.monotonic() + _SYNC_S / 4
                case _Heard():
                    self._journal.write(
                        "heard", topic=item.topic, text=item.text, retain=item.retain
                    )
                    heard.append(item)
        # Written down as it came; read in any order, because `rev` and `seq` must suffice.
        self._rng.shuffle(heard)
        for item in heard:
            self._read(item)

    def _read(self, heard: _Heard) -> None:
        document = json.loads(heard.text)
        kind, _, rest = heard.topic.removeprefix(self._d2c).partition("/")
        if kind == "status":
            self.device_state, self.device_boot = document["state"], document.get("boot", 0)
            self._meet_ledger(document.get("ledger"))
            return
        body = document["body"]
        if "seq" in document:
            self.counts["heard"] += 1
            self._records.add(document["seq"], document["seq"])
        if kind == "job" and rest in self.jobs:
            self._apply(self.jobs[rest], body)
        elif kind == "result" and rest in self.jobs:
            self.jobs[rest].has_result = True
        elif kind == "event":
            self.counts[f"event {rest}"] += 1
            if rest == "gap":
                self._records.add(body["from_seq"], body["to_seq"])
        elif kind == "sync":
            self._meet_ledger(body.get("ledger"))
            self._answer_sync({job_id for job_id, _ in body["open"]})

    def _meet_ledger(self, ledger: str | None) -> None:
        """Take note of the ledger that the device reports from; another one starts anew."""
        if ledger is None or ledger == self._records.ledger:
            return
        self.speaks_acks = True
        if self._records.ledger is None:
            self._records.ledger = ledger
            return
        self._journal.note("another ledger", ledger=ledger)
        self._records = Records(ledger)
        for job in self.jobs.values():
            if not job.has_ended:
                job.state, job.rev = None, 0
                self._schedule(job, 0.0)

    def _apply(self, job: ChaosJob, body: dict[str, Any]) -> None:
        if body["rev"] <= job.rev:
            return
        is_first = job.state is None
        job.rev, job.state = body["rev"], body["state"]
        if job.has_ended and job.ended_at is None:
            job.ended_at = time.monotonic()
            self.counts["ended"] += 1
        if is_first and not job.has_ended:
            self._after_acceptance(job)
        elif (is_first and job.kind is Kind.CANCEL_FIRST) or (
            is_first and job.other_body is not None
        ):
            self._schedule(job, 0.0)

    def _after_acceptance(self, job: ChaosJob) -> None:
        if job.cancel_delay_s is not None:
            self._schedule(job, job.cancel_delay_s)
        elif job.other_body is not None or self.is_healing:
            self._schedule(job, 0.0)

    # --- sending ---------------------------------------------------------------------------------

    def _schedule(self, job: ChaosJob, delay_s: float) -> None:
        heapq.heappush(self._due, (time.monotonic() + delay_s, next(self._order), job.job_id))

    def _do_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            self._do(self.jobs[heapq.heappop(self._due)[2]])

    def _do(self, job: ChaosJob) -> None:
        """Do the next thing that a job needs, and come back later where it needs more."""
        again = self._do_next(job)
        if again and self._resend:
            self._schedule(job, job.retry_s * self._rng.uniform(0.8, 1.2))
            job.retry_s = min(job.retry_s * _RETRY_FACTOR, _RETRY_MAX_S)

    def _do_next(self, job: ChaosJob) -> bool:
        """Send what is due for a job; say whether it must be looked at again."""
        if job.kind is Kind.CANCEL_FIRST and not job.sent:
            return self._do_cancel_first(job)
        if job.state is None:
            self._send_submit(job)
            return True
        if job.other_body is not None and job.others_sent < job.copies:
            job.others_sent += 1
            self._send_body(job, job.other_body)
        if job.has_ended:
            return False
        if job.cancel_delay_s is not None:
            self._send_cancel(job)
            return True
        if self.is_healing and not self.speaks_acks:
            self._send_submit(job)
        return True

    def _do_cancel_first(self, job: ChaosJob) -> bool:
        """Cancel; submit once the device has answered that, or soon after without waiting."""
        is_patient = job.copies > 1 or self._rng.random() < 0.5
        if job.state is None:
            self._send_cancel(job)
            if is_patient and job.cancels_sent <= _CANCEL_FIRST_PATIENCE:
                return True
        self._send_submit(job)
        return True

    def _send_submit(self, job: ChaosJob) -> None:
        for _ in range(job.copies if not job.sent else 1):
            job.sent += 1
            self._send_body(job, job.body)
        job.first_sent_at = job.first_sent_at or time.monotonic()

    def _send_body(self, job: ChaosJob, body: dict[str, Any]) -> None:
        expiry_s: int | None = None
        if job.not_after is not None:
            left_s = job.not_after - time.time()
            # Past its time it is sent without an expiry, so that the device can say so.
            expiry_s = math.ceil(left_s) if left_s > 0 else None
        text = encode_submit(self._rng, job, body)
        self._publish(f"job/{job.job_id}", text, expiry_s)

    def _send_cancel(self, job: ChaosJob) -> None:
        job.cancels_sent += 1
        self._publish(f"job/{job.job_id}/cancel", encode_envelope(self._rng, "job.cancel", {}))

    def _publish(self, topic: str, text: str, expiry_s: int | None = None) -> None:
        tag = next(self._tags)
        self._journal.write("send", tag=tag, topic=self._c2d + topic, text=text, expiry=expiry_s)
        properties = Properties(PacketTypes.PUBLISH)
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        info = self._client.publish(self._c2d + topic, text, qos=1, properties=properties)
        self._tag_of[info.mid] = tag
        self.counts["sent"] += 1

    # --- acknowledging and reconciling ---------------------------------------------------------

    def _acknowledge(self) -> None:
        now = time.monotonic()
        if not (self._acks and self.speaks_acks and self._is_up.is_set()):
            return
        records = self._records
        if now >= self._next_ack and records.upto > records.acked:
            self._next_ack = now + _ACK_S
            records.acked = records.upto
            body = {"seq": records.upto, "ledger": records.ledger}
            self._publish("ack", encode_envelope(self._rng, "ack", body), 3600)
        has_hole = records.hole_since is not None and now - records.hole_since > _HOLE_S
        # After a connection, or with a hole: what was sent to nobody is to come again.
        if self._next_sync and now >= self._next_sync:
            self._next_sync = 0.0
            self._answer_sync(None)
            # A slow device that is asked again at once would begin again at once.
            is_stuck = records.upto == self._synced_at
            self._sync_s = min(self._sync_s * 2, _SYNC_MAX_S) if is_stuck else _SYNC_S
            self._synced_at = records.upto
        elif has_hole and not self._next_sync:
            self._next_sync = now + self._sync_s

    def _answer_sync(self, device_open: set[str] | None) -> None:
        """Say what was received up to where, what the device should have, what is unknown here."""
        if not self._acks:
            return
        now = time.monotonic()
        body: dict[str, Any] = {"acked_seq": self._records.upto}
        if self._records.ledger is not None:
            body["ledger"] = self._records.ledger
        if device_open is not None:
            unknown = sorted(device_open - self.jobs.keys())
            missing = [
                {"v": 1, "id": make_ulid(self._rng), "type": "job.submit", "body": job.body}
                for job in self.jobs.values()
                if self._is_missing(job, now)
            ]
            body |= {"unknown": unknown, "missing": missing[:_MISSING_AT_ONCE]}
        self._publish("sync", encode_envelope(self._rng, "sync", body), 60)

    def _is_missing(self, job: ChaosJob, now: float) -> bool:
        if job.not_after is not None or job.kind is Kind.CANCEL_FIRST:
            return False
        if job.state == "succeeded":
            return not job.has_result and now - (job.ended_at or now) > _MISSING_S
        is_old = job.first_sent_at is not None and now - job.first_sent_at > _MISSING_S
        return self._resend and job.state is None and is_old
