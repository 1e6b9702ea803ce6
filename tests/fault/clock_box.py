"""A box whose wall clock a test moves, and a model that counts how often each input was run.

Owns a box of real processes that were started with `tests.fault.shifted`, its console, and what
was asked of it: each input carries a number of its own. The model's last step appends that
number to a file, so a run that nobody reports is seen all the same.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from agent.clock import format_ms, parse_at
from agent.commands import new_id
from agent.manifest import Step, TensorEntry, read_manifest, write_manifest
from agent.repository import ModelRepository
from benchmarks.tiny_model import write_version
from platforms.artifact import Datatype
from tests.fault.shifted import write_shift
from tests.harness.box import Box, RecordingConsole, make_body, make_envelope
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

MODEL = "counted"
ENDS = {"succeeded", "failed", "timed_out", "canceled", "expired", "rejected"}
_WIDTH = 3
_STEP_MODULE = "clock_count_step"
_STEP = '''\
"""A postprocessing step that counts: number, seconds to take, runs that end the process."""

import os
import time
from pathlib import Path


def build(params, manifest, folder):
    def step(outputs, value, params):
        number, wait_s, crashes = next(iter(outputs.values())).reshape(-1)[:3].tolist()
        path = Path(os.environ["COUNTED_RUNS"])
        with path.open("a") as file:
            file.write(f"{number:.0f}\\\\n")
        if path.read_text().split().count(f"{number:.0f}") <= crashes:
            os._exit(9)
        time.sleep(wait_s)
        return {"number": number}

    return step
'''.replace("\\\\n", "\\n")
_SETTINGS = {
    "EDGEWARD_STORE__KEEP_ENDS_DAYS": "1",
    "EDGEWARD_STORE__KEEP_BODIES_DAYS": "1",
    "EDGEWARD_OUTBOX__RESULT_DAYS": "1",
    "EDGEWARD_QUEUE__RETRY_DELAY_S": "3",
    "EDGEWARD_MQTT__KEEPALIVE_S": "5",
}


@dataclass
class Asked:
    """One job as it was submitted."""

    number: int
    payload: bytes
    runs: int
    properties: dict[str, Any] = field(default_factory=dict)


class ClockBox:
    """One box with a wrong clock.

    Args:
        folder: for everything.
        mqtt: a running broker.
        queue: another.
    """

    def __init__(self, folder: Path, mqtt: MqttProcess, queue: QueueProcess) -> None:
        self.runs_file = folder / "runs.txt"
        self.runs_file.touch()
        self._shift_file = folder / "shift.json"
        self._offset_s = 0
        write_shift(self._shift_file, 0)
        steps = _write_step(folder / "steps")
        settings = {"COUNTED_RUNS": str(self.runs_file), **_SETTINGS}
        self.box = Box(folder, mqtt, queue, **settings)
        self._path = {"PYTHONPATH": ":".join([str(steps), *sys.path])}
        self.box.launcher = (
            sys.executable,
            "-m",
            "tests.fault.shifted",
            str(self._shift_file),
        )
        _add_model(folder / MODEL, self.box.data_dir / "models")
        self.console = RecordingConsole(mqtt.port)
        self.asked: dict[str, Asked] = {}
        self.files: list[str] = []
        self._numbers = 0
        self.inbox = self.box.data_dir / "inbox" / MODEL
        self.inbox.mkdir(parents=True)

    def start(self, *names: str) -> None:
        """Start `agent` or `worker`, and wait until the agent serves."""
        for name in names:
            self.box.start(name, **self._path)
        if "agent" in names:
            self.wait_told()

    def wait_worker(self) -> None:
        """Wait until the agent knows of a worker."""

        def is_there() -> bool:
            path = self.box.data_dir / "run" / "status.json"
            return bool(json.loads(path.read_text())["workers"])

        wait_until(is_there, 40, f"a worker is ready; log:\n{self.log()}")

    def close(self) -> None:
        """Stop everything."""
        self.box.close()
        self.console.close()

    # --- time ----------------------------------------------------------------------------------

    def set_clock(self, offset_s: int, boot: str | None = None) -> None:
        """Let the clock jump; where the agent runs, wait until it has kept house since."""
        self._offset_s = offset_s
        write_shift(self._shift_file, offset_s, boot)
        if "agent" in self.box.processes:
            self.wait_told()

    def wait_told(self) -> None:
        """Wait until the agent's status bears the present time twice: then it has kept house."""
        seen: set[str] = set()

        def is_told() -> bool:
            at = self._read_status_at()
            if at is not None and abs(parse_at(at) / 1000 - time.time() - self._offset_s) < 3:
                seen.add(at)
            return len(seen) >= 4

        wait_until(is_told, 30, f"the agent's clock has jumped; log:\n{self.log()}")

    def _read_status_at(self) -> str | None:
        path = self.box.data_dir / "run" / "status.json"
        if not path.exists():
            return None
        return str(json.loads(path.read_text())["at"])

    # --- jobs ----------------------------------------------------------------------------------

    def submit(
        self,
        wait_s: float = 0.0,
        crashes: int = 0,
        *,
        expiry_s: int | None = None,
        not_before_s: float | None = None,
        **body: Any,
    ) -> str:
        """Submit a job with the console's clock, which is right."""
        self._numbers += 1
        data = [float(self._numbers), wait_s, float(crashes)]
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, _WIDTH], "data": data}
        fields: dict[str, Any] = {}
        now_ms = time.time_ns() // 1_000_000
        if not_before_s is not None:
            fields["not_before"] = format_ms(now_ms + int(not_before_s * 1000))
        properties = {}
        if expiry_s is not None:
            fields["not_after"] = format_ms(now_ms + expiry_s * 1000)
            properties["MessageExpiryInterval"] = expiry_s
        job_id = new_id()
        document = make_body(model=MODEL, input={"tensors": [tensor]}, **body)
        payload = make_envelope(document, **fields)
        self.asked[job_id] = Asked(self._numbers, payload, crashes + 1, properties)
        self._send(job_id)
        return job_id

    def _send(self, job_id: str) -> None:
        asked = self.asked[job_id]
        self.console.publish(self.console.topics.submit(job_id), asked.payload, **asked.properties)

    def submit_each_sort(self) -> list[str]:
        """Submit jobs with every kind of time in them."""
        self.drop_file()
        return [
            self.submit(),
            self.submit(handler="infer.batch", priority=9),
            self.submit(queue_ttl_s=120),
            self.submit(expiry_s=120),
            self.submit(expiry_s=120, queue_ttl_s=100, run_timeout_s=60, progress_timeout_s=60),
            self.submit(not_before_s=1.5),
            self.submit(not_before_s=-5),
        ]

    def repeat_all(self) -> None:
        """Submit every job that there ever was again, and wait until that was dealt with."""
        for job_id in list(self.asked):
            self._send(job_id)
        if "worker" in self.box.processes:
            self.wait_ends([self.submit(priority=0)])

    def drop_file(self) -> None:
        """Put a file into the inbox."""
        self._numbers += 1
        name = f"{self._numbers:04}.npy"
        part = self.inbox / f"{name}.part"
        with part.open("wb") as file:
            np.save(file, np.array([[self._numbers, 0, 0]], np.float32))
        part.rename(self.inbox / name)
        self.files.append(name)

    def wait_accepted(self, job_ids: Iterable[str]) -> None:
        """Wait until the ledger has jobs."""
        chosen = list(job_ids)
        wait_until(
            lambda: all(self.console.last_state(job_id) for job_id in chosen), 30, "accepted"
        )

    def wait_running(self, job_id: str) -> None:
        """Wait until a run of a job has begun."""
        number = self.asked[job_id].number
        wait_until(lambda: self.count_runs()[number], 30, f"a run begins; log:\n{self.log()}")

    def wait_ends(self, job_ids: Iterable[str] | None = None) -> None:
        """Wait until jobs, or all, have ended and the files are delivered."""
        chosen = list(self.asked) if job_ids is None else list(job_ids)

        def find_open() -> list[str]:
            self.supervise()
            return [job_id for job_id in chosen if not self._has_ended(job_id)]

        try:
            wait_until(lambda: not find_open(), 40, "all end")
            if job_ids is None:
                wait_until(lambda: len(self.read_lines()) >= len(self.files), 30, "files come back")
        except AssertionError as exc:
            rows = self.box.query(
                "SELECT job_id, state, attempt, reason_code, ready_boot_ms FROM jobs "
                "WHERE ended_ms IS NULL"
            )
            raise AssertionError(f"{exc}: {find_open()}; {rows}; log:\n{self.log()}") from exc

    def supervise(self) -> None:
        """Start a worker again that has ended."""
        process = self.box.processes.get("worker")
        if process is not None and process.poll() is not None:
            self.start("worker")

    def _has_ended(self, job_id: str) -> bool:
        state = self.console.last_state(job_id)
        return state is not None and state["state"] in ENDS

    # --- what became of them -------------------------------------------------------------------

    def count_runs(self) -> Counter[int]:
        """Return how often the worker ran each number."""
        return Counter(int(line) for line in self.runs_file.read_text().split())

    def read_lines(self) -> list[dict[str, Any]]:
        """Return what was delivered for files."""
        folder = self.box.data_dir / "outbox" / MODEL
        return [
            json.loads(line)
            for file in sorted(folder.glob("*.jsonl"))
            for line in file.read_text().splitlines()
        ]

    def log(self) -> str:
        """Return the end of the log."""
        return self.box.read_log()[-3000:]

    def describe(self, job_id: str) -> object:
        """Return a job's history, for a failed test's message."""
        query = "SELECT job_id, rev, state, at_ms, attempt, reason_code FROM transitions"
        return [row[1:] for row in self.box.query(query) if row[0] == job_id]

    def check(self) -> None:
        """Compare everything that was asked with what became of it."""
        query = "SELECT job_id, state, rev, attempt, reason_code FROM jobs WHERE source = 'mqtt'"
        rows = {row[0]: row[1:] for row in self.box.query(query)}
        assert set(rows) == set(self.asked)
        # A result follows its end's state, behind the ends of all others.
        wait_until(
            lambda: set(self.asked) <= self.console.results.keys(), 20, "all results are told"
        )
        runs = self.count_runs()
        for job_id, asked in self.asked.items():
            state, rev, attempt, reason = rows[job_id]
            assert (state, reason) == ("succeeded", "ok"), (job_id, rows[job_id])
            # A dispatch that was lost on its way to a worker counts too; whether it ran does not
            # depend on what anybody says.
            assert attempt >= asked.runs, (job_id, rows[job_id], self.describe(job_id))
            assert runs[asked.number] == asked.runs, (job_id, self.describe(job_id))
            told = self.console.last_state(job_id)
            assert told is not None
            assert (told["state"], told["rev"]) == (state, rev)
            outputs = {str(result["output"]) for result in self.console.results[job_id]}
            assert len(outputs) == 1
        self._check_revs(rows)
        self._check_files(runs)

    def _check_revs(self, rows: dict[str, Any]) -> None:
        steps: dict[str, list[int]] = {}
        for job_id, rev in self.box.query("SELECT job_id, rev FROM transitions ORDER BY rev"):
            steps.setdefault(job_id, []).append(rev)
        for job_id, row in rows.items():
            assert steps[job_id] == list(range(1, row[1] + 1))

    def _check_files(self, runs: Counter[int]) -> None:
        lines = self.read_lines()
        assert Counter(line["file"] for line in lines) == Counter(self.files)
        for line in lines:
            number = int(line["file"].partition(".")[0])
            assert line["output"]["number"] == number
            assert runs[number] == 1
            told = self.console.last_state(line["job_id"])
            assert told is not None
            assert told["state"] == "succeeded"


def _write_step(folder: Path) -> Path:
    """Write a distribution that announces the counting step, as a user's would."""
    info = folder / f"{_STEP_MODULE}-1.0.dist-info"
    info.mkdir(parents=True)
    name = _STEP_MODULE.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[edgeward.postprocess]\n{_STEP_MODULE} = {_STEP_MODULE}:build\n"
    )
    (folder / f"{_STEP_MODULE}.py").write_text(_STEP)
    return folder


def _add_model(folder: Path, models_dir: Path) -> None:
    shape: list[str | int | None] = ["batch", _WIDTH]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        MODEL,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    tensors = (
        TensorEntry(name="x", datatype=Datatype.FP32, shape=(-1, _WIDTH)),
        TensorEntry(name="y", datatype=Datatype.FP32, shape=(-1, _WIDTH)),
    )
    write_version(folder, MODEL, graph, tensors)
    manifest = read_manifest(folder)
    steps = (Step(name=_STEP_MODULE),)
    write_manifest(manifest.model_copy(update={"postprocess": steps}), folder)
    ModelRepository(models_dir).add(folder)
