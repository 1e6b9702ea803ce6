"""The run journal: which jobs ran in a worker when it died, and whether it crashed.

    <run_dir>/workers/<slot>.<worker>.running   what the engine runs now; locked while it lives
    <run_dir>/workers/<slot>.<worker>.trace     faulthandler's stacks, empty unless it crashed

Written for the death of the process, not of the machine: without a flush to the
disk, so it costs microseconds. The next worker of the slot reads what dead
predecessors left, reports crashes of which there is evidence, and removes it.
Evidence is a trace of a fatal signal, or a higher count of the kernel's
out-of-memory kills; SIGKILL from outside leaves neither and is nobody's fault.

Invariants: files are removed only after their report was sent; those of another
boot are removed unread.

Source: docs/adr/0014-crashes-need-evidence.md.
"""

import contextlib
import faulthandler
import fcntl
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.clock import SystemClock

log = logging.getLogger(__name__)

_HEAD_BYTES = 8
_TRACE_SHOWN = 4000
_VMSTAT = Path("/proc/vmstat")
_SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Floating": "SIGFPE",
    "Aborted": "SIGABRT",
    "Bus error": "SIGBUS",
    "Illegal instruction": "SIGILL",
}
OUT_OF_MEMORY = "oom"


@dataclass(frozen=True)
class Crash:
    """What a dead worker ran, and what killed it."""

    signal: str
    run: dict[str, Any]
    """`task`, `reply`, `model`, `version` and `jobs` with id and attempt."""


class RunJournal:
    """The journal of this process.

    Args:
        folder: where journals are.
        slot: this worker's place; predecessors had the same.
        worker_id: this process's own id.
    """

    def __init__(self, folder: Path, slot: str, worker_id: str) -> None:
        self._folder = folder
        self._prefix = re.sub(r"[^A-Za-z0-9_+-]", "-", slot)
        self._name = f"{self._prefix}.{worker_id}"
        self._lock = threading.Lock()
        self._runs: dict[int, dict[str, Any]] = {}
        self._fd: int | None = None
        self._head: dict[str, Any] = {}

    def open(self) -> None:
        """Begin this process's journal, and let fatal signals leave their stacks.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._name}.running"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._head = {"boot": SystemClock().boot_id(), "oom": read_oom_kills()}
        self._write()
        trace = (self._folder / f"{self._name}.trace").open("w", encoding="utf-8")
        faulthandler.enable(trace, all_threads=True)

    @contextmanager
    def running(self, task: dict[str, Any], version: str | None, jobs: Any) -> Iterator[None]:
        """Note these jobs as running while the block lasts."""
        run = {
            "task": task["task"],
            "reply": task["reply"],
            "model": task["model"],
            "version": version,
            "jobs": [{"id": item["id"], "attempt": item["attempt"]} for item in jobs],
        }
        key = id(run)
        with self._lock:
            self._runs[key] = run
            self._write()
        try:
            yield
        finally:
            with self._lock:
                del self._runs[key]
                self._write()

    def _write(self) -> None:
        if self._fd is None:
            return
        data = json.dumps({**self._head, "runs": list(self._runs.values())}).encode()
        # One write; what an older, longer one left behind the length is not read.
        os.pwrite(self._fd, len(data).to_bytes(_HEAD_BYTES, "big") + data, 0)

    def report_dead(self, send: Callable[[Crash], None]) -> None:
        """Send what predecessors of this slot crashed on, and remove what they left.

        Raises:
            Whatever `send` raises: then the files stay for the next worker.
        """
        for path in sorted(self._folder.glob(f"{self._prefix}.*.running")):
            if path.stem != self._name and (document := _read_dead(path)) is not None:
                trace = path.with_suffix(".trace")
                for crash in _find_crashes(document, trace):
                    send(crash)
                trace.unlink(missing_ok=True)
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove this process's journal: it ended in order."""
        faulthandler.disable()
        if self._fd is not None:
            for suffix in ("running", "trace"):
                (self._folder / f"{self._name}.{suffix}").unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = None


def read_oom_kills() -> int:
    """Return how many processes the kernel has killed for memory since boot, 0 where unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in _VMSTAT.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return 0


def _read_dead(path: Path) -> dict[str, Any] | None:
    """Return a journal whose process is gone; None while it lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        data = file.read()
    length = int.from_bytes(data[:_HEAD_BYTES], "big")
    try:
        document = json.loads(data[_HEAD_BYTES : _HEAD_BYTES + length])
    except ValueError:
        document = {}
    return document if isinstance(document, dict) else {}


def _find_crashes(document: dict[str, Any], trace: Path) -> list[Crash]:
    """Return a crash for each run of a journal, where there is evidence of one."""
    if document.get("boot") != SystemClock().boot_id():
        return []
    text = trace.read_text(encoding="utf-8", errors="replace") if trace.exists() else ""
    signal = next((name for words, name in _SIGNALS.items() if words in text), None)
    if signal is None and read_oom_kills() > document.get("oom", 0):
        signal = OUT_OF_MEMORY
    if signal is None:
        return []
    runs = document.get("runs", [])
    log.error("the last worker crashed (%s) in %d runs\n%s", signal, len(runs), text[:_TRACE_SHOWN])
    return [Crash(signal, run) for run in runs]
