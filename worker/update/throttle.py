"""How fast a download may be: a token bucket on a clock that never jumps."""

import time
from collections.abc import Callable

_BURST_S = 0.25
"""How much unused time may be made up for at once."""


class Throttle:
    """Spreads bytes over time. Never waits: it says how long to.

    Args:
        bytes_per_s: the limit, on average; None for none.
        clock: seconds, monotonic.
    """

    def __init__(
        self, bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = bytes_per_s
        self._clock = clock
        self._free_at = clock()
        """When all bytes taken so far are paid for."""

    def choose_piece(self, largest: int) -> int:
        """Return how much to read at once, so that the waits between are short."""
        if self._rate is None:
            return largest
        return max(1, min(largest, int(self._rate * _BURST_S)))

    def take(self, count: int) -> float:
        """Account for bytes that came; return the seconds to wait before the next ones."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._free_at = max(self._free_at, now - _BURST_S) + count / self._rate
        return max(0.0, self._free_at - now)
