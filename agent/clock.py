"""Time, as the rest of Edgeward asks for it.

Owns the two clocks: wall time for people and the wire, and the boot clock
(CLOCK_BOOTTIME, which counts suspend and never jumps) for every deadline and
lease. Code that decides by time takes a `Clock`, so tests inject their own.
"""

import time
import uuid
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


class Clock(Protocol):
    """What decisions may ask about time."""

    def wall_ms(self) -> int:
        """Return milliseconds since 1970 UTC; may jump."""
        ...

    def boot_ms(self) -> int:
        """Return milliseconds since this machine booted; never jumps, counts suspend."""
        ...

    def boot_id(self) -> str:
        """Return the id of this boot; `boot_ms` values compare only within one."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def wall_ms(self) -> int:
        """Return milliseconds since 1970 UTC."""
        return time.time_ns() // 1_000_000

    def boot_ms(self) -> int:
        """Return milliseconds on CLOCK_BOOTTIME, or on the monotonic clock where there is none."""
        clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        return time.clock_gettime_ns(clock) // 1_000_000

    def boot_id(self) -> str:
        """Return the kernel's boot id, or one made for this process where there is none."""
        return _read_boot_id()


@cache
def _read_boot_id() -> str:
    try:
        return _BOOT_ID_FILE.read_text().strip()
    except OSError:
        return str(uuid.uuid4())


@lru_cache(maxsize=256)
def format_ms(wall_ms: int) -> str:
    """Return `2026-08-22T10:00:00.000Z` for milliseconds since 1970."""
    text = datetime.fromtimestamp(wall_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def parse_at(text: str) -> int:
    """Return milliseconds since 1970 for an RFC 3339 time; one without a zone is UTC.

    Raises:
        ValueError: it is no such time.
    """
    at = datetime.fromisoformat(text)
    return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
