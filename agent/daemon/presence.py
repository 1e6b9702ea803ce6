"""Presence: what the device says about itself: birth, status, reported, heartbeat, replies.

These are snapshots, not records: the newest replaces all before it, so they go
out directly on each connection and never wait in the outbox.
"""

from collections.abc import Callable, Mapping
from typing import Any

from agent.clock import Clock, format_ms
from agent.commands import encode, new_id
from agent.config import Settings
from agent.daemon.messages import Connected, Received
from agent.daemon.mqtt import MqttSession, pack_properties
from agent.errors import ResponseTopicError, UnsupportedTypeError
from agent.topics import Topics

PROTOCOL_VERSIONS = ("edgeward/v1",)
_REPLY_TTL_S = 60

Snapshot = Callable[[], Mapping[str, Any]]


class Presence:
    """Publishes the device's snapshots and answers request/reply commands.

    Args:
        settings: heartbeat interval and limits.
        topics: the device's topics.
        session: the MQTT session.
        clock: wall time.
        info: builds the birth certificate's body.
        reported: builds the reported state's body.
        health: builds the heartbeat's body.
        ask_sync: lets the writer publish a sync request.
    """

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        session: MqttSession,
        clock: Clock,
        *,
        info: Snapshot,
        reported: Snapshot,
        health: Snapshot,
        ask_sync: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._topics = topics
        self._session = session
        self._clock = clock
        self._info = info
        self._reported = reported
        self._health = health
        self._ask_sync = ask_sync
        self.boot = 0
        self.ledger = ""
        """The ledger's identity; consoles tell by it that another one has begun."""

    def connected(self, event: Connected, sync: Mapping[str, Any]) -> None:
        """Say what a new connection begins with: info, status, reported, sync."""
        # On every connection: a broker that lost its retained messages gets them back.
        self.publish_info()
        self._session.publish(self._topics.status, self.status("online", event.conn), retain=True)
        self.publish_reported()
        self.publish_sync(sync)

    def publish_sync(self, body: Mapping[str, Any]) -> None:
        """Ask the console to compare what it knows with what is here."""
        self._publish(self._topics.sync, "sync", {"ledger": self.ledger, **body})

    def status(self, state: str, conn: int) -> str:
        """Return the payload of the status topic."""
        return encode({"state": state, "boot": self.boot, "conn": conn, "ledger": self.ledger})

    def publish_info(self) -> None:
        """Publish the birth certificate, retained."""
        body = {"ledger": self.ledger, **self._info()}
        self._publish(self._topics.info, "info", body, retain=True)

    def publish_reported(self) -> None:
        """Publish the reported state of models, retained."""
        self._publish(self._topics.reported, "reported", self._reported(), retain=True)

    def publish_heartbeat(self) -> None:
        """Publish the heartbeat; it is not worth keeping for later."""
        ttl_s = int(self._settings.heartbeat_s * 3)
        self._publish(self._topics.heartbeat, "heartbeat", self._health(), qos=0, ttl_s=ttl_s)

    def answer(self, name: str, message: Received, broadcast: bool) -> Callable[[], None]:
        """Check a request and return what answers it, to be run after the commit.

        Raises:
            ResponseTopicError: the reply would go where replies may not go.
            UnsupportedTypeError: there is no such command.
        """
        topic = message.response_topic or ""
        if broadcast:
            # One topic cannot be below every device's prefix: its last level counts.
            topic = self._topics.reply_prefix + topic.rpartition("/")[2]
        if not topic.startswith(self._topics.reply_prefix) or topic == self._topics.reply_prefix:
            msg = f"response topic {topic[:128]!r} is not below {self._topics.reply_prefix}"
            raise ResponseTopicError(msg)
        bodies: dict[str, Snapshot] = {
            "ping": lambda: {"pong": format_ms(self._clock.wall_ms())},
            "doctor": lambda: {"health": self._health(), "info": self._info()},
            "rebirth": self._rebirth,
        }
        if broadcast:
            del bodies["doctor"]
        build = bodies.get(name)
        if build is None:
            msg = f"no command {name[:64]!r}; there are: {', '.join(bodies)}"
            raise UnsupportedTypeError(msg)
        return lambda: self._reply(topic, name, build(), message.correlation)

    def _rebirth(self) -> Mapping[str, Any]:
        self.publish_info()
        self.publish_reported()
        self._session.publish(
            self._topics.status, self.status("online", self._session.conn), retain=True
        )
        self._ask_sync()
        return {"reborn": True}

    def _reply(
        self, topic: str, name: str, body: Mapping[str, Any], correlation: bytes | None
    ) -> None:
        self._publish(topic, f"cmd.{name}.reply", body, ttl_s=_REPLY_TTL_S, correlation=correlation)

    def _publish(
        self,
        topic: str,
        message_type: str,
        body: Mapping[str, Any],
        *,
        qos: int = 1,
        retain: bool = False,
        ttl_s: int | None = None,
        correlation: bytes | None = None,
    ) -> None:
        now = format_ms(self._clock.wall_ms())
        message_id = new_id()
        envelope = {
            "v": 1,
            "id": message_id,
            "type": message_type,
            "ts": now,
            "boot": self.boot,
            "body": body,
        }
        properties = pack_properties(
            correlation=correlation or message_id.encode(),
            expiry_s=ttl_s,
            message_type=message_type,
        )
        self._session.publish(
            topic, encode(envelope), qos=qos, retain=retain, properties=properties
        )
