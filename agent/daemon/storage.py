"""The disk below the ledger: its watermark, and a reserve for when it is full.

- Below the watermark no new work is taken, so that what was accepted can still
  be worked off, reported and forgotten. It stays low until a quarter more than
  the watermark is free, so that it does not flap with every file.
- The reserve (*ballast*) is a really allocated file. When SQLite says the disk
  is full it is deleted, which makes room for outcomes and deletions; when space
  has come back it is made again.

Both bounds shrink with the disk: a tenth and a twentieth of it at most, so that
they make sense on a card of 16 GB and on a tmpfs of 3 MB. Thread-safe; asks the
disk at most once a second. Never deletes anything but its own file.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.fileio import fsync_dir

log = logging.getLogger(__name__)

BALLAST = "ballast"
_LOOK_S = 1.0
_WATERMARK_SHARE = 0.10
_BALLAST_SHARE = 0.05
_RISE = 1.25


class Storage:
    """Watches the file system of a folder and keeps a reserve in it.

    Args:
        data_dir: the ledger's folder; need not exist yet.
        min_free_bytes: the watermark; 0 turns it off.
        ballast_bytes: size of the reserve; 0 turns it off.
        now_s: a monotonic clock.
    """

    def __init__(
        self,
        data_dir: Path,
        min_free_bytes: int,
        ballast_bytes: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = data_dir
        self._file = data_dir / BALLAST
        self._min_free_bytes = min_free_bytes
        self._ballast_bytes = ballast_bytes
        self._now_s = now_s
        self._lock = threading.RLock()
        self._looked_at: float | None = None
        self._free_bytes: int | None = None
        self._total_bytes = 0
        self._is_low = False

    def is_low(self) -> bool:
        """Say whether so little is free that no new work should be taken."""
        with self._lock:
            self._look()
            return self._is_low

    def release(self) -> bool:
        """Delete the reserve because the disk is full; say whether that freed anything."""
        with self._lock:
            try:
                size = self._file.stat().st_blocks
                self._file.unlink()
                # Journaling file systems give blocks back only once the deletion is committed.
                fsync_dir(self._folder)
            except OSError:
                return False
            self._looked_at = None
            self._look()
            self._is_low = True
            log.warning("the disk is full: the reserve of %d bytes is freed", size * 512)
            return size > 0

    def maintain(self) -> None:
        """Make the reserve again where it is missing and there is room for it."""
        with self._lock:
            self._look()
            wanted = self._reserve_bytes
            if self._free_bytes is None or wanted <= 0 or self._has_reserve(wanted):
                return
            if self._free_bytes < self._watermark_bytes * _RISE + wanted:
                return
            try:
                self._allocate(wanted)
            except OSError as exc:
                log.warning("the disk's reserve could not be made: %s", exc.strerror)
                with contextlib.suppress(OSError):
                    self._file.unlink(missing_ok=True)
            self._looked_at = None

    def describe(self) -> dict[str, Any]:
        """Return the disk's state as the heartbeat carries it."""
        with self._lock:
            self._look()
            return {
                "free_bytes": self._free_bytes,
                "watermark_bytes": self._watermark_bytes,
                "low": self._is_low,
                "ballast": self._has_reserve(self._reserve_bytes),
            }

    @property
    def _watermark_bytes(self) -> int:
        return min(self._min_free_bytes, int(self._total_bytes * _WATERMARK_SHARE))

    @property
    def _reserve_bytes(self) -> int:
        return min(self._ballast_bytes, int(self._total_bytes * _BALLAST_SHARE))

    def _has_reserve(self, wanted: int) -> bool:
        """Say whether the reserve lies there whole; a torn one is made anew."""
        try:
            found = self._file.stat()
        except OSError:
            return False
        return wanted > 0 and found.st_blocks * 512 >= wanted

    def _allocate(self, size: int) -> None:
        fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            else:
                _write_zeros(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
        fsync_dir(self._folder)

    def _look(self) -> None:
        now = self._now_s()
        if self._looked_at is not None and now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        try:
            found = os.statvfs(self._folder)
        except OSError:
            # Unknown is not full: the ledger itself says so in time.
            self._free_bytes = None
            return
        self._total_bytes = found.f_blocks * found.f_frsize
        self._free_bytes = found.f_bavail * found.f_frsize
        if self._free_bytes < self._watermark_bytes:
            self._is_low = True
        elif self._free_bytes >= self._watermark_bytes * _RISE:
            self._is_low = False


def _write_zeros(fd: int, size: int) -> None:
    """Fill a file where the system cannot allocate (macOS)."""
    block = bytes(1 << 16)
    while size > 0:
        size -= os.write(fd, block[: min(size, len(block))])
