"""Acknowledgement and reconciliation end to end: real processes, a real broker that loses."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.commands import new_id
from agent.repository import ModelRepository
from tests.harness.acking import AckingConsole, count_distinct
from tests.harness.box import Box, make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.models import write_endless_model
from tests.harness.waiting import wait_until

COUNT_OUTBOX = "SELECT count(*) FROM outbox"
FOREIGN = "01JZ5W7Q2M4N8R0T3V6X9YBCDE"


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MqttProcess, QueueProcess]]:
    folder = tmp_path_factory.mktemp("brokers")
    mqtt, queue = MqttProcess(folder / "mqtt"), QueueProcess(folder / "queue")
    mqtt.start()
    queue.start()
    yield mqtt, queue
    mqtt.stop()
    queue.stop()


@pytest.fixture
def box(tmp_path: Path, brokers: tuple[MqttProcess, QueueProcess]) -> Iterator[Box]:
    box = Box(tmp_path, *brokers)
    yield box
    box.close()


@pytest.fixture
def console(box: Box) -> Iterator[AckingConsole]:
    console = AckingConsole(box.mqtt.port)
    yield console
    console.close()


def start(box: Box, console: AckingConsole, **environment: str) -> None:
    """Start agent and worker; returns when the agent asks to reconcile for the first time."""
    known = len(console.find("sync"))
    box.start("agent", **environment)
    if "worker" not in box.processes:
        box.start("worker")
    wait_until(lambda: len(console.find("sync")) > known, 30, "the agent is online")


def count_outbox(box: Box) -> int:
    return int(box.query(COUNT_OUTBOX)[0][0])


def run_jobs(console: AckingConsole, count: int) -> list[str]:
    """Run jobs to their results, without acknowledging anything."""
    ids = [console.submit() for _ in range(count)]
    wait_until(lambda: all(job_id in console.results for job_id in ids), 30, "results")
    for job_id in ids:
        assert console.wait_end(job_id)["state"] == "succeeded"
    console.work(answers=False)
    return ids


def identity(console: AckingConsole) -> str:
    return str(console.find("sync")[-1]["body"]["ledger"])


def test_first_acknowledgement_makes_the_console_s_the_one_that_counts_over_restarts(
    box: Box, console: AckingConsole
) -> None:
    start(box, console)
    run_jobs(console, 5)
    wait_until(lambda: count_outbox(box) == 0, 10, "the broker's PUBACK counts")
    upto = max(console.seen)
    console.send("ack", seq=upto, ledger=identity(console))
    wait_until(
        lambda: box.query("SELECT value FROM facts WHERE name = 'console_acks'") == [("1",)],
        10,
        "the agent has heard a console",
    )
    for _ in range(2):
        run_jobs(console, 3)
        kept = count_outbox(box)
        assert kept >= 6
        box.kill("agent")
        start(box, console)
        assert count_outbox(box) >= kept
    console.work(answers=False)
    assert console.seen == set(range(1, max(console.seen) + 1))
    console.send("ack", seq=max(console.seen), ledger=identity(console))
    wait_until(lambda: count_outbox(box) == 0, 10, "all is acknowledged")


def test_acknowledgements_that_cannot_be_meant_are_ignored(
    box: Box, console: AckingConsole
) -> None:
    start(box, console, EDGEWARD_OUTBOX__ACK="console")
    run_jobs(console, 3)
    kept = count_outbox(box)
    console.send("ack", seq=max(console.seen) + 1000)
    console.send("ack", seq=max(console.seen), ledger=FOREIGN)
    console.send("sync", acked_seq=max(console.seen), ledger=FOREIGN)
    console.send("ack", seq=-1)
    console.send("ack", seq="all")
    # Messages of one sender arrive in order: once this one is answered, all before it were read.
    console.wait_end(console.submit())
    wait_until(lambda: len(console.find("event")) >= 2, 10, "two are no acknowledgements")
    assert count_outbox(box) >= kept
    # Without a ledger's name it is taken for this one.
    console.work(answers=False)
    console.send("ack", seq=max(console.seen))
    wait_until(lambda: count_outbox(box) <= 2, 10, "a good one counts")


def test_sync_answer_brings_again_exactly_what_is_above_it(
    box: Box, console: AckingConsole
) -> None:
    start(box, console, EDGEWARD_OUTBOX__ACK="console")
    run_jobs(console, 10)
    highest = max(console.seen)
    assert console.seen == set(range(1, highest + 1))
    before = len(console.messages)
    console.send("sync", acked_seq=highest - 7, ledger=identity(console))
    wait_until(lambda: count_outbox(box) == 7, 10, "the others are forgotten")
    expected = list(range(highest - 6, highest + 1))

    def came() -> list[int]:
        return [document["seq"] for _, document in console.messages[before:] if "seq" in document]

    wait_until(lambda: len(came()) >= 7, 10, "seven are sent again")
    assert came() == expected
    console.send("sync", acked_seq=highest, ledger=identity(console))
    wait_until(lambda: count_outbox(box) == 0, 10, "now all of them are there")
    assert came() == expected


def test_missing_unknown_and_cancel_of_a_sync_are_acted_on(
    box: Box, console: AckingConsole
) -> None:
    start(box, console)
    job_id = new_id()
    body = make_body(job_id=job_id)
    console.publish(console.topics.submit(job_id), make_envelope(body))
    console.wait_end(job_id)
    wait_until(lambda: job_id in console.results, 10, "its result")
    lost, never = new_id(), new_id()
    held = new_id()
    console.publish(
        console.topics.submit(held), make_envelope(make_body(), not_before="2099-01-01T00:00:00Z")
    )
    wait_until(lambda: console.last_state(held), 10, "one job waits")
    envelope = {"v": 1, "id": "m", "type": "job.submit"}
    console.send(
        "sync",
        missing=[
            {**envelope, "body": make_body(job_id=lost)},
            {**envelope, "body": body},
        ],
        unknown=[held, new_id()],
        cancel=[never],
    )
    assert console.wait_end(lost)["state"] == "succeeded"
    assert console.wait_end(never)["state"] == "canceled"
    wait_until(lambda: len(console.results[job_id]) == 2, 10, "the result comes again")
    assert count_distinct(console.results[job_id]) == 1
    wait_until(lambda: len(console.states[held]) == 2, 10, "its state is said again")
    console.send("sync", cancel=[held])
    assert console.wait_end(held)["state"] == "canceled"


def test_agent_asks_to_reconcile_in_its_period_and_after_rebirth(
    box: Box, console: AckingConsole
) -> None:
    start(box, console)
    first = len(console.find("sync"))
    console.publish(
        "edgeward/v1/box-1/c2d/cmd/rebirth",
        b"",
        ResponseTopic="edgeward/v1/box-1/d2c/reply/me",
    )
    wait_until(lambda: len(console.find("sync")) == first + 1, 10, "rebirth asks once")
    box.stop("agent")
    start(box, console, EDGEWARD_MQTT__SYNC_S="1")
    again = len(console.find("sync"))
    wait_until(lambda: len(console.find("sync")) >= again + 2, 10, "and then each second")
    body = console.find("sync")[-1]["body"]
    assert set(body) == {
        "ledger",
        "seq",
        "oldest_seq",
        "desired_version",
        "epoch",
        "open",
        "open_count",
        "digest",
        "outbox_depth",
    }


def test_lost_ledger_shows_in_its_identity_and_numbers_begin_anew(
    box: Box, console: AckingConsole
) -> None:
    start(box, console)
    run_jobs(console, 2)
    old = identity(console)
    box.stop("agent")
    for file in box.data_dir.glob("ledger.db*"):
        file.unlink()
    start(box, console)
    assert identity(console) != old
    assert console.find("status")[-1]["ledger"] == identity(console)
    assert console.find("info")[-1]["body"]["ledger"] == identity(console)
    before = len(console.messages)
    console.wait_end(console.submit())
    assert min(item["seq"] for _, item in console.messages[before:] if "seq" in item) == 1


def test_cancel_of_a_running_job_asks_its_worker_to_stop(box: Box, console: AckingConsole) -> None:
    write_endless_model(box.data_dir.parent / "endless")
    ModelRepository(box.data_dir / "models").add(box.data_dir.parent / "endless")
    start(box, console, EDGEWARD_LIMITS__RUN_TIMEOUT_S="5")
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [2**62]}
    job_id = console.submit(make_body(model="endless", input={"tensors": [tensor]}))
    wait_until(lambda: (console.last_state(job_id) or {}).get("state") == "running", 20, "it runs")
    console.publish(console.topics.cancel(job_id), make_envelope({}, "job.cancel"))
    assert console.wait_end(job_id)["state"] == "canceled"
    client = QueueProcess.client(box.queue)
    try:
        wait_until(lambda: client.get(f"edgeward:cancel:{job_id}"), 10, "the worker is asked")
        assert 0 < client.ttl(f"edgeward:cancel:{job_id}") <= 3600
    finally:
        client.close()
    box.kill("worker")
    assert (console.last_state(job_id) or {})["state"] == "canceled"


class CappedBroker(MqttProcess):
    """A mosquitto as distributions ship it: 1,000 messages wait, nothing survives a restart."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        [config] = folder.glob("**/*.conf")
        text = config.read_text().replace("max_queued_messages 0", "max_queued_messages 1000")
        assert "max_queued_messages 1000" in text
        config.write_text(text.replace("persistence true", "persistence false"))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("restart", [False, True], ids=["capped", "capped and restarted"])
def test_jobs_that_the_broker_dropped_are_not_lost(
    tmp_path: Path, queue_broker: QueueProcess, restart: bool
) -> None:
    broker = CappedBroker(tmp_path / "capped")
    broker.start()
    box = Box(tmp_path, broker, queue_broker, EDGEWARD_MQTT__SYNC_S="1")
    console = AckingConsole(broker.port)
    try:
        start(box, console)
        box.stop("agent")
        ids = console.want(5000)
        wait_until(lambda: len(console.wanted) == 5000, 5, "all are published")
        console.publish("edgeward/v1/nobody/c2d/flush", b"")
        if restart:
            broker.kill()
            broker.start()
        start(box, console)
        wait_until(lambda: console.sees_all(ids), 150, "5,000 results")
        assert console.resent >= (5000 if restart else 3900)
        assert all(count_distinct(console.results[job_id]) == 1 for job_id in ids)
        assert box.query("SELECT state, count(*) FROM jobs GROUP BY 1") == [("succeeded", 5000)]

        def is_empty() -> bool:
            console.work()
            return count_outbox(box) == 0

        wait_until(is_empty, 30, "everything is acknowledged")
    finally:
        box.close()
        console.close()
        broker.stop()
