"""Fault points: named places at which a test ends this process.

`EDGEWARD_FAULT=name` ends the process by SIGKILL when it passes the point of
that name; `name:3` at the third passing. In a test build only: that is a
checkout with its tests beside it. An installed Edgeward ignores the variable.

`POINTS` is the list: its first word says which part of the box passes the
point, its second what has just been done there. tests/fault/test_fault_points.py
ends the box at each of them, and a test compares the list with the code.
"""

import os
import signal
from pathlib import Path

VARIABLE = "EDGEWARD_FAULT"
POINTS = (
    "intake.received",
    "intake.written",
    "intake.committed",
    "intake.acked",
    "dispatch.written",
    "dispatch.committed",
    "dispatch.sent",
    "outcome.received",
    "outcome.written",
    "outcome.committed",
    "outcome.acked",
    "outbox.numbered",
    "outbox.published",
    "outbox.acknowledged",
    "outbox.forgotten",
    "outbox.bounded",
    "sync.answered",
    "retention.forgotten",
    "recovery.migrated",
    "recovery.counted",
    "recovery.started",
    "worker.received",
    "worker.ran",
    "worker.sent",
    "inbox.claimed",
    "inbox.submitted",
    "inbox.delivered",
    "inbox.explained",
    "inbox.moved",
    "spool.taken",
    "spool.posted",
    "spool.removed",
)
UPDATE_POINTS = (
    "update.fetching",
    "update.fetched",
    "update.staging",
    "update.told",
    "update.staged",
    "update.activating",
    "update.shared",
    "update.switched",
    "update.committing",
    "update.unshared",
    "update.committed",
    "update.rolling_back",
    "update.restored",
    "update.reset",
    "update.rolled_back",
)
"""Those that only an update passes; tests/fault/test_update_faults.py ends the box at each."""


class _Fault:
    """The one armed point of this process."""

    def __init__(self, text: str) -> None:
        self.point, _, count = text.partition(":")
        self.left = int(count) if count.isdigit() else 1


def _arm() -> _Fault | None:
    text = os.environ.get(VARIABLE)
    is_test_build = (Path(__file__).parents[1] / "tests" / "fault").is_dir()
    return _Fault(text) if text and is_test_build else None


_ARMED = _arm()


def reach(point: str) -> None:
    """Pass a fault point; ends the process if this is the one."""
    if _ARMED is not None and _ARMED.point == point:
        _ARMED.left -= 1
        if _ARMED.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
