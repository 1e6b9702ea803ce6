"""Agent and worker on real brokers, seen from a console: the session, and bad input."""

import base64
import json
import math
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.commands import new_id
from agent.repository import ModelRepository
from console.models.samples import write_digit_samples
from tests.harness.box import TENSOR, Box, RecordingConsole, make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

DIGITS = Path(__file__).parents[2] / "console" / "models" / "digits"


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MqttProcess, QueueProcess]]:
    folder = tmp_path_factory.mktemp("brokers")
    mqtt, queue = MqttProcess(folder / "mqtt"), QueueProcess(folder / "queue")
    mqtt.start()
    queue.start()
    yield mqtt, queue
    mqtt.stop()
    queue.stop()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outside") / "secret.npy"
    path.write_bytes(b"secret")
    return path


@pytest.fixture(scope="module")
def box(
    tmp_path_factory: pytest.TempPathFactory, brokers: tuple[MqttProcess, QueueProcess]
) -> Iterator[Box]:
    box = Box(tmp_path_factory.mktemp("box"), *brokers, EDGEWARD_HEARTBEAT_S="0.5")
    ModelRepository(box.data_dir / "models").add(DIGITS)
    yield box
    box.close()


@pytest.fixture(scope="module")
def console(box: Box, brokers: tuple[MqttProcess, QueueProcess]) -> Iterator[RecordingConsole]:
    console = RecordingConsole(brokers[0].port)
    box.start("agent")
    box.start("worker")
    wait_until(lambda: console.find("status"), 30, "the agent is online")
    yield console
    console.close()


def submit_raw(console: RecordingConsole, payload: bytes) -> tuple[str, dict[str, Any]]:
    """Submit bytes as a job; return its id and the state that it ends in."""
    job_id = new_id()
    console.publish(console.topics.submit(job_id), payload)
    return job_id, console.wait_end(job_id)


def test_good_job_ends_with_its_result_and_timings(console: RecordingConsole) -> None:
    job_id = console.submit()
    assert console.wait_end(job_id)["state"] == "succeeded"
    wait_until(lambda: job_id in console.results, 10, "its result arrives")
    [result] = console.results[job_id]
    assert set(result["timings_ms"]) == {"queue", "pre", "infer", "post"}
    assert (result["model"], result["version"], result["release"]) == ("tiny", 1, "1.0.0")
    [output] = result["output"]["outputs"]
    assert (output["name"], output["shape"]) == ("y", [1, 10])


def test_real_image_is_recognised(console: RecordingConsole, tmp_path: Path) -> None:
    [sample] = write_digit_samples(tmp_path, 1)
    image = base64.b64encode(sample.path.read_bytes()).decode()
    job_id = console.submit(make_body(model="digits", input={"data_b64": image}))
    assert console.wait_end(job_id)["state"] == "succeeded"
    wait_until(lambda: job_id in console.results, 10, "its result arrives")
    assert console.results[job_id][0]["output"][0]["label"] == str(sample.label)


def test_birth_says_what_the_box_is_and_can(console: RecordingConsole) -> None:
    wait_until(
        lambda: any(item["body"]["platform"] for item in console.find("info")),
        30,
        "it was detected",
    )
    info = next(item["body"] for item in console.find("info") if item["body"]["platform"])
    assert info["protocols"] == ["edgeward/v1"]
    assert set(info["models"]) == {"digits", "tiny"}
    assert info["platform"]["arch"]


def test_heartbeat_tells_load_and_depths(console: RecordingConsole) -> None:
    wait_until(lambda: console.find("heartbeat"), 10, "a heartbeat")
    body = console.find("heartbeat")[-1]["body"]
    assert body["mqtt"] == "online"
    assert body["queue_broker"] == "reachable"
    assert body["resources"]["memory_available_mb"] > 0


def test_every_report_is_numbered_without_gaps(console: RecordingConsole) -> None:
    job_id = console.submit()
    console.wait_end(job_id)
    wait_until(lambda: job_id in console.results, 10, "its result arrives")
    seqs = sorted({item["seq"] for _, item in list(console.messages) if "seq" in item})
    assert seqs == list(range(1, len(seqs) + 1))


NAN_TENSOR = {**TENSOR, "data": [0.5] * 63 + ["NaN"]}
BAD_SUBMITS: dict[str, tuple[bytes, str, str]] = {
    "text": (b"hello", "rejected", "malformed"),
    "nothing": (b"", "rejected", "malformed"),
    "half a document": (make_envelope(make_body())[:-5], "rejected", "malformed"),
    "not UTF-8": (
        b'{"v":1,"id":"x","type":"job.submit","body":{"a":"\xff"}}',
        "rejected",
        "malformed",
    ),
    "deep nesting": (b'{"v":1,"id":"x","type":"t","body":' + b"[" * 5000, "rejected", "malformed"),
    "a list": (b"[1,2]", "rejected", "malformed"),
    "no type": (b'{"v":1,"id":"x"}', "rejected", "malformed"),
    "NaN in JSON": (make_envelope(make_body(params={"x": math.nan})), "rejected", "malformed"),
    "1e999": (
        make_envelope(make_body()).replace(b"0.25", b"1e999", 1),
        "rejected",
        "malformed",
    ),
    "another version": (make_envelope(make_body(), v=2), "rejected", "unsupported_version"),
    "another type": (make_envelope(make_body(), kind="shell"), "rejected", "unsupported_type"),
    "a shell job": (make_envelope(make_body(handler="shell")), "rejected", "unknown_handler"),
    "no model": (make_envelope({"handler": "infer", "input": {}}), "rejected", "invalid_body"),
    "no input": (make_envelope(make_body(input={})), "rejected", "invalid_body"),
    "two inputs": (
        make_envelope(make_body(input={"tensors": [TENSOR], "file": "a"})),
        "rejected",
        "invalid_body",
    ),
    "priority 10": (make_envelope(make_body(priority=10)), "rejected", "invalid_body"),
    "another job's id": (make_envelope(make_body(job_id=new_id())), "rejected", "invalid_body"),
    "unknown model": (make_envelope(make_body(model="nope")), "rejected", "unknown_model"),
    "model outside": (make_envelope(make_body(model="../tiny")), "rejected", "invalid_body"),
    "over the limit": (
        make_envelope(make_body(params={"x": "y" * 300_000})),
        "rejected",
        "payload_too_large",
    ),
    "too late": (
        make_envelope(make_body(), not_after="2020-01-01T00:00:00Z"),
        "expired",
        "deadline_passed",
    ),
    "unknown version": (make_envelope(make_body(version="9")), "failed", "unknown_version"),
    "wrong shape": (
        make_envelope(make_body(input={"tensors": [{**TENSOR, "shape": [64]}]})),
        "failed",
        "bad_input_data",
    ),
    "wrong count": (
        make_envelope(make_body(input={"tensors": [{**TENSOR, "shape": [1, 32]}]})),
        "failed",
        "bad_input_data",
    ),
    "wrong dtype": (
        make_envelope(make_body(input={"tensors": [{**TENSOR, "datatype": "INT8"}]})),
        "failed",
        "bad_input_data",
    ),
    "NaN by name": (
        make_envelope(make_body(input={"tensors": [NAN_TENSOR]})),
        "failed",
        "bad_input_data",
    ),
    "not base64": (
        make_envelope(make_body(model="digits", input={"data_b64": "%%%"})),
        "failed",
        "bad_input",
    ),
    "no image": (
        make_envelope(make_body(model="digits", input={"data_b64": "aGVsbG8="})),
        "failed",
        "bad_image",
    ),
    "a missing file": (
        make_envelope(make_body(input={"file": "tiny/none.npy"})),
        "failed",
        "input_not_found",
    ),
    "a path upwards": (
        make_envelope(make_body(input={"file": "../ledger.db"})),
        "failed",
        "path_not_allowed",
    ),
    "a path elsewhere": (
        make_envelope(make_body(input={"file": "/etc/passwd"})),
        "failed",
        "path_not_allowed",
    ),
}


@pytest.mark.parametrize("name", BAD_SUBMITS)
def test_bad_submit_ends_in_a_state_with_a_stable_code(
    console: RecordingConsole, name: str
) -> None:
    payload, state, code = BAD_SUBMITS[name]
    _, end = submit_raw(console, payload)
    assert (end["state"], end["reason"]["code"]) == (state, code), end["reason"]


def test_file_behind_a_link_is_refused(box: Box, console: RecordingConsole, outside: Path) -> None:
    link = box.data_dir / "inbox" / "link.npy"
    link.symlink_to(outside)
    _, end = submit_raw(console, make_envelope(make_body(input={"file": "link.npy"})))
    link.unlink()
    assert (end["state"], end["reason"]["code"]) == ("failed", "path_not_allowed")


def test_bad_job_in_a_bundle_fails_alone(console: RecordingConsole) -> None:
    bad = make_body(input={"tensors": [{**TENSOR, "shape": [64]}]})
    ids = [console.submit(bad if index == 7 else None) for index in range(16)]
    states = [console.wait_end(job_id)["state"] for job_id in ids]
    assert states == ["failed" if index == 7 else "succeeded" for index in range(16)]


def test_topic_without_a_job_id_is_an_event(console: RecordingConsole) -> None:
    console.publish(console.topics.submit("not-a-ulid"), make_envelope(make_body()))
    console.publish("edgeward/v1/box-1/c2d/nonsense", b"{}")

    def codes() -> set[str]:
        return {item["body"]["code"] for item in console.find("event")}

    wait_until(lambda: {"malformed", "unsupported_type"} <= codes(), 10, "both events arrive")


def test_id_with_another_body_is_a_conflict_and_the_original_stands(
    console: RecordingConsole,
) -> None:
    job_id = console.submit()
    console.wait_end(job_id)
    console.submit(make_body(priority=1), job_id)

    def conflicts() -> list[Any]:
        return [e for e in console.find("event") if e["body"].get("job_id") == job_id]

    wait_until(conflicts, 10, "the conflict is reported")
    assert conflicts()[0]["body"]["code"] == "id_conflict"
    assert console.last_state(job_id)["state"] == "succeeded"  # type: ignore[index]


def test_cancel_before_the_submit_wins(console: RecordingConsole) -> None:
    job_id = new_id()
    console.publish(console.topics.cancel(job_id), make_envelope({}, "job.cancel"))
    assert console.wait_end(job_id)["state"] == "canceled"
    console.submit(job_id=job_id)
    states = len(console.states[job_id])
    wait_until(lambda: len(console.states[job_id]) > states, 10, "the state is sent again")
    assert console.last_state(job_id)["state"] == "canceled"  # type: ignore[index]


def test_deadline_comes_from_the_message_expiry(console: RecordingConsole) -> None:
    job_id = new_id()
    late = make_envelope(make_body(), not_after="2020-01-01T00:00:00Z")
    # The broker counted the expiry down by its own clock; `not_after` may come from a wrong one.
    console.publish(console.topics.submit(job_id), late, MessageExpiryInterval=600)
    assert console.wait_end(job_id)["state"] == "succeeded"


def test_ping_is_answered_below_the_reply_prefix_only(console: RecordingConsole) -> None:
    good = console.topics.reply_prefix + "abc"
    console.publish(console.topics.command("ping"), b"", ResponseTopic=good)
    wait_until(lambda: console.find("reply"), 10, "the reply")
    assert "pong" in console.find("reply")[0]["body"]
    console.publish(
        console.topics.command("ping"), b"", ResponseTopic="edgeward/v1/other/c2d/job/x"
    )
    wait_until(
        lambda: any(e["body"]["code"] == "response_topic_refused" for e in console.find("event")),
        10,
        "the refusal",
    )


def test_broadcast_ping_is_answered_below_the_own_prefix(console: RecordingConsole) -> None:
    before = len(console.find("reply"))
    console.publish(
        "edgeward/v1/_all/c2d/cmd/ping", b"", ResponseTopic="edgeward/v1/_all/d2c/reply/all-1"
    )
    wait_until(lambda: len(console.find("reply")) > before, 10, "the reply")
    topics = [topic for topic, _ in list(console.messages) if "/reply/" in topic]
    assert topics[-1] == console.topics.reply_prefix + "all-1"


def test_results_too_large_to_travel_go_to_a_file(box: Box, console: RecordingConsole) -> None:
    folder = box.data_dir / "inbox" / "big"
    folder.mkdir(exist_ok=True)
    with (folder / ".big.npy").open("wb") as file:
        np.save(file, np.full((20_000, 64), 0.123456, np.float32))
    job_id = console.submit(make_body(input={"file": "big/.big.npy"}))
    assert console.wait_end(job_id)["state"] == "succeeded"
    wait_until(lambda: job_id in console.results, 10, "its result arrives")
    reference = console.results[job_id][0]["output"]
    document = json.loads((box.data_dir / reference["file"]).read_text())
    assert document["outputs"][0]["shape"] == [20_000, 10]


def test_will_and_farewell_carry_boot_and_connection(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    box = Box(tmp_path, mosquitto, queue_broker, EDGEWARD_MQTT__WILL_DELAY_S="0")
    console = RecordingConsole(mosquitto.port)
    try:
        box.start("agent")
        wait_until(lambda: len(console.find("status")) == 1, 30, "online")
        box.kill("agent")
        wait_until(lambda: len(console.find("status")) == 2, 30, "the will")
        box.start("agent")
        wait_until(lambda: len(console.find("status")) == 3, 30, "online again")
        box.stop("agent")
        wait_until(lambda: len(console.find("status")) == 4, 30, "the farewell")
    finally:
        box.close()
        console.close()
    assert [(s["state"], s["boot"], s["conn"]) for s in console.find("status")] == [
        ("online", 1, 1),
        ("offline", 1, 1),
        ("online", 2, 2),
        ("stopped", 2, 2),
    ]


def test_commands_sent_while_the_agent_was_away_run_when_it_is_back(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    box = Box(tmp_path, mosquitto, queue_broker)
    console = RecordingConsole(mosquitto.port)
    try:
        box.start("worker")
        box.start("agent")
        wait_until(lambda: console.find("status"), 30, "online")
        box.stop("agent")
        ids = [console.submit() for _ in range(20)]
        box.start("agent")
        assert {console.wait_end(job_id)["state"] for job_id in ids} == {"succeeded"}
    finally:
        box.close()
        console.close()


@pytest.mark.parametrize("name", ["agent", "worker"])
def test_service_manager_hears_of_readiness_life_and_the_stop(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess, name: str
) -> None:
    box = Box(tmp_path, mosquitto, queue_broker)
    heard: list[str] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)

        def hears(wanted: str) -> bool:
            with suppress(BlockingIOError):
                heard.append(manager.recv(1024).decode())
            return wanted in heard

        box.start(name, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="2000000")
        try:
            wait_until(lambda: hears("READY=1"), 30, "READY=1")
            wait_until(lambda: hears("WATCHDOG=1"), 30, "WATCHDOG=1")
            box.processes[name].terminate()
            wait_until(lambda: hears("STOPPING=1"), 30, "STOPPING=1")
        finally:
            box.close()
    assert heard.index("READY=1") < heard.index("WATCHDOG=1") < heard.index("STOPPING=1")
