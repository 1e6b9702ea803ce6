"""Durable MQTT jobs beside bare Celery, in one run, on the same broker and worker pool.

Starts a real Mosquitto, a real Redis or Valkey, the agent (store with
`synchronous=FULL`) and a worker, and measures

- durable jobs per second: command published → result received at the console,
  every state and result stored and reported as docs/protocol.md has it;
- bare Celery on the same queue broker: one task per job, same threads pool and
  same model, result fetched from the Redis result backend;
- both latencies at idle, one at a time;
- the agent's idle memory, the idle CPU of agent and worker, the start time.

Ratios are what counts: the two sides run in turn on the same machine.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion

from agent.commands import encode, new_id
from agent.daemon.mqtt import set_no_delay
from agent.repository import ModelRepository
from agent.topics import Topics
from benchmarks.tiny_model import write_tiny_model
from console.embedded import MqttBrokerKind, prepare_mqtt_broker, prepare_queue_broker

DEVICE = "bench"
MODEL = "tiny"
_WINDOW = 1000
_WAIT_S = 60.0
_INPUTS = 64


@dataclass
class Figures:
    """What one run measured."""

    jobs_per_s: list[float] = field(default_factory=list)
    celery_tasks_per_s: list[float] = field(default_factory=list)
    job_ms: list[float] = field(default_factory=list)
    celery_ms: list[float] = field(default_factory=list)
    agent_rss_mb: list[float] = field(default_factory=list)
    idle_cpu_percent: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, float]:
        """Return the report: medians over the rounds, of the memory the largest."""
        jobs, tasks = statistics.median(self.jobs_per_s), statistics.median(self.celery_tasks_per_s)
        job_ms, celery_ms = statistics.median(self.job_ms), statistics.median(self.celery_ms)
        return {
            "jobs_per_s": round(jobs, 1),
            "celery_tasks_per_s": round(tasks, 1),
            "throughput_ratio": round(jobs / tasks, 2),
            "job_p50_ms": round(job_ms, 2),
            "celery_p50_ms": round(celery_ms, 2),
            "latency_ratio_p50": round(job_ms / celery_ms, 2),
            "agent_rss_mb": round(max(self.agent_rss_mb), 1),
            "idle_cpu_percent": round(statistics.median(self.idle_cpu_percent), 2),
            "ready_s": round(statistics.median(self.ready_s), 2),
        }


class BenchConsole:
    """A console that submits with paho and receives with mosquitto_sub.

    The console shares the two cores with the box it measures, so it does as
    little as it can: the C client prints a topic and the first characters of
    what it received, and that is all that is looked at.
    """

    def __init__(self, port: int) -> None:
        self._topics = Topics(DEVICE)
        self.results: SimpleQueue[str] = SimpleQueue()
        self.ended: set[str] = set()
        self.online = threading.Event()
        argv = ["mosquitto_sub", "-p", str(port), "-V", "5", "-q", "1", "-F", "%t %p"]
        for topic in (self._topics.result("+"), self._topics.state("+"), self._topics.status):
            argv += ["-t", topic]
        self._receiver = subprocess.Popen(argv, stdout=subprocess.PIPE)
        threading.Thread(target=self._receive, daemon=True).start()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.max_inflight_messages_set(0)
        self._client.on_socket_open = set_no_delay
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def _receive(self) -> None:
        for line in self._receiver.stdout or ():
            topic, _, payload = line.partition(b" ")
            if b"/d2c/result/" in topic:
                self.results.put(topic[-26:].decode())
            elif b"/d2c/job/" in topic:
                if b'"state":"succeeded"' in payload:
                    self.ended.add(topic[-26:].decode())
            elif b'"online"' in payload:
                self.online.set()

    def submit(self, body: dict[str, Any]) -> str:
        """Publish one job."""
        job_id = new_id()
        envelope = {"v": 1, "id": job_id, "type": "job.submit", "body": body}
        self._client.publish(self._topics.submit(job_id), encode(envelope), qos=1)
        return job_id

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()
        self._receiver.terminate()
        self._receiver.wait(5)


def make_body() -> dict[str, Any]:
    """Return the job that both sides run."""
    data = [round(0.01 * index, 2) for index in range(_INPUTS)]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, _INPUTS], "data": data}
    return {"handler": "infer", "model": MODEL, "input": {"tensors": [tensor]}}


@contextmanager
def start_process(argv: Sequence[str], log: Path, env: dict[str, str]) -> Iterator[psutil.Process]:
    """Run a process until the block ends."""
    with log.open("ab") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env={**os.environ, **env})
    try:
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def measure_jobs(console: BenchConsole, count: int) -> float:
    """Return durable jobs per second over `count` jobs, window of 1,000 open ones."""
    body = make_body()
    waiting: set[str] = set()
    before = len(console.ended)
    started = time.perf_counter()
    sent = received = 0
    while received < count:
        while sent < count and sent - received < _WINDOW:
            waiting.add(console.submit(body))
            sent += 1
        waiting.discard(console.results.get(timeout=_WAIT_S))
        received += 1
    spent_s = time.perf_counter() - started
    if waiting:
        msg = f"{len(waiting)} jobs without a result"
        raise RuntimeError(msg)
    wait_until(lambda: len(console.ended) >= before + count, 30, "states of ended jobs")
    return count / spent_s


def measure_job_latency(console: BenchConsole, count: int) -> list[float]:
    """Return milliseconds from command to result, one job at a time."""
    body = make_body()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        console.submit(body)
        console.results.get(timeout=_WAIT_S)
        times.append(1000 * (time.perf_counter() - started))
        # The pause makes it idle latency: what the last job left behind is done by then.
        time.sleep(0.05)
    return times


def measure_celery(
    queue_url: str, model: Path, count: int, latency_count: int
) -> tuple[float, list[float]]:
    """Return bare Celery's tasks per second and latencies; its worker runs already."""
    from benchmarks.bare_celery import build_app, infer

    app = build_app(queue_url, model)
    task = app.tasks[infer.__name__]
    inputs = [0.01 * index for index in range(_INPUTS)]
    task.delay(inputs).get(timeout=60)
    times = []
    for _ in range(latency_count):
        started = time.perf_counter()
        task.delay(inputs).get(timeout=60)
        times.append(1000 * (time.perf_counter() - started))
        time.sleep(0.05)
    started = time.perf_counter()
    pending = [task.delay(inputs) for _ in range(count)]
    for result in pending:
        result.get(timeout=_WAIT_S)
    return count / (time.perf_counter() - started), times


def measure_idle(processes: Sequence[psutil.Process], seconds: float) -> float:
    """Return the CPU percent of one core that these processes take together while idle."""

    def spent() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes)

    before = spent()
    time.sleep(seconds)
    return 100 * (spent() - before) / seconds


class Bench:
    """One run: the processes and the measurements, in turn."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._folder = folder
        self._args = args
        self._figures = Figures()
        self._data = folder / "data"
        self._model = write_tiny_model(folder / "model")

    def run(self) -> dict[str, float]:
        """Measure everything."""
        ModelRepository(self._data / "models").add(self._folder / "model")
        with ExitStack() as stack:
            queue = prepare_queue_broker(self._data / "run")
            mqtt = prepare_mqtt_broker(
                self._data / "run", self._data, kind=MqttBrokerKind.MOSQUITTO, durable=False
            )
            for part in (queue, mqtt):
                stack.enter_context(start_process(part.argv, self._folder / "log", {}))
                wait_until(part.is_ready, 20, "a broker")
            self._queue_url, self._port = queue.url, mqtt.port
            console = BenchConsole(mqtt.port)
            stack.callback(console.close)
            for _ in range(self._args.rounds):
                self._round(console)
        return self._figures.to_json()

    def _round(self, console: BenchConsole) -> None:
        figures = self._figures
        with self._celery_worker():
            rate, times = measure_celery(
                self._queue_url, self._model, self._args.celery_jobs, self._args.latency_jobs
            )
        figures.celery_tasks_per_s.append(rate)
        figures.celery_ms += times
        with self._edgeward("worker", "--lane", "inference") as worker:
            console.online.clear()
            started = time.perf_counter()
            with self._edgeward("agent") as agent:
                console.online.wait(_WAIT_S)
                figures.ready_s.append(time.perf_counter() - started)
                measure_job_latency(console, 5)
                figures.job_ms += measure_job_latency(console, self._args.latency_jobs)
                figures.jobs_per_s.append(measure_jobs(console, self._args.jobs))
                time.sleep(3)
                idle = measure_idle([agent, worker], self._args.idle_s)
                figures.idle_cpu_percent.append(idle)
                figures.agent_rss_mb.append(agent.memory_info().rss / 1e6)

    def _edgeward(self, *command: str) -> Any:
        env = {
            "EDGEWARD_DATA_DIR": str(self._data),
            "EDGEWARD_DEVICE_ID": DEVICE,
            "EDGEWARD_MQTT__PORT": str(self._port),
            "EDGEWARD_QUEUE__URL": self._queue_url,
            "EDGEWARD_LOG_LEVEL": "warning",
        }
        program = Path(sys.executable).with_name("edgeward")
        return start_process([str(program), *command], self._folder / "log", env)

    def _celery_worker(self) -> Any:
        argv = [sys.executable, "-m", "benchmarks.bare_celery", self._queue_url, str(self._model)]
        return start_process(argv, self._folder / "log", {})


def wait_until(predicate: Any, timeout_s: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come true.
    """
    deadline = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > deadline:
            msg = f"waited in vain for {what}"
            raise TimeoutError(msg)
        time.sleep(0.05)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--celery-jobs", type=int, default=2_000)
    parser.add_argument("--latency-jobs", type=int, default=100)
    parser.add_argument("--idle-s", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="edgeward-bench-"))
    try:
        report = Bench(folder, args).run()
    except Exception:
        print((folder / "log").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:20} {value:>10}")


if __name__ == "__main__":
    main()
