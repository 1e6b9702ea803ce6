"""One run of a rollout: hears the fleet, decides, keeps what it decided, and only then sends.

Owns the loop. What is decided is in `progress`, what is kept in `store`, what is sent in
`fleet`; here is only the order of things.

Invariants:
- a document is published after it was committed, and again in the same bytes at each start
  and each new connection until its device has answered: killed at any point, a rollout goes on
  where it was, and never sends a second version for the same step;
- silence is counted from the start of a run: a console that was down blames no device for it.

    hear ──► tell the members ──► advance the lanes ──► commit ──► publish
"""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from agent.clock import SystemClock
from agent.commands import new_id
from console.errors import RolloutNotFoundError, RolloutOrderError
from console.rollout.desired import (
    Desired,
    Expected,
    build_desired,
    build_entry,
    choose_base,
    encode_desired,
    find_active,
    find_watch_s,
    read_report,
)
from console.rollout.fleet import Box, Fleet
from console.rollout.plan import Invited, Thresholds, assign_groups, parse_groups, parse_percent
from console.rollout.progress import (
    Cause,
    Lane,
    LaneState,
    Member,
    MemberState,
    News,
    Order,
    Progress,
    RolloutState,
    conclude,
    obey,
)
from console.rollout.store import Errand, Rollout, RolloutStore, Step, Wishes

_POLL_S = 0.2
_WATCH_S = 0.5
_SWEEP_S = 1.0
"""After a subscription the broker has sent by then what it retains."""
_RUNS = (RolloutState.RUNNING, RolloutState.ROLLING_BACK)
_WATCHED = ("shadow", "canary", "probation")
"""What a device does for a time that it was told, without a word in between."""
_EXPECTING = (
    MemberState.ASKED,
    MemberState.UNKNOWN,
    MemberState.PINNED,
    MemberState.RETURNING,
    MemberState.NOT_RETURNED,
)
"""States in which a device may still answer."""


@dataclass(frozen=True)
class Choice:
    """Which devices a rollout is for: patterns as of a shell, of ids and of classes."""

    devices: str = "*"
    hardware_class: str = "*"


@dataclass(frozen=True)
class Happening:
    """Something to show: `asked`, `member`, `lane` or `state`, with what it is about."""

    kind: str
    member: Member | None = None
    lane: Lane | None = None
    state: RolloutState | None = None
    version: int | None = None


Show = Callable[[Happening], None]


def read_thresholds(wishes: Wishes) -> Thresholds:
    """Return the thresholds of a rollout's wishes.

    Raises:
        RolloutPlanError: one is no percentage.
    """
    success, error = parse_percent(wishes.success), parse_percent(wishes.error)
    return Thresholds(success, error, wishes.min_failures)


def plan_rollout(
    fleet: Fleet, model: str, release: str, wishes: Wishes, choice: Choice
) -> tuple[Rollout, list[Member]]:
    """Return a new rollout of the devices that fit, with the group of each; writes nothing.

    Raises:
        RolloutPlanError: the groups or thresholds make no sense.
        RolloutNotFoundError: no device fits.
    """
    shares = parse_groups(wishes.groups)
    read_thresholds(wishes)
    invited = [
        Invited(name, fleet.box(name).hardware_class, fleet.box(name).view.state == "online")
        for name in fleet.list_known()
        if fnmatchcase(name, choice.devices)
    ]
    invited = [item for item in invited if fnmatchcase(item.hardware_class, choice.hardware_class)]
    if not invited:
        msg = (
            f"no device fits among the {len(fleet.list_known())} that the broker knows of "
            f"(devices {choice.devices!r}, class {choice.hardware_class!r})"
        )
        raise RolloutNotFoundError(msg)
    now_ms = SystemClock().wall_ms()
    rollout = Rollout(new_id(), model, release, wishes, RolloutState.RUNNING, now_ms, now_ms)
    groups = assign_groups(rollout.rollout_id, invited, shares)
    members = [
        Member(item.device, item.hardware_class, groups[item.device])
        for item in invited
        if item.device in groups
    ]
    return rollout, members


class Conductor:
    """One run of one rollout. Not thread-safe.

    Args:
        fleet: the connected fleet, already discovered.
        store: the state folder, already claimed.
        rollout_id: a rollout in it.
        show: told what happens once it is safe.
    """

    def __init__(
        self,
        fleet: Fleet,
        store: RolloutStore,
        rollout_id: str,
        show: Show = lambda _happening: None,
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._show = show
        self._rollout = store.get(rollout_id)
        self._errands = store.read_errands(rollout_id)
        self._documents = store.read_documents()
        self._heard_s: dict[str, float] = {}
        self._watched_s = time.monotonic()
        self._resend_at_s = float("inf")
        self._listened_s = float("-inf")
        self._step = Step()
        self._happenings: list[Happening] = []
        self.state = self._rollout.state
        self.progress = Progress(
            store.read_members(rollout_id),
            store.read_lanes(rollout_id),
            read_thresholds(self._rollout.wishes),
        )

    def run(self, stop: threading.Event) -> RolloutState:
        """Go on until the rollout has ended, is paused or aborted, or `stop` is set; blocks.

        Raises:
            StoreError: the state cannot be kept; nothing is sent then.
        """
        self._begin()
        while self.state in _RUNS and not stop.is_set():
            self._turn(_POLL_S)
        return self.state

    # --- a run ----------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.state is not RolloutState.ROLLING_BACK:
            self._set_state(obey(self.state, Order.RESUME))
        # Whatever another process asked for before this run is older than this run.
        self._step.clears_order = True
        for device, member in self.progress.members.items():
            if self.state is RolloutState.ROLLING_BACK:
                self._recall(device)
            elif member.state is MemberState.UNKNOWN and self._is_open(member):
                self._tell(device, News.WORKING, "asked again")
        self._look(self.progress.members)
        self._decide()
        self._send_again()

    def _is_open(self, member: Member) -> bool:
        lane = self.progress.lanes[member.hardware_class]
        return lane.state in (LaneState.RUNNING, LaneState.STALLED)

    def _turn(self, timeout_s: float) -> None:
        sweep = self._fleet.poll(timeout_s)
        if sweep.has_subscribed:
            # What the broker still retains is heard first.
            self._resend_at_s = time.monotonic() + _SWEEP_S
        if time.monotonic() >= self._resend_at_s:
            self._resend_at_s = float("inf")
            self._send_again()
        self._look(sweep.devices & self.progress.members.keys())
        if time.monotonic() - self._watched_s >= _WATCH_S:
            self._watched_s = time.monotonic()
            self._watch()
        self._decide()

    def _decide(self) -> None:
        """Advance what can be, keep it, send it."""
        self._advance()
        members = self.progress.members.values()
        self._set_state(conclude(self.state, self.progress.lanes.values(), members))
        errands = list(self._step.errands)
        self._keep()
        for errand in errands:
            self._fleet.publish(errand.device, errand.payload)

    def _keep(self) -> None:
        step, self._step = self._step, Step()
        happenings, self._happenings = self._happenings, []
        if not step.is_empty:
            self._store.save(self._rollout.rollout_id, step)
        for happening in happenings:
            self._show(happening)

    def _advance(self) -> None:
        if self.state is not RolloutState.RUNNING:
            return
        lanes, asked = self.progress.advance()
        self._step.lanes += lanes
        self._happenings += [Happening("lane", lane=lane) for lane in lanes]
        for member in asked:
            self._ask(member)

    # --- what is sent ---------------------------------------------------------------------

    def _ask(self, member: Member) -> None:
        box, model = self._fleet.box(member.device), self._rollout.model
        base = choose_base(box.desired, self._documents.get(member.device))
        before = base.find_entry(model) if base is not None else None
        release = self._rollout.release
        entry = build_entry(before, release, self._rollout.wishes.probation)
        undo = before or {"release": find_active(box.view.reported, model)}
        self._entrust(member, base, entry, undo)

    def _recall(self, device: str) -> None:
        """Ask a device for what it had before; once, whatever becomes of it."""
        errand = self._errands.get(device)
        was_returning = self.progress.members[device].state is MemberState.RETURNING
        if errand is None or was_returning:
            return
        member = self._tell(device, News.RECALL)
        if member is not None:
            base = choose_base(self._fleet.box(device).desired, self._documents.get(device))
            self._entrust(member, base, errand.before, errand.before)

    def _entrust(
        self,
        member: Member,
        base: Desired | None,
        entry: dict[str, Any],
        before: dict[str, Any],
    ) -> None:
        """Make the document for a member; it is sent once it was kept."""
        box = self._fleet.box(member.device)
        desired = build_desired(base, box.view.reported, self._rollout.model, entry)
        release = entry.get("release")
        errand = Errand(
            member.device,
            desired.epoch,
            desired.version,
            release if isinstance(release, str) else None,
            encode_desired(desired),
            before,
        )
        self._errands[member.device] = errand
        self._documents[member.device] = desired
        self._heard_s[member.device] = time.monotonic()
        self._step.errands.append(errand)
        self._step.documents[member.device] = desired
        self._step.members.append(member)
        self._happenings.append(Happening("asked", member=member, version=desired.version))

    def _send_again(self) -> None:
        """Send what was not answered and what the broker does not have, in the same bytes."""
        for device, member in self.progress.members.items():
            errand = self._errands.get(device)
            if errand is None or member.state not in _EXPECTING:
                continue
            if not self._fleet.is_retained(device, errand.epoch, errand.version):
                self._fleet.publish(device, errand.payload)

    # --- what is heard --------------------------------------------------------------------

    def _look(self, devices: Iterable[str]) -> None:
        """Compare what devices report with what they were asked for."""
        for device in devices:
            errand = self._errands.get(device)
            if errand is None or self.progress.members[device].state not in _EXPECTING:
                continue
            box = self._fleet.box(device)
            self._heard_s[device] = time.monotonic()
            errand = self._follow_writer(box, errand)
            expected = Expected(self._rollout.model, errand.release, errand.epoch, errand.version)
            verdict = read_report(box.view.reported, expected)
            if verdict is not None:
                self._tell(device, verdict.news, verdict.detail, verdict.reason)

    def _follow_writer(self, box: Box, errand: Errand) -> Errand:
        """Take note of a document that somebody else has written since."""
        desired = box.desired
        if desired is None or (desired.epoch, desired.version) == (errand.epoch, errand.version):
            return errand
        if desired.epoch == errand.epoch and desired.version < errand.version:
            return errand
        entry = desired.find_entry(self._rollout.model) or {}
        if entry.get("release") != errand.release:
            text = f"version {desired.version} of its desired state names {entry.get('release')}"
            self._tell(errand.device, News.FOREIGN, "", Cause("superseded", text))
            return errand
        # About another model: the release that we wait for is still asked for.
        followed = replace(errand, epoch=desired.epoch, version=desired.version)
        self._errands[errand.device] = followed
        return followed

    def _watch(self) -> None:
        """Take note of orders, and of members that have said nothing for too long."""
        self._take_order()
        if not self._fleet.is_connected:
            # Nobody can be heard: silence begins anew with the next connection.
            self._heard_s.clear()
            return
        self._watch_silence(time.monotonic())

    def _watch_silence(self, now_s: float) -> None:
        """Mark who is silent, after its last retained word was asked for once more."""
        needs_words = False
        for device, member in self.progress.members.items():
            if member.state not in (MemberState.ASKED, MemberState.RETURNING):
                continue
            patience_s = self._find_patience(member)
            due_s = self._heard_s.setdefault(device, now_s) + patience_s
            if due_s > now_s:
                continue
            if self._listened_s < due_s:
                needs_words = True
            elif now_s >= self._listened_s + _SWEEP_S:
                text = f"nothing was heard of it for {patience_s:g} s"
                self._tell(device, News.SILENCE, "", Cause("no_answer", text))
        # Not before those have been judged who became due before the last time.
        if needs_words and now_s >= self._listened_s + _SWEEP_S:
            self._listened_s = now_s
            self._fleet.listen_again()

    def _take_order(self) -> None:
        order = self._store.get(self._rollout.rollout_id).order
        if order is not None:
            self._step.clears_order = True
            with suppress(RolloutOrderError):
                # Whoever gave it looks at what became of it.
                self._set_state(obey(self.state, order))

    def _find_patience(self, member: Member) -> float:
        """Return for how long a member may be silent."""
        wishes = self._rollout.wishes
        if member.detail in _WATCHED:
            document = self._documents.get(member.device)
            entry = document.find_entry(self._rollout.model) if document is not None else None
            return wishes.device_timeout_s + find_watch_s(entry)
        is_there = self._fleet.box(member.device).view.state == "online"
        if member.detail == "deferred" and is_there:
            # It waits for its maintenance window, and has said so.
            return float("inf")
        return wishes.device_timeout_s

    def _tell(
        self, device: str, news: News, detail: str = "", reason: Cause | None = None
    ) -> Member | None:
        member = self.progress.tell(device, news, detail, reason)
        if member is not None:
            self._step.members.append(member)
            self._happenings.append(Happening("member", member=member))
        return member

    def _set_state(self, state: RolloutState) -> None:
        if state is not self.state:
            self.state = self._step.state = state
            self._happenings.append(Happening("state", state=state))
