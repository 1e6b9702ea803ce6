"""The whole fleet over MQTT: who is there, what each device has, and what it is asked for.

Owns one connection with four subscriptions for all devices, and a mirror of each device. It
acknowledges no record, so it stands beside the devices' durable console without harm. All that
it listens to is retained, so it listens with QoS 0: with QoS 1 and its own defaults mosquitto
2.0.11 sent 1,020 messages of 12,000 and dropped the others, with QoS 0 it sent all.

Invariant: a device is known only by its status, and its retained desired document was heard
before that (where the broker keeps the order of what it sends): a sweep that a broker's queue
limit cuts short leaves devices out, and never makes a document from half of what there is.

Source: docs/protocol.md, "Topics"; docs/rollout.md, "The broker".
"""

import logging
import time
from dataclasses import dataclass, field

from agent.clock import SystemClock
from agent.commands import new_id
from agent.config import Settings
from console.addresses import ANY_DEVICE, ConsoleTopics, find_desired
from console.connection import RECEIVE_MAXIMUM, Arrived, Connection, Refused, Subscribed
from console.link import read_report
from console.mirror import DeviceMirror, DeviceView, Outgoing
from console.rollout.desired import Desired, read_desired
from console.rollout.hardware import classify_hardware

log = logging.getLogger(__name__)

_RECONNECT_S = 1.0
_SWEEP_LIMIT_S = 60.0


@dataclass
class Box:
    """What is known of one device."""

    mirror: DeviceMirror
    desired: Desired | None = None
    """Its retained desired document; None where there is none, or none that can be read."""
    desired_generation: int = 0
    """The connection that the document came by: a broker may lose it between two."""

    @property
    def view(self) -> DeviceView:
        """What it said last."""
        return self.mirror.device

    @property
    def hardware_class(self) -> str:
        """Its hardware class; `unknown` where it has not said what it is."""
        platform = (self.view.info or {}).get("platform")
        return classify_hardware(platform if isinstance(platform, dict) else None)


@dataclass
class Sweep:
    """What was heard in one poll."""

    devices: set[str] = field(default_factory=set)
    """Those with news."""
    has_subscribed: bool = False
    """All that is retained comes again: what the broker does not send now, it does not have."""


class Fleet:
    """The connection to all devices. Not thread-safe.

    Args:
        settings: the broker.
    """

    def __init__(self, settings: Settings) -> None:
        self.boxes: dict[str, Box] = {}
        every = ConsoleTopics(ANY_DEVICE)
        self._connection = Connection(
            settings.mqtt,
            f"edgeward-rollout-{new_id()}",
            # In this order: see the module's invariant.
            [every.desired, every.reported, every.info, every.status],
            is_durable=False,
            reconnect_s=_RECONNECT_S,
            password=settings.password() if settings.mqtt.username is not None else None,
            qos=0,
        )

    def __enter__(self) -> "Fleet":
        self._connection.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def discover(self, quiet_s: float) -> None:
        """Take in what the broker retains; blocks until nothing new was learnt for `quiet_s`."""
        end_s = time.monotonic() + _SWEEP_LIMIT_S
        known, quiet_at_s = -1, 0.0
        while (now_s := time.monotonic()) < end_s:
            learnt = self._count_learnt()
            if learnt != known:
                known, quiet_at_s = learnt, now_s + quiet_s
            elif now_s >= quiet_at_s:
                return
            self.poll(max(0.0, quiet_at_s - now_s))

    def _count_learnt(self) -> int:
        return sum(
            item is not None
            for box in self.boxes.values()
            for item in (box.desired, box.view.state, box.view.info, box.view.reported)
        )

    def list_known(self) -> list[str]:
        """Return the devices that have ever said a status, in order."""
        return sorted(name for name, box in self.boxes.items() if box.view.state is not None)

    def box(self, device: str) -> Box:
        """Return what is known of a device; made where nothing is."""
        if device not in self.boxes:
            self.boxes[device] = Box(DeviceMirror(device))
        return self.boxes[device]

    def poll(self, timeout_s: float) -> Sweep:
        """Take in what was heard, waiting up to `timeout_s` for something."""
        sweep = Sweep()
        for message in self._connection.take(timeout_s, RECEIVE_MAXIMUM):
            if isinstance(message, Subscribed):
                sweep.has_subscribed = True
            elif isinstance(message, Refused):
                log.warning("rollout: refused: %s", message.why)
            else:
                device = self._take_in(message)
                sweep.devices |= {device} if device is not None else set()
        return sweep

    @property
    def is_connected(self) -> bool:
        """Say whether there is a connection, as far as one can know."""
        return self._connection.is_connected

    def is_retained(self, device: str, epoch: str, version: int) -> bool:
        """Say whether the broker was heard, by this connection, to have a document or a newer one.

        One of another epoch was written by somebody since, and is newer.
        """
        box = self.box(device)
        if box.desired is None or box.desired_generation != self._connection.generation:
            return False
        return box.desired.epoch != epoch or box.desired.version >= version

    def listen_again(self) -> None:
        """Let the broker send again all that it retains: with QoS 0 something may be lost."""
        self._connection.listen_again()

    def publish(self, device: str, payload: str) -> None:
        """Send a desired document, retained; without a connection it goes out on the next one."""
        topic = self.box(device).mirror.topics.desired
        # paho keeps what it cannot send with QoS 1 until it can.
        self._connection.publish(Outgoing(topic, payload, is_retained=True))

    def _take_in(self, message: Arrived) -> str | None:
        """Take in a message and return whom it tells news of; what is known is no news."""
        device = find_desired(message.topic)
        if device is not None:
            return device if self._take_desired(device, message) else None
        report = read_report(message)
        if report is None:
            return None
        address, heard = report
        mirror = self.box(address.device).mirror
        changes = mirror.hear(heard, time.monotonic(), SystemClock().wall_ms())
        return address.device if changes else None

    def _take_desired(self, device: str, message: Arrived) -> bool:
        box = self.box(device)
        before, box.desired = box.desired, read_desired(message.payload)
        box.desired_generation = message.generation
        return box.desired != before
