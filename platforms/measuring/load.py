"""Load on one session: threads that ask again as soon as they are answered, and their times.

A closed loop: `concurrency` threads share one session, as the worker's threads do. Runs that
begin before the settling time is over are not counted. Imported by the measuring child, so it
reaches NumPy, psutil and `platforms` only.

Invariants: every thread counts at least one run, however long one takes; the memory used by
`stress` does not grow with its length.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from platforms.errors import PlatformError
from platforms.runtimes.base import Array, Session

Inputs = Mapping[str, Array]

_SETTLE_SHARE, _SETTLE_LONGEST_S = 0.2, 0.3
"""Of a point's time, spent before counting begins."""
_BUCKETS_PER_E = 100
"""Buckets of the histogram per factor e: each 1 % wide."""
_SLOW_FACTOR = 10.0
"""A run that takes this many times the median is an outlier."""
_SAMPLE_EVERY_S = 1.0
_STEADY_SHARE = 0.1
"""Of a stress run's time, after which memory should not grow any more."""
_MB = 1e6


@dataclass
class _Thread:
    """What one thread saw."""

    latencies_ns: list[int] = field(default_factory=list)
    buckets: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    first_failure: str = ""
    first_start_ns: int = 0
    """Of the runs that count."""
    last_end_ns: int = 0
    longest_ns: int = 0


def read_memory() -> dict[str, float | None]:
    """Return this process's resident and proportional memory in MB (10⁶ bytes)."""
    process = psutil.Process()
    # Only Linux knows the proportional one.
    pss = getattr(process.memory_full_info(), "pss", None)
    return {
        "rss_mb": process.memory_info().rss / _MB,
        "pss_mb": None if pss is None else pss / _MB,
    }


def measure(session: Session, inputs: Inputs, concurrency: int, seconds: float) -> dict[str, Any]:
    """Run `inputs` over and over from `concurrency` threads, and return what it took.

    Blocks for `seconds`, or longer where one run takes longer.

    Returns:
        `runs`, `mean_ms`, `p50_ms`, `p95_ms`, `p99_ms`, `rows_per_s`, and
        `cpu_percent` of one core.

    Raises:
        PlatformError: a run failed.
    """
    rows = _count_rows(inputs)
    threads = [_Thread() for _ in range(concurrency)]
    began_ns = time.perf_counter_ns()
    count_from_ns = began_ns + round(1e9 * min(_SETTLE_LONGEST_S, _SETTLE_SHARE * seconds))
    end_ns = began_ns + round(1e9 * seconds)
    failed: list[PlatformError] = []

    def work(mine: _Thread) -> None:
        while not failed:
            start = time.perf_counter_ns()
            try:
                session.run(inputs)
            except PlatformError as exc:
                failed.append(exc)
                return
            mine.last_end_ns = time.perf_counter_ns()
            if start >= count_from_ns:
                mine.first_start_ns = mine.first_start_ns or start
                mine.latencies_ns.append(mine.last_end_ns - start)
                if mine.last_end_ns >= end_ns:
                    return

    before_cpu_s = _read_cpu_s()
    _run_threads(work, threads)
    if failed:
        raise failed[0]
    cpu_s = _read_cpu_s() - before_cpu_s
    last_ns = max(item.last_end_ns for item in threads)
    merged = np.concatenate([np.asarray(item.latencies_ns) for item in threads]) / 1e6
    p50, p95, p99 = np.percentile(merged, (50, 95, 99))
    return {
        "runs": len(merged),
        "mean_ms": float(merged.mean()),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
        # Each thread over its own time: they neither begin nor end together.
        "rows_per_s": rows * sum(_rate(item) for item in threads),
        "cpu_percent": 100 * cpu_s / ((last_ns - began_ns) / 1e9),
    }


def _rate(thread: _Thread) -> float:
    """Return the thread's runs per second between its first and its last counted moment."""
    return len(thread.latencies_ns) / ((thread.last_end_ns - thread.first_start_ns) / 1e9)


def stress(
    session: Session,
    inputs: Inputs,
    concurrency: int,
    seconds: float,
    report: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Load a session for a long time and return what went wrong.

    Args:
        session: what is loaded.
        inputs: of every run.
        concurrency: number of threads.
        seconds: how long; the last runs may end later.
        report: called every second with `elapsed_s`, `runs`, `failures` and `rss_mb`.

    Returns:
        `runs`, `failures` (by code), `first_failure`, `rows_per_s`, the percentiles and
        `longest_ms`, `slow_runs` (over ten times the median), `longest_gap_ms` (without any
        answer), `rss_start_mb`, `rss_steady_mb` (after a tenth of the time), `rss_end_mb`.
    """
    threads = [_Thread() for _ in range(concurrency)]
    began_ns = time.perf_counter_ns()
    end_ns = began_ns + round(1e9 * seconds)
    gap = _Gap(began_ns)

    def work(mine: _Thread) -> None:
        while (start := time.perf_counter_ns()) < end_ns:
            try:
                session.run(inputs)
            except PlatformError as exc:
                mine.failures[exc.code] += 1
                mine.first_failure = mine.first_failure or str(exc)
                continue
            mine.last_end_ns = time.perf_counter_ns()
            took = mine.last_end_ns - start
            mine.buckets[_bucket(took)] += 1
            mine.longest_ns = max(mine.longest_ns, took)
            gap.answer(mine.last_end_ns)

    memory = _Memory(began_ns, seconds)

    def watch() -> None:
        while not over.wait(_SAMPLE_EVERY_S):
            elapsed_s = (time.perf_counter_ns() - began_ns) / 1e9
            runs = sum(item.buckets.total() for item in threads)
            failures = sum(item.failures.total() for item in threads)
            rss_mb = memory.sample(elapsed_s)
            report({"elapsed_s": elapsed_s, "runs": runs, "failures": failures, "rss_mb": rss_mb})

    over = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _run_threads(work, threads)
    over.set()
    watcher.join()
    wall_s = (time.perf_counter_ns() - began_ns) / 1e9
    return {**_summarize(threads, _count_rows(inputs), wall_s, gap), **memory.finish()}


class _Gap:
    """The longest time in which nobody was answered."""

    def __init__(self, now_ns: int) -> None:
        self._lock = threading.Lock()
        self._last_ns = now_ns
        self.longest_ns = 0

    def answer(self, now_ns: int) -> None:
        with self._lock:
            self.longest_ns = max(self.longest_ns, now_ns - self._last_ns)
            self._last_ns = max(self._last_ns, now_ns)


class _Memory:
    """Resident memory at the start, once it should be steady, and at the end; MB."""

    def __init__(self, began_ns: int, seconds: float) -> None:
        self._steady_at_s = _STEADY_SHARE * seconds
        self._start = self._read()
        self._steady: float | None = None

    @staticmethod
    def _read() -> float:
        return float(psutil.Process().memory_info().rss / _MB)

    def sample(self, elapsed_s: float) -> float:
        now = self._read()
        if self._steady is None and elapsed_s >= self._steady_at_s:
            self._steady = now
        return now

    def finish(self) -> dict[str, float]:
        end = self._read()
        steady = end if self._steady is None else self._steady
        return {"rss_start_mb": self._start, "rss_steady_mb": steady, "rss_end_mb": end}


def _bucket(took_ns: int) -> int:
    return round(_BUCKETS_PER_E * math.log(max(took_ns, 1)))


def _unbucket_ms(bucket: int) -> float:
    return math.exp(bucket / _BUCKETS_PER_E) / 1e6


def _summarize(threads: list[_Thread], rows: int, wall_s: float, gap: _Gap) -> dict[str, Any]:
    buckets = sum((item.buckets for item in threads), Counter[int]())
    failures = sum((item.failures for item in threads), Counter[str]())
    runs = buckets.total()
    found = {f"p{share}_ms": _find_percentile_ms(buckets, share) for share in (50, 95, 99)}
    limit = math.inf if found["p50_ms"] is None else _SLOW_FACTOR * found["p50_ms"]
    return {
        **found,
        "runs": runs,
        "failures": dict(failures),
        "first_failure": next((item.first_failure for item in threads if item.first_failure), ""),
        "rows_per_s": rows * runs / wall_s,
        "longest_ms": max(item.longest_ns for item in threads) / 1e6,
        "slow_runs": sum(n for bucket, n in buckets.items() if _unbucket_ms(bucket) > limit),
        "longest_gap_ms": gap.longest_ns / 1e6,
    }


def _find_percentile_ms(buckets: Counter[int], percent: float) -> float | None:
    """Return a percentile to within 1 %, or None where nothing was counted."""
    seen, total = 0, buckets.total()
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= total * percent / 100:
            return _unbucket_ms(bucket)
    return None


def _run_threads(work: Callable[[_Thread], None], threads: list[_Thread]) -> None:
    workers = [threading.Thread(target=work, args=(item,)) for item in threads]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _count_rows(inputs: Inputs) -> int:
    first = next(iter(inputs.values()))
    return int(first.shape[0]) if first.ndim else 1


def _read_cpu_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)
