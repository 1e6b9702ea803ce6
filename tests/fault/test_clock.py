"""A wrong wall clock: no fresh job expires, and none runs twice.

The clock of agent and worker jumps a year ahead, ten years back, or to 1970, and back again:
while jobs wait, while one runs, while one waits for its next attempt, and while the agent is
down. After each jump housekeeping has run, with ends that are remembered for a day, and every
job that there ever was is submitted again.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import kombu.transport.redis
import pytest
from kombu import Connection as QueueConnection

from agent.tasks import transport_options
from tests.fault.clock_box import MODEL, ClockBox
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
    box.wait_worker()
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
    box.wait_worker()
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


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("before_s", "after_s"),
    [(0, JUMPS["a year ahead"]), (JUMPS["1970"], 0)],
    ids=["a year ahead", "from 1970 to now"],
)
def test_file_whose_result_waits_for_its_folder_is_not_forgotten_when_the_clock_jumps(
    box: ClockBox, before_s: int, after_s: int
) -> None:
    box.set_clock(before_s)
    box.start("worker")
    box.wait_worker()
    # As if the results' folder were a stick that somebody pulled.
    outbox = box.box.data_dir / "outbox"
    outbox.mkdir(exist_ok=True)
    (outbox / MODEL).write_text("no folder")
    box.drop_file()
    box.wait_ends([box.submit()])
    query = "SELECT count(*) FROM jobs WHERE source = 'folder' AND state = 'succeeded'"
    wait_until(lambda: box.box.query(query)[0][0] == 1, 30, "its job ends")
    box.set_clock(after_s)
    for _ in range(2):
        box.box.kill("agent")
        box.start("agent")
    (outbox / MODEL).unlink()
    box.wait_ends()
    box.repeat_all()
    box.check()


@pytest.mark.timeout(120)
def test_result_file_of_a_remembered_job_outlives_a_clock_a_year_ahead(box: ClockBox) -> None:
    box.start("worker")
    job_id = box.submit()
    box.wait_ends([job_id])
    results = box.box.data_dir / "results"
    results.mkdir(exist_ok=True)
    known, unknown = results / f"{job_id}.1.json", results / "01ARZ3NDEKTSV4RRFFQ69G5FAV.1.json"
    known.write_text("[]")
    unknown.write_text("[]")
    os.utime(unknown, (0, 0))
    box.set_clock(JUMPS["a year ahead"])
    wait_until(lambda: not unknown.exists(), 20, "what nobody knows goes")
    assert known.exists()


@pytest.mark.parametrize(
    "offset_s", [JUMPS["a year ahead"], -JUMPS["1970"]], ids=["a year", "from 1970"]
)
def test_worker_that_starts_after_a_jump_takes_no_task_that_another_still_runs(
    queue_broker: QueueProcess, monkeypatch: pytest.MonkeyPatch, offset_s: int
) -> None:
    options = transport_options()
    with (
        QueueConnection(queue_broker.url, transport_options=options) as first,
        QueueConnection(queue_broker.url, transport_options=options) as second,
    ):
        queue = first.SimpleQueue("tasks")
        queue.put({"task": 1})
        assert queue.get(timeout=5).payload == {"task": 1}
        monkeypatch.setattr(kombu.transport.redis, "time", lambda: time.time() + offset_s)
        channel = second.channel()
        channel.qos.restore_visible(interval=1)
        client = queue_broker.client()
        assert client.llen("tasks") == 0
        client.close()
