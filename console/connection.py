"""A console's MQTT connection: connects, subscribes, hands over what it hears.

Owns paho's client and thread. paho's callbacks only put messages into a queue, because an
exception in one of them would end its thread without a word; whoever owns the connection
takes them out. Reconnects by itself.

Invariant: with `manual_ack` a message is acknowledged to the broker only by `settle`, and
only on the connection that it came by.

Source: docs/protocol.md, "Connection"; design notes "pitfalls", paho-mqtt.
"""

import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.client import (
    Client,
    ConnectFlags,
    DisconnectFlags,
    MQTTMessage,
    MQTTMessageInfo,
    MQTTv5,
)
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.errors import BrokerUnavailableError
from agent.sections import MqttSettings
from console.mirror import Outgoing

log = logging.getLogger(__name__)

CONNECT_S = 5.0
RECEIVE_MAXIMUM = 2000
_GATHER_S = 0.005
_FLUSH_S = 2.0
_MAX_PACKET_BYTES = 1 << 20
_SESSION_EXPIRY_S = 7 * 86_400


@dataclass(frozen=True)
class Arrived:
    """A message as it came."""

    topic: str
    payload: bytes
    is_retained: bool = False
    generation: int = 0
    mid: int = 0
    """0 where nothing is to be acknowledged."""


@dataclass(frozen=True)
class Subscribed:
    """A connection is ready; what was sent before it may be lost."""


@dataclass(frozen=True)
class Refused:
    """The broker refused the connection or the subscription."""

    why: str


Heard = Arrived | Subscribed | Refused


class Connection:
    """One connection to a broker.

    Args:
        limits: the broker and how to reach it.
        client_id: the console's name on the broker.
        filters: topic filters to subscribe to at each connect.
        is_durable: keep a session at the broker, and acknowledge by `settle` only.
        reconnect_s: time between two tries to connect again.
        password: the MQTT password.
        qos: of the subscriptions. 0 where what is retained of very many topics is wanted at
            once: mosquitto's queue for QoS 1 drops what is over `max_queued_messages`.
    """

    def __init__(
        self,
        limits: MqttSettings,
        client_id: str,
        filters: Sequence[str],
        *,
        is_durable: bool,
        reconnect_s: float,
        password: str | None,
        qos: int = 1,
    ) -> None:
        self._qos = qos
        self._limits = limits
        self._filters = filters
        self._is_durable = is_durable
        self._heard: SimpleQueue[Heard] = SimpleQueue()
        self._early: deque[Heard] = deque()
        self._generation = 0
        self._last: MQTTMessageInfo | None = None
        self._client = self._build_client(client_id, reconnect_s, password)

    def _build_client(self, client_id: str, reconnect_s: float, password: str | None) -> Client:
        limits = self._limits
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTv5,
            manual_ack=self._is_durable,
        )
        client.connect_timeout = CONNECT_S
        # It only ever sleeps for the value, though it is declared as an int.
        client.reconnect_delay_set(reconnect_s, reconnect_s)  # type: ignore[arg-type]
        if limits.username is not None:
            client.username_pw_set(limits.username, password)
        if limits.tls:
            client.tls_set_context(_build_tls(limits))
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
        self._generation += 1
        if code.is_failure:
            self._heard.put(Refused(str(code)))
        else:
            client.subscribe([(topic, self._qos) for topic in self._filters])

    def _on_disconnect(
        self,
        _client: Client,
        _data: object,
        _flags: DisconnectFlags,
        code: ReasonCode,
        _properties: Properties | None,
    ) -> None:
        log.debug("console connection: %s", code)

    def _on_subscribe(
        self,
        _client: Client,
        _data: object,
        _mid: int,
        codes: list[ReasonCode],
        _properties: Properties | None,
    ) -> None:
        refused = next((code for code in codes if code.is_failure), None)
        self._heard.put(Refused(str(refused)) if refused else Subscribed())

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        mid = message.mid if message.qos and self._is_durable else 0
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        payload = bytes(message.payload)
        self._heard.put(Arrived(topic, payload, message.retain, self._generation, mid))

    # --- the owner's thread ----------------------------------------------------------------

    def open(self) -> None:
        """Connect and subscribe; blocks up to 5 s for each.

        Raises:
            BrokerUnavailableError: the broker does not answer, or refuses us.
        """
        where = f"{self._limits.host}:{self._limits.port}"
        try:
            self._client.connect(**self._arguments())
        except (OSError, ValueError) as exc:
            msg = f"no MQTT broker at {where}: {exc}; is `edgeward up` running?"
            raise BrokerUnavailableError(msg) from exc
        self._client.loop_start()
        why = self._await_subscribed()
        if why is not None:
            self.close()
            msg = f"the MQTT broker at {where} refuses a console: {why}"
            raise BrokerUnavailableError(msg)

    def _await_subscribed(self) -> str | None:
        """Wait for the broker's answer; return why it is none."""
        deadline = time.monotonic() + CONNECT_S
        while True:
            try:
                first = self._heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return f"no answer within {CONNECT_S:g} s"
            if isinstance(first, Refused):
                return first.why
            if isinstance(first, Subscribed):
                return None
            # Messages of a session that was kept come before the subscription's answer.
            self._early.append(first)

    def open_later(self) -> None:
        """Connect as soon as there is a broker; returns at once."""
        self._client.connect_async(**self._arguments())
        self._client.loop_start()

    def _arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "host": self._limits.host,
            "port": self._limits.port,
            "keepalive": self._limits.keepalive_s,
        }
        properties = Properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = _MAX_PACKET_BYTES
        if self._is_durable:
            # Mosquitto's own default is 20, and each commit would be for as many only.
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            properties.SessionExpiryInterval = _SESSION_EXPIRY_S
            arguments["clean_start"] = False
        return {**arguments, "properties": properties}

    def close(self) -> None:
        """Disconnect and end paho's thread; what was published last goes out before, in 2 s."""
        if self._last is not None and self.is_connected:
            # paho's thread ends at a disconnect, whatever it still has to write.
            with suppress(RuntimeError, ValueError):
                self._last.wait_for_publish(_FLUSH_S)
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def is_connected(self) -> bool:
        """Say whether there is a connection, as far as one can know."""
        return self._client.is_connected()

    def listen_again(self) -> None:
        """Subscribe once more, which brings all that is retained again; `Subscribed` follows."""
        self._client.subscribe([(topic, self._qos) for topic in self._filters])

    @property
    def generation(self) -> int:
        """How many connections there were; a message says by which one it came."""
        return self._generation

    def take(self, timeout_s: float, limit: int) -> list[Heard]:
        """Return what was heard, up to `limit`, waiting up to `timeout_s` for the first.

        Waits a moment for what comes right behind it, so that one commit serves many.
        """
        taken = []
        gather_s = _GATHER_S if self._is_durable else 0.0
        try:
            taken.append(self._next(timeout_s))
            while len(taken) < limit:
                taken.append(self._next(gather_s))
        except Empty:
            pass
        return taken

    def _next(self, timeout_s: float) -> Heard:
        if self._early:
            return self._early.popleft()
        return self._heard.get(timeout=timeout_s) if timeout_s else self._heard.get_nowait()

    def publish(self, message: Outgoing) -> bool:
        """Send a message with QoS 1; say whether there is a connection to send it on."""
        properties = Properties(PacketTypes.PUBLISH)
        if message.expiry_s is not None:
            properties.MessageExpiryInterval = message.expiry_s
        if message.response_topic is not None:
            properties.ResponseTopic = message.response_topic
        info = self._client.publish(
            message.topic,
            message.payload,
            qos=1,
            retain=message.is_retained,
            properties=properties,
        )
        is_sent = info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS
        self._last = info if is_sent else self._last
        return is_sent

    def settle(self, messages: Iterable[Arrived]) -> None:
        """Acknowledge messages to the broker: what they say is safe."""
        for message in messages:
            # The number of a message means another one on another connection.
            if message.mid and message.generation == self._generation:
                self._client.ack(message.mid, 1)


def _set_no_delay(_client: Client, _data: object, sock: Any) -> None:
    # Measured on loopback: a round trip was 88 ms without it, and 4 ms with it.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _build_tls(limits: MqttSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=limits.ca_file and str(limits.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if limits.cert_file is not None:
        context.load_cert_chain(limits.cert_file, limits.key_file)
    return context
