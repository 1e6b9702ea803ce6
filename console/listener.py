"""A minimal durable console: hears devices, keeps what they say, and only then acknowledges.

Owns the loop of `edgeward console listen`: take in what was heard, commit it to the archive,
acknowledge it, send what is asked for. A second one on the same archive is refused.

Invariant: killed at any point, it loses nothing: what was not committed was not
acknowledged, and comes again from the broker's session or from the device.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent.config import Settings
from agent.errors import StoreError
from console.addresses import ANY_DEVICE
from console.archive import Archive, put_command
from console.errors import AlreadyListeningError
from console.link import ConsoleLink
from console.mirror import STALE_AFTER_S, Change

_POLL_S = 0.2
_REQUESTS_S = 0.5
_STORE_RETRY_S = 1.0

Tell = Callable[[str], None]


class Listener:
    """One run of a durable console. Not thread-safe.

    Args:
        settings: the broker.
        archive: where everything is kept.
        devices: whom to listen to; none: to all devices.
        client_id: the console's name on the broker; by default the archive's own.
        stale_after_s: after so long without news an open job is marked stale.
        show: told every change once it is safe.
        note: told in a sentence what happens to this console itself.
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        *,
        devices: Sequence[str] = (),
        client_id: str | None = None,
        stale_after_s: float = STALE_AFTER_S,
        show: Callable[[Change], None] = lambda _change: None,
        note: Tell = lambda _text: None,
    ) -> None:
        self._archive = archive
        self._show = show
        self._note = note
        self._where = f"{settings.mqtt.host}:{settings.mqtt.port}"
        self._devices = tuple(devices) or (ANY_DEVICE,)
        self._request = 0
        self._requests_s = float("-inf")
        self._was_connected = False
        self._link = ConsoleLink(
            settings,
            devices=self._devices,
            client_id=client_id or archive.client_id,
            is_durable=True,
            recall=archive.find_jobs,
            restore=lambda mirror: archive.restore(mirror, time.monotonic()),
            stale_after_s=stale_after_s,
        )

    def run(self, stop: threading.Event) -> None:
        """Listen until `stop` is set; blocks."""
        # Whatever was asked for until now is among the open jobs that a mirror begins with.
        self._archive.clear_requests()
        for device in self._archive.list_known_devices():
            if self._follows(device):
                self._link.mirror(device)
        self._link.connect(wait=False)
        self._note(f"listening on {self._where}; Ctrl-C ends it")
        try:
            while not stop.is_set():
                self._turn(stop)
        finally:
            self._link.close()

    def _follows(self, device: str) -> bool:
        return ANY_DEVICE in self._devices or device in self._devices

    def _turn(self, stop: threading.Event) -> None:
        self._tell_connection()
        self._take_requests()
        changes = self._link.poll(_POLL_S)
        self._save(changes, stop)
        self._link.commit()
        for change in changes:
            self._show(change)

    def _save(self, changes: Sequence[Change], stop: threading.Event) -> None:
        """Commit what was heard; try again for as long as the disk refuses it."""
        while True:
            try:
                self._archive.save(changes, self._link.mirrors)
            except StoreError as exc:
                self._note(f"nothing is acknowledged meanwhile: {exc}")
                if not exc.retryable or stop.wait(_STORE_RETRY_S):
                    raise
            else:
                return

    def _take_requests(self) -> None:
        """Send what people have asked for since the last look."""
        now_s = time.monotonic()
        if now_s - self._requests_s < _REQUESTS_S:
            return
        self._requests_s = now_s
        for row in self._archive.read_requests(self._request):
            self._request = row["request"]
            if self._follows(row["device"]):
                put_command(self._link.mirror(row["device"]), row, now_s)

    def _tell_connection(self) -> None:
        if self._link.is_connected is not self._was_connected:
            self._was_connected = self._link.is_connected
            self._note(f"{'connected to' if self._was_connected else 'lost'} {self._where}")


@contextmanager
def claim_archive(path: Path) -> Iterator[None]:
    """Keep other listeners off an archive while the block runs.

    Raises:
        AlreadyListeningError: there is one.
    """
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            msg = f"another `edgeward console listen` uses {path}"
            raise AlreadyListeningError(msg) from exc
        yield
