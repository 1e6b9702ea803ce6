"""Fixtures and functions for all tests; import the functions from here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import free_port, require_binary, wait_until

__all__ = ["free_port", "mosquitto", "queue_broker", "require_binary", "wait_until"]


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[MqttProcess]:
    """A running mosquitto with the shipped settings, on a free port, with a store of its own."""
    require_binary("mosquitto")
    broker = MqttProcess(tmp_path / "mosquitto")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def queue_broker(tmp_path: Path) -> Iterator[QueueProcess]:
    """A running Valkey or Redis on a Unix socket, with the shipped settings."""
    broker = QueueProcess(tmp_path / "queue")
    broker.start()
    yield broker
    broker.stop()
