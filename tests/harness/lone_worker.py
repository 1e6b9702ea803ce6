"""A worker process without an agent: tasks go straight into the broker, its answers come back.

Its model `wild` does in a postprocessing step what a job's params say: crash, sleep, abort.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from kombu import Connection, Producer, Queue

from agent.commands import encode, new_id
from agent.jobs import Lane
from agent.manifest import Step, read_manifest, write_manifest
from agent.repository import ModelRepository
from agent.tasks import (
    INFER_TASK,
    HeartbeatBody,
    cancel_key,
    celery_message,
    heartbeat_key,
    lane_queue,
    transport_options,
)
from benchmarks.tiny_model import write_tiny_model
from tests.harness.brokers import QueueProcess
from tests.harness.known_box import seed_platform
from tests.harness.models import write_endless_model
from tests.harness.waiting import wait_until

REPLY = "outcomes.test"
FOR_EVER = 2**62
_STEP = """
import ctypes, os, time

def build(params, manifest, folder):
    if (folder / "crash-on-load").exists():
        ctypes.string_at(0)
    def step(outputs, value, params):
        if params.get("do") == "segv":
            ctypes.string_at(0)
        if params.get("do") == "abort":
            os.abort()
        time.sleep(params.get("sleep_s", 0))
        return "done"
    return step
"""


def write_wild_model(folder: Path, site: Path) -> None:
    """Write the model `wild`, and the distribution of its step into a folder for PYTHONPATH."""
    write_tiny_model(folder, "wild")
    manifest = read_manifest(folder).model_copy(update={"postprocess": (Step(name="wild"),)})
    write_manifest(manifest, folder)
    info = site / "acme_wild-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_wild.py").write_text(_STEP, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-wild\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edgeward.postprocess]\nwild = acme_wild:build\n")


def write_row(path: Path, value: float = 0.5) -> str:
    """Write one row for `tiny` and `wild` as .npy; return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, np.full((1, 64), value, np.float32))
    return path.name


def make_item(given: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a job as a task carries it; by default one row for `tiny` and `wild`."""
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 64], "data": [0.25] * 64}
    body = {"input": given or {"tensors": [tensor]}, "params": changes.pop("params", {})}
    item = {"id": new_id(), "attempt": 1, "timeout_s": 60.0, "progress_timeout_s": None}
    return {**item, "body": body, **changes}


def make_loop(times: int, **changes: Any) -> dict[str, Any]:
    """Return a job for `endless`."""
    tensor = {"name": "x", "datatype": "INT64", "shape": [1], "data": [times]}
    return make_item({"tensors": [tensor]}, **changes)


class LoneWorker:
    """A worker of the lanes inference and batch in one slot, on a box of its own."""

    def __init__(self, folder: Path, broker: QueueProcess, **settings: str) -> None:
        self.data_dir = folder / "data"
        seed_platform(self.data_dir)
        self.slot = "test"
        self.process: subprocess.Popen[bytes] | None = None
        self._log = folder / "worker.log"
        self._client: Any = broker.client()
        self._connection = Connection(broker.url, transport_options=transport_options())
        self._messages = self._connection.SimpleQueue(Queue(REPLY, durable=True))
        self.heard: list[dict[str, Any]] = []
        self._env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")]),
            "EDGEWARD_DATA_DIR": str(self.data_dir),
            "EDGEWARD_DEVICE_ID": "test",
            "EDGEWARD_QUEUE__URL": broker.url,
            "EDGEWARD_WORKER__CONCURRENCY": "2",
            **settings,
        }
        self.repository = ModelRepository(self.data_dir / "models")
        write_tiny_model(folder / "tiny")
        write_endless_model(folder / "endless")
        write_wild_model(folder / "wild", folder / "site")
        for name in ("tiny", "endless", "wild"):
            self.repository.add(folder / name)

    @property
    def inbox(self) -> Path:
        return self.data_dir / "inbox"

    @property
    def journals(self) -> list[Path]:
        """Files that it left, or uses."""
        return sorted((self.data_dir / "run" / "workers" / self.slot).iterdir())

    def start(self, *argv: str) -> None:
        """Start it, by another program if one is given, and wait until it says that it lives."""
        before = self.beat()
        program = str(Path(sys.executable).with_name("edgeward"))
        lanes = ("--lane", "inference", "--lane", "batch", "--slot", self.slot)
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                argv or (program, "worker", *lanes),
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

        def has_started() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.read_log()
            beat = self.beat()
            return beat is not None and beat.worker != (before and before.worker)

        wait_until(has_started, 30, "the worker lives")

    def beat(self) -> HeartbeatBody | None:
        """Return its last heartbeat, while that counts."""
        text = self._client.get(heartbeat_key(self.slot))
        return None if text is None else HeartbeatBody.model_validate_json(text)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def wait_end(self, timeout_s: float = 30) -> int:
        """Wait until it has ended by itself; return the exit code."""
        assert self.process is not None
        code = self.process.wait(timeout_s)
        self.process = None
        return code

    def kill(self) -> None:
        """End it from outside, without a word."""
        assert self.process is not None
        self.process.kill()
        self.wait_end()

    def send(self, model: str, items: Sequence[dict[str, Any]], lane: Lane = Lane.INFERENCE) -> str:
        """Send one task of jobs; return its id."""
        task_id = new_id()
        task = {"v": 1, "task": task_id, "device": "test", "reply": REPLY, "handler": "infer"}
        payload = encode({**task, "model": model, "version": None, "jobs": items})
        body, headers = celery_message(INFER_TASK, task_id, payload)
        queue = Queue(lane_queue(lane), durable=True)
        Producer(self._connection.default_channel, serializer="json").publish(
            body, routing_key=queue.name, headers=headers, declare=[queue]
        )
        return task_id

    def cancel(self, job_id: str) -> None:
        """Ask to stop a job, as an agent does."""
        self._client.set(cancel_key(job_id), "1", ex=60)

    def count_said(self) -> int:
        """Return how many messages lie in the reply queue, unread."""
        return int(self._client.llen(REPLY))

    def count_waiting(self, lane: Lane = Lane.INFERENCE) -> int:
        """Return how many tasks lie in a lane's list."""
        return int(self._client.llen(lane_queue(lane)))

    def hear(self, kind: str = "outcome", timeout_s: float = 30) -> dict[str, Any]:
        """Return its next message of a kind; the others before it are kept in `heard`."""
        while True:
            message = self._messages.get(timeout=timeout_s)
            message.ack()
            said: dict[str, Any] = message.payload
            self.heard.append(said)
            if said["kind"] == kind:
                return said

    def wait_held(self, task_id: str, *, started: bool = True) -> None:
        """Wait until it says that a task runs."""

        def is_held() -> bool:
            beat = self.beat()
            return beat is not None and task_id in (beat.started if started else beat.held)

        wait_until(is_held, 20, f"task {task_id} runs; log:\n{self.read_log()[-2000:]}")

    def read_log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            process = self.process
            try:
                self.wait_end(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._messages.close()
        self._connection.release()
        self._client.close()
