"""Commands that wait for their answer: when each is sent, and sent again.

Pure: told the time, asked what is due. A command is sent until a state of its job
answers it, with a growing wait in between, so that a device that is slow is not buried.

Invariants: at most `window` submits are under way, because a broker drops what goes
beyond its queue without a word (mosquitto: 1,000 messages) and PUBACKs it all the same;
the others wait for their turn, in order. While the device is known to be away each
command is sent once, and rarely again: the broker keeps it, and copies would only fill
its queue.

Source: docs/protocol.md, "Jobs"; design notes "pitfalls", paho-mqtt.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random

from console.submission import Command

FIRST_WAIT_S = 3.0
LONGEST_WAIT_S = 60.0
WINDOW = 200
"""A fifth of mosquitto's default queue: room for cancels, acks and a second console."""
_AWAY_WAIT_S = 600.0
_JITTER = 0.25
"""Waits differ by up to this part, so that many commands do not come in one burst for ever."""


@dataclass
class Pending:
    """One command that is not answered."""

    command: Command
    is_cancel: bool = False
    """A cancel is answered by an end only: a running job's state says nothing about it."""
    wait_s: float = FIRST_WAIT_S
    due_s: float = float("-inf")
    sent_s: float | None = None


class ResendQueue:
    """The unanswered commands of one device, in the order in which they were given.

    Args:
        window: how many may be under way.
        random: the source of jitter.
    """

    def __init__(self, window: int = WINDOW, random: Random | None = None) -> None:
        self._window = window
        self._random = random or Random()
        self._pending: dict[str, Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._pending

    def put(self, command: Command, *, is_cancel: bool = False) -> None:
        """Add a command. A cancel takes the place of a submit, and not the other way."""
        known = self._pending.get(command.job_id)
        if known is not None and known.is_cancel and not is_cancel:
            return
        self._pending[command.job_id] = Pending(command, is_cancel)

    def drop(self, job_id: str) -> None:
        """Forget a job's command: it is answered."""
        self._pending.pop(job_id, None)

    def answer(self, job_id: str, *, by_end: bool) -> None:
        """Take note of a state: it answers a submit, and a cancel where it is an end."""
        pending = self._pending.get(job_id)
        if pending is not None and (by_end or not pending.is_cancel):
            del self._pending[job_id]

    def hurry(self, sent_before_s: float = float("inf")) -> None:
        """Make what is under way due at once: the device, or our connection, is back.

        Args:
            sent_before_s: what went out later is on its way.
        """
        for pending in self._active():
            pending.wait_s = FIRST_WAIT_S
            if pending.sent_s is not None and pending.sent_s <= sent_before_s:
                pending.due_s = float("-inf")

    def _active(self) -> Iterator[Pending]:
        return islice(self._pending.values(), self._window)

    def find_active(self) -> list[Pending]:
        """Return the commands under way or next to go."""
        return list(self._active())

    def take_due(
        self, now_s: float, *, is_away: bool = False, limit: int | None = None
    ) -> list[Pending]:
        """Return what is to be sent now, and expect it to be sent.

        Args:
            now_s: the time on a monotonic clock.
            is_away: whether the device is known to be offline or stopped.
            limit: how many at most.
        """
        due = [item for item in self._active() if item.due_s <= now_s][:limit]
        for item in due:
            self.mark_sent(item, now_s, is_away=is_away)
        return due

    def mark_sent(self, item: Pending, now_s: float, *, is_away: bool = False) -> None:
        """Take note that a command went out, and set when it goes out again."""
        item.sent_s = now_s
        wait_s = _AWAY_WAIT_S if is_away else item.wait_s
        item.due_s = now_s + wait_s * self._random.uniform(1 - _JITTER, 1.0)
        if not is_away:
            item.wait_s = min(item.wait_s * 2, LONGEST_WAIT_S)
