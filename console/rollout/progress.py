"""How far a rollout is: the state machines of its members, its classes and itself.

Pure: no store, no broker, no clock.

A member, one device (`follow`; what has no arrow changes nothing):

    waiting ──ask──► asked ──success──► succeeded
                      │ ▲ └──failure──► failed
              silence │ │ working         ▲ success, failure: from `unknown` and `pinned` too
                      ▼ │                 │
                    unknown ──────────────┘      asked, unknown ──pin──► pinned
    asked, unknown, pinned ──foreign──► superseded
    all that were asked and not superseded ──recall──► returning ──success──► returned
                                              └─failure, silence─► not_returned ─success─► returned

A lane, one hardware class (`judge`): it asks group after group of its own members, whatever
the other classes do.

    running ──enough successes──► next group, or done after the last
       │ ▲ └──too many failures, or too few successes and none to come──► stopped
       ▼ │ a member is heard of
    stalled   everybody who answers has answered, and that is not enough

Invariants:
- `succeeded`, `failed`, `superseded`, `returned` and the lanes' `done` and `stopped` are
  absorbing but for a recall, so a duplicate, a retained replay or an old report changes nothing;
- nobody is asked in a lane that is not running;
- a member that says nothing counts neither as a success nor as a failure.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from console.errors import RolloutOrderError
from console.rollout.plan import Thresholds


class MemberState(StrEnum):
    """States of one device in a rollout."""

    WAITING = "waiting"
    """Its group has not begun: nothing was sent."""
    ASKED = "asked"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    UNKNOWN = "unknown"
    """It has said nothing for the device time-out."""
    PINNED = "pinned"
    """Its owner pinned another release."""
    SUPERSEDED = "superseded"
    """Somebody else has asked it for something else since."""
    RETURNING = "returning"
    """It was asked to go back to the release that it had."""
    RETURNED = "returned"
    NOT_RETURNED = "not_returned"


class News(StrEnum):
    """What can happen to a member."""

    ASK = "ask"
    WORKING = "working"
    SUCCESS = "success"
    FAILURE = "failure"
    PIN = "pin"
    SILENCE = "silence"
    FOREIGN = "foreign"
    RECALL = "recall"


def _build_table() -> Mapping[tuple[MemberState, News], MemberState]:
    state, news = MemberState, News
    table = {
        (state.WAITING, news.ASK): state.ASKED,
        (state.ASKED, news.SILENCE): state.UNKNOWN,
        (state.UNKNOWN, news.WORKING): state.ASKED,
        (state.ASKED, news.PIN): state.PINNED,
        (state.UNKNOWN, news.PIN): state.PINNED,
        (state.RETURNING, news.SUCCESS): state.RETURNED,
        (state.RETURNING, news.FAILURE): state.NOT_RETURNED,
        (state.RETURNING, news.SILENCE): state.NOT_RETURNED,
        (state.RETURNING, news.PIN): state.NOT_RETURNED,
        (state.RETURNING, news.FOREIGN): state.SUPERSEDED,
        (state.NOT_RETURNED, news.SUCCESS): state.RETURNED,
        (state.NOT_RETURNED, news.FOREIGN): state.SUPERSEDED,
    }
    for open_state in (state.ASKED, state.UNKNOWN, state.PINNED):
        table[open_state, news.SUCCESS] = state.SUCCEEDED
        table[open_state, news.FAILURE] = state.FAILED
        table[open_state, news.FOREIGN] = state.SUPERSEDED
    for asked in set(state) - {state.WAITING, state.SUPERSEDED, state.RETURNED}:
        table[asked, news.RECALL] = state.RETURNING
    return MappingProxyType(table)


_TABLE = _build_table()


def follow(state: MemberState, news: News) -> MemberState:
    """Return the state after some news; the same where it changes nothing."""
    return _TABLE.get((state, news), state)


@dataclass(frozen=True)
class Cause:
    """Why something is as it is: a stable code, and a sentence."""

    code: str = ""
    message: str = ""


NO_CAUSE = Cause()


@dataclass(frozen=True)
class Member:
    """One device in a rollout."""

    device: str
    hardware_class: str
    group: int
    """From 1."""
    state: MemberState = MemberState.WAITING
    detail: str = ""
    """What it is doing by its own word: `fetching`, `staging`, `probation`, `deferred`, …"""
    reason: Cause = NO_CAUSE


class LaneState(StrEnum):
    """States of a hardware class in a rollout."""

    RUNNING = "running"
    STALLED = "stalled"
    STOPPED = "stopped"
    DONE = "done"


@dataclass(frozen=True)
class Lane:
    """One hardware class in a rollout."""

    hardware_class: str
    group: int = 0
    """The last group that was asked; 0 before the first."""
    state: LaneState = LaneState.RUNNING
    reason: Cause = NO_CAUSE


@dataclass(frozen=True)
class Tally:
    """How many members are in which state."""

    counts: Mapping[MemberState, int]

    @classmethod
    def of(cls, members: Iterable[Member]) -> "Tally":
        """Count members."""
        counts = dict.fromkeys(MemberState, 0)
        for member in members:
            counts[member.state] += 1
        return cls(counts)

    @property
    def pending(self) -> int:
        """Members that are asked and have not answered yet."""
        return self.counts[MemberState.ASKED]

    @property
    def succeeded(self) -> int:
        """Members that have the release."""
        return self.counts[MemberState.SUCCEEDED]

    @property
    def failed(self) -> int:
        """Members that failed or rolled back."""
        return self.counts[MemberState.FAILED]

    @property
    def reachable(self) -> int:
        """Members that count: those that have answered, or still may."""
        return self.pending + self.succeeded + self.failed

    @property
    def may_come_back(self) -> int:
        """Members that count for nothing now and may do so later."""
        return self.counts[MemberState.UNKNOWN] + self.counts[MemberState.PINNED]


def judge(lane: Lane, members: Sequence[Member], limits: Thresholds) -> Lane:
    """Return what a class is to do next; its own members are given.

    A returned `group` that is higher than the lane's says that this group is to be asked.
    """
    if lane.state in (LaneState.STOPPED, LaneState.DONE):
        return lane
    groups = sorted({member.group for member in members})
    tallies = {
        group: Tally.of(member for member in members if member.group == group) for group in groups
    }
    for group in groups:
        if group <= lane.group and (why := _find_too_many(tallies[group], group, limits)):
            return replace(lane, state=LaneState.STOPPED, reason=why)
    return _move_on(lane, tallies, limits)


def _move_on(lane: Lane, tallies: Mapping[int, Tally], limits: Thresholds) -> Lane:
    following = next((group for group in tallies if group > lane.group), None)
    current = tallies.get(lane.group, Tally.of(()))
    is_pending = any(tally.pending for group, tally in tallies.items() if group <= lane.group)
    has_enough = current.reachable > 0 and current.succeeded >= limits.success * current.reachable
    running = replace(lane, state=LaneState.RUNNING, reason=NO_CAUSE)
    if following is not None and (has_enough or lane.group == 0):
        return replace(running, group=following)
    if is_pending:
        return running
    if has_enough or not tallies:
        return replace(running, state=LaneState.DONE)
    why = _word_too_few(current, lane.group, limits)
    if current.may_come_back or not current.reachable:
        return replace(lane, state=LaneState.STALLED, reason=why)
    return replace(lane, state=LaneState.STOPPED, reason=why)


def _find_too_many(tally: Tally, group: int, limits: Thresholds) -> Cause | None:
    if not tally.failed or tally.failed < limits.failures_of(tally.reachable):
        return None
    share = f"{tally.failed} of {tally.reachable} devices that answer"
    return Cause("too_many_failures", f"{share} failed in group {group}")


def _word_too_few(tally: Tally, group: int, limits: Thresholds) -> Cause:
    if not tally.reachable:
        return Cause("nobody_answers", f"no device of group {group} answers")
    share = f"{tally.succeeded} of {tally.reachable} devices that answer"
    needed = f"{float(limits.success * 100):g}%"
    return Cause("too_few_successes", f"{share} have it in group {group}; {needed} must")


class RolloutState(StrEnum):
    """States of a whole rollout."""

    RUNNING = "running"
    PAUSED = "paused"
    STALLED = "stalled"
    STOPPED = "stopped"
    DONE = "done"
    ABORTED = "aborted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"


class Order(StrEnum):
    """What a person can ask of a rollout."""

    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    ROLL_BACK = "roll_back"


_OPEN = (RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.STALLED)
_ORDERS: Mapping[tuple[RolloutState, Order], RolloutState] = MappingProxyType(
    {
        (RolloutState.RUNNING, Order.PAUSE): RolloutState.PAUSED,
        (RolloutState.STALLED, Order.PAUSE): RolloutState.PAUSED,
        (RolloutState.PAUSED, Order.PAUSE): RolloutState.PAUSED,
        (RolloutState.ROLLING_BACK, Order.RESUME): RolloutState.ROLLING_BACK,
        (RolloutState.ABORTED, Order.ABORT): RolloutState.ABORTED,
        (RolloutState.ROLLED_BACK, Order.ROLL_BACK): RolloutState.ROLLING_BACK,
        (RolloutState.ROLLING_BACK, Order.ROLL_BACK): RolloutState.ROLLING_BACK,
        **{(state, Order.RESUME): RolloutState.RUNNING for state in _OPEN},
        **{(state, Order.ABORT): RolloutState.ABORTED for state in (*_OPEN, RolloutState.STOPPED)},
        **{
            (state, Order.ROLL_BACK): RolloutState.ROLLING_BACK
            for state in (
                *_OPEN,
                RolloutState.STOPPED,
                RolloutState.DONE,
                RolloutState.ABORTED,
            )
        },
    }
)


def obey(state: RolloutState, order: Order) -> RolloutState:
    """Return a rollout's state after an order.

    Raises:
        RolloutOrderError: the order makes no sense in that state.
    """
    try:
        return _ORDERS[state, order]
    except KeyError as exc:
        msg = f"a rollout that is {state} takes no {order.replace('_', '-')}"
        raise RolloutOrderError(msg) from exc


def conclude(state: RolloutState, lanes: Iterable[Lane], members: Iterable[Member]) -> RolloutState:
    """Return the state of a rollout by that of its classes, or of its recalled members."""
    if state is RolloutState.ROLLING_BACK:
        is_open = any(member.state is MemberState.RETURNING for member in members)
        return state if is_open else RolloutState.ROLLED_BACK
    if state not in (RolloutState.RUNNING, RolloutState.STALLED):
        return state
    found = {lane.state for lane in lanes}
    for lane_state, whole in (
        (LaneState.RUNNING, RolloutState.RUNNING),
        (LaneState.STALLED, RolloutState.STALLED),
        (LaneState.STOPPED, RolloutState.STOPPED),
    ):
        if lane_state in found:
            return whole
    return RolloutState.DONE


class Progress:
    """The members and lanes of one rollout, and what changed since the last `take_changed`.

    Args:
        members: all of them.
        lanes: those that have begun; the others begin.
        limits: when a class goes on, and when it stops.
    """

    def __init__(
        self, members: Iterable[Member], lanes: Iterable[Lane], limits: Thresholds
    ) -> None:
        self.members = {member.device: member for member in members}
        known = {lane.hardware_class: lane for lane in lanes}
        classes = sorted({member.hardware_class for member in self.members.values()})
        self.lanes = {name: known.get(name, Lane(name)) for name in classes}
        self.limits = limits
        self._of_class: dict[str, list[str]] = {name: [] for name in classes}
        for member in self.members.values():
            self._of_class[member.hardware_class].append(member.device)

    def members_of(self, hardware_class: str) -> Iterator[Member]:
        """Yield the members of a class."""
        return (self.members[device] for device in self._of_class[hardware_class])

    def tell(
        self, device: str, news: News, detail: str = "", reason: Cause | None = None
    ) -> Member | None:
        """Take in news of a member and return it as it is now, or None where nothing changed."""
        before = self.members[device]
        state = follow(before.state, news)
        if state is before.state and (news is not News.WORKING or state is not MemberState.ASKED):
            return None
        after = replace(before, state=state, detail=detail, reason=reason or NO_CAUSE)
        if after == before:
            return None
        self.members[device] = after
        return after

    def advance(self) -> tuple[list[Lane], list[Member]]:
        """Judge every class; return the lanes that changed and the members that are asked now."""
        changed, asked = [], []
        for name, lane in self.lanes.items():
            after = judge(lane, list(self.members_of(name)), self.limits)
            if after == lane:
                continue
            self.lanes[name] = after
            changed.append(after)
            if after.group > lane.group:
                fresh = [item for item in self.members_of(name) if item.group == after.group]
                told = (self.tell(item.device, News.ASK) for item in fresh)
                asked += [item for item in told if item is not None]
        return changed, asked
