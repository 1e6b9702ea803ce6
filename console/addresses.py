"""Topics as a console needs them: of many devices at once, and those it writes to.

The other half of `agent.topics`, which knows one device; owns no message.
"""

from dataclasses import dataclass

from agent.topics import BROADCAST, DEVICE_PATTERN, PREFIX, Topics

ANY_DEVICE = "+"
"""In the place of a device: whoever is there. MQTT's wildcard of one level."""


@dataclass(frozen=True)
class ReportAddress:
    """What a d2c topic names."""

    device: str
    kind: str
    """`status`, `info`, `reported`, `heartbeat`, `sync`, `job`, `result`, `progress`, `event`, …"""
    rest: str
    """The level below: a job's id, an event's type; empty where there is none."""


def find_report(topic: str) -> ReportAddress | None:
    """Return what a topic names, or None where no device reports on it."""
    head = f"{PREFIX}/"
    if not topic.startswith(head):
        return None
    device, _, below = topic[len(head) :].partition("/")
    direction, _, name = below.partition("/")
    if direction != "d2c" or not name or device == BROADCAST:
        return None
    if not DEVICE_PATTERN.fullmatch(device):
        return None
    kind, _, rest = name.partition("/")
    return ReportAddress(device, kind, rest)


def find_desired(topic: str) -> str | None:
    """Return the device whose desired state a topic carries, or None where it is another topic."""
    device = topic.removeprefix(f"{PREFIX}/").removesuffix("/c2d/desired")
    is_one = topic == ConsoleTopics(device).desired and DEVICE_PATTERN.fullmatch(device)
    return device if is_one else None


class ConsoleTopics(Topics):
    """The topics of one device that only a console writes to."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        head = f"{PREFIX}/{device}/c2d/"
        self.ack = head + "ack"
        self.answer = head + "sync"
        self.desired = head + "desired"

    def reply(self, name: str) -> str:
        """Return a response topic that the device accepts."""
        return self.reply_prefix + name
