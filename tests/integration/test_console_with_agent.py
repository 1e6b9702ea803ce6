"""The durable console and the real agent: what one sends the other understands."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.box import DEVICE, TENSOR, Box
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.console import ConsoleProcess
from tests.harness.waiting import wait_until

LIMIT_S = 40.0


@pytest.fixture
def box(tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess) -> Iterator[Box]:
    box = Box(tmp_path / "box", mosquitto, queue_broker)
    box.start("agent")
    box.start("worker")
    yield box
    box.close()


@pytest.fixture
def console(mosquitto: MqttProcess, tmp_path: Path) -> Iterator[ConsoleProcess]:
    process = ConsoleProcess(tmp_path, mosquitto.port)
    yield process
    process.close()


def submit(console: ConsoleProcess, folder: Path, count: int) -> list[str]:
    path = folder / "input.json"
    path.write_text(json.dumps({"tensors": [TENSOR]}))
    answer = console.ask("submit", "tiny", *[path] * count, "--device", DEVICE)
    return [job["job_id"] for job in answer["jobs"]]


def wait_until_all_succeeded(console: ConsoleProcess, box: Box, ids: list[str]) -> None:
    def have_ended() -> bool:
        jobs = console.ask("jobs", "--limit", 1000)
        done = [job for job in jobs if job["state"] == "succeeded" and job["result"]]
        return len(done) == len(ids)

    wait_until(have_ended, LIMIT_S, "every job succeeded")
    wait_until(
        lambda: box.query("SELECT count(*) FROM outbox") == [(0,)],
        LIMIT_S,
        "every record is acknowledged",
    )


def test_jobs_come_through_a_console_that_is_killed(
    box: Box, console: ConsoleProcess, tmp_path: Path
) -> None:
    ids = submit(console, tmp_path, 60)
    console.start()
    for _ in range(3):
        wait_until(lambda: console.lines_path.exists() and console.lines(), LIMIT_S, "it hears")
        console.end(signal.SIGKILL)
        console.start()
    wait_until_all_succeeded(console, box, ids)
    assert box.query("SELECT value FROM facts WHERE name = 'console_acks'") == [("1",)]
    (listed,) = console.ask("devices")
    assert [(listed["acked_seq"],)] == box.query("SELECT value FROM counters WHERE name = 'seq'")


def test_agent_that_lost_its_ledger_gets_its_open_jobs_again(
    box: Box, console: ConsoleProcess, tmp_path: Path
) -> None:
    box.stop("worker")
    console.start()
    ids = submit(console, tmp_path, 5)
    wait_until(
        lambda: [job["state"] for job in console.ask("jobs")] == ["queued"] * 5,
        LIMIT_S,
        "the agent has the jobs",
    )
    box.kill("agent")
    for path in box.data_dir.glob("ledger.db*"):
        path.unlink()
    box.start("agent")
    box.start("worker")
    wait_until_all_succeeded(console, box, ids)
    assert [event["type"] for event in console.ask("events")] == ["ledger"]
