"""`edgeward console`: a durable console as a process, and a device that plays by the book."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.brokers import MqttProcess
from tests.harness.console import ConsoleProcess
from tests.harness.fake_device import FakeDevice
from tests.harness.waiting import free_port, wait_until

LIMIT_S = 20.0


@pytest.fixture
def device(mosquitto: MqttProcess) -> Iterator[FakeDevice]:
    played = FakeDevice(mosquitto.port)
    played.connect()
    yield played
    if played.is_online:
        played.leave()


@pytest.fixture
def console(mosquitto: MqttProcess, tmp_path: Path) -> Iterator[ConsoleProcess]:
    process = ConsoleProcess(tmp_path, mosquitto.port)
    yield process
    process.close()


def expect(condition: Callable[[], object], message: str) -> None:
    wait_until(condition, LIMIT_S, message)


def test_job_that_was_submitted_while_all_was_offline_ends_with_its_result(
    console: ConsoleProcess, device: FakeDevice, tmp_path: Path
) -> None:
    (job_id,) = console.submit(tmp_path)
    (job,) = console.ask("jobs")
    assert (job["state"], job["own"]) == (None, True)
    console.start()
    expect(lambda: job_id in device.jobs, "the device has the job")
    device.move(job_id, "running")
    device.succeed(job_id, [1, 2])
    expect(lambda: not device.records, "every record is acknowledged")
    shown = console.ask("jobs", job_id)
    assert (shown["state"], shown["rev"], shown["result"]["output"]) == ("succeeded", 3, [1, 2])
    (listed,) = console.ask("devices")
    assert (listed["device"], listed["state"], listed["open_jobs"]) == ("box-7", "online", 0)
    assert (listed["ledger"], listed["acked_seq"]) == (device.ledger, device.seq)
    kinds = [line["kind"] for line in console.lines() if line.get("job_id") == job_id]
    assert kinds[-2:] == ["state", "result"]


def test_commands_beside_a_running_console_are_taken_by_it(
    console: ConsoleProcess, device: FakeDevice, tmp_path: Path
) -> None:
    console.start()
    expect(lambda: console.lines_path.exists() and console.lines(), "the console hears the device")
    (job_id,) = console.submit(tmp_path)
    expect(lambda: job_id in device.jobs, "the device has the job")
    console.ask("cancel", job_id)
    expect(lambda: console.ask("jobs", job_id)["state"] == "canceled", "the job is canceled")


def test_console_that_is_killed_and_comes_back_has_lost_nothing(
    console: ConsoleProcess, device: FakeDevice, tmp_path: Path
) -> None:
    ids = console.submit(tmp_path, 40)
    console.start()
    for round_number in range(4):
        expect(lambda: len(device.jobs) == 40, "the device has the jobs")
        for job_id in ids[round_number * 10 : round_number * 10 + 10]:
            device.move(job_id, "running")
            device.succeed(job_id, job_id)
            device.record("event/alarm", "event.alarm", {"job": job_id})
        console.end(signal.SIGKILL)
        console.start()
    expect(lambda: not device.records, "every record is acknowledged")
    jobs = console.ask("jobs", "--limit", 100)
    assert {(job["state"], job["result"]["output"] == job["job_id"]) for job in jobs} == {
        ("succeeded", True)
    }
    alarms = [event["body"]["job"] for event in console.ask("events", "--limit", 100)]
    assert sorted(alarms) == sorted(ids)


def test_what_a_device_said_while_the_console_was_away_is_kept_by_one_of_three(
    console: ConsoleProcess, device: FakeDevice, mosquitto: MqttProcess, tmp_path: Path
) -> None:
    console.start()
    (job_id,) = console.submit(tmp_path)
    expect(lambda: job_id in device.jobs, "the device has the job")
    expect(lambda: not device.records, "its state is acknowledged")
    assert console.end(signal.SIGTERM) == 0
    # Neither the device's connection nor the broker's memory outlives this.
    device.leave()
    device.succeed(job_id, 7)
    mosquitto.kill()
    for path in (tmp_path / "mosquitto").rglob("mosquitto.db"):
        path.unlink()
    mosquitto.start()
    console.start()
    device.connect()
    expect(lambda: not device.records, "every record is acknowledged")
    assert console.ask("jobs", job_id)["result"]["output"] == 7


def test_device_with_a_new_ledger_gets_its_open_jobs_again_and_ends_stay(
    console: ConsoleProcess, device: FakeDevice, tmp_path: Path
) -> None:
    open_id, ended_id = console.submit(tmp_path, 2)
    console.start()
    expect(lambda: len(device.jobs) == 2, "the device has the jobs")
    device.move(open_id, "running")
    device.move(open_id, "queued")
    device.succeed(ended_id, 1)
    expect(lambda: not device.records, "every record is acknowledged")
    device.leave()
    device.lose_ledger()
    device.connect()
    expect(lambda: open_id in device.jobs, "the open job comes again")
    device.succeed(open_id, 2)
    expect(lambda: not device.records, "every record is acknowledged")
    assert ended_id not in device.jobs
    states = {job["job_id"]: job["state"] for job in console.ask("jobs")}
    assert states == {open_id: "succeeded", ended_id: "succeeded"}
    assert [event["type"] for event in console.ask("events")] == ["ledger"]


def test_gap_record_lets_acknowledgements_go_on(
    console: ConsoleProcess, device: FakeDevice
) -> None:
    console.start()
    device.record("event/alarm", "event.alarm", {})
    expect(lambda: device.acked == 1, "the first record is acknowledged")
    device.seq += 5
    device.drop(2, 6)
    expect(lambda: device.acked == 7, "the gap is covered")
    assert console.ask("events", "--type", "gap")[0]["body"]["count"] == 5


def test_thousands_of_jobs_for_a_device_that_is_away_do_not_flood_its_queue(
    console: ConsoleProcess, device: FakeDevice, tmp_path: Path
) -> None:
    device.leave()
    ids = console.submit(tmp_path, 700)
    console.start()
    expect(lambda: "connected to" in console.errors() or console.lines(), "the console is there")
    device.connect()
    wait_until(lambda: len(device.jobs) == len(ids), 60, "the device has every job")
    assert set(device.jobs) == set(ids)
    submits = [topic for topic, _ in device.heard if topic.startswith("job/")]
    assert len(submits) < 2 * len(ids)


def test_devices_are_kept_apart(
    console: ConsoleProcess, device: FakeDevice, mosquitto: MqttProcess, tmp_path: Path
) -> None:
    other = FakeDevice(mosquitto.port, "box-8")
    other.connect()
    console.start("--device", "box-7", "--device", "box-8")
    (mine,) = console.submit(tmp_path, device="box-8")
    expect(lambda: mine in other.jobs, "the other device has its job")
    other.succeed(mine, 1)
    device.record("event/alarm", "event.alarm", {})
    expect(lambda: not (device.records or other.records), "both are acknowledged")
    assert mine not in device.jobs
    listed = {item["device"]: item["acked_seq"] for item in console.ask("devices")}
    assert listed == {"box-7": 1, "box-8": other.seq}
    other.leave()


def test_second_listener_on_a_store_is_refused(console: ConsoleProcess, device: FakeDevice) -> None:
    console.start()
    expect(lambda: console.lines_path.exists() and console.lines(), "the console hears the device")
    assert console.ask("listen", code=8)["error"]["code"] == "already_listening"


@pytest.mark.parametrize("command", ["jobs", "devices", "events"])
def test_store_that_is_missing_is_named(tmp_path: Path, command: str) -> None:
    error = ConsoleProcess(tmp_path, free_port()).ask(command, code=1)["error"]
    assert error["code"] == "bad_console_store"
    assert str(tmp_path) in error["message"]


def test_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    console = ConsoleProcess(tmp_path, free_port())
    console.store.write_bytes(b"this is no database" * 100)
    before = console.store.read_bytes()
    assert console.ask("jobs", code=1)["error"]["code"] in ("bad_console_store", "store_damaged")
    assert console.store.read_bytes() == before


def test_console_without_a_broker_waits_for_one_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    console = ConsoleProcess(tmp_path, free_port())
    console.start()
    expect(lambda: console.store.exists(), "the store is made")
    console.submit(tmp_path)
    assert console.end(signal.SIGINT) == 0
