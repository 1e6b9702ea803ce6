"""Shadow: a candidate sees copies of requests, its answers are compared, and nobody gets them.

Owns the copies' queue and the comparison. One thread, so that a shadow takes no more than one
core; what does not fit into the queue is dropped and counted, never waited for.

Invariants: `offer` neither blocks nor raises; a candidate that does not load or run costs its own
count and nothing else; its figures are counted as its own (`StatsCounter`).
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple

from agent.errors import AgentError
from agent.traffic import Traffic
from platforms.errors import PlatformError, TensorError
from platforms.parity import compare_output
from platforms.runtimes.base import Array
from worker.engine.engine import ServedModel
from worker.engine.sessions import LoadedModel
from worker.engine.stats import FailReason, RunTimes
from worker.errors import WorkerError

log = logging.getLogger(__name__)

QUEUE_MAX = 32
"""Copies that wait; more are dropped."""
ALIKE_SQNR_DB = 20.0
"""From here on answers without classes count as the same."""

_IDLE_S = 5.0

Arrays = Mapping[str, Array]
Open = Callable[[str, str], tuple[ServedModel, LoadedModel]]


@dataclass(slots=True)
class ShadowCounts:
    """What came of the copies of one version."""

    compared: int = 0
    agreed: int = 0
    failed: int = 0
    dropped: int = 0


class _Copy(NamedTuple):
    model: str
    version: str
    inputs: Arrays
    outputs: Arrays


@dataclass
class Shadow:
    """Runs copies in the background.

    Args:
        open_version: returns a version, loading it where it is not; may raise what a load raises.
    """

    open_version: Open
    _queue: "SimpleQueue[_Copy]" = field(default_factory=SimpleQueue)
    _counts: dict[tuple[str, str], ShadowCounts] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_running: bool = False

    def offer(self, traffic: Traffic, model: str, inputs: Arrays, outputs: Arrays) -> None:
        """Let the candidate see a copy of a request that has been answered."""
        if traffic.shadow is None or random.random() * 100 >= traffic.shadow_percent:
            return
        version = str(traffic.shadow)
        counts = self._get_counts(model, version)
        with self._lock:
            if self._queue.qsize() >= QUEUE_MAX:
                counts.dropped += 1
                return
            self._queue.put(_Copy(model, version, inputs, outputs))
            must_start = not self._is_running
            self._is_running = True
        if must_start:
            threading.Thread(target=self._work, name="edgeward-shadow", daemon=True).start()

    def read(self, model: str, version: str) -> ShadowCounts:
        """Return what came of the copies of a version so far."""
        with self._lock:
            return self._counts.get((model, version), ShadowCounts())

    def list_counts(self) -> dict[tuple[str, str], ShadowCounts]:
        """Return what came of the copies, by model and version."""
        with self._lock:
            return dict(self._counts)

    def _get_counts(self, model: str, version: str) -> ShadowCounts:
        with self._lock:
            return self._counts.setdefault((model, version), ShadowCounts())

    def _work(self) -> None:
        """Run copies until none has come for a while."""
        while True:
            try:
                copy = self._queue.get(timeout=_IDLE_S)
            except Empty:
                with self._lock:
                    if self._queue.empty():
                        self._is_running = False
                        return
                continue
            self._run(copy)

    def _run(self, copy: _Copy) -> None:
        counts = self._get_counts(copy.model, copy.version)
        began = time.perf_counter_ns()
        try:
            served, model = self.open_version(copy.model, copy.version)
        except (AgentError, PlatformError, WorkerError) as exc:
            log.warning("shadow of %s %s does not load: %s", copy.model, copy.version, exc)
            counts.failed += 1
            return
        stats = served.batcher.stats
        try:
            with served.batcher.acquire():
                started = time.perf_counter_ns()
                found = model.session.run(copy.inputs, check_finite=False)
        except (PlatformError, WorkerError) as exc:
            # Inputs that the new version does not take are its fault here: the old one took them.
            log.info("shadow of %s %s: %s", copy.model, copy.version, exc)
            counts.failed += 1
            stats.add_failure(FailReason.BACKEND, time.perf_counter_ns() - began)
            return
        spent_ns = time.perf_counter_ns() - started
        rows = next((len(array) for array in copy.inputs.values() if array.ndim), 1)
        stats.add_run(rows, 1, RunTimes(0, spent_ns, 0, rows), total_ns=spent_ns)
        # Whoever sees that it was compared sees the verdict, too.
        counts.agreed += is_alike(copy.outputs, found)
        counts.compared += 1


def is_alike(reference: Arrays, found: Arrays) -> bool:
    """Say whether two answers are the same for whoever asked: same classes, or little noise."""
    for name, right in reference.items():
        if name not in found:
            return False
        try:
            parity = compare_output(name, right, found[name])
        except TensorError:
            return False
        if parity.top_1 is not None:
            if parity.top_1 < 1:
                return False
        elif not (parity.is_identical or (parity.sqnr_db or 0.0) >= ALIKE_SQNR_DB):
            return False
    return True
