"""Junk costs a box neither its memory nor its answers."""

from pathlib import Path

import pytest

from tests.fault.flood import iter_payloads, measure_flood, read_all
from tests.harness.box import Box, RecordingConsole
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

MESSAGES = 20_000
PAYLOADS = 100_000
RSS_MB = 100


def test_any_payload_is_read_or_refused_and_nothing_else() -> None:
    refused = read_all(iter_payloads(PAYLOADS))
    # Some of what was bent is still whole: else nothing behind the envelope was tried.
    assert PAYLOADS * 0.5 < refused <= PAYLOADS


@pytest.mark.timeout(180)
def test_flooded_agent_stays_small_and_answers(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    box = Box(tmp_path, mosquitto, queue_broker)
    console = RecordingConsole(mosquitto.port)
    try:
        box.start("agent")
        box.start("worker")
        wait_until(lambda: console.find("status"), 30, "the agent is online")
        figures = measure_flood(box, console, MESSAGES)
        assert figures.highest_mb < RSS_MB, figures
        assert console.wait_end(console.submit())["state"] == "succeeded"
        # By number: some of the junk is a sync that makes the agent send everything again.
        events = {item["seq"]: item["body"]["code"] for item in console.find("event")}
        singly = [code for code in events.values() if code not in ("too_many", "id_conflict")]
        assert len(singly) <= 2 * 60, "bad commands beyond the budget are only counted"
        assert "Traceback" not in box.read_log()
    finally:
        box.close()
        console.close()
