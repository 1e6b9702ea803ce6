"""A duration as a person types it."""

import re

_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration(text: str) -> float:
    """Return `90`, `90s`, `10m`, `2h` or `1d` in seconds.

    Raises:
        ValueError: it is no such duration, or zero.
    """
    match = _PATTERN.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        msg = f"{text!r} is no duration such as 90s, 10m or 2h"
        raise ValueError(msg)
    return seconds
