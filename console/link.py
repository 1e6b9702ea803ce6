"""A console's side of the MQTT protocol: submits jobs and follows what a device reports.

Owns one connection and what it has heard of the jobs it follows. paho's callbacks only
put messages into a queue; whoever owns the link takes them out with `poll`.

Invariants: a state counts only if its `rev` is higher than the one known (so duplicates,
replay and reordering need no special case); a job is sent again until a state of it has
been seen; the session is a clean one that subscribes at each connect, because a broker
may have lost it (the embedded one does).

Source: docs/protocol.md, "Jobs", rule 6; "Outbox and loss".
"""

import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.clock import SystemClock, parse_at
from agent.commands import new_id
from agent.config import MqttSettings, Settings
from agent.errors import BrokerUnavailableError
from agent.jobs import ENDS, JobState
from agent.topics import Topics
from console.submission import Command

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_RESEND_S = 3.0
_POLL_S = 0.2


@dataclass
class FollowedJob:
    """What the device has said of one job so far."""

    job_id: str
    state: JobState | None = None
    rev: int = 0
    reason: dict[str, Any] | None = None
    result: dict[str, Any] | None = None
    reported_ms: int | None = None
    """When its end was written on the device, by the device's clock."""
    received_ms: int | None = None
    """When its end came here."""

    @property
    def has_ended(self) -> bool:
        """Say whether its end was heard of."""
        return self.state is not None and self.state in ENDS

    @property
    def is_complete(self) -> bool:
        """Say whether it has ended, with its result where it succeeded."""
        return self.has_ended and (self.state is not JobState.SUCCEEDED or self.result is not None)


@dataclass(frozen=True)
class _Heard:
    """A message as it came."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class _Subscribed:
    """A connection is ready; what was sent before it may be lost."""


@dataclass(frozen=True)
class _Refused:
    """The broker refused the connection or the subscription."""

    why: str


@dataclass
class _Unseen:
    """A command that no state has answered yet."""

    topic: str
    payload: str
    until_end: bool = False
    """Whether only an end answers it: a running job's retained state answers no cancel."""
    sent_s: float = field(default_factory=time.monotonic)


class ConsoleLink:
    """One console's connection to one device. Thread-safe.

    Args:
        settings: the broker, and the device by its `device_id`.
        reconnect_s: time between two tries to connect again.
    """

    def __init__(self, settings: Settings, reconnect_s: float = 1.0) -> None:
        self._settings = settings.mqtt
        self._topics = Topics(settings.device_id)
        self._heard: SimpleQueue[_Heard | _Subscribed | _Refused] = SimpleQueue()
        self._lock = threading.RLock()
        self._unseen: dict[str, _Unseen] = {}
        self._jobs: dict[str, FollowedJob] = {}
        self._follows_all = False
        self.device_state: str | None = None
        """The device's retained status: `online`, `offline`, `stopped`, or None."""
        self._client = self._build_client(settings, reconnect_s)

    def __enter__(self) -> "ConsoleLink":
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _build_client(self, settings: Settings, reconnect_s: float) -> Client:
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=f"edgeward-console-{new_id()}",
            protocol=MQTTv5,
        )
        client.connect_timeout = _CONNECT_S
        # It only ever sleeps for the value, though it is declared as an int.
        client.reconnect_delay_set(reconnect_s, reconnect_s)  # type: ignore[arg-type]
        if settings.mqtt.username is not None:
            client.username_pw_set(settings.mqtt.username, settings.password())
        if settings.mqtt.tls:
            client.tls_set_context(_build_tls(settings.mqtt))
        client.on_socket_open = _set_no_delay
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        return client

    # --- paho's thread ---------------------------------------------------------------------

    def _on_connect(
        self,
        client: Client,
        _data: object,
        _flags: ConnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self._heard.put(_Refused(str(code)))
        else:
            client.subscribe(self._topics.reports, qos=1)

    def _on_disconnect(
        self,
        _client: Client,
        _data: object,
        _flags: DisconnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        log.debug("console link: %s", code)

    def _on_subscribe(
        self,
        _client: Client,
        _data: object,
        _mid: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        refused = next((code for code in codes if code.is_failure), None)
        self._heard.put(_Refused(str(refused)) if refused else _Subscribed())

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self._heard.put(_Heard(message.topic, bytes(message.payload)))

    # --- any thread ------------------------------------------------------------------------

    def connect(self) -> None:
        """Connect and subscribe; blocks up to 5 s for each. Reconnects by itself from then on.

        Raises:
            BrokerUnavailableError: the broker does not answer, or refuses us.
        """
        where = f"{self._settings.host}:{self._settings.port}"
        try:
            self._client.connect(
                self._settings.host, self._settings.port, keepalive=self._settings.keepalive_s
            )
        except (OSError, ValueError) as exc:
            msg = f"no MQTT broker at {where}: {exc}; is `edgeward up` running?"
            raise BrokerUnavailableError(msg) from exc
        self._client.loop_start()
        try:
            first = self._heard.get(timeout=_CONNECT_S)
        except Empty:
            first = _Refused(f"no answer within {_CONNECT_S:g} s")
        if isinstance(first, _Refused):
            self.close()
            msg = f"the MQTT broker at {where} refuses a console: {first.why}"
            raise BrokerUnavailableError(msg)

    def close(self) -> None:
        """Disconnect and end paho's thread."""
        self._client.disconnect()
        self._client.loop_stop()

    def submit(self, commands: Iterable[Command]) -> None:
        """Send jobs, and again until a state of each has been seen."""
        for command in commands:
            self._send(
                command.job_id, _Unseen(self._topics.submit(command.job_id), command.payload)
            )

    def cancel(self, command: Command) -> None:
        """Send a cancel, and again until the job's end has been seen."""
        topic = self._topics.cancel(command.job_id)
        self._send(command.job_id, _Unseen(topic, command.payload, until_end=True))

    def follow_all(self) -> None:
        """Follow every job that the device reports, not only those submitted here."""
        with self._lock:
            self._follows_all = True

    def _send(self, job_id: str, message: _Unseen) -> None:
        with self._lock:
            self._jobs.setdefault(job_id, FollowedJob(job_id))
            self._unseen[job_id] = message
        self._client.publish(message.topic, message.payload, qos=1)

    @property
    def jobs(self) -> dict[str, FollowedJob]:
        """The jobs that are followed, by id, as last heard."""
        with self._lock:
            return dict(self._jobs)

    def poll(self, timeout_s: float = _POLL_S) -> None:
        """Take in what has been heard, waiting up to `timeout_s` for something; send again."""
        try:
            self._take(self._heard.get(timeout=timeout_s))
            while True:
                self._take(self._heard.get_nowait())
        except Empty:
            pass
        self._resend()

    def wait(
        self, done: Callable[[], bool], timeout_s: float, polled: Callable[[], None] = lambda: None
    ) -> bool:
        """Poll until `done` or the time is over; say whether it is done.

        Args:
            done: what is waited for.
            timeout_s: how long at most.
            polled: called after every poll, such as to move a progress bar.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            self.poll(min(_POLL_S, left_s))
            polled()
        return True

    def _take(self, heard: "_Heard | _Subscribed | _Refused") -> None:
        if isinstance(heard, _Heard):
            kind = self._topics.report_kind(heard.topic)
            try:
                document = json.loads(heard.payload) if heard.payload and kind else None
            except ValueError:
                log.warning("console link: no JSON on %s", heard.topic)
                return
            if kind and isinstance(document, dict):
                self._apply(*kind, document)
        elif isinstance(heard, _Subscribed):
            self._resend(max_age_s=0.0)
        else:
            log.warning("console link: refused: %s", heard.why)

    def _apply(self, kind: str, rest: str, document: dict[str, Any]) -> None:
        with self._lock:
            if kind == "status":
                self.device_state = document.get("state")
                return
            job = self._jobs.get(rest)
            if job is None and kind in ("job", "result") and self._follows_all:
                job = self._jobs[rest] = FollowedJob(rest)
            if job is None:
                return
            if kind == "job":
                _apply_state(job, document)
                unseen = self._unseen.get(rest)
                if unseen and job.state and (job.has_ended or not unseen.until_end):
                    del self._unseen[rest]
            elif kind == "result":
                job.result = document.get("body")

    def _resend(self, max_age_s: float = _RESEND_S) -> None:
        """Send again what no state has answered for so long."""
        now = time.monotonic()
        with self._lock:
            due = [item for item in self._unseen.values() if now - item.sent_s >= max_age_s]
            for item in due:
                item.sent_s = now
        for item in due if self._client.is_connected() else ():
            self._client.publish(item.topic, item.payload, qos=1)


def _apply_state(job: FollowedJob, document: dict[str, Any]) -> None:
    """Take in a reported state; one that is not of the protocol's form is logged and ignored."""
    try:
        body = document["body"]
        rev, state = int(body["rev"]), JobState(body["state"])
        reported_ms = parse_at(document["ts"])
    except (KeyError, TypeError, ValueError) as exc:
        log.warning("console link: state of %s ignored: %r", job.job_id, exc)
        return
    if rev <= job.rev:
        return
    job.rev, job.state, job.reason = rev, state, body.get("reason")
    if state in ENDS:
        job.reported_ms, job.received_ms = reported_ms, SystemClock().wall_ms()


def _set_no_delay(_client: Client, _data: object, sock: Any) -> None:
    # Measured on loopback: a round trip was 88 ms without it, and 4 ms with it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _build_tls(limits: MqttSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=limits.ca_file and str(limits.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if limits.cert_file is not None:
        context.load_cert_chain(limits.cert_file, limits.key_file)
    return context
