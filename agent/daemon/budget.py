"""A budget of events: a flood of bad input must not become a flood of reports.

So many events a minute are written one by one; what is over is counted, and the
count is one event when the minute is over. Nothing is hidden, and the disk of a
box is not written full by whoever sends it junk.
"""

from agent.clock import Clock

_MINUTE_MS = 60_000


class EventBudget:
    """Counts the events of the present minute, by the boot clock.

    Args:
        clock: boot time.
        per_minute: how many may be written.
    """

    def __init__(self, clock: Clock, per_minute: int) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._since_ms = clock.boot_ms()
        self._used = 0
        self._over: dict[str, int] = {}

    def take(self, code: str) -> bool:
        """Ask for one event; False where it is counted instead."""
        if self._used < self._per_minute:
            self._used += 1
            return True
        self._over[code] = self._over.get(code, 0) + 1
        return False

    def count(self, code: str, times: int) -> None:
        """Count what was never looked at."""
        if times:
            self._over[code] = self._over.get(code, 0) + times

    def settle(self) -> dict[str, int] | None:
        """Begin a new minute where one is over; return what was counted in it, if anything."""
        now_ms = self._clock.boot_ms()
        if now_ms - self._since_ms < _MINUTE_MS:
            return None
        self._since_ms, self._used = now_ms, 0
        over, self._over = self._over, {}
        return over or None
