"""A box under mixed load for half an hour: does anything grow that should not?

    python -m tests.fault.soak --minutes 30 --json

Owns one run: a whole box (brokers, agent, worker) and an acknowledging console get jobs of all
sorts at a steady rate, with duplicates on the wire, and files in a folder. Every few seconds
it looks at memory, file descriptors, threads, the ledger's files and the outbox. In the end
the history checker says whether every job came out right, and each series gets its slope.

What may grow: the ledger remembers each ended job for `keep_ends_days`. So its size is judged
without that: `ledger_rest_kb` is the file's size less the ended jobs times the bytes that each
took in the first half. Growth that is faster than the number of jobs shows up there. The same
goes for results too long for the wire, which are files, and for what the broker retains.
"""

import argparse
import json
import random
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from tests.fault.chaos.models import ECHO, WIDTH
from tests.fault.chaos.plan import SHARES, Plan
from tests.fault.chaos.scenario import Scenario
from tests.fault.trend import draw_sparkline, draw_svg, find_trend

_SETTINGS = {
    "EDGEWARD_INBOX__ENABLED": "true",
    "EDGEWARD_INBOX__SETTLE_S": "0.2",
    "EDGEWARD_INBOX__SCAN_S": "0.5",
}
_BURST_S = 0.5
_FILES_PER_S = 1.0
_SETTLE_S = 60.0
_KB = 1024
_JUDGED = (
    "agent_rss_kb",
    "agent_fds",
    "agent_threads",
    "worker_rss_kb",
    "worker_fds",
    "worker_threads",
    "worker_processes",
    "queue_rss_kb",
    "outbox_depth",
    "open_jobs",
    "wal_kb",
    "ledger_rest_kb",
)


@dataclass(frozen=True)
class Sample:
    """What the box was like at one moment."""

    at_s: float
    agent_rss_kb: float
    agent_fds: int
    agent_threads: int
    worker_rss_kb: float
    worker_fds: int
    worker_threads: int
    worker_processes: int
    queue_rss_kb: float
    mqtt_rss_kb: float
    ledger_kb: float
    wal_kb: float
    free_kb: float
    outbox_depth: int
    open_jobs: int
    ended_jobs: int


@dataclass(frozen=True)
class Load:
    """What a run asks of the box."""

    duration_s: float
    rate: float
    sample_s: float
    seed: int


Tell = Callable[[Sample], None]


class Soak:
    """One run.

    Args:
        folder: where the box lives.
        load: how much, for how long.
        tell: told of each sample.
    """

    def __init__(self, folder: Path, load: Load, tell: Tell = lambda _: None) -> None:
        self.samples: list[Sample] = []
        self._load = load
        self._tell = tell
        self._rng = random.Random(load.seed)
        self._files = 0
        self._pause = threading.Event()
        self.scenario = Scenario(
            folder,
            Plan(load.seed, ()),
            duplicate=0.03,
            quiet_limit_s=_SETTLE_S,
            cast_options={"settings": _SETTINGS, "durable": False},
        )
        self.inbox = self.scenario.cast.data_dir / "inbox" / ECHO

    def run(self) -> dict[str, Any]:
        """Load the box, then let it come to rest, and return what was seen."""
        began = time.monotonic()
        try:
            self.scenario.start()
            self._drive()
            is_quiet = self.scenario.settle() and self._wait_files()
            console = dict(self.scenario.console.counts)
            lost = len(self.scenario.console.list_open())
        finally:
            self.scenario.stop()
        report = self.scenario.check()
        return {
            "duration_s": round(time.monotonic() - began, 1),
            "rate_per_s": self._load.rate,
            "seed": self._load.seed,
            "jobs": len(self.scenario.console.jobs),
            "files": self._files,
            "files_done": self._count_done(),
            "lost": lost,
            "became_quiet": is_quiet,
            "findings": [f"{item.kind}: {item.rule}: {item.job}" for item in report.findings[:10]],
            "ends": report.ends,
            "console": console,
            "restarts": {
                name: member.starts - 1 for name, member in self.scenario.cast.members.items()
            },
        }

    def _drive(self) -> None:
        """Submit in small bursts, at a rate that does not depend on how the box keeps up."""
        kinds, weights = list(SHARES), list(SHARES.values())
        began = time.monotonic()
        submitted, next_sample_s = 0, 0.0
        while (now_s := time.monotonic() - began) < self._load.duration_s:
            wanted = int(now_s * self._load.rate)
            self.scenario.console.submit(self._rng.choices(kinds, weights, k=wanted - submitted))
            submitted = wanted
            while self._files < now_s * _FILES_PER_S:
                self._write_file()
            if now_s >= next_sample_s:
                next_sample_s += self._load.sample_s
                self._take_sample(now_s)
            self._pause.wait(_BURST_S)

    def _write_file(self) -> None:
        self._files += 1
        self.inbox.mkdir(parents=True, exist_ok=True)
        part = self.inbox / f"{self._files:06}.npy.part"
        with part.open("wb") as file:
            np.save(file, np.full((1, WIDTH), self._files, np.float32))
        part.rename(part.with_suffix(""))

    def _count_done(self) -> int:
        done = self.inbox / "done"
        return sum(1 for _ in done.iterdir()) if done.is_dir() else 0

    def _wait_files(self) -> bool:
        deadline = time.monotonic() + _SETTLE_S
        while self._count_done() < self._files:
            if time.monotonic() > deadline:
                return False
            self._pause.wait(_BURST_S)
        return True

    def _take_sample(self, now_s: float) -> None:
        cast = self.scenario.cast
        agent, worker, queue, mqtt = (
            measure_process(cast.members[name].pid) for name in ("agent", "worker", "queue", "mqtt")
        )
        sample = Sample(
            at_s=round(now_s, 2),
            agent_rss_kb=agent["rss_kb"],
            agent_fds=int(agent["fds"]),
            agent_threads=int(agent["threads"]),
            worker_rss_kb=worker["rss_kb"],
            worker_fds=int(worker["fds"]),
            worker_threads=int(worker["threads"]),
            worker_processes=int(worker["processes"]),
            queue_rss_kb=queue["rss_kb"],
            mqtt_rss_kb=mqtt["rss_kb"],
            **measure_ledger(cast.ledger_path),
        )
        self.samples.append(sample)
        self._tell(sample)


def measure_process(pid: int) -> dict[str, float]:
    """Return memory, open files and threads of a process and its children, together."""
    found = {"rss_kb": 0.0, "fds": 0, "threads": 0, "processes": 0}
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            # A child may end between the look at the list and the look at it.
            with suppress(psutil.NoSuchProcess), process.oneshot():
                found["rss_kb"] += process.memory_info().rss / _KB
                found["fds"] += process.num_fds()
                found["threads"] += process.num_threads()
                found["processes"] += 1
    return found


def measure_ledger(path: Path) -> dict[str, Any]:
    """Return sizes and counts of a ledger that is in use."""
    wal = path.with_name(path.name + "-wal")
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10)) as ledger:
        page, pages, free = (
            ledger.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        (depth,) = ledger.execute("SELECT count(*) FROM outbox").fetchone()
        opened, ended = ledger.execute(
            "SELECT count(*) - count(ended_ms), count(ended_ms) FROM jobs"
        ).fetchone()
    return {
        "ledger_kb": page * pages / _KB,
        "free_kb": page * free / _KB,
        "wal_kb": wal.stat().st_size / _KB if wal.exists() else 0.0,
        "outbox_depth": depth,
        "open_jobs": opened,
        "ended_jobs": ended,
    }


def judge(samples: Sequence[Sample], warm_up_s: float) -> dict[str, Any]:
    """Return the trend of each series after the warm-up, and what an ended job takes."""
    chosen = [sample for sample in samples if sample.at_s >= warm_up_s]
    chosen = chosen if len(chosen) >= 3 else list(samples)
    times_s = [sample.at_s for sample in chosen]
    series, bytes_per_end = build_series(chosen)
    trends = {name: find_trend(times_s, values).to_json() for name, values in series.items()}
    return {
        "samples": len(chosen),
        "warm_up_s": warm_up_s,
        "ledger_bytes_per_ended_job": bytes_per_end,
        "series": {name: trends[name] for name in _JUDGED},
        "may_grow": {name: trends[name] for name in trends if name not in _JUDGED},
        "within_noise": all(trends[name]["within_noise"] for name in _JUDGED),
    }


def build_series(chosen: Sequence[Sample]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return every series by name, and the bytes that an ended job took in each half."""
    rows = [asdict(sample) for sample in chosen]
    series = {name: [float(row[name]) for row in rows] for name in rows[0] if name != "at_s"}
    used = [size - free for size, free in zip(series["ledger_kb"], series["free_kb"], strict=True)]
    middle = len(chosen) // 2
    ended = series["ended_jobs"]

    def per_end(first: int, last: int) -> float:
        return (used[last] - used[first]) / max(1.0, ended[last] - ended[first])

    each_kb = per_end(0, middle)
    series["ledger_rest_kb"] = [
        size - each_kb * count for size, count in zip(used, ended, strict=True)
    ]
    halves = {"first_half": each_kb, "second_half": per_end(middle, len(chosen) - 1)}
    return series, {name: round(value * _KB) for name, value in halves.items()}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20.0, help="jobs a second (20)")
    parser.add_argument("--sample-s", type=float, default=10.0)
    parser.add_argument("--warm-up-s", type=float, default=None, help="a sixth of the run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--samples", type=Path, help="keep the samples there, as JSON lines")
    parser.add_argument("--plot", type=Path, help="draw all series there, as SVG")
    return parser.parse_args(argv)


def show(document: dict[str, Any], samples: Sequence[Sample], out: Any) -> None:
    """Write what a person wants to see."""
    series, _ = build_series(samples)
    for name, values in series.items():
        trend = document["series"].get(name) or document["may_grow"][name]
        word = "ok" if trend["within_noise"] else "grows" if name in _JUDGED else "(may grow)"
        slope = f"{trend['slope_per_h']:+.1f} ± {trend['standard_error_per_h']:.1f} /h"
        print(f"{name:>18} {draw_sparkline(values)} {slope:>24}  {word}", file=out)


def main(argv: Sequence[str] | None = None) -> int:
    """Run once; 0 where nothing was lost and nothing grew."""
    arguments = parse_arguments(argv)
    duration_s = arguments.minutes * 60
    warm_up_s = duration_s / 6 if arguments.warm_up_s is None else arguments.warm_up_s
    load = Load(duration_s, arguments.rate, arguments.sample_s, arguments.seed)

    def tell(sample: Sample) -> None:
        if arguments.samples is not None:
            with arguments.samples.open("a") as file:
                file.write(json.dumps(asdict(sample)) + "\n")
        text = (
            f"{sample.at_s:6.0f} s  agent {sample.agent_rss_kb / _KB:.1f} MB "
            f"{sample.agent_fds} fds  worker {sample.worker_rss_kb / _KB:.1f} MB "
            f"{sample.worker_fds} fds  outbox {sample.outbox_depth}  ended {sample.ended_jobs}"
        )
        print(text, file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="edgeward-soak-") as folder:
        soak = Soak(Path(folder), load, tell)
        document = soak.run()
    document |= judge(soak.samples, warm_up_s)
    if arguments.plot is not None:
        series, _ = build_series(soak.samples)
        times_s = [sample.at_s for sample in soak.samples]
        arguments.plot.write_text(draw_svg(times_s, dict(series)))
    show(document, soak.samples, sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(document))
    is_good = document["became_quiet"] and not document["findings"] and document["within_noise"]
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
