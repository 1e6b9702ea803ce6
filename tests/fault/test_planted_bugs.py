"""The history checker finds bugs: three are planted, each is provoked, and each is found.

Every scenario also runs with the agent as it is and finds nothing, so a finding comes from the
bug and from nothing else.
"""

import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from tests.fault.chaos.checker import DOUBLE, LOST, Report
from tests.fault.chaos.plan import Kind, Plan
from tests.fault.chaos.proxy import Link
from tests.fault.chaos.scenario import Scenario
from tests.harness.waiting import require_binary, wait_until

KILLS, BURST = 3, 120
QUIET_S = 30.0


def submit_under_kills(scenario: Scenario) -> None:
    """Kill the agent while commands come in; this console never sends one again."""
    console, agent = scenario.console, scenario.cast.members["agent"]
    for boot in range(2, KILLS + 2):
        console.submit([Kind.GOOD] * BURST)
        wait_until(console.is_all_taken, 20, "the broker has them all")
        agent.kill()
        wait_until(lambda: console.device_boot == boot, 20, "the agent is back")  # noqa: B023


def outrun_a_worker(scenario: Scenario) -> None:
    """Stop the worker until its tasks are given to a new attempt, then let it go on."""
    console, worker = scenario.console, scenario.cast.members["worker"]
    jobs = [console.make(Kind.SLOW) for _ in range(2)]
    for job in jobs:
        job.body["input"]["tensors"][0]["data"] = [1_200_000]
    console.add(jobs)
    wait_until(lambda: all(job.state == "running" for job in jobs), 20, "both run")
    worker.send(signal.SIGSTOP)
    client = redis.Redis(unix_socket_path=str(scenario.cast.queue_socket))
    # Its heartbeat lives for 10 s; this stands for their passing.
    client.delete(*client.scan_iter("edgeward:worker:*"))
    client.close()
    wait_until(lambda: read_attempts(scenario) == {2}, 20, "both have a new attempt")
    worker.send(signal.SIGCONT)


def read_attempts(scenario: Scenario) -> set[int]:
    address = f"{scenario.cast.ledger_path.as_uri()}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=10)
    try:
        return {row[0] for row in connection.execute("SELECT attempt FROM jobs")}
    finally:
        connection.close()


def report_to_nobody(scenario: Scenario) -> None:
    """Let what the agent publishes vanish for a moment, then cut its connection."""
    console, proxy = scenario.console, scenario.cast.proxy
    console.submit([Kind.GOOD] * 300)
    wait_until(lambda: console.counts["ended"] >= 10, 20, "the first have ended")
    proxy.set_link(Link.DEAF_UP)
    wait_until(lambda: proxy.counts.swallowed >= 50, 20, "reports vanish")
    proxy.set_link(Link.GOOD)


Provoke = Callable[[Scenario], None]


def run_scenario(folder: Path, bug: str, provoke: Provoke, quiet_limit_s: float) -> Report:
    require_binary("mosquitto")
    argv = (sys.executable, "-m", "tests.fault.planted", bug, "agent")
    scenario = Scenario(
        folder,
        Plan(1, ()),
        duplicate=0.0,
        quiet_limit_s=quiet_limit_s,
        cast_options={"agent_argv": argv},
        console_options={"resend": provoke is not submit_under_kills},
    )
    try:
        scenario.start()
        provoke(scenario)
        scenario.settle()
    finally:
        scenario.stop()
    return scenario.check()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("provoke", "bug", "control", "kind", "rule"),
    [
        (submit_under_kills, "puback_first", "slow_disk", LOST, "accepted and unknown"),
        (outrun_a_worker, "old_attempt", "none", DOUBLE, "outcome of an old attempt"),
        (report_to_nobody, "deleted_at_publish", "none", LOST, "number never arrived"),
    ],
)
def test_checker_finds_the_planted_bug_and_nothing_without_it(
    tmp_path: Path, provoke: Provoke, bug: str, control: str, kind: str, rule: str
) -> None:
    planted = run_scenario(tmp_path / "planted", bug, provoke, 3.0 if kind is LOST else QUIET_S)
    assert rule in {finding.rule for finding in planted.findings if finding.kind == kind}

    healthy = run_scenario(tmp_path / "healthy", control, provoke, QUIET_S)
    assert healthy.findings == []
