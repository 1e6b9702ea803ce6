"""Maintenance windows: when they are open, by tables typed out by hand."""

from datetime import datetime

import pytest
from pydantic import ValidationError

from agent.window import BoxView, Closed, Window, find_closed

NIGHTLY = Window(cron="0 3 * * *", duration_s=3600)
OVER_MIDNIGHT = Window(cron="0 22 * * *", duration_s=4 * 3600)
FRIDAYS = Window(cron="30 1 * * 5", duration_s=1800)
LONG = Window(cron="0 0 1 * *", duration_s=31 * 86_400)
QUARTERS = Window(cron="*/15 * * * *", duration_s=60)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.mark.parametrize(
    ("window", "now", "wait_s"),
    [
        (NIGHTLY, "2026-11-22 03:00:00", 0),
        (NIGHTLY, "2026-11-22 03:59:59", 0),
        (NIGHTLY, "2026-11-22 04:00:00", 23 * 3600),
        (NIGHTLY, "2026-11-22 02:59:59", 1),
        (NIGHTLY, "2026-12-31 12:00:00", 15 * 3600),
        (OVER_MIDNIGHT, "2026-11-22 21:59:00", 60),
        (OVER_MIDNIGHT, "2026-11-22 22:00:00", 0),
        (OVER_MIDNIGHT, "2026-11-23 00:00:00", 0),
        (OVER_MIDNIGHT, "2026-11-23 01:59:59", 0),
        (OVER_MIDNIGHT, "2026-11-23 02:00:00", 20 * 3600),
        (FRIDAYS, "2026-11-27 01:30:00", 0),
        (FRIDAYS, "2026-11-27 02:00:00", 7 * 86_400 - 1800),
        (FRIDAYS, "2026-11-26 01:45:00", 86_400 - 900),
        (LONG, "2026-11-15 12:00:00", 0),
        (QUARTERS, "2026-11-22 10:15:30", 0),
        (QUARTERS, "2026-11-22 10:16:00", 14 * 60),
        (Window(), "2026-11-22 10:16:00", 0),
    ],
)
def test_window_opens_by_its_cron_expression_for_its_duration(
    window: Window, now: str, wait_s: float
) -> None:
    closed = find_closed(window, at(now), BoxView())
    assert (closed.wait_s if closed else 0) == wait_s


@pytest.mark.parametrize(
    ("window", "box", "opens"),
    [
        (Window(idle=True), BoxView(is_idle=True), True),
        (Window(idle=True), BoxView(is_idle=False), False),
        (Window(idle=True), BoxView(is_idle=None), True),
        (Window(), BoxView(is_idle=False, temperature_c=99, is_on_mains=False), True),
        (Window(max_temperature_c=70), BoxView(temperature_c=70), True),
        (Window(max_temperature_c=70), BoxView(temperature_c=70.1), False),
        (Window(max_temperature_c=70), BoxView(temperature_c=None), True),
        (Window(on_mains=True), BoxView(is_on_mains=True), True),
        (Window(on_mains=True), BoxView(is_on_mains=False), False),
        (Window(on_mains=True), BoxView(is_on_mains=None), True),
    ],
)
def test_predicates_hold_back_only_what_they_can_tell(
    window: Window, box: BoxView, opens: bool
) -> None:
    closed = find_closed(window, at("2026-11-22 12:00:00"), box)
    assert closed is None if opens else isinstance(closed, Closed)


def test_open_window_with_a_hot_box_is_looked_at_again_soon() -> None:
    hot = Window(cron="0 3 * * *", max_temperature_c=70)
    closed = find_closed(hot, at("2026-11-22 03:10:00"), BoxView(temperature_c=80))
    assert closed is not None
    assert closed.wait_s == 30
    assert "80 °C" in closed.why


@pytest.mark.parametrize(
    "cron",
    [
        "",
        "* * * *",
        "* * * * * *",
        "61 * * * *",
        "0 0 31 2 *",
        "hourly",
        "0 3 * * * * *",
        "@daily; rm",
    ],
)
def test_what_is_no_cron_expression_is_refused(cron: str) -> None:
    with pytest.raises(ValidationError):
        Window(cron=cron)


@pytest.mark.parametrize("duration_s", [0, -1, 32 * 86_400, float("nan"), float("inf")])
def test_window_without_a_usable_duration_is_refused(duration_s: float) -> None:
    with pytest.raises(ValidationError):
        Window(cron="0 3 * * *", duration_s=duration_s)
