"""What each model version has done: counters as Triton keeps them.

Owns the counting, one lock a version, held for about a microsecond once a run. As in Triton,
`success` and the `compute` durations count requests (each request of a batch has the whole
run's time), `inference_count` rows, `execution_count` and the batches' own durations runs.

Invariants: counters only grow; a snapshot is of one moment.
"""

import time
from collections import defaultdict
from enum import StrEnum
from threading import Lock
from typing import NamedTuple

from agent.latency import find_step
from worker.engine.service import BatchStats, Duration, ModelStats


class FailReason(StrEnum):
    """Why a request failed; Triton's words."""

    REJECTED = "REJECTED"
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"
    OTHER = "OTHER"


class RunTimes(NamedTuple):
    """How long the parts of one run took, ns, and what it was."""

    input_ns: int
    """Stacking the requests."""
    infer_ns: int
    output_ns: int
    """Taking the answers apart."""
    batch_rows: int = 1
    """Rows of the batch; of the largest piece, where it was run in pieces."""
    runs: int = 1
    """Pieces."""


class _Sum:
    """A duration in the making."""

    __slots__ = ("count", "ns")

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns

    def read(self) -> Duration:
        return Duration(self.count, self.ns)


class _Batches:
    """Runs of one batch size."""

    __slots__ = ("infer", "input", "output")

    def __init__(self) -> None:
        self.input, self.infer, self.output = _Sum(), _Sum(), _Sum()


class StatsCounter:
    """Counts what one model version does; thread-safe."""

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self._lock = Lock()
        self._rows = 0
        self._runs = 0
        self._last_ms = 0
        self._success, self._fail, self._queue = _Sum(), _Sum(), _Sum()
        self._input, self._infer, self._output = _Sum(), _Sum(), _Sum()
        self._hit, self._miss = _Sum(), _Sum()
        self._batches: defaultdict[int, _Batches] = defaultdict(_Batches)
        self._failures = dict.fromkeys(FailReason, 0)
        self._latencies: defaultdict[int, int] = defaultdict(int)

    def add_run(
        self, rows: int, requests: int, times: RunTimes, *, total_ns: int, queue_ns: int = 0
    ) -> None:
        """Count a run that answered `requests` requests.

        Args:
            rows: in all.
            requests: of those that got an answer.
            times: of the run.
            total_ns: from the arrival of each request to its answer, all together.
            queue_ns: of that, what they waited for their turn.
        """
        last_ms = time.time_ns() // 1_000_000
        with self._lock:
            self._rows += rows
            self._runs += times.runs
            self._last_ms = last_ms
            self._success.add(total_ns, requests)
            self._latencies[find_step(total_ns // requests if requests else 0)] += requests
            self._queue.add(queue_ns, requests)
            self._input.add(times.input_ns * requests, requests)
            self._infer.add(times.infer_ns * requests, requests)
            self._output.add(times.output_ns * requests, requests)
            batches = self._batches[times.batch_rows]
            batches.input.add(times.input_ns, times.runs)
            batches.infer.add(times.infer_ns, times.runs)
            batches.output.add(times.output_ns, times.runs)

    def add_failure(self, reason: FailReason, ns: int = 0) -> None:
        """Count a request that got no answer, after so long."""
        with self._lock:
            self._fail.add(ns)
            self._failures[reason] += 1

    def add_cache_hit(self, total_ns: int, lookup_ns: int) -> None:
        """Count a request that the cache answered; as in Triton it is a success, and no run."""
        last_ms = time.time_ns() // 1_000_000
        with self._lock:
            self._last_ms = last_ms
            self._success.add(total_ns)
            self._hit.add(lookup_ns)

    def add_cache_miss(self, ns: int) -> None:
        """Count a look into the cache that found nothing, and the time to look and to insert."""
        with self._lock:
            self._miss.add(ns)

    def read_latencies(self) -> dict[int, int]:
        """Return requests that got an answer, by `find_step` of how long it took.

        Requests of one batch count with its mean.
        """
        with self._lock:
            return dict(self._latencies)

    def read(self, pending: int = 0) -> ModelStats:
        """Return the counters of this moment."""
        with self._lock:
            batches = tuple(
                BatchStats(rows, one.input.read(), one.infer.read(), one.output.read())
                for rows, one in sorted(self._batches.items())
            )
            return ModelStats(
                name=self.name,
                version=self.version,
                last_inference_ms=self._last_ms,
                inference_count=self._rows,
                execution_count=self._runs,
                success=self._success.read(),
                fail=self._fail.read(),
                queue=self._queue.read(),
                compute_input=self._input.read(),
                compute_infer=self._infer.read(),
                compute_output=self._output.read(),
                cache_hit=self._hit.read(),
                cache_miss=self._miss.read(),
                batches=batches,
                pending=pending,
                failures={reason.value: count for reason, count in self._failures.items()},
            )
