"""Checks of the two brokers: reachable, and keeping exactly what they should keep.

The queue broker should keep nothing on disk, since the ledger refills it; the MQTT
broker must keep the session of a device that is away. Each check blocks for at most
`CHECK_LIMIT_S` and answers with a `Check`, never with an exception. The probe's MQTT
session has a client id of its own and is removed at the end.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, cast
from uuid import uuid4

import paho.mqtt.client as mqtt
import redis
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from redis.backoff import NoBackoff
from redis.retry import Retry

from agent.topics import Topics
from platforms.preflight import Check, CheckStatus

CHECK_LIMIT_S = 3.0
_WORK_LIMIT_S = 2.4
"""Leaves the rest of `CHECK_LIMIT_S` for removing the probe's session."""
_CLEANUP_LIMIT_S = 0.5
_SESSION_EXPIRY_S = 60
_KEEPALIVE_S = 5
"""Also the limit that paho sets to a TLS handshake."""
_QUEUE = "queue-broker"
_MQTT = "mqtt-broker"

_WANTED_QUEUE_SETTINGS = {"appendonly": "no", "save": "", "maxmemory-policy": "noeviction"}
_QUEUE_REMEDY = (
    'set appendonly no, save "" and maxmemory-policy noeviction: the ledger refills the queue,'
    " and a queue on disk wears the card and may refuse to start after a power cut"
)


@dataclass(frozen=True)
class MqttTarget:
    """Where the MQTT broker is, and as whom to connect."""

    host: str
    port: int = 1883
    tls: bool = False
    username: str | None = None
    password: str | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    device_id: str = "doctor"
    """The device below whose topics the probe subscribes; access lists go by it."""


@dataclass(frozen=True)
class _Answer:
    """What the broker said to one connection."""

    error: str = ""
    session_present: bool = False
    max_qos: int = 2
    receive_maximum: int = 65_535
    session_expiry_s: int = _SESSION_EXPIRY_S
    subscription_error: str = ""


def check_queue(url: str) -> Check:
    """Check that the queue broker answers and keeps its data in memory only.

    `url` is redis-py's (`redis://`, `rediss://`, `unix://`), kombu's `redis+socket://`, or
    the path of a Unix socket.
    """
    return _run_bounded(_QUEUE, lambda: _check_queue(url))


def check_mqtt(target: MqttTarget) -> Check:
    """Check that the MQTT broker speaks MQTT 5 and keeps a session while its client is away.

    Connects three times, subscribes to one topic of the device and publishes nothing.
    """
    return _run_bounded(_MQTT, lambda: _check_mqtt(target))


def _run_bounded(name: str, work: Callable[[], Check]) -> Check:
    """Give up on a check that hangs, in name resolution for one, which nothing can interrupt."""
    results: Queue[Check] = Queue(maxsize=1)
    Thread(target=lambda: results.put(work()), name=f"doctor-{name}", daemon=True).start()
    try:
        return results.get(timeout=CHECK_LIMIT_S)
    except Empty:
        summary = f"no answer within {CHECK_LIMIT_S:g} s"
        return Check(name, CheckStatus.FAIL, summary, "check the address, the network and the log")


def _check_queue(url: str) -> Check:
    try:
        client = redis.Redis.from_url(
            _normalise_queue_url(url),
            socket_timeout=_WORK_LIMIT_S / 4,
            socket_connect_timeout=_WORK_LIMIT_S / 4,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
        )
    except ValueError as exc:
        return Check(_QUEUE, CheckStatus.FAIL, str(exc), "correct queue.url in the settings")
    with contextlib.closing(client):
        try:
            client.ping()
        except redis.RedisError as exc:
            remedy = (
                "start it, or let `edgeward up` start its own; check queue.url and its password"
            )
            return Check(_QUEUE, CheckStatus.FAIL, f"{_hide_password(url)}: {exc}", remedy)
        return _judge_queue(client, _hide_password(url))


def _judge_queue(client: redis.Redis, where: str) -> Check:
    try:
        settings = {name: _read_setting(client, name) for name in _WANTED_QUEUE_SETTINGS}
    except redis.RedisError as exc:
        summary = f"{where} answers; its settings cannot be read: {exc}"
        return Check(_QUEUE, CheckStatus.WARN, summary, _QUEUE_REMEDY)
    wrong = [
        f'{name} is "{value}"'
        for name, value in settings.items()
        if value != _WANTED_QUEUE_SETTINGS[name]
    ]
    if wrong:
        summary = f"{where} answers; {', '.join(wrong)}"
        return Check(_QUEUE, CheckStatus.WARN, summary, _QUEUE_REMEDY)
    return Check(_QUEUE, CheckStatus.OK, f"{where} answers; in memory only, never evicts")


def _read_setting(client: redis.Redis, name: str) -> str:
    # redis-py types its commands for the synchronous and the asynchronous client at once.
    answer = cast("dict[str, Any]", client.config_get(name))
    return str(answer.get(name, ""))


def _normalise_queue_url(url: str) -> str:
    if url.startswith("/"):
        return f"unix://{url}"
    return url.replace("redis+socket://", "unix://", 1)


def _hide_password(url: str) -> str:
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _check_mqtt(target: MqttTarget) -> Check:
    deadline = time.monotonic() + _WORK_LIMIT_S
    client_id = f"edgeward-doctor-{uuid4().hex[:12]}"
    topic = Topics(target.device_id).command(client_id)
    where = f"{target.host}:{target.port}"
    try:
        first = _visit(target, client_id, deadline, topic)
    except (OSError, ValueError) as exc:
        first = _Answer(error=str(exc) or type(exc).__name__)
    if first.error:
        remedy = "start it, or let `edgeward up` start its own; check mqtt.* in the settings"
        return Check(_MQTT, CheckStatus.FAIL, f"{where}: {first.error}", remedy)
    try:
        second = _visit(target, client_id, deadline)
    except OSError as exc:
        second = _Answer(error=str(exc) or type(exc).__name__)
    finally:
        _remove_session(target, client_id)
    return _judge_mqtt(where, first, second)


def _judge_mqtt(where: str, first: _Answer, second: _Answer) -> Check:
    limits = f"QoS up to {first.max_qos}, {first.receive_maximum} messages in flight"
    if second.error:
        summary = f"{where} took a first connection and not the second: {second.error}"
        return Check(_MQTT, CheckStatus.FAIL, summary, "see the broker's log")
    if not second.session_present:
        summary = f"{where} forgets the session of a client that is away ({limits})"
        remedy = "allow persistent sessions: commands sent while the box is away are lost"
        return Check(_MQTT, CheckStatus.FAIL, summary, remedy)
    if first.max_qos < 1:
        remedy = "allow QoS 1 on the broker: commands and reports need it"
        return Check(_MQTT, CheckStatus.FAIL, f"{where}: {limits}", remedy)
    if first.subscription_error:
        summary = f"{where} refuses the device's commands: {first.subscription_error}"
        remedy = "let the device read its own c2d topics (see the access list in the protocol)"
        return Check(_MQTT, CheckStatus.WARN, summary, remedy)
    if first.session_expiry_s < _SESSION_EXPIRY_S:
        summary = f"{where} keeps sessions for {first.session_expiry_s} s only ({limits})"
        remedy = "raise the broker's limit of the session expiry to a week"
        return Check(_MQTT, CheckStatus.WARN, summary, remedy)
    return Check(_MQTT, CheckStatus.OK, f"{where} speaks MQTT 5 and keeps sessions; {limits}")


def _visit(
    target: MqttTarget, client_id: str, deadline: float, topic: str | None = None
) -> _Answer:
    """Connect to a session that is to be kept, subscribe to `topic` if any, and leave."""
    connection = _Connection(target, client_id, deadline)
    answer = connection.open(clean_start=False, session_expiry_s=_SESSION_EXPIRY_S)
    if topic is not None and not answer.error:
        answer = replace(answer, subscription_error=connection.subscribe(topic))
    connection.close()
    return answer


def _remove_session(target: MqttTarget, client_id: str) -> None:
    """Connect with a clean start and no expiry, which removes the session from the broker."""
    connection = _Connection(target, client_id, time.monotonic() + _CLEANUP_LIMIT_S)
    # A broker that is gone by now forgets the session by itself, after its expiry.
    with contextlib.suppress(OSError):
        connection.open(clean_start=True, session_expiry_s=0)
        connection.close()


class _Connection:
    """One short connection, driven in the calling thread up to a deadline."""

    def __init__(self, target: MqttTarget, client_id: str, deadline: float) -> None:
        self._target = target
        self._deadline = deadline
        self._answers: list[_Answer] = []
        self._subscriptions: list[str] = []
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5
        )
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe

    def open(self, *, clean_start: bool, session_expiry_s: int) -> _Answer:
        """Return what the broker said.

        Raises:
            OSError: no connection; an `ssl.SSLError` is one too.
            ValueError: host, port or a certificate's file is unusable.
        """
        self._prepare()
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session_expiry_s
        self._client.connect(
            self._target.host,
            self._target.port,
            keepalive=_KEEPALIVE_S,
            clean_start=clean_start,
            properties=properties,
        )
        trouble = self._drive(self._answers)
        return self._answers[0] if self._answers else _Answer(error=trouble)

    def subscribe(self, topic: str) -> str:
        """Return why the subscription was refused, or an empty text."""
        self._client.subscribe(topic, qos=1)
        trouble = self._drive(self._subscriptions)
        return self._subscriptions[0] if self._subscriptions else trouble

    def close(self) -> None:
        """Send DISCONNECT."""
        self._client.disconnect()

    def _prepare(self) -> None:
        target = self._target
        if target.username is not None:
            self._client.username_pw_set(target.username, target.password)
        if target.tls:
            self._client.tls_set(
                ca_certs=str(target.ca_file) if target.ca_file else None,
                certfile=str(target.cert_file) if target.cert_file else None,
                keyfile=str(target.key_file) if target.key_file else None,
            )
        self._client.connect_timeout = max(0.1, self._deadline - time.monotonic())

    def _drive(self, awaited: Sequence[object]) -> str:
        """Run the network loop until something awaited is there; return what went wrong."""
        while not awaited:
            if time.monotonic() > self._deadline:
                return "no MQTT answer in time"
            code = self._client.loop(timeout=0.05)
            if not awaited and code != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return f"the broker closed the connection ({mqtt.error_string(code)})"
        return ""

    def _on_connect(
        self,
        _client: mqtt.Client,
        _data: object,
        flags: mqtt.ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        def read(name: str, default: int) -> int:
            return int(getattr(properties, name, default))

        self._answers.append(
            _Answer(
                error=f"refused: {code}" if code.is_failure else "",
                session_present=flags.session_present,
                max_qos=read("MaximumQoS", 2),
                receive_maximum=read("ReceiveMaximum", 65_535),
                session_expiry_s=read("SessionExpiryInterval", _SESSION_EXPIRY_S),
            )
        )

    def _on_subscribe(
        self,
        _client: mqtt.Client,
        _data: object,
        _id: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        self._subscriptions.extend(str(code) if code.is_failure else "" for code in codes)
