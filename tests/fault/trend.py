"""Trends in samples: the slope of a series, how sure it is, and a picture.

Pure. The slope comes from least squares. Its standard error is widened by the residuals'
correlation from one sample to the next: memory goes in steps, and neighbours that say the
same thing are not two witnesses.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

_BARS = "▁▂▃▄▅▆▇█"
_HOUR_S = 3600.0
_SURE = 2.0
# Less than this over the whole run is no trend worth a name, however even the samples are.
_NEGLIGIBLE = 0.01
_MOST_CORRELATED = 0.9
_WIDTH, _HEIGHT, _LEFT = 640, 110, 200


@dataclass(frozen=True)
class Trend:
    """What a series did."""

    first: float
    last: float
    least: float
    most: float
    slope_per_h: float
    error_per_h: float
    """Standard error of the slope."""
    change: float
    """What the slope makes of the whole run, as a share of the mean."""

    @property
    def is_within_noise(self) -> bool:
        """Whether the slope may as well be none, or comes to less than 1 % over the run."""
        unsure = abs(self.slope_per_h) <= _SURE * self.error_per_h
        return unsure or abs(self.change) <= _NEGLIGIBLE

    def to_json(self) -> dict[str, float | bool]:
        """Return it as a part of a JSON document."""
        return {
            "first": round(self.first, 2),
            "last": round(self.last, 2),
            "min": round(self.least, 2),
            "max": round(self.most, 2),
            "slope_per_h": round(self.slope_per_h, 3),
            "standard_error_per_h": round(self.error_per_h, 3),
            "change_percent": round(100 * self.change, 2),
            "within_noise": self.is_within_noise,
        }


def find_trend(times_s: Sequence[float], values: Sequence[float]) -> Trend:
    """Return the trend of a series; with fewer than three samples there is none."""
    slope, error = _fit(times_s, values)
    mean = sum(values) / len(values)
    duration_s = times_s[-1] - times_s[0]
    return Trend(
        values[0],
        values[-1],
        min(values),
        max(values),
        slope * _HOUR_S,
        error * _HOUR_S,
        slope * duration_s / mean if mean else 0.0,
    )


def _fit(times_s: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return slope and standard error, both per second."""
    count = len(values)
    if count < 3:
        return 0.0, 0.0
    middle_s, mean = sum(times_s) / count, sum(values) / count
    spread = sum((at - middle_s) ** 2 for at in times_s)
    slope = (
        sum((at - middle_s) * (value - mean) for at, value in zip(times_s, values, strict=True))
        / spread
    )
    rest = [
        value - mean - slope * (at - middle_s) for at, value in zip(times_s, values, strict=True)
    ]
    square = sum(item * item for item in rest)
    error = math.sqrt(square / (count - 2) / spread)
    correlation = sum(a * b for a, b in itertools.pairwise(rest)) / square if square else 0
    correlation = min(max(correlation, 0.0), _MOST_CORRELATED)
    return slope, error * math.sqrt((1 + correlation) / (1 - correlation))


def draw_sparkline(values: Sequence[float], width: int = 60) -> str:
    """Return a series as a line of bars, from its least to its most."""
    if not values:
        return ""
    step = max(1.0, len(values) / width)
    chosen = [values[int(index * step)] for index in range(int(len(values) / step))]
    least, most = min(chosen), max(chosen)
    scale = (len(_BARS) - 1) / (most - least) if most > least else 0.0
    return "".join(_BARS[round((value - least) * scale)] for value in chosen)


def draw_svg(times_s: Sequence[float], series: dict[str, Sequence[float]]) -> str:
    """Return all series as one picture, one below the other."""
    rows = [
        _draw_row(number, name, times_s, values)
        for number, (name, values) in enumerate(series.items())
    ]
    height = _HEIGHT * len(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + 20}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(rows)}</svg>\n'
    )


def _draw_row(number: int, name: str, times_s: Sequence[float], values: Sequence[float]) -> str:
    top, room = number * _HEIGHT + 15, _HEIGHT - 30
    least, most = min(values), max(values)
    height = room / (most - least) if most > least else 0.0
    width = _WIDTH / max(1e-9, times_s[-1] - times_s[0])
    points = " ".join(
        f"{_LEFT + (at - times_s[0]) * width:.1f},{top + room - (value - least) * height:.1f}"
        for at, value in zip(times_s, values, strict=True)
    )
    return (
        f'<text x="4" y="{top + room / 2}">{name}</text>'
        f'<text x="{_LEFT - 6}" y="{top + 8}" text-anchor="end">{most:g}</text>'
        f'<text x="{_LEFT - 6}" y="{top + room}" text-anchor="end">{least:g}</text>'
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{room}" fill="none" stroke="#ccc"/>'
        f'<polyline points="{points}" fill="none" stroke="#36c" stroke-width="1.5"/>'
    )
