"""What an update costs those who ask meanwhile, and how long a rollback takes, on one whole box.

`python -m benchmarks.lifecycle [--json] [--clients 8]`

Agent, both workers, brokers and clients on this machine. The p99 of the seconds around the switch
is held against that of the seconds before the update began, in one run; a request that fails is
counted. Then the previous version is made the active one by `edgeward models rollback`, without
any network, and timed from the command's start to the first answer of that version.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness.brokers import MqttProcess, QueueProcess
from tests.harness.commands import PROGRAM, clean_environment
from tests.harness.update_box import Client, UpdateBox
from tests.harness.waiting import wait_until

_QUIET_S = 5.0
_AROUND_S = 2.0
_PROBATION_S = 5.0


class Clients:
    """Ask without a pause; every answer with its time."""

    def __init__(self, port: int, count: int) -> None:
        self.answers: list[tuple[float, float, str]] = []
        """When it came (monotonic), how long it took (s), and which version gave it."""
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(port,), daemon=True) for _ in range(count)
        ]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        for thread in self._threads:
            thread.join(20)

    def _ask(self, port: int) -> None:
        client = Client(port)
        while not self._over.is_set():
            began = time.monotonic()
            try:
                version = client.ask()
            except (OSError, http.client.HTTPException) as exc:
                self.failures.append(str(exc))
                continue
            now = time.monotonic()
            self.answers.append((now, now - began, version))
        client.close()

    def find_first(self, version: str, after: float = 0.0) -> float | None:
        """Return when a version answered first."""
        return next((at for at, _, by in self.answers if by == version and at > after), None)

    def compute_p99_ms(self, start: float, end: float) -> float:
        """Return the p99 of the answers that came in a time."""
        spent = [took for at, took, _ in self.answers if start <= at < end]
        return float(np.percentile(spent, 99)) * 1000


def measure(folder: Path, mqtt: MqttProcess, queue: QueueProcess, clients: int) -> dict[str, Any]:
    """Update and roll back one box under load."""
    box = UpdateBox(folder, mqtt, queue)
    load = Clients(box.port, clients)
    try:
        wait_until(box.serves, 60, "the HTTP API answers")
        box.add("2.0.0")
        load.start()
        time.sleep(2 * _QUIET_S)
        began = time.monotonic()
        quiet_ms = load.compute_p99_ms(began - _QUIET_S, began)
        state = box.wait_end(box.update("2.0.0", probation={"duration_s": _PROBATION_S}))
        switched = load.find_first("2") or 0.0
        around_ms = load.compute_p99_ms(switched - _AROUND_S, switched + _AROUND_S)
        asked = time.monotonic()
        command = [PROGRAM, "models", "rollback", "digits", "--data-dir", str(box.box.data_dir)]
        subprocess.run(command, check=True, capture_output=True, env=clean_environment())
        done = time.monotonic()
        wait_until(lambda: load.find_first("1", asked) is not None, 20, "it is back")
        back = load.find_first("1", done) or done
    finally:
        load.stop()
        box.close()
    return {
        "update": state["reason"]["code"],
        "clients": clients,
        "requests": len(load.answers),
        "failed": len(load.failures),
        "p99_before_ms": round(quiet_ms, 2),
        "p99_around_switch_ms": round(around_ms, 2),
        "p99_ratio": round(around_ms / quiet_ms, 2),
        "rollback_command_s": round(done - asked, 2),
        "rollback_after_command_s": round(max(0.0, back - done), 2),
    }


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(description="What an update and a rollback cost.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgeward-lifecycle-") as name:
        folder = Path(name)
        mqtt, queue = MqttProcess(folder / "mqtt"), QueueProcess(folder / "queue")
        mqtt.start()
        queue.start()
        try:
            found = measure(folder / "box", mqtt, queue, options.clients)
        finally:
            mqtt.stop()
            queue.stop()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        for key, value in found.items():
            print(f"{key.replace('_', ' '):<26}{value}")
    return 0 if not found["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
