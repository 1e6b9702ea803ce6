"""What a rollout is to do: which device is in which group, and when to go on or to stop.

Pure. Groups are shares of the whole fleet that add up: `1%,10%,100%` means one percent, then
up to ten, then all. Devices are put in one order, and a group is the next piece of it:

- within a hardware class by a hash of the rollout's id and the device, so that the same few
  do not go first each time; those that are offline when the rollout starts come last;
- the classes are interleaved by their sizes, and the first device of each comes before the
  second of any.

Invariants: the first group has a member of every class; every prefix of the order has each
class in proportion, to within one device; the same input gives the same groups.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from math import ceil

from console.errors import RolloutPlanError

SMALL_GROUP = 10
"""Members of a class in a group below which one failure is enough to stop."""
_FAILURES_SMALL, _FAILURES = 1, 2
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True)
class Share:
    """How far a group goes: a part of the fleet, or a number of devices."""

    part: Fraction | None = None
    count: int = 0

    def size_of(self, total: int) -> int:
        """Return up to which device of `total` the group goes."""
        wanted = self.count if self.part is None else ceil(self.part * total)
        return min(total, wanted)


@dataclass(frozen=True)
class Thresholds:
    """When a class goes on to its next group, and when it stops."""

    success: Fraction
    """Of the members that can be reached, so many must have the release."""
    error: Fraction
    """Of the members that can be reached, so many failures stop the class."""
    min_failures: int | None = None
    """Fewer failures than these never stop a class. None: 1 in groups below 10, else 2."""

    def failures_of(self, reachable: int) -> int:
        """Return how many failures among so many members stop a class."""
        fewest = self.min_failures
        if fewest is None:
            fewest = _FAILURES_SMALL if reachable < SMALL_GROUP else _FAILURES
        return max(fewest, ceil(self.error * reachable), 1)


@dataclass(frozen=True)
class Invited:
    """A device that may take part."""

    device: str
    hardware_class: str
    is_online: bool = True


def parse_groups(text: str) -> tuple[Share, ...]:
    """Return the groups of `1%,10%,100%` or `5,50,all`.

    Raises:
        RolloutPlanError: it is another form, or a group is smaller than the one before.
    """
    shares = tuple(_parse_share(part.strip()) for part in text.split(","))
    for before, after in pairwise(shares):
        is_kind = (before.part is None) == (after.part is None)
        if is_kind and (after.part or after.count) <= (before.part or before.count):
            msg = f"groups {text!r}: each one includes the one before, so it must be larger"
            raise RolloutPlanError(msg)
        if before.part == 1:
            msg = f"groups {text!r}: nothing can come after all devices"
            raise RolloutPlanError(msg)
    return shares


def _parse_share(text: str) -> Share:
    if text == "all":
        return Share(Fraction(1))
    if "%" in text:
        return Share(parse_percent(text, lowest=Fraction(1, 10_000)))
    if text.isascii() and text.isdigit() and int(text) > 0:
        return Share(count=int(text))
    msg = f"group {text!r}: give a percentage such as 10%, a number of devices, or all"
    raise RolloutPlanError(msg)


def parse_percent(text: str, lowest: Fraction = Fraction(0)) -> Fraction:
    """Return `95%` as 19/20.

    Raises:
        RolloutPlanError: it is no percentage from `lowest` to 100%.
    """
    match = _PERCENT.fullmatch(text.strip())
    part = Fraction(match[1]) / 100 if match else Fraction(-1)
    if not lowest <= part <= 1:
        msg = f"{text!r} is no percentage such as 95%"
        raise RolloutPlanError(msg)
    return part


def assign_groups(
    rollout_id: str, devices: Iterable[Invited], shares: Sequence[Share]
) -> dict[str, int]:
    """Return the group of each device, counted from 1.

    A device behind the last share is in none. A share that adds no device is no group.
    """
    ordered = _put_in_order(rollout_id, devices)
    classes = len({item.hardware_class for item in ordered})
    groups: dict[str, int] = {}
    done = number = 0
    for share in shares:
        end = share.size_of(len(ordered))
        if not done:
            end = max(end, classes)
        if end <= done:
            continue
        number += 1
        groups |= {item.device: number for item in ordered[done:end]}
        done = end
    return groups


def _put_in_order(rollout_id: str, devices: Iterable[Invited]) -> list[Invited]:
    by_class: dict[str, list[Invited]] = defaultdict(list)
    for item in devices:
        by_class[item.hardware_class].append(item)
    places: list[tuple[Fraction, str, Invited]] = []
    for members in by_class.values():
        members.sort(key=lambda item: (not item.is_online, _hash(rollout_id, item.device)))
        places += [
            (Fraction(at, len(members)), _hash(rollout_id, item.device), item)
            for at, item in enumerate(members)
        ]
    return [item for _, _, item in sorted(places, key=lambda place: place[:2])]


def _hash(rollout_id: str, device: str) -> str:
    return sha256(f"{rollout_id}\0{device}".encode()).hexdigest()
