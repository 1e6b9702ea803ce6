"""A worker whose consumer stands still ends by itself, so that its supervisor starts a new one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.brokers import QueueProcess
from tests.harness.lone_worker import LoneWorker, make_item
from worker.heartbeat import EXIT_HUNG

# The worker's own code; what comes after "ready" in Celery's loop never does. Asked to end, the
# first kind does so, and the second does not.
_STALL = """
import sys, time
from celery import signals
from celery.worker import state
from agent.config import load_settings
from agent.jobs import Lane
from worker.app import Worker

def stall(**_):
    while state.should_stop is None or {deaf}:
        time.sleep(0.05)

worker = Worker(load_settings(), [Lane.INFERENCE], "test")
signals.worker_ready.connect(worker._on_ready, weak=False)
signals.worker_ready.connect(stall, weak=False)
sys.exit(worker.run())
"""


@pytest.fixture
def worker(tmp_path: Path, queue_broker: QueueProcess) -> Iterator[LoneWorker]:
    worker = LoneWorker(tmp_path, queue_broker)
    yield worker
    worker.close()


@pytest.mark.parametrize("deaf", [False, True])
def test_stalled_consumer_ends_its_worker_and_the_next_one_takes_the_task(
    worker: LoneWorker, deaf: bool
) -> None:
    worker.start(sys.executable, "-c", _STALL.replace("{deaf}", str(deaf)))
    worker.send("tiny", [make_item()])
    assert worker.wait_end(60) == (EXIT_HUNG if deaf else 0)
    assert worker.count_waiting() == 1
    assert "1 tasks wait, and the consumer takes none" in worker.read_log()
    worker.start()
    assert worker.hear()["jobs"][0]["state"] == "succeeded"
