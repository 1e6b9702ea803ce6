"""A wrong wall clock: no fresh job expires, and none runs twice.

The clock of agent and worker jumps a year ahead, ten years back, or to 1970, and back again:
while jobs wait, while one runs, while one waits for its next attempt, and while the agent is
down. After each jump housekeeping has run, with ends that are remembered for a day, and every
job that there ever was is submitted again.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.clock_box import ClockBox
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

DAY_S = 86_400
JUMPS = {
    "a year ahead": 365 * DAY_S,
    "ten years back": -3650 * DAY_S,
    "1970": -int(time.time()) + DAY_S // 2,
}
AMID_JUMPS = pytest.mark.parametrize("offset_s", JUMPS.values(), ids=JUMPS.keys())


@pytest.fixture
def box(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[ClockBox]:
    box = ClockBox(tmp_path, mosquitto, queue_broker)
    box.start("agent")
    wait_until(lambda: box.console.find("status"), 30, "the agent is online")
    yield box
    box.close()


@pytest.mark.timeout(180)
@AMID_JUMPS
def test_clock_that_jumps_while_jobs_run_and_wait_costs_none(box: ClockBox, offset_s: int) -> None:
    box.start("worker")
    box.submit_each_sort()
    box.wait_ends()
    runs_on = box.submit(wait_s=1.5)
    box.wait_running(runs_on)
    box.set_clock(offset_s)
    box.submit(expiry_s=60)
    box.repeat_all()
    box.wait_ends()

    box.box.stop("worker")
    box.wait_accepted(box.submit_each_sort())
    box.set_clock(0)
    box.repeat_all()
    box.set_clock(offset_s)
    box.start("worker")
    box.wait_ends()
    box.set_clock(0)
    box.repeat_all()
    box.check()


@pytest.mark.timeout(180)
@AMID_JUMPS
def test_clock_that_jumps_while_the_agent_is_down_costs_no_job(
    box: ClockBox, offset_s: int
) -> None:
    for offset in (offset_s, 0):
        box.wait_accepted(box.submit_each_sort())
        box.box.kill("agent")
        box.set_clock(offset)
        box.start("agent")
    box.repeat_all()
    box.start("worker")
    box.wait_ends()
    box.repeat_all()
    box.check()


@pytest.mark.timeout(180)
@AMID_JUMPS
def test_clock_that_jumps_during_a_back_off_neither_skips_nor_lengthens_it(
    box: ClockBox, offset_s: int
) -> None:
    box.start("worker")
    job_id = box.submit(crashes=2)

    def waits() -> bool:
        box.supervise()
        query = "SELECT ready_boot_ms FROM jobs WHERE interruptions = 2 AND task_id IS NULL"
        return any(row[0] is not None for row in box.box.query(query))

    wait_until(waits, 40, f"the third attempt waits; log:\n{box.log()}")
    began = time.monotonic()
    box.set_clock(offset_s)
    box.wait_ends([job_id])
    assert time.monotonic() - began < 15
    box.set_clock(0)
    box.repeat_all()
    box.check()
