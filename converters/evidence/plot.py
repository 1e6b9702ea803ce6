"""The picture of a conversion: how accurate, how fast and how large each artifact is, as SVG.

Owns the scales and the drawing. The SVG stands in a page: colours and fonts are the page's
classes, so that it is right in the light and in the dark. Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 920.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 40.0, 62.0, 62.0
_HEADING = 14.0
_SQNR_MIN, _SQNR_MAX = 0.0, 100.0
"""dB; what is outside is drawn at the edge."""
_RADIUS_MIN, _RADIUS_MAX = 10.0, 34.0
_CLEARANCE = 1.0
_PASSES = 200
_STEPS = (1.0, 2.0, 5.0)
_SPREAD = 1.5
"""Least ratio of the time axis's ends to the measured ones."""


@dataclass(frozen=True)
class Mark:
    """One artifact on one runtime."""

    number: int
    """As in the table."""
    title: str
    """Shown where the pointer rests."""
    latency_ms: float
    sqnr_db: float
    """Infinite where the answers are equal."""
    size_bytes: int
    kind: int
    """Index of its colour: the format."""
    is_ok: bool


@dataclass
class _Circle:
    mark: Mark
    x: float
    y: float
    radius: float
    at: tuple[float, float]
    """Where its figures are; the circle may stand beside."""


def draw_plot(marks: Sequence[Mark]) -> str:
    """Return an `<svg>`: latency from left to right, signal to noise upwards, size as area.

    Args:
        marks: at least one.
    """
    low, high = _find_range([mark.latency_ms for mark in marks])
    largest = max(mark.size_bytes for mark in marks)
    circles = []
    for mark in marks:
        x, y = _place_x(mark.latency_ms, low, high), _place_y(mark.sqnr_db)
        radius = max(_RADIUS_MIN, _RADIUS_MAX * math.sqrt(mark.size_bytes / max(1, largest)))
        circles.append(_Circle(mark, x, y, radius, (x, y)))
    _push_apart(circles)
    parts = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" '
        'aria-label="Accuracy over latency; the area of a circle is the size of the file">',
        *_draw_axes(low, high),
        # The large ones first, so that none hides another.
        *(_draw_circle(one) for one in sorted(circles, key=lambda one: -one.radius)),
        "</svg>",
    ]
    return "".join(parts)


def _find_range(values: Sequence[float]) -> tuple[float, float]:
    return min(values) / _SPREAD, max(values) * _SPREAD


def _place_x(latency_ms: float, low: float, high: float) -> float:
    share = math.log(latency_ms / low) / math.log(high / low)
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _place_y(sqnr_db: float) -> float:
    kept = min(max(sqnr_db, _SQNR_MIN), _SQNR_MAX)
    share = (kept - _SQNR_MIN) / (_SQNR_MAX - _SQNR_MIN)
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _push_apart(circles: Sequence[_Circle]) -> None:
    """Move circles until their numbers can be read: sideways and up, never over the axes."""
    for _ in range(_PASSES):
        for index, one in enumerate(circles):
            for other in circles[index + 1 :]:
                _push_pair(one, other)


def _push_pair(one: _Circle, other: _Circle) -> None:
    # Their numbers must not meet; the rims may.
    wanted = 2 * _RADIUS_MIN + _CLEARANCE
    dx, dy = other.x - one.x, other.y - one.y
    distance = math.hypot(dx, dy)
    if distance >= wanted:
        return
    if distance < _CLEARANCE:
        # One on the other, or nearly: a direction of its own for each, downwards too.
        dx, dy = math.cos(other.mark.number), math.sin(other.mark.number)
        distance = 1.0
    shift = (wanted - distance) / 2
    for circle, sign in ((one, -1), (other, 1)):
        circle.x += sign * shift * dx / distance
        circle.y += sign * shift * dy / distance
        circle.x = min(max(circle.x, _LEFT + _RADIUS_MIN), _WIDTH - _RIGHT - _RADIUS_MIN)
        circle.y = min(max(circle.y, _TOP), _HEIGHT - _BOTTOM)


def _draw_circle(circle: _Circle) -> str:
    mark = circle.mark
    state = "" if mark.is_ok else " bad"
    x, y = circle.at
    leader = ""
    if math.hypot(circle.x - x, circle.y - y) > _RADIUS_MIN:
        leader = f'<path class="leader" d="M{x:.1f} {y:.1f}L{circle.x:.1f} {circle.y:.1f}"/>'
    return (
        f'{leader}<g class="mark kind{mark.kind}{state}"><title>{escape(mark.title)}</title>'
        f'<circle cx="{circle.x:.1f}" cy="{circle.y:.1f}" r="{circle.radius:.1f}"/>'
        f'<text x="{circle.x:.1f}" y="{circle.y + 4:.1f}">{mark.number}</text></g>'
    )


def _draw_axes(low: float, high: float) -> list[str]:
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for level in range(round(_SQNR_MIN), round(_SQNR_MAX) + 1, 20):
        y = _place_y(level)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        text = f"≥ {level}" if level == _SQNR_MAX else f"≤ {level}" if not level else str(level)
        parts.append(f'<text class="tick left" x="{left - 8}" y="{y + 4:.1f}">{text}</text>')
    for value in _find_ticks(low, high):
        x = _place_x(value, low, high)
        parts.append(f'<path class="grid" d="M{x:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 18}">{value:g}</text>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="axis" x="{middle:g}" y="{_HEIGHT - 18:g}">'
        "p50 of a run of one row, ms (fast ones left)</text>"
    )
    parts.append(
        f'<text class="axis start" x="4" y="{_HEADING:g}">'
        "signal to noise, dB (more is closer to the original)</text>"
    )
    return parts


def _find_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 of each power of ten within the range."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [step * 10.0**power for power in range(first, last + 1) for step in _STEPS]
    return [value for value in every if low <= value <= high]
