"""MQTT topics of `edgeward/v1`: the only module that spells them.

Direction is a topic level, so that security is two ACL lines. Source:
docs/protocol.md, "Topics".
"""

import re
from dataclasses import dataclass

PREFIX = "edgeward/v1"
DEVICE_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
BROADCAST = "_all"
# A ULID: 26 characters of Crockford's base 32; the first is 0–7, or it would pass 128 bits.
JOB_ID_PATTERN = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


@dataclass(frozen=True)
class JobAddress:
    """What a c2d topic names: a job, or the cancelling of one."""

    job_id: str
    cancel: bool = False


@dataclass(frozen=True)
class CommandAddress:
    """What a c2d topic names: a command, one to this device or one to all."""

    name: str
    broadcast: bool = False


@dataclass(frozen=True)
class DocumentAddress:
    """What a c2d topic names: `desired`, `ack` or `sync`."""

    name: str


Address = JobAddress | CommandAddress | DocumentAddress


class Topics:
    """The topics of one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._c2d = f"{PREFIX}/{device}/c2d/"
        self._d2c = f"{PREFIX}/{device}/d2c/"
        self._all = f"{PREFIX}/{BROADCAST}/c2d/"
        self.status = self._d2c + "status"
        self.info = self._d2c + "info"
        self.heartbeat = self._d2c + "heartbeat"
        self.reported = self._d2c + "reported"
        self.sync = self._d2c + "sync"
        self.reply_prefix = self._d2c + "reply/"

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """Topic filters the device subscribes to, each with QoS 1."""
        return (self._c2d + "#", self._all + "cmd/+")

    @property
    def reports(self) -> str:
        """Topic filter a console subscribes to for everything this device says."""
        return self._d2c + "#"

    def submit(self, job_id: str) -> str:
        """Return the topic a console submits a job to."""
        return f"{self._c2d}job/{job_id}"

    def cancel(self, job_id: str) -> str:
        """Return the topic a console cancels a job on."""
        return f"{self._c2d}job/{job_id}/cancel"

    def command(self, name: str) -> str:
        """Return the topic of a request/reply command."""
        return f"{self._c2d}cmd/{name}"

    def state(self, job_id: str) -> str:
        """Return the retained topic of a job's state."""
        return f"{self._d2c}job/{job_id}"

    def result(self, job_id: str) -> str:
        """Return the topic of a job's result."""
        return f"{self._d2c}result/{job_id}"

    def progress(self, job_id: str) -> str:
        """Return the topic of a running job's progress."""
        return f"{self._d2c}progress/{job_id}"

    def event(self, kind: str) -> str:
        """Return the topic of an event of this kind."""
        return f"{self._d2c}event/{kind}"

    def report_kind(self, topic: str) -> tuple[str, str] | None:
        """Return what a d2c topic of this device carries, as (kind, rest), or None."""
        if not topic.startswith(self._d2c):
            return None
        kind, _, rest = topic[len(self._d2c) :].partition("/")
        return kind, rest

    def find_address(self, topic: str) -> Address | None:
        """Return what a received topic names, or None where it is no topic of the protocol."""
        if topic.startswith(self._all):
            kind, _, name = topic[len(self._all) :].partition("/")
            return CommandAddress(name, broadcast=True) if kind == "cmd" and name else None
        if not topic.startswith(self._c2d):
            return None
        match topic[len(self._c2d) :].split("/"):
            case ["job", job_id]:
                return JobAddress(job_id)
            case ["job", job_id, "cancel"]:
                return JobAddress(job_id, cancel=True)
            case ["cmd", name] if name:
                return CommandAddress(name)
            case ["desired" | "ack" | "sync" as name]:
                return DocumentAddress(name)
        return None
