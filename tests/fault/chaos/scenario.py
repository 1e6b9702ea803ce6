"""Plays a plan on a cast, waits until all is quiet, and measures each recovery.

How a recovery is measured: right after each kill a probe, a job of the highest priority, is
submitted; the recovery is over when its end is seen at the console. Where another fault
happened in between, the time counts from the end of the last one: a stopped process that is
let go, a link that is good again, another kill, a worker that a bad job has crashed.
`recovery_raw` counts from the kill itself, whatever else was broken meanwhile.
"""

import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fault.chaos.cast import Cast
from tests.fault.chaos.checker import Report, check
from tests.fault.chaos.console import ChaosConsole
from tests.fault.chaos.jobs import ChaosJob
from tests.fault.chaos.journal import Journal
from tests.fault.chaos.plan import Act, Fault, Plan, Step
from tests.fault.chaos.proxy import Link
from tests.harness.waiting import wait_until

JOURNAL, LEDGER = "journal.jsonl", "data/ledger.db"
_ONLINE_LIMIT_S = 30.0
_PROBE_LIMIT_S = 8.0
_BACKLOG_LIMIT_S = 30.0
_QUIET_POLL_S = 0.1
_GIVE_UP_FACTOR = 10


@dataclass
class Probe:
    """One kill and the job that tells when the box worked again."""

    member: str
    killed_at: float
    job: ChaosJob


@dataclass
class Outcome:
    """What a run gave."""

    report: Report
    plan: Plan
    kills: Counter[str]
    faults: Counter[str]
    probes: list[Probe]
    disturbances: list[tuple[float, float]]
    duration_s: float
    is_quiet: bool
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost, doubled or illegal."""
        return not self.report.findings and self.is_quiet

    def list_recoveries(self, *, raw: bool = False) -> list[float]:
        """Return the recovery of each kill in seconds, infinite where there was none."""
        return [self._measure(probe, raw=raw) for probe in self.probes]

    def _measure(self, probe: Probe, *, raw: bool) -> float:
        ended = probe.job.ended_at
        if ended is None:
            return float("inf")
        ends = [end for _, end in self.disturbances if probe.killed_at < end <= ended]
        begin = probe.killed_at if raw else max([probe.killed_at, *ends])
        return ended - begin


def find_percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all do not exceed; 0 for none."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[max(0, -(-int(share * 100) * len(ordered) // 100) - 1)]


def count_unsent(ledger: Path) -> int:
    """Return how many records wait in the outbox of a ledger that is being written."""
    connection = sqlite3.connect(f"{ledger.as_uri()}?mode=ro", uri=True, timeout=10)
    try:
        return int(connection.execute("SELECT count(*) FROM outbox").fetchone()[0])
    finally:
        connection.close()


class Scenario:
    """One run.

    Args:
        folder: where the box lives and what it leaves.
        plan: what to do.
        duplicate: probability of duplicates on the agent's link.
        quiet_limit_s: longest wait, at the end, for the next message; ten times that in all.
        on_progress: told jobs ended, jobs in all, kills done, and what goes on.
        cast_options: for `Cast`.
        console_options: for `ChaosConsole`.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        *,
        duplicate: float = 0.03,
        quiet_limit_s: float = 30.0,
        on_progress: Callable[[int, int, int, str], None] | None = None,
        cast_options: dict[str, Any] | None = None,
        console_options: dict[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.plan = plan
        self.journal = Journal(folder / JOURNAL)
        self.cast = Cast(
            folder, self.journal, seed=plan.seed, duplicate=duplicate, **(cast_options or {})
        )
        self.console = ChaosConsole(
            self.cast.mqtt_port, "chaos-box", self.journal, plan.seed, **(console_options or {})
        )
        self.probes: list[Probe] = []
        self.disturbances: list[tuple[float, float]] = []
        self.kills: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._quiet_limit_s = quiet_limit_s
        self._on_progress = on_progress or (lambda *_: None)
        self._pause = threading.Event()

    def run(self) -> Outcome:
        """Play everything, stop the box cleanly, and let the checker look."""
        began = time.monotonic()
        try:
            self.start()
            for act in self.plan.acts:
                self.play(act)
            is_quiet = self.settle()
        finally:
            self.stop()
        return Outcome(
            self.check(is_acked=self.console.speaks_acks),
            self.plan,
            self.kills,
            self.faults,
            self.probes,
            self.disturbances + self._list_crashes(),
            time.monotonic() - began,
            is_quiet,
            self._count(),
        )

    def check(self, *, is_acked: bool = True) -> Report:
        """Let the checker look at what was left; the box is stopped."""
        return check(self.folder / JOURNAL, self.folder / LEDGER, is_acked=is_acked)

    def _list_crashes(self) -> list[tuple[float, float]]:
        return [(at, at) for member in self.cast.members.values() for at in member.crashes]

    def _count(self) -> dict[str, int]:
        proxy = self.cast.proxy.counts
        return {
            **dict(sorted(self.console.counts.items())),
            "proxy_connections": proxy.connections,
            "proxy_duplicates": proxy.duplicated,
            "proxy_swallowed": proxy.swallowed,
            "crashes": len(self._list_crashes()),
            **{f"starts_{member.name}": member.starts for member in self.cast.members.values()},
        }

    # --- the parts, for tests that want them one by one ----------------------------------------

    def start(self) -> None:
        """Start the box and wait until it is online."""
        self.cast.start()
        self.console.connect()
        wait_until(
            lambda: self.console.device_state == "online",
            _ONLINE_LIMIT_S,
            "the device is online",
        )

    def play(self, act: Act) -> None:
        """Do an act's steps in their time, then wait for the probes of its kills."""
        began = time.monotonic()
        self.journal.note("act", title=act.title)
        self._tell(act.title)
        probes: list[Probe] = []
        for step in act.steps:
            self._pause.wait(max(0.0, began + step.at_s - time.monotonic()))
            probes += self._do(step)
        self._wait(lambda: all(probe.job.has_ended for probe in probes), _PROBE_LIMIT_S)
        # Kills among a handful of jobs prove more than kills beside an endless queue.
        self._wait(lambda: len(self.console.list_open()) < 300, _BACKLOG_LIMIT_S)
        self._tell(act.title)

    def _do(self, step: Step) -> list[Probe]:
        if step.jobs:
            self.console.submit(step.jobs)
        if step.fault is None:
            return []
        word = "healed" if step.is_healing else "broken"
        self.journal.note(word, fault=step.fault, target=step.target)
        if step.fault is Fault.KILL:
            return [self.kill(step.target)]
        if step.is_healing:
            self._heal(step)
        else:
            self.faults[f"{step.fault} {step.target}"] += 1
            now = time.monotonic()
            self.disturbances.append((now, now + step.lasts_s))
            self._break(step)
        return []

    def kill(self, member: str) -> Probe:
        """Kill a member and submit the probe that tells when it is back."""
        self.cast.members[member].kill()
        now = time.monotonic()
        self.kills[member] += 1
        self.disturbances.append((now, now))
        probe = Probe(member, now, self.console.probe())
        self.probes.append(probe)
        self._tell(f"kill {member}")
        return probe

    def _break(self, step: Step) -> None:
        if step.fault is Fault.STOP:
            self.cast.members[step.target].send(signal.SIGSTOP)
        elif step.fault is Fault.FLAP:
            self.cast.members[step.target].hold()
        elif step.fault is Fault.AMNESIA:
            self.cast.members[step.target].hold(signal.SIGKILL)
            self.cast.forget_mqtt()
        elif step.fault is Fault.CLOCK:
            self.cast.set_clock(int(step.target))
        else:
            self.cast.proxy.set_link(Link(step.target))

    def _heal(self, step: Step) -> None:
        if step.fault is Fault.STOP:
            self.cast.members[step.target].send(signal.SIGCONT)
        elif step.fault in (Fault.FLAP, Fault.AMNESIA):
            self.cast.members[step.target].start()
        elif step.fault is Fault.CLOCK:
            self.cast.set_clock(0)
        else:
            self.cast.proxy.set_link(Link.GOOD)

    def settle(self) -> bool:
        """Heal everything and wait until nothing is left to do; say whether that came."""
        self._tell("settling")
        self.journal.note("settling")
        self.cast.set_clock(0)
        self.cast.proxy.set_link(Link.GOOD)
        self.cast.proxy.duplicate = 0.0
        for member in self.cast.members.values():
            member.send(signal.SIGCONT)
            member.start()
        self.console.is_healing = True
        return self._wait_quiet(
            lambda: not self.console.list_open() and not count_unsent(self.cast.ledger_path)
        )

    def _wait_quiet(self, is_quiet: Callable[[], bool]) -> bool:
        """Wait as long as things move: a slow machine is not a broken one."""
        give_up = time.monotonic() + _GIVE_UP_FACTOR * self._quiet_limit_s
        heard, since = -1, time.monotonic()
        while not is_quiet():
            now = time.monotonic()
            if self.console.counts["heard"] != heard:
                heard, since = self.console.counts["heard"], now
            if now - since > self._quiet_limit_s or now > give_up:
                return False
            self._pause.wait(_QUIET_POLL_S)
        return True

    def stop(self) -> None:
        """Stop the box cleanly, take in what it says last, and close the journal."""
        self.journal.note("stopping")
        self.cast.stop_agent()
        self._wait(lambda: self.console.device_state == "stopped", 5.0)
        self.console.close()
        self.cast.close()
        self.journal.close()

    def _wait(self, condition: Callable[[], bool], limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() >= deadline:
                return False
            self._pause.wait(_QUIET_POLL_S)
        return True

    def _tell(self, doing: str) -> None:
        ended, kills = self.console.counts["ended"], sum(self.kills.values())
        self._on_progress(ended, self.plan.jobs, kills, doing)
