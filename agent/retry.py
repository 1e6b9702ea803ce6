"""How long a job waits before it is tried again: exponential back-off with jitter.

Pure. Two classes: an attempt that was *interrupted* (its worker vanished) is
tried at once the first time, because mostly the box and not the job was the
cause; one that ended in a *retryable error* waits from the first time on.
"""

import random
from enum import StrEnum

_LARGEST_POWER = 30


class RetryClass(StrEnum):
    """Why a job is tried again."""

    INTERRUPTED = "interrupted"
    ERROR = "error"


def compute_delay_ms(
    kind: RetryClass,
    count: int,
    base_s: float,
    max_s: float,
    jitter: float | None = None,
) -> int:
    """Return the wait in milliseconds.

    Args:
        kind: why it is tried again.
        count: how often this has happened to the job, this time included.
        base_s: the first wait.
        max_s: no wait is longer.
        jitter: 0–1, for tests; random otherwise. The wait is between half and all of its value,
            so that jobs interrupted together do not come back together.
    """
    power = count - (2 if kind is RetryClass.INTERRUPTED else 1)
    if power < 0:
        return 0
    share = random.random() if jitter is None else jitter
    whole_s = min(max_s, base_s * 2.0 ** min(power, _LARGEST_POWER))
    return int(1000 * whole_s * (0.5 + share / 2))
