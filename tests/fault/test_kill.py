"""kill -9 of each process during 1,000 jobs loses and doubles nothing.

The checks read the ledger and the console's log, and take their rules from
docs/protocol.md, "Jobs": every accepted job has exactly one end, its `rev`
counts from 1 without a gap, and exactly one result record.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.harness.box import Box, RecordingConsole
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

JOBS = 1000
ENDS = {"succeeded", "failed", "timed_out", "canceled", "expired", "rejected"}
WAIT_S = 100


@pytest.fixture
def box(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[Box]:
    box = Box(tmp_path, mosquitto, queue_broker)
    yield box
    box.close()


@pytest.fixture
def console(box: Box, mosquitto: MqttProcess) -> Iterator[RecordingConsole]:
    console = RecordingConsole(mosquitto.port)
    box.start("agent")
    box.start("worker")
    # The agent's session must exist before the first command: the broker keeps none for a stranger.
    wait_until(lambda: console.find("status"), 30, "the agent is online")
    yield console
    console.close()


def count_ended(box: Box) -> int:
    return int(box.query("SELECT count(*) FROM jobs WHERE ended_ms IS NOT NULL")[0][0])


def wait_all(box: Box, console: RecordingConsole, ids: list[str]) -> None:
    def all_reported() -> bool:
        box.supervise()
        return all(job_id in console.results for job_id in ids)

    wait_until(all_reported, WAIT_S, f"{JOBS} results; log:\n{box.read_log()[-3000:]}")
    wait_until(
        lambda: all((console.last_state(job_id) or {}).get("state") in ENDS for job_id in ids),
        30,
        "every end is reported",
    )


def check_history(box: Box, console: RecordingConsole, ids: list[str]) -> None:
    """Compare what the console saw and what the ledger holds with the protocol's promises."""
    jobs = {row[0]: row for row in box.query("SELECT job_id, state, rev, result FROM jobs")}
    assert set(jobs) == set(ids)
    steps = Counter(row[0] for row in box.query("SELECT job_id FROM transitions"))
    ends = Counter(
        row[0] for row in box.query("SELECT job_id, state FROM transitions") if row[1] in ENDS
    )
    for job_id in ids:
        _, state, rev, result = jobs[job_id]
        assert state == "succeeded"
        assert result is not None
        assert steps[job_id] == rev
        assert ends[job_id] == 1
        last = console.last_state(job_id)
        assert last is not None
        assert (last["state"], last["rev"]) == (state, rev)
        # The same record may arrive twice (at least once); two different ones may not.
        assert len({str(body) for body in console.results[job_id]}) == 1


@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["worker", "agent"])
def test_killed_process_loses_and_doubles_nothing(
    box: Box, console: RecordingConsole, victim: str
) -> None:
    ids = console.submit_many(JOBS)
    wait_until(lambda: count_ended(box) >= JOBS // 10, 60, "the first jobs have ended")
    assert count_ended(box) < JOBS, "the kill must hit while there is work"
    box.kill(victim)
    box.start(victim)
    wait_all(box, console, ids)
    check_history(box, console, ids)


@pytest.mark.timeout(240)
def test_killed_queue_broker_loses_and_doubles_nothing(
    box: Box, console: RecordingConsole, queue_broker: QueueProcess
) -> None:
    ids = console.submit_many(JOBS)
    wait_until(lambda: count_ended(box) >= JOBS // 10, 60, "the first jobs have ended")
    assert count_ended(box) < JOBS, "the kill must hit while there is work"
    queue_broker.kill()
    queue_broker.start()
    wait_all(box, console, ids)
    check_history(box, console, ids)


@pytest.mark.timeout(240)
def test_jobs_end_without_a_network_and_are_reported_when_it_is_back(
    box: Box, console: RecordingConsole, mosquitto: MqttProcess
) -> None:
    inbox = box.data_dir / "inbox" / "tiny"
    mosquitto.stop()
    inbox.mkdir(parents=True, exist_ok=True)
    for index in range(20):
        write_input(inbox / f"{index:02}.json.part", inbox / f"{index:02}.npy")
    wait_until(lambda: count_ended(box) == 20, 30, "folder jobs end offline")
    assert not console.find("result")
    mosquitto.start()
    ids = [row[0] for row in box.query("SELECT job_id FROM jobs")]
    wait_until(lambda: all(job_id in console.results for job_id in ids), 60, "late reports arrive")
    check_history(box, console, ids)


@pytest.mark.timeout(240)
def test_jobs_wait_in_the_ledger_without_a_queue_broker(
    box: Box, console: RecordingConsole, queue_broker: QueueProcess
) -> None:
    queue_broker.kill()
    ids = console.submit_many(50)
    wait_until(
        lambda: all(console.last_state(job_id) for job_id in ids), 30, "the jobs are accepted"
    )
    assert count_ended(box) == 0
    queue_broker.start()
    wait_all(box, console, ids)
    check_history(box, console, ids)


@pytest.mark.timeout(240)
def test_agent_killed_among_folder_jobs_delivers_each_result_once(
    box: Box, console: RecordingConsole
) -> None:
    inbox, names = box.data_dir / "inbox" / "tiny", [f"{index:03}.npy" for index in range(200)]
    inbox.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_input(inbox / f"{name}.part", inbox / name)
    for fraction in (1, 3):
        wanted = 50 * fraction
        wait_until(lambda: len(read_lines(box)) >= wanted, 60, "results are written")  # noqa: B023
        box.kill("agent")
        box.start("agent")
    done = inbox / "done"
    wait_until(
        lambda: done.is_dir() and len(list(done.iterdir())) == len(names), 60, "all are delivered"
    )
    files = Counter(line["file"] for line in read_lines(box))
    assert files == Counter(names)
    assert not list((inbox / ".work").iterdir())


def write_input(part: Path, final: Path) -> None:
    """Write one row for the tiny model as .npy, under a name that is never taken, then rename."""
    with part.open("wb") as file:
        np.save(file, np.full((1, 64), 0.5, np.float32))
    part.rename(final)


def read_lines(box: Box) -> list[dict[str, str]]:
    files = (box.data_dir / "outbox" / "tiny").glob("*.jsonl")
    return [
        json.loads(line)
        for file in files
        for line in file.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
