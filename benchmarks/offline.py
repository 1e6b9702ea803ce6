"""A day offline: how a full outbox is drained, beside the raw QoS 1 rate of the same client.

Writes the ledger of a box that ran `--jobs` jobs in 24 hours without a network
(the ledger's own code on a clock that the script turns, heartbeats included),
starts a real Mosquitto, a subscriber and the agent on it, and measures until
everything has arrived:

- whether all of it came, in the order of its numbers, and whether what was
  thinned and the gap records add up;
- the agent's memory while it drains;
- records per second, beside what the same MQTT client library reaches on the
  same broker with the same window when it only publishes: the ratio counts.

Both in turn, `--rounds` times, each on a copy of the ledger; the median counts.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from paho.mqtt.client import Client, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console

from agent.commands import hash_text, new_id
from agent.config import Settings
from agent.daemon.mqtt import pack_properties, set_no_delay
from agent.jobs import JobState, Lane, Reason, Source
from agent.store import bounds, outbox
from agent.store.bounds import OutboxBounds
from agent.store.database import migrate, open_engine, transaction
from agent.store.facts import ensure_identity
from agent.store.ledger import Ledger, NewJob, Outcome
from agent.store.records import build_telemetry
from agent.topics import Topics
from benchmarks.pipeline import start_process, wait_until
from console.embedded import MqttBrokerKind, prepare_mqtt_broker

DEVICE = "bench"
_DAY_MS = 86_400_000
_BATCH = 32
_HEARTBEAT_MS = 30_000
_TELEMETRY_BOUND = 1000
_BODY = '{"handler":"infer","model":"tiny","input":{"data_b64":"AAAA"}}'
_DRAIN_S = 300.0


class DayClock:
    """A clock that the script turns; it began a day ago."""

    def __init__(self) -> None:
        self.wall = time.time_ns() // 1_000_000 - _DAY_MS
        self.boot = 1_000_000

    def wall_ms(self) -> int:
        """Return the wall time."""
        return self.wall

    def boot_ms(self) -> int:
        """Return the boot time."""
        return self.boot

    def boot_id(self) -> str:
        """Return the boot's id."""
        return "offline"

    def advance(self, ms: int) -> None:
        """Let both go on."""
        self.wall += ms
        self.boot += ms


def write_day(path: Path, jobs: int) -> dict[str, int]:
    """Write the ledger of a day offline; return how many records wait, by class."""
    clock, topics = DayClock(), Topics(DEVICE)
    engine = open_engine(path)
    migrate(engine)
    ledger = Ledger(topics, clock)
    limits = OutboxBounds(1 << 30, 30, 100_000, _TELEMETRY_BOUND)
    step_ms = _DAY_MS * _BATCH // jobs
    beat_ms = 0
    with transaction(engine) as tx:
        ensure_identity(tx)
    for _ in range(jobs // _BATCH):
        clock.advance(step_ms)
        with transaction(engine) as tx:
            _run_batch(tx, ledger, clock)
            while beat_ms < clock.boot - 1_000_000:
                beat_ms += _HEARTBEAT_MS
                row = build_telemetry(topics, '{"uptime_s":1}', clock.wall)
                outbox.add_records(tx, [row])
            bounds.enforce(tx, topics, limits, clock.wall)
    with transaction(engine) as tx:
        sizes = {rank.name: count for rank, (count, _) in outbox.measure_classes(tx).items()}
    engine.dispose()
    return sizes


def _run_batch(tx: Any, ledger: Ledger, clock: DayClock) -> None:
    job = NewJob("", Source.FOLDER, _BODY, hash_text(_BODY), "infer", Lane.INFERENCE, "tiny")
    ledger.accept(tx, [job._replace(job_id=new_id()) for _ in range(_BATCH)])
    ready = ledger.schedule.find_ready(tx, Lane.INFERENCE, _BATCH)
    ledger.schedule.assign(tx, [(new_id(), ready)])
    result = {"output": [{"label": "0", "index": 0, "score": 0.9}], "model": "tiny", "version": 1}
    ledger.record_outcomes(
        tx,
        [
            Outcome(
                item.job_id, 1, JobState.SUCCEEDED, Reason("ok"), clock.wall, clock.wall + 5, result
            )
            for item in ready
        ],
    )


@dataclass
class Arrived:
    """What the subscriber has seen."""

    seqs: list[int] = field(default_factory=list)
    gaps: int = 0
    first_s: float = 0.0
    last_s: float = 0.0


class Subscriber:
    """mosquitto_sub, so that the receiving side costs as little as it can."""

    def __init__(self, port: int, topic: str) -> None:
        self.arrived = Arrived()
        self.count = 0
        argv = ["mosquitto_sub", "-p", str(port), "-V", "5", "-q", "1", "-t", topic, "-F", "%p"]
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE)
        self._lines: list[tuple[float, bytes]] = []
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        for line in self._process.stdout or ():
            self._lines.append((time.monotonic(), line))
            self.count += 1

    def read(self) -> Arrived:
        """Return the numbers that arrived, and those that gap records name."""
        for at_s, line in self._lines:
            document = json.loads(line)
            if not isinstance(document, dict) or "seq" not in document:
                continue
            self.arrived.first_s = self.arrived.first_s or at_s
            self.arrived.last_s = at_s
            self.arrived.seqs.append(document["seq"])
            if document["type"] == "event.gap":
                self.arrived.gaps += document["body"]["count"]
        return self.arrived

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()


def measure_raw(port: int, count: int, payload: str, window: int) -> float:
    """Publish `count` messages of QoS 1 with a window; return messages per second."""
    client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
    client.max_inflight_messages_set(0)
    client.on_socket_open = set_no_delay
    room, done = threading.Semaphore(window), threading.Event()
    acked = [0]

    def on_publish(*_: Any) -> None:
        acked[0] += 1
        room.release()
        if acked[0] == count:
            done.set()

    client.on_publish = on_publish
    client.connect("127.0.0.1", port)
    client.loop_start()
    properties: Any = pack_properties(correlation=b"0" * 26, message_type="job.result")
    began = time.monotonic()
    for number in range(count):
        room.acquire()
        # Like the outbox: half of the messages are states, which the broker retains.
        is_state = number % 2 == 0
        client.publish(f"raw/{number}", payload, qos=1, retain=is_state, properties=properties)
    done.wait(_DRAIN_S)
    spent_s = time.monotonic() - began
    client.disconnect()
    client.loop_stop()
    return count / spent_s


def measure_drain(folder: Path, port: int, expected: int, seconds: float) -> dict[str, Any]:
    """Start the agent on the ledger in `folder` and drain it; return what was seen."""
    subscriber = Subscriber(port, Topics(DEVICE).reports)
    environment = {
        "EDGEWARD_DATA_DIR": str(folder),
        "EDGEWARD_DEVICE_ID": DEVICE,
        "EDGEWARD_MQTT__PORT": str(port),
        "EDGEWARD_QUEUE__URL": f"redis+socket://{folder}/none.sock",
    }
    program = Path(sys.executable).with_name("edgeward")
    rss_mb: list[float] = []
    with start_process([str(program), "agent"], folder / "agent.log", environment) as process:
        wait_until(lambda: subscriber.count > 0, 30, "the agent reports")
        deadline = time.monotonic() + seconds
        while subscriber.count < expected and time.monotonic() < deadline:
            rss_mb.append(_read_rss_mb(process))
            time.sleep(0.1)
        rss_mb.append(_read_rss_mb(process))
    subscriber.close()
    arrived = subscriber.read()
    rate = len(arrived.seqs) / max(1e-3, arrived.last_s - arrived.first_s)
    return {"arrived": arrived, "records_per_s": rate, "rss_mb": rss_mb}


def _read_rss_mb(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 1e6


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Run everything and return the figures."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with out.status(f"writing a day of {args.jobs} jobs"):
            waiting = write_day(folder / "ledger.db", args.jobs)
        expected = sum(waiting.values())
        window = Settings().mqtt.inflight
        rounds = []
        for number in range(1, args.rounds + 1):
            out.print(f"round {number} of {args.rounds}: publishing raw, draining {expected}")
            copy = folder / f"round-{number}"
            copy.mkdir()
            shutil.copy(folder / "ledger.db", copy)
            rounds.append(run_round(copy, args.jobs, expected, window, args.limit_s))
    return {
        "jobs": args.jobs,
        "waiting": waiting,
        "adds_up": all(figures["adds_up"] for figures in rounds),
        "in_order": all(figures["in_order"] for figures in rounds),
        "ratio": statistics.median(figures["ratio"] for figures in rounds),
        "rounds": rounds,
    }


def run_round(
    folder: Path, jobs: int, expected: int, window: int, limit_s: float
) -> dict[str, Any]:
    """Publish raw, then drain the ledger in `folder`, on a broker that has kept nothing."""
    broker = prepare_mqtt_broker(folder / "mqtt", folder / "mqtt", kind=MqttBrokerKind.MOSQUITTO)
    with start_process(broker.argv, folder / "mqtt.log", {}):
        wait_until(broker.is_ready, 15, "mosquitto serves")
        sink = Subscriber(broker.port, "raw/#")
        raw_per_s = measure_raw(broker.port, jobs, json.dumps({"pad": "x" * 400}), window)
        sink.close()
        return summarise(raw_per_s, measure_drain(folder, broker.port, expected, limit_s))


def summarise(raw_per_s: float, drained: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one round."""
    arrived: Arrived = drained["arrived"]
    highest = max(arrived.seqs, default=0)
    rss = [round(value, 1) for value in drained["rss_mb"]]
    return {
        "arrived": len(arrived.seqs),
        "distinct": len(set(arrived.seqs)),
        "named_by_gaps": arrived.gaps,
        "highest_seq": highest,
        "adds_up": len(set(arrived.seqs)) + arrived.gaps == highest,
        "in_order": arrived.seqs == sorted(arrived.seqs),
        "records_per_s": round(drained["records_per_s"], 1),
        "raw_per_s": round(raw_per_s, 1),
        "ratio": round(drained["records_per_s"] / raw_per_s, 2),
        "agent_rss_mb": {"first": rss[0], "max": max(rss), "last": rss[-1]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where something did not arrive or does not add up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3, help="each publishes raw, then drains")
    parser.add_argument("--limit-s", type=float, default=_DRAIN_S)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    figures = run(args, Console(stderr=True))
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:>16}  {value}")
    return 0 if figures["adds_up"] and figures["in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
