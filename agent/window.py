"""Maintenance windows: when work that disturbs may run.

A window is a cron expression (the local time at which it opens), a duration,
and predicates about the box. Pure apart from the cron library: the time and
what the box looks like are given.

Source: docs/protocol.md, "Maintenance windows".
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Openings are looked for this far back at least, so that daylight saving cannot hide one.
_MARGIN = timedelta(hours=2)
_CRON_FIELDS = 5
# How soon a closed predicate is looked at again.
RECHECK_S = 30.0


class Window(BaseModel):
    """When a job may be started. Once started it runs to its end."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    cron: str | None = Field(default=None, max_length=128)
    duration_s: float = Field(default=3600.0, gt=0, le=31 * 86_400)
    idle: bool = False
    max_temperature_c: float | None = None
    on_mains: bool = False
    min_free_mb: float | None = Field(default=None, gt=0)

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str | None) -> str | None:
        if cron is not None:
            # The library knows a sixth field, seconds: 7,200 openings to look through each time.
            if len(cron.split()) != _CRON_FIELDS:
                msg = f"{cron!r} is no cron expression: it has five fields"
                raise ValueError(msg)
            _iterate(cron, datetime(2026, 1, 1))
        return cron


@dataclass(frozen=True)
class BoxView:
    """What predicates ask about the box; None where it cannot be told."""

    is_idle: bool | None = None
    """Whether nothing but this work would run."""
    temperature_c: float | None = None
    is_on_mains: bool | None = None
    free_mb: float | None = None
    """On the disk of the data folder, 10⁶ bytes."""
    held: str | None = None
    """Who holds a lease on the box, and why; None where nobody does."""


@dataclass(frozen=True)
class Closed:
    """A window is closed now."""

    wait_s: float
    """When to look again."""
    why: str


def _iterate(cron: str, start: datetime) -> "object":
    # Imported where a window is used: most boxes never have one.
    from cronsim import CronSim, CronSimError

    try:
        return CronSim(cron, start)
    except CronSimError as exc:
        msg = f"{cron!r} is no cron expression: {exc}"
        raise ValueError(msg) from exc


def find_closed(window: Window, now: datetime, box: BoxView) -> Closed | None:
    """Return why a window is closed and when to look again, or None where it is open.

    Args:
        window: the window.
        now: the box's local time, without a zone: windows are for the people near the box.
        box: what the box looks like. What it cannot tell does not hold work back.
    """
    wait_s = _find_wait(window, now)
    if wait_s > 0:
        opens = (now + timedelta(seconds=wait_s)).isoformat(sep=" ", timespec="minutes")
        return Closed(wait_s, f"its window opens at {opens} local time")
    for why in _list_obstacles(window, box):
        return Closed(RECHECK_S, why)
    return None


def _find_wait(window: Window, now: datetime) -> float:
    """Return the seconds until the next opening, 0 while one lasts."""
    if window.cron is None:
        return 0.0
    duration = timedelta(seconds=window.duration_s)
    openings = _iterate(window.cron, now - duration - _MARGIN)
    for opening in openings:  # type: ignore[attr-defined]
        if opening > now:
            return float((opening - now).total_seconds())
        if now < opening + duration:
            return 0.0
    return float(duration.total_seconds())


def _list_obstacles(window: Window, box: BoxView) -> list[str]:
    obstacles = []
    if window.idle and box.is_idle is False:
        obstacles.append("it waits until the box is idle")
    hot, limit = box.temperature_c, window.max_temperature_c
    if limit is not None and hot is not None and hot > limit:
        obstacles.append(f"the box has {hot:g} °C, over its limit of {limit:g} °C")
    if window.on_mains and box.is_on_mains is False:
        obstacles.append("it waits until the box is on mains power")
    free, least = box.free_mb, window.min_free_mb
    if least is not None and free is not None and free < least:
        obstacles.append(f"the disk has {free:.0f} MB left, below its limit of {least:g} MB")
    if box.held is not None:
        obstacles.append(f"the box is not to be disturbed: {box.held}")
    return obstacles
