"""Half-open links: how soon they are found, and that nothing is lost meanwhile.

    python -m tests.fault.half_open --keepalive 20 --json

Each figure comes from a box of its own, with a proxy in one of its two links: to the MQTT
broker, or to the queue broker. While jobs come in at a steady rate, the connections through the
proxy are left half-open:

- `abandoned`: the present ones; a new one works, so it counts how soon there is one;
- `stalled`: also new ones, until the agent's status says that it is offline.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fault.byte_proxy import ByteProxy
from tests.harness.box import Box, RecordingConsole
from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.waiting import wait_until

ABANDONED, STALLED = "abandoned", "stalled"
QUEUE_STALL_S = 12.0
_JOBS_EVERY_S = 0.2
_ONLINE_S = 30.0
_HEAL_S = 90.0


class Stream(threading.Thread):
    """Submits a job now and then, whatever happens to the box."""

    def __init__(self, console: RecordingConsole) -> None:
        super().__init__(name="stream", daemon=True)
        self.job_ids: list[str] = []
        self._console = console
        self._stopping = threading.Event()

    def run(self) -> None:
        """Submit until stopped."""
        while not self._stopping.wait(_JOBS_EVERY_S):
            self.job_ids.append(self._console.submit())

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self.join()


class LinkedBox:
    """A box, its console, and a proxy in one of its links."""

    def __init__(self, folder: Path, link: str, keepalive_s: int) -> None:
        self.mqtt = MqttProcess(folder / "mqtt")
        self.queue = QueueProcess(folder / "queue")
        self.mqtt.start()
        self.queue.start()
        settings = {"EDGEWARD_MQTT__KEEPALIVE_S": str(keepalive_s), "EDGEWARD_HEARTBEAT_S": "1"}
        if link == "mqtt":
            self.proxy = ByteProxy(self.mqtt.port)
            settings["EDGEWARD_MQTT__PORT"] = str(self.proxy.port)
        else:
            self.proxy = ByteProxy(self.queue.socket_path)
            settings["EDGEWARD_QUEUE__URL"] = f"redis://127.0.0.1:{self.proxy.port}/0"
        self.box = Box(folder, self.mqtt, self.queue, **settings)
        self.console = RecordingConsole(self.mqtt.port)
        self.stream = Stream(self.console)

    def start(self) -> None:
        """Start everything and wait until jobs come back."""
        self.box.start("agent")
        self.box.start("worker")
        wait_until(lambda: self.console.find("status"), _ONLINE_S, "the agent is online")
        self.stream.start()
        wait_until(lambda: len(self.console.results) >= 5, _ONLINE_S, "jobs come back")

    def read_status(self, name: str) -> Any:
        """Return a value of the agent's own status."""
        path = self.box.data_dir / "run" / "status.json"
        return json.loads(path.read_text())[name] if path.exists() else None

    def settle(self) -> dict[str, int]:
        """Stop submitting, wait until all has come, and count."""
        self.stream.stop()
        ids = self.stream.job_ids

        def count_missing() -> int:
            self.box.supervise()
            return sum(1 for job_id in ids if not self._is_complete(job_id))

        with contextlib.suppress(AssertionError):
            wait_until(lambda: not count_missing(), _HEAL_S, "every job ends")
        doubled = sum(
            len({str(body) for body in self.console.results.get(job_id, ())}) > 1 for job_id in ids
        )
        return {"jobs": len(ids), "lost": count_missing(), "double": doubled}

    def _is_complete(self, job_id: str) -> bool:
        state = self.console.last_state(job_id)
        ended = state is not None and state["state"] == "succeeded"
        return ended and job_id in self.console.results

    def close(self) -> None:
        """Stop everything."""
        self.box.close()
        self.console.close()
        self.proxy.close()
        self.mqtt.stop()
        self.queue.stop()


@contextlib.contextmanager
def open_box(folder: Path, link: str, keepalive_s: int) -> Iterator[LinkedBox]:
    """Give a running box; closed in the end."""
    linked = LinkedBox(folder, link, keepalive_s)
    try:
        linked.start()
        yield linked
    finally:
        linked.close()


def measure_mqtt(folder: Path, how: str, keepalive_s: int) -> dict[str, Any]:
    """Leave the MQTT link half-open; return when the agent found out, and what was lost."""
    with open_box(folder, "mqtt", keepalive_s) as linked:
        # The status file is older than the connection, and says "offline" for a moment yet.
        wait_until(lambda: linked.read_status("mqtt") == "online", _ONLINE_S, "its status says so")
        before = linked.proxy.accepted
        began = time.monotonic()
        if how == ABANDONED:
            linked.proxy.abandon()
            wait_until(lambda: linked.proxy.accepted > before, 4 * keepalive_s + 10, "found")
        else:
            linked.proxy.stall()
            wait_until(
                lambda: linked.read_status("mqtt") == "offline", 4 * keepalive_s + 10, "found"
            )
        found_s = time.monotonic() - began
        linked.proxy.resume()
        counts = linked.settle()
        return {"keepalive_s": keepalive_s, "found_s": round(found_s, 1), **counts}


def measure_queue(folder: Path, how: str) -> dict[str, Any]:
    """Leave the queue broker's links half-open; return when jobs ran on, and what was lost."""
    with open_box(folder, "queue", 20) as linked:
        began = time.monotonic()
        if how == ABANDONED:
            linked.proxy.abandon()
        else:
            linked.proxy.stall()
            wait_until(
                lambda: linked.read_status("queue_broker") != "reachable", 40, "the agent notices"
            )
            told_s = time.monotonic() - began
            threading.Event().wait(max(0.0, QUEUE_STALL_S - told_s))
            linked.proxy.resume()
        healed = time.monotonic()
        job_id = linked.console.submit()

        def has_run() -> bool:
            linked.box.supervise()
            return job_id in linked.console.results

        wait_until(has_run, _HEAL_S, f"jobs run on; log:\n{linked.box.read_log()[-3000:]}")
        runs_on_s = time.monotonic() - healed
        counts = linked.settle()
        found = {} if how == ABANDONED else {"found_s": round(told_s, 1)}
        return {**found, "runs_on_after_s": round(runs_on_s, 1), **counts}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all four; 0 where everything was found in time and nothing was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.half_open", description=__doc__)
    parser.add_argument("--keepalive", type=int, default=20, help="of MQTT, in seconds (20)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args(argv)
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edgeward-half-open-") as name:
        for how in (ABANDONED, STALLED):
            print(f"MQTT link, {how}", file=sys.stderr, flush=True)
            folder = Path(name) / f"mqtt-{how}"
            folder.mkdir()
            document[f"mqtt_{how}"] = measure_mqtt(folder, how, arguments.keepalive)
        for how in (ABANDONED, STALLED):
            print(f"queue broker's link, {how}", file=sys.stderr, flush=True)
            folder = Path(name) / f"queue-{how}"
            folder.mkdir()
            document[f"queue_{how}"] = measure_queue(folder, how)
    if arguments.json:
        print(json.dumps(document))
    else:
        for key, values in document.items():
            print(key, "  ".join(f"{name} {value}" for name, value in values.items()))
    limit_s = 2 * arguments.keepalive
    in_time = all(document[f"mqtt_{how}"]["found_s"] <= limit_s for how in (ABANDONED, STALLED))
    whole = all(item["lost"] == item["double"] == 0 for item in document.values())
    return 0 if in_time and whole else 1


if __name__ == "__main__":
    sys.exit(main())
