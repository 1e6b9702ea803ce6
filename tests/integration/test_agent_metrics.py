"""The agent's metrics, scraped from a real agent that runs real jobs."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.platformfile import load_platform
from agent.repository import ModelRepository
from tests.architecture.documents import ROOT
from tests.harness.box import Box, RecordingConsole
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import free_port, wait_until
from worker.engine.engine import Engine
from worker.engine.serving import EngineService
from worker.metrics import build_registry, render

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def box(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess, port: int
) -> Iterator[Box]:
    box = Box(tmp_path / "box", mosquitto, queue_broker, EDGEWARD_METRICS__PORT=str(port))
    yield box
    for name in list(box.processes):
        box.kill(name)


def scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_scrape_tells_of_jobs_outbox_and_box(box: Box, mosquitto: MqttProcess, port: int) -> None:
    console = RecordingConsole(mosquitto.port)
    box.start("agent")
    wait_until(lambda: console.find("status"), 30, "the agent is online")
    waiting = console.submit_many(3)

    wait_until(
        lambda: sum(v for (n, _), v in scrape(port).items() if n == "edgeward_jobs_open") == 3,
        20,
        "three jobs wait",
    )
    before = scrape(port)
    assert before["edgeward_mqtt_connected", ()] == 1
    assert before["edgeward_queue_broker_up", ()] == 1
    assert before["edgeward_workers", ()] == 0
    assert before["edgeward_job_oldest_age_seconds", (("lane", "inference"),)] >= 0
    assert before["edgeward_store_ok", ()] == 1
    assert before["edgeward_disk_free_bytes", ()] > 0
    assert before["edgeward_ledger_bytes", ()] > 4096

    box.start("worker")
    wait_until(lambda: set(waiting) <= console.results.keys(), 60, "results")
    wait_until(
        lambda: (
            scrape(port).get(("edgeward_job_duration_seconds_count", (("state", "succeeded"),)))
            == 3
        ),
        20,
        "the ends are counted",
    )
    after = scrape(port)
    wait_until(lambda: scrape(port)["edgeward_workers", ()] == 1, 20, "the worker is counted")
    assert after["edgeward_outbox_published_total", ()] >= 6
    assert after["edgeward_outbox_dropped_total", (("class", "event"),)] == 0
    assert not [value for (name, _), value in after.items() if name == "edgeward_jobs_open"]
    console.close()


def test_port_in_use_costs_the_metrics_and_nothing_else(
    tmp_path: Path, mosquitto: MqttProcess, queue_broker: QueueProcess
) -> None:
    # The broker's own port is surely taken.
    box = Box(tmp_path / "box", mosquitto, queue_broker, EDGEWARD_METRICS__PORT=str(mosquitto.port))
    console = RecordingConsole(mosquitto.port)
    try:
        box.start("agent")
        wait_until(lambda: console.find("status"), 30, "the agent is online")
        wait_until(lambda: "metrics cannot be served" in box.read_log(), 10, "it says so")
    finally:
        console.close()
        for name in list(box.processes):
            box.kill(name)


def read_families(text: str) -> set[str]:
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_every_metric_that_the_board_names_is_exported(
    box: Box, mosquitto: MqttProcess, port: int
) -> None:
    board = json.loads((ROOT / "docs" / "grafana" / "edgeward.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    names = set(re.findall(r"\b(?:edgeward|nv|process)_\w+", " ".join(queries)))
    box.start("agent")
    wait_until(lambda: box.read_log().count("started, boot"), 30, "the agent has started")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        exported = read_families(answer.read().decode())
    engine = Engine(load_platform(box.data_dir))
    service = EngineService(engine, ModelRepository(box.data_dir / "models"))
    exported |= read_families(render(build_registry(service)).decode())
    service.close()

    # A histogram's samples have a suffix of their own, a counter's family has none.
    known = exported | {re.sub(r"_total$", "", name) for name in exported}
    found = {
        name if name in known else re.sub(r"_(?:bucket|count|sum|total)$", "", name)
        for name in names
    }
    assert len(names) > 20
    assert found <= known
