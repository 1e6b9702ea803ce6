"""A console's side of the MQTT protocol, as a library: submit, follow, cancel, acknowledge.

Owns a connection and a mirror of each device: brings what the one hears to the other, and
what the other wants to send back to the one. What a console must do is in
`console.mirror`; how to write one with this is in docs/console.md.

Invariants: a link that is not durable never acknowledges a record and never answers a
sync, so that looking on costs the device's real console nothing. A durable one does both
only after its owner's `commit`.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent.clock import SystemClock
from agent.commands import new_id
from agent.config import Settings
from agent.topics import Topics
from console.addresses import ANY_DEVICE, ReportAddress, find_report
from console.connection import RECEIVE_MAXIMUM, Arrived, Connection, Refused, Subscribed
from console.connection import Heard as Message
from console.mirror import STALE_AFTER_S, Change, DeviceMirror, Heard, JobView
from console.resend import WINDOW
from console.submission import Command

__all__ = ["ANY_DEVICE", "Change", "ConsoleLink", "JobView"]

log = logging.getLogger(__name__)

_POLL_S = 0.2
_WATCH_S = 1.0

Recall = Callable[[Mapping[str, set[str]]], Mapping[str, Iterable[JobView]]]
"""Given job ids by device, returns what the owner kept of them, by device."""


class ConsoleLink:
    """One console's connection to one device, or to many. Thread-safe.

    Args:
        settings: the broker, and the device by its `device_id`.
        reconnect_s: time between two tries to connect again.
        devices: the devices to follow instead; `ANY_DEVICE` is all of them.
        client_id: the console's name on the broker; by default a new one.
        is_durable: it keeps what it hears, and calls `commit` when it is safe. It has a
            session at the broker, acknowledges records and answers syncs. A device may
            have one such console: what that acknowledges, the device forgets.
        recall: finds jobs that a durable console has kept elsewhere; with it, complete
            jobs are let go of after each `commit`.
        restore: gives a new mirror what a durable console has kept of its device.
        window: submits that are under way at a time, for each device.
        stale_after_s: after so long without news an open job is marked stale.
    """

    def __init__(
        self,
        settings: Settings,
        reconnect_s: float = 1.0,
        *,
        devices: Sequence[str] = (),
        client_id: str | None = None,
        is_durable: bool = False,
        recall: Recall | None = None,
        restore: Callable[[DeviceMirror], None] | None = None,
        window: int = WINDOW,
        stale_after_s: float = STALE_AFTER_S,
    ) -> None:
        if is_durable and client_id is None:
            msg = "a durable console needs a client_id: the broker keeps its session under it"
            raise ValueError(msg)
        self._device = settings.device_id
        self._devices = tuple(devices) or (settings.device_id,)
        self._client_id = client_id or f"edgeward-console-{new_id()}"
        self._is_durable = is_durable
        self._recall = recall
        self._restore = restore
        self._window = window
        self._stale_after_s = stale_after_s
        self._follows_all = is_durable
        self._lock = threading.RLock()
        self._mirrors: dict[str, DeviceMirror] = {}
        self._unsettled: list[Arrived] = []
        self._callbacks: list[Callable[[Change], None]] = []
        self._watched_s = 0.0
        self._connection = Connection(
            settings.mqtt,
            self._client_id,
            [Topics(device).reports for device in self._devices],
            is_durable=is_durable,
            reconnect_s=reconnect_s,
            password=settings.password() if settings.mqtt.username is not None else None,
        )

    def __enter__(self) -> "ConsoleLink":
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- connection -----------------------------------------------------------------------

    def connect(self, *, wait: bool = True) -> None:
        """Connect and subscribe; blocks up to 5 s for each. Reconnects by itself from then on.

        Args:
            wait: False: return at once, and connect as soon as there is a broker.

        Raises:
            BrokerUnavailableError: the broker does not answer, or refuses us.
        """
        if wait:
            self._connection.open()
            with self._lock:
                for mirror in self._mirrors.values():
                    mirror.connected(time.monotonic())
        else:
            self._connection.open_later()

    def close(self) -> None:
        """Acknowledge what was committed, disconnect and end paho's thread."""
        with self._lock:
            now_s, mirrors = time.monotonic(), self.mirrors if self.is_connected else []
            for message in [item for mirror in mirrors for item in mirror.take_last(now_s)]:
                self._connection.publish(message)
        self._connection.close()

    @property
    def is_connected(self) -> bool:
        """Say whether there is a connection, as far as one can know."""
        return self._connection.is_connected

    # --- what a console asks for ----------------------------------------------------------

    def submit(self, commands: Iterable[Command], device: str | None = None) -> None:
        """Send jobs, and again until a state of each has been seen."""
        with self._lock:
            mirror = self.mirror(device)
            for command in commands:
                mirror.submit(command, time.monotonic())
        self._send_due()

    def cancel(self, command: Command, device: str | None = None) -> None:
        """Send a cancel, and again until the job's end has been seen."""
        with self._lock:
            self.mirror(device).cancel(command, time.monotonic())
        self._send_due()

    def follow_all(self) -> None:
        """Follow every job that is reported, not only those submitted here."""
        with self._lock:
            self._follows_all = True
            for mirror in self._mirrors.values():
                mirror.follows_all = True

    def on_change(self, callback: Callable[[Change], None]) -> None:
        """Call `callback` with each change, in the thread that polls."""
        self._callbacks.append(callback)

    # --- what is known --------------------------------------------------------------------

    def mirror(self, device: str | None = None) -> DeviceMirror:
        """Return what is known of a device; made where nothing is."""
        name = device or self._device
        with self._lock:
            if name not in self._mirrors:
                self._mirrors[name] = self._make_mirror(name)
            return self._mirrors[name]

    def _make_mirror(self, device: str) -> DeviceMirror:
        mirror = DeviceMirror(
            device,
            acknowledges=self._is_durable,
            follows_all=self._follows_all,
            window=self._window,
            stale_after_s=self._stale_after_s,
            reply=self._client_id.rpartition("/")[2],
        )
        if self._restore is not None:
            self._restore(mirror)
        if self.is_connected:
            mirror.connected(time.monotonic())
        return mirror

    @property
    def mirrors(self) -> list[DeviceMirror]:
        """The mirrors of all devices that were heard of."""
        with self._lock:
            return list(self._mirrors.values())

    @property
    def jobs(self) -> dict[str, JobView]:
        """The jobs of the settings' device that are followed, by id, as last heard."""
        with self._lock:
            return dict(self.mirror().jobs)

    @property
    def device_state(self) -> str | None:
        """The device's status: `online`, `offline`, `stopped`, or None."""
        return self.mirror().device.state

    # --- hearing --------------------------------------------------------------------------

    def poll(self, timeout_s: float = _POLL_S) -> list[Change]:
        """Take in what was heard, waiting up to `timeout_s` for something.

        Returns the changes. A durable console makes them safe and then calls `commit`, also
        where there are none; for others that happens here.
        """
        messages = self._connection.take(timeout_s, RECEIVE_MAXIMUM)
        with self._lock:
            changes = self._take_in(messages)
            changes += self._watch()
        for change in changes:
            for callback in self._callbacks:
                callback(change)
        if not self._is_durable:
            self.commit()
        return changes

    def commit(self) -> None:
        """Say that all changes so far are safe: acknowledge them, and send what is due."""
        with self._lock:
            messages, self._unsettled = self._unsettled, []
            for mirror in self._mirrors.values():
                mirror.commit()
                if self._recall is not None:
                    mirror.forget_complete()
        self._connection.settle(messages)
        self._send_due()

    def batches(self, timeout_s: float = _POLL_S) -> Iterator[list[Change]]:
        """Yield changes for ever, in batches, also empty ones after `timeout_s` without news.

        Asking for the next batch says that the one before is safe (`commit`).
        """
        while True:
            yield self.poll(timeout_s)
            self.commit()

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

    def _take_in(self, messages: Sequence[Message]) -> list[Change]:
        now_s, wall_ms = time.monotonic(), SystemClock().wall_ms()
        reports: list[tuple[ReportAddress, Heard] | None] = []
        for message in messages:
            if isinstance(message, Subscribed):
                reports.append(None)
            elif isinstance(message, Refused):
                log.warning("console link: refused: %s", message.why)
            else:
                self._unsettled.append(message)
                report = read_report(message)
                if report is not None:
                    reports.append(report)
        self._bring_back([report for report in reports if report is not None])
        changes = []
        for item in reports:
            if item is None:
                for mirror in self._mirrors.values():
                    mirror.connected(now_s)
            else:
                changes += self.mirror(item[0].device).hear(item[1], now_s, wall_ms)
        return changes

    def _bring_back(self, reports: Sequence[tuple[ReportAddress, Heard]]) -> None:
        """Ask the owner for the jobs that these reports are about and that were let go of."""
        if self._recall is None:
            return
        wanted: dict[str, set[str]] = {}
        for address, heard in reports:
            known = self.mirror(address.device).jobs
            lacking = {job_id for job_id in _name_jobs(heard) if job_id not in known}
            if lacking:
                wanted.setdefault(address.device, set()).update(lacking)
        if wanted:
            for device, jobs in self._recall(wanted).items():
                self.mirror(device).restore(jobs=jobs)

    def _watch(self) -> list[Change]:
        now_s = time.monotonic()
        if now_s - self._watched_s < _WATCH_S:
            return []
        self._watched_s = now_s
        return [change for mirror in self._mirrors.values() for change in mirror.watch(now_s)]

    def _send_due(self) -> None:
        """Publish what is due; nothing while there is no connection."""
        with self._lock:
            if not self.is_connected:
                return
            now_s = time.monotonic()
            for mirror in self._mirrors.values():
                for message in mirror.take_due(now_s):
                    self._connection.publish(message)


def read_report(message: Arrived) -> tuple[ReportAddress, Heard] | None:
    """Return a message as a report, or None where it is none."""
    address = find_report(message.topic)
    if address is None or not message.payload:
        return None
    try:
        document = json.loads(message.payload)
    except (ValueError, RecursionError):
        log.warning("console link: no JSON on %s", message.topic)
        return None
    if not isinstance(document, dict):
        return None
    return address, Heard(address.kind, address.rest, document, message.is_retained)


def _name_jobs(heard: Heard) -> list[str]:
    """Return the ids of the jobs that a report is about."""
    if heard.kind in ("job", "result", "progress"):
        return [heard.rest]
    body: Any = heard.document.get("body")
    if heard.kind == "sync" and isinstance(body, dict) and isinstance(body.get("open"), list):
        return [str(entry[0]) for entry in body["open"] if isinstance(entry, list) and entry]
    return []
