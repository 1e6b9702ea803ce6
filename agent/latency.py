"""Latencies as counts by size: cheap to add to, exact enough for a percentile.

Workers count, the agent compares; this is the form between them. Pure.

Invariant: a step is at most 1/8 wider than where it begins, so a percentile is at most so far off.
"""

from collections.abc import Mapping

STEPS = 8
"""Steps within a factor of 2."""


def find_step(ns: int) -> int:
    """Return the step of a latency in nanoseconds."""
    bits = max(ns, 1).bit_length()
    shift = bits - 4
    fraction = (ns >> shift if shift > 0 else ns << -shift) & (STEPS - 1)
    return bits * STEPS + fraction


def compute_percentile_ms(counts: Mapping[int, int], share: float) -> float | None:
    """Return the latency below which so many of the requests stayed, ms; None without any.

    Args:
        counts: requests by `find_step`.
        share: 0–1.
    """
    left = share * sum(counts.values())
    if left <= 0:
        return None
    for step in sorted(counts):
        left -= counts[step]
        if left <= 0:
            bits, fraction = divmod(step, STEPS)
            return float((STEPS + fraction + 1) * 2.0 ** (bits - 4) / 1e6)
    return None
