"""The MQTT 5 session of one device: connect, keep, hand over, publish.

Owns the connection and nothing else: every callback puts a message into the
mailbox and returns (an exception in a paho callback would kill its network
thread while `is_connected()` still says True). Each connection is a new paho
client under the same client id and broker session, so an acknowledgement can
never go to the wrong connection, and what was in flight is replayed from the
outbox instead of from paho's memory.

Source: docs/protocol.md, "Connection"; design notes "pitfalls", paho-mqtt.
"""

import logging
import random
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.config import Settings
from agent.daemon.messages import Acknowledged, Connected, Disconnected, Message, Received
from agent.errors import ConfigError
from agent.topics import Topics

log = logging.getLogger(__name__)

MAX_PACKET_BYTES = 1 << 20
_SESSION_TAKEN_OVER = 0x8E
_TAKEOVER_WAIT_S = 60.0
_TAKEOVER_LIMIT = 3
_CONNECT_TIMEOUT_S = 10.0
# paho asks after one keep-alive of silence and gives up after another: with nine tenths of it, a
# half-open connection is found, and a new one there, within two.
_KEEPALIVE_SHARE = 0.9
_KEEPALIVE_MIN_S = 5
# More waiting messages than the widest receive maximum that is usual.
_FLOOD = 1000


class PackedProperties:
    """PUBLISH properties built as bytes.

    paho's own class looks every name up by reflection: 60 µs a message, more
    than the rest of a publish. Of the object, `Client.publish` uses `pack` only
    (paho 2.2). Layout: MQTT 5.0, 2.2.2 and 3.3.2.3.
    """

    __slots__ = ("_packed",)

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def pack(self) -> bytes:
        """Return the property length and the properties."""
        return self._packed


def pack_properties(
    *, correlation: bytes | None = None, expiry_s: int | None = None, message_type: str = ""
) -> PackedProperties:
    """Return the properties of a publish; they are hints, never needed for correctness."""
    parts = []
    if expiry_s is not None:
        parts.append(struct.pack("!BI", 0x02, expiry_s))
    if correlation is not None:
        parts.append(struct.pack("!BH", 0x09, len(correlation)) + correlation)
    parts.append(_pack_hints(message_type))
    body = b"".join(parts)
    return PackedProperties(_pack_length(len(body)) + body)


@cache
def _pack_hints(message_type: str) -> bytes:
    return _pack_user("v", "1") + _pack_user("type", message_type)


def _pack_user(key: str, value: str) -> bytes:
    name, text = key.encode(), value.encode()
    return b"\x26" + struct.pack("!H", len(name)) + name + struct.pack("!H", len(text)) + text


def _pack_length(length: int) -> bytes:
    low, high = length & 0x7F, length >> 7
    return bytes([low]) if not high else bytes([low | 0x80, high])


@dataclass(frozen=True)
class _Ended:
    """How a connection ended."""

    taken_over: bool
    was_up: bool


class MqttSession(threading.Thread):
    """Keeps the device connected; one thread of its own beside paho's.

    Args:
        settings: the device's settings.
        topics: its topics.
        post: puts a message into the writer's mailbox; must not block.
        next_conn: commits and returns the number of the next connection, and the
            payload of its will, before CONNECT.
        on_takeover: told how many times in a row another client took the session.
    """

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        post: Callable[[Message], None],
        next_conn: Callable[[], tuple[int, str]],
        on_takeover: Callable[[int], None],
    ) -> None:
        super().__init__(name="mqtt-session", daemon=True)
        self._settings = settings
        self._topics = topics
        self._post = post
        self._next_conn = next_conn
        self._on_takeover = on_takeover
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._client: Client | None = None
        self._conn = 0
        self._taken_over = False
        self._unread = 0
        self._waiting: Callable[[], int] = lambda: 0
        self.state = "offline"

    def watch_mailbox(self, waiting: Callable[[], int]) -> None:
        """Tell how many messages wait; before `start`.

        The broker keeps to our receive maximum with QoS 1, but nothing bounds QoS 0:
        while too many wait, those are counted and thrown away.
        """
        self._waiting = waiting

    def _is_flooded(self) -> bool:
        return self._waiting() > _FLOOD

    def take_unread(self) -> int:
        """Return how many messages were thrown away since the last call."""
        count, self._unread = self._unread, 0
        return count

    def run(self) -> None:
        """Connect, again and again with full jitter, until stopped."""
        limits = self._settings.mqtt
        delay_s = limits.reconnect_min_s
        takeovers = 0
        while not self._stopping.is_set():
            ended = self._serve()
            takeovers = takeovers + 1 if ended.taken_over else 0
            if ended.taken_over:
                self._on_takeover(takeovers)
            if takeovers >= _TAKEOVER_LIMIT:
                log.error(
                    "another client uses the device id %s: not connecting again until a restart",
                    self._topics.device,
                )
                self.state = "duplicate_device_id"
                return
            delay_s = (
                limits.reconnect_min_s if ended.was_up else min(delay_s * 2, limits.reconnect_max_s)
            )
            floor_s = _TAKEOVER_WAIT_S if ended.taken_over else 0.0
            self._stopping.wait(floor_s + random.uniform(0.1, 1.0) * delay_s)

    def _serve(self) -> _Ended:
        """Hold one connection until it ends; say how it ended."""
        try:
            # TimeoutError (an OSError): the store cannot be written; then there is nothing to say.
            conn, will = self._next_conn()
            client = self._build_client(conn, will)
            self._ended.clear()
            self._taken_over = False
            self._client, self._conn = client, conn
            client.connect(
                self._settings.mqtt.host,
                self._settings.mqtt.port,
                keepalive=_shorten_keepalive(self._settings.mqtt.keepalive_s),
                clean_start=False,
                properties=self._connect_properties(),
            )
        except (OSError, ValueError, ConfigError) as exc:
            log.warning("MQTT broker %s: %s", self._settings.mqtt.host, exc)
            self.state = "offline"
            return _Ended(taken_over=False, was_up=False)
        client.loop_start()
        self._ended.wait()
        was_up = self.state == "online"
        self.state = "offline"
        client.loop_stop()
        self._post(Disconnected(conn, "connection ended"))
        return _Ended(taken_over=self._taken_over, was_up=was_up)

    def _build_client(self, conn: int, payload: str) -> Client:
        limits = self._settings.mqtt
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._topics.device,
            protocol=MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        client.connect_timeout = _CONNECT_TIMEOUT_S
        # The window is ours (the reporter's); paho must not queue in RAM beside it.
        client.max_inflight_messages_set(0)
        if limits.username is not None:
            client.username_pw_set(limits.username, self._settings.password())
        if limits.tls:
            client.tls_set_context(_build_tls(self._settings))
        will = Properties(PacketTypes.WILLMESSAGE)
        will.WillDelayInterval = limits.will_delay_s
        client.will_set(self._topics.status, payload, qos=1, retain=True, properties=will)
        client.on_socket_open = set_no_delay
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.user_data_set(conn)
        return client

    def _connect_properties(self) -> Properties:
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = self._settings.mqtt.session_expiry_s
        properties.ReceiveMaximum = self._settings.mqtt.receive_maximum
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        return properties

    def _on_connect(
        self,
        client: Client,
        conn: int,
        flags: ConnectFlags,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            log.warning("MQTT broker refused the connection: %s", code)
            self._ended.set()
            return
        client.subscribe([(topic, 1) for topic in self._topics.subscriptions])
        self.state = "online"
        maximum = int(getattr(properties, "ReceiveMaximum", 65535))
        self._post(Connected(conn, flags.session_present, maximum))

    def _on_disconnect(
        self,
        _client: Client,
        _conn: int,
        _flags: DisconnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        # It can fire twice for one connection (paho); the first time knows why.
        if not self._ended.is_set():
            self._taken_over = code.value == _SESSION_TAKEN_OVER
        self._ended.set()

    def _on_message(self, _client: Client, conn: int, message: MQTTMessage) -> None:
        properties: Any = message.properties
        if not message.qos and self._is_flooded():
            self._unread += 1
            return
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        self._post(
            Received(
                conn,
                message.mid if message.qos else 0,
                topic,
                bytes(message.payload),
                getattr(properties, "MessageExpiryInterval", None),
                getattr(properties, "ResponseTopic", None),
                getattr(properties, "CorrelationData", None),
            )
        )

    def _on_publish(
        self, _client: Client, conn: int, mid: int, _code: ReasonCode, _properties: Properties
    ) -> None:
        self._post(Acknowledged(conn, mid))

    @property
    def conn(self) -> int:
        """Number of the newest connection."""
        return self._conn

    def publish(
        self,
        topic: str,
        payload: str,
        *,
        qos: int = 1,
        retain: bool = False,
        properties: PackedProperties | None = None,
    ) -> int | None:
        """Send a message on the present connection.

        Returns the message id that its acknowledgement will carry, or None
        where there is no connection. Never queues for a later one.
        """
        client = self._client
        if client is None or self.state != "online":
            return None
        packed = cast("Properties | None", properties)
        info = client.publish(topic, payload, qos=qos, retain=retain, properties=packed)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def ack(self, conn: int, mid: int) -> None:
        """Acknowledge a received message, if its connection is still the present one."""
        client = self._client
        if client is not None and conn == self._conn and mid:
            client.ack(mid, 1)

    def stop(self, farewell: str | None, timeout_s: float = 5.0) -> None:
        """Publish `farewell` as the retained status, disconnect and end the thread."""
        self._stopping.set()
        client = self._client
        if client is not None and self.state == "online":
            if farewell is not None:
                info = client.publish(self._topics.status, farewell, qos=1, retain=True)
                info.wait_for_publish(timeout_s)
            client.disconnect()
        self._ended.set()
        self.join(timeout_s)


def _shorten_keepalive(keepalive_s: int) -> int:
    return max(_KEEPALIVE_MIN_S, int(keepalive_s * _KEEPALIVE_SHARE))


def set_no_delay(_client: Client, _userdata: object, sock: Any) -> None:
    """Switch Nagle's algorithm off: with it, a round trip on loopback was 88 ms instead of 4."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _build_tls(settings: Settings) -> ssl.SSLContext:
    limits = settings.mqtt
    context = ssl.create_default_context(cafile=limits.ca_file and str(limits.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if limits.cert_file is not None:
        context.load_cert_chain(str(limits.cert_file), limits.key_file and str(limits.key_file))
    return context
