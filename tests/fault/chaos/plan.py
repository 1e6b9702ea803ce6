"""What a run does, as far as its seed decides it: jobs, faults, and when.

Pure. A plan is a row of acts. An act submits its share of the jobs in bursts and, among
them, breaks something: kills alone or in volleys, or a disturbance (a stopped process, a
broker that goes and comes, a bad link) with or without a kill in it. One act cuts the device
off for longer.

The same seed and numbers give the same plan; what then happens depends on the machine.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from tests.fault.chaos.cast import MEMBERS
from tests.fault.chaos.proxy import Link


class Kind(StrEnum):
    """Sorts of jobs."""

    GOOD = "good"
    BATCH = "batch"
    SLOW = "slow"
    BAD_INPUT = "bad_input"
    UNKNOWN_MODEL = "unknown_model"
    TTL = "ttl"
    EXPIRING = "expiring"
    """With a message expiry of a second or two; sent also while the device is offline."""
    LATE = "late"
    """Past its `not_after` when it is submitted."""
    CANCEL_FIRST = "cancel_first"
    CANCEL_LATER = "cancel_later"
    CONFLICT = "conflict"
    """The same id comes again with another body."""
    ENDLESS = "endless"
    POISON = "poison"


SHARES: dict[Kind, float] = {
    Kind.GOOD: 0.62,
    Kind.BATCH: 0.06,
    Kind.SLOW: 0.08,
    Kind.BAD_INPUT: 0.03,
    Kind.UNKNOWN_MODEL: 0.01,
    Kind.TTL: 0.04,
    Kind.EXPIRING: 0.04,
    Kind.LATE: 0.01,
    Kind.CANCEL_FIRST: 0.03,
    Kind.CANCEL_LATER: 0.05,
    Kind.CONFLICT: 0.03,
}
"""How many of all jobs are of each sort."""
_RARE_EVERY = 500
"""One job in so many never ends by itself, and one kills its worker: each costs a restart."""
WIRE_LINKS = (Link.LOST, Link.LOSSY)
"""What happens to a link only where the agent has a network of its own."""
_KILLS_A_ROUND = 13
"""For so many kills there is one stopped process, one bad link and one wrong clock, and either a
flap or a broker without memory."""
_YEAR_S = 365 * 86_400
CLOCK_JUMPS_S = (60, -3600, _YEAR_S, -10 * _YEAR_S, -1_795_000_000)
"""The last one: 1970, as on a board without a battery."""


class Fault(StrEnum):
    """What is done to a member or to the link."""

    KILL = "kill"
    STOP = "stop"
    """SIGSTOP, later SIGCONT."""
    FLAP = "flap"
    """Ended by SIGTERM, and started again later."""
    AMNESIA = "amnesia"
    """Killed, and started again later with nothing of what it had stored."""
    LINK = "link"
    CLOCK = "clock"
    """The wall clock of agent and worker jumps, and later back."""


@dataclass(frozen=True)
class Step:
    """One thing that an act does, `at_s` after its beginning."""

    at_s: float
    fault: Fault | None = None
    target: str = ""
    """A member, the link's state by its name, or by how many seconds the clock is wrong."""
    lasts_s: float = 0.0
    jobs: tuple[Kind, ...] = ()
    is_healing: bool = False
    """Whether this ends the fault of that name instead of beginning it."""


@dataclass(frozen=True)
class Act:
    """Some steps in the order of their time."""

    title: str
    steps: tuple[Step, ...]

    @property
    def kills(self) -> int:
        """How many processes this act kills."""
        return sum(step.fault is Fault.KILL for step in self.steps)


@dataclass(frozen=True)
class Plan:
    """A whole run."""

    seed: int
    acts: tuple[Act, ...]

    @property
    def jobs(self) -> int:
        """How many jobs are submitted, the probes after kills left out."""
        return sum(len(step.jobs) for act in self.acts for step in act.steps)

    @property
    def kills(self) -> int:
        """How many processes are killed."""
        return sum(act.kills for act in self.acts)


def make_plan(
    jobs: int,
    kills: int,
    seed: int,
    *,
    without: Sequence[str] = WIRE_LINKS,
    offline_s: float = 0.0,
) -> Plan:
    """Return the plan of a run.

    Args:
        jobs: how many jobs to submit.
        kills: how many processes to kill.
        seed: decides everything else.
        without: sorts of jobs, faults or states of the link to leave out, by name; those of the
            link that need a wire by default.
        offline_s: length of the offline stretch; 0 takes 6 s for small runs, 30 s for others.
    """
    rng = random.Random(seed)
    offline_s = offline_s or (6.0 if jobs <= 2000 else 30.0)
    frames = _make_frames(rng, kills, frozenset(without), offline_s)
    kinds = _make_kinds(rng, jobs, frozenset(without))
    shares = _cut(rng, kinds, len(frames))
    acts = [
        Act(title, _merge(rng, steps, share))
        for (title, steps), share in zip(frames, shares, strict=True)
    ]
    return Plan(seed, tuple(acts))


def _make_kinds(rng: random.Random, jobs: int, without: frozenset[str]) -> list[Kind]:
    shares = {kind: share for kind, share in SHARES.items() if kind not in without}
    kinds = rng.choices(list(shares), list(shares.values()), k=jobs)
    for index, kind in enumerate((Kind.ENDLESS, Kind.POISON)):
        if kind not in without:
            for place in range(_RARE_EVERY // 4 * (1 + index), jobs, _RARE_EVERY):
                kinds[place] = kind
    return kinds


def _cut(rng: random.Random, kinds: list[Kind], parts: int) -> list[list[Kind]]:
    """Cut the jobs into as many parts of about one size."""
    part = len(kinds) / parts
    inner = [round((index + rng.uniform(-0.2, 0.2)) * part) for index in range(1, parts)]
    edges = [0, *inner, len(kinds)]
    return [kinds[low:high] for low, high in pairwise(edges)]


_Frame = tuple[str, list[Step]]


def _make_frames(
    rng: random.Random, kills: int, without: frozenset[str], offline_s: float
) -> list[_Frame]:
    """Return the faults of all acts; together they kill exactly `kills` processes."""
    left = kills
    frames: list[_Frame] = []
    in_offline = min(left, 4 if kills < 100 else 12)
    left -= in_offline
    for index in range(max(1, kills // _KILLS_A_ROUND)):
        outage = (_make_flap, _make_amnesia)[index % 2]
        for build in (_make_stop, _make_link, _make_jump, outage):
            frame = build(rng, without, is_killing=left > 0)
            if frame is not None:
                frames.append(frame)
                left -= sum(step.fault is Fault.KILL for step in frame[1])
    while left > 0:
        count = min(left, rng.choice((1, 1, 2, 2, 3, 3, 4)))
        left -= count
        frames.append(("volley", _make_volley(rng, count)))
    rng.shuffle(frames)
    frames.insert(len(frames) // 2, _make_offline(rng, offline_s, in_offline))
    return frames


def _kill(at_s: float, target: str) -> Step:
    return Step(at_s, Fault.KILL, target)


def _lasting(at_s: float, lasts_s: float, fault: Fault, target: str) -> list[Step]:
    return [
        Step(at_s, fault, target, lasts_s),
        Step(at_s + lasts_s, fault, target, is_healing=True),
    ]


def _make_volley(rng: random.Random, count: int) -> list[Step]:
    at_s = rng.uniform(0.05, 0.4)
    steps = []
    for _ in range(count):
        steps.append(_kill(at_s, rng.choice(MEMBERS)))
        at_s += rng.choice((0.0, rng.uniform(0.0, 1.2)))
    return steps


def _make_stop(rng: random.Random, without: frozenset[str], *, is_killing: bool) -> _Frame | None:
    """One process stands still for 1–6 s, mostly shorter; maybe another, or itself, is killed."""
    if Fault.STOP in without:
        return None
    target, lasts_s = rng.choice(MEMBERS), rng.triangular(1.0, 6.0, 1.0)
    steps = _lasting(0.2, lasts_s, Fault.STOP, target)
    if is_killing and rng.random() < 0.7:
        steps.append(_kill(0.2 + rng.uniform(0.1, lasts_s), rng.choice(MEMBERS)))
    return f"stop {target}", steps


def _make_link(rng: random.Random, without: frozenset[str], *, is_killing: bool) -> _Frame | None:
    links = [link for link in Link if link is not Link.GOOD and link not in without]
    if Fault.LINK in without or not links:
        return None
    link, lasts_s = rng.choice(links), rng.triangular(1.0, 5.0, 1.0)
    steps = _lasting(0.1, lasts_s, Fault.LINK, link)
    if is_killing and rng.random() < 0.7:
        steps.append(_kill(0.1 + rng.uniform(0.1, lasts_s), rng.choice(MEMBERS)))
    return f"link {link}", steps


def _make_jump(rng: random.Random, without: frozenset[str], *, is_killing: bool) -> _Frame | None:
    if Fault.CLOCK in without:
        return None
    offset_s, lasts_s = rng.choice(CLOCK_JUMPS_S), rng.triangular(0.5, 4.0, 1.0)
    steps = _lasting(0.1, lasts_s, Fault.CLOCK, str(offset_s))
    if is_killing and rng.random() < 0.7:
        steps.append(_kill(0.1 + rng.uniform(0.1, lasts_s), rng.choice(MEMBERS)))
    return f"clock {offset_s:+}", steps


def _make_flap(rng: random.Random, without: frozenset[str], *, is_killing: bool) -> _Frame | None:
    del is_killing
    if Fault.FLAP in without:
        return None
    target = rng.choice(("mqtt", "queue"))
    return f"flap {target}", _lasting(0.2, rng.uniform(0.2, 2.0), Fault.FLAP, target)


def _make_amnesia(
    rng: random.Random, without: frozenset[str], *, is_killing: bool
) -> _Frame | None:
    """The MQTT broker loses sessions, queues and retained messages."""
    del is_killing
    if Fault.AMNESIA in without:
        return None
    return "amnesia mqtt", _lasting(0.2, rng.uniform(0.1, 1.0), Fault.AMNESIA, "mqtt")


def _make_offline(rng: random.Random, offline_s: float, kills: int) -> _Frame:
    """A long cut of the device's link, with kills on both sides of it."""
    steps = _lasting(0.1, offline_s, Fault.LINK, Link.CUT)
    steps += [_kill(rng.uniform(0.5, offline_s), rng.choice(MEMBERS)) for _ in range(kills)]
    return "offline", steps


def _merge(rng: random.Random, steps: list[Step], kinds: list[Kind]) -> tuple[Step, ...]:
    """Put an act's jobs between its faults, in one to three bursts."""
    end_s = max((step.at_s for step in steps), default=0.0)
    bursts = rng.randint(1, 3)
    for index in range(bursts):
        share = tuple(kinds[index::bursts])
        at_s = 0.0 if index == 0 else rng.uniform(0.0, end_s)
        if share:
            steps.append(Step(at_s, jobs=share))
    return tuple(sorted(steps, key=lambda step: step.at_s))
