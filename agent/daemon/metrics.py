"""The agent's metrics for Prometheus.

Owns the names below `edgeward_` that speak of jobs, outbox and box, and the small HTTP
server that gives them out. What is counted elsewhere is read when it is asked for; only
durations are kept here. prometheus_client is imported when metrics are turned on: a box
without them does not pay for it.

Invariants: a scrape changes nothing and holds up nobody; what cannot be read is left out,
not reported as zero.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from agent.clock import Clock
from agent.errors import MetricsError, StoreError
from agent.jobs import JobState
from agent.sections import MetricsSettings
from agent.store.database import open_reader
from agent.store.outbox import Rank, measure_classes
from agent.store.transitions import EndedJob

log = logging.getLogger(__name__)

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0)
"""Upper bounds of a job's time from acceptance to its end."""
_OPEN_JOBS = text(
    "SELECT lane, state, count(*), min(created_ms) FROM jobs WHERE ended_ms IS NULL"
    " GROUP BY lane, state"
)
_DROPPED = text("SELECT name, value FROM counters WHERE name LIKE 'dropped\\_%' ESCAPE '\\'")


class JobTimes:
    """Durations of ended jobs by state; written by one thread, read by others."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: dict[JobState, list[int]] = {}
        self._sums_s: dict[JobState, float] = {}

    def observe(self, ended: Iterable[EndedJob]) -> None:
        """Count jobs that ended."""
        with self._lock:
            for job in ended:
                took_s = max(0, job.took_ms) / 1000
                counts = self._counts.setdefault(job.state, [0] * (len(BUCKETS_S) + 1))
                at = next((i for i, bound in enumerate(BUCKETS_S) if took_s <= bound), -1)
                counts[at] += 1
                self._sums_s[job.state] = self._sums_s.get(job.state, 0.0) + took_s

    def read(self) -> list[tuple[JobState, list[int], float]]:
        """Return, for each state, the counts of the buckets and the sum in seconds."""
        with self._lock:
            return [(s, list(c), self._sums_s[s]) for s, c in self._counts.items()]


class AgentCollector:
    """Collects at each scrape; a collector of prometheus_client.

    Args:
        ledger: the SQLite file.
        clock: wall time, for ages.
        times: durations of ended jobs.
        measure: the heartbeat's body.
        version: of the agent.
    """

    def __init__(
        self,
        ledger: Path,
        clock: Clock,
        times: JobTimes,
        measure: Callable[[], Mapping[str, Any]],
        version: str,
    ) -> None:
        from prometheus_client import core

        self._core = core
        self._ledger = ledger
        self._clock = clock
        self._times = times
        self._measure = measure
        self._version = version

    def collect(self) -> Iterator[Any]:
        """Yield all families."""
        yield self._gauge("agent_info", "Always 1.", [({"version": self._version}, 1)])
        yield self._collect_times()
        yield from self._collect_box(self._measure())
        try:
            yield from self._collect_ledger()
        except (StoreError, SQLAlchemyError) as exc:
            log.warning("metrics of the ledger cannot be read: %s", exc)

    def _gauge(self, name: str, what: str, samples: Iterable[tuple[dict[str, str], Any]]) -> Any:
        return self._fill(self._core.GaugeMetricFamily, name, what, samples)

    def _counter(self, name: str, what: str, samples: Iterable[tuple[dict[str, str], Any]]) -> Any:
        return self._fill(self._core.CounterMetricFamily, name, what, samples)

    @staticmethod
    def _fill(
        kind: Any, name: str, what: str, samples: Iterable[tuple[dict[str, str], Any]]
    ) -> Any:
        """Return a family of the samples whose value is known."""
        known = [(labels, value) for labels, value in samples if value is not None]
        names = list(known[0][0]) if known else []
        family = kind(f"edgeward_{name}", what, labels=names)
        for labels, value in known:
            family.add_metric(list(labels.values()), float(value))
        return family

    def _collect_times(self) -> Any:
        family = self._core.HistogramMetricFamily(
            "edgeward_job_duration_seconds",
            "From a job's acceptance to its end.",
            labels=["state"],
        )
        bounds = [*(str(bound) for bound in BUCKETS_S), "+Inf"]
        for state, counts, sum_s in self._times.read():
            sums = [sum(counts[: index + 1]) for index in range(len(counts))]
            family.add_metric([state.value], list(zip(bounds, sums, strict=True)), sum_s)
        return family

    def _collect_box(self, said: Mapping[str, Any]) -> Iterator[Any]:
        outbox, resources, storage = said["outbox"], said["resources"], said["storage"]
        plain: Sequence[tuple[str, str, Any]] = (
            ("uptime_seconds", "Since the agent's start.", said["uptime_s"]),
            ("mqtt_connected", "Whether there is a connection.", said["mqtt"] == "online"),
            (
                "queue_broker_up",
                "Whether the queue broker answers.",
                said["queue_broker"] == "reachable",
            ),
            ("store_ok", "Whether the ledger can be written.", said["store"] == "ok"),
            ("workers", "Workers that live.", said["workers"]),
            ("tasks", "Tasks in the queue broker and at workers.", said["tasks"]),
            ("cpu_ratio", "Of the whole machine.", resources["cpu_percent"] / 100),
            (
                "memory_available_bytes",
                "Of the machine or its cgroup.",
                resources["memory_available_mb"] * 10**6,
            ),
            ("disk_free_bytes", "On the ledger's disk.", _to_bytes(resources["disk_free_mb"])),
            (
                "temperature_celsius",
                "Of the hottest sensor.",
                resources["temperature_c"],
            ),
            ("storage_low", "Whether new work is refused for want of disk.", storage["low"]),
            ("quarantined_models", "Versions that are not served.", len(said["quarantine"])),
        )
        for name, what, value in plain:
            yield self._gauge(name, what, [({}, value)])
        for name, what in (
            ("published", "Records published, first sends and others."),
            ("republished", "Records published again."),
        ):
            yield self._counter(f"outbox_{name}", what, [({}, outbox[name])])

    def _collect_ledger(self) -> Iterator[Any]:
        engine = open_reader(self._ledger)
        try:
            with engine.connect() as tx:
                yield from self._collect_jobs(tx)
                yield from self._collect_outbox(tx)
        finally:
            engine.dispose()
        size = sum(path.stat().st_size for path in self._ledger.parent.glob("ledger.db*"))
        yield self._gauge("ledger_bytes", "With its log and index.", [({}, size)])

    def _collect_jobs(self, tx: Connection) -> Iterator[Any]:
        rows = tx.execute(_OPEN_JOBS).all()
        yield self._gauge(
            "jobs_open",
            "Jobs that have not ended.",
            [({"lane": lane, "state": state}, count) for lane, state, count, _ in rows],
        )
        oldest: dict[str, int] = {}
        for lane, _, _, created_ms in rows:
            oldest[lane] = min(created_ms, oldest.get(lane, created_ms))
        now_ms = self._clock.wall_ms()
        yield self._gauge(
            "job_oldest_age_seconds",
            "Age of the oldest open job.",
            [({"lane": lane}, max(0, now_ms - at) / 1000) for lane, at in oldest.items()],
        )

    def _collect_outbox(self, tx: Connection) -> Iterator[Any]:
        sizes = measure_classes(tx)
        for name, what, place in (
            ("records", "Records that wait for the console.", 0),
            ("bytes", "Bytes of their bodies.", 1),
        ):
            samples = [
                ({"class": rank.name.lower()}, sizes.get(rank, (0, 0))[place]) for rank in Rank
            ]
            yield self._gauge(f"outbox_{name}", what, samples)
        dropped = {name: value for name, value in tx.execute(_DROPPED)}
        yield self._counter(
            "outbox_dropped",
            "Records dropped for want of room; gap records name them.",
            [
                ({"class": rank.name.lower()}, dropped.get(f"dropped_{rank.name}", 0))
                for rank in Rank
            ],
        )


def _to_bytes(size_mb: int | None) -> int | None:
    return None if size_mb is None else size_mb * 10**6


class MetricsServer:
    """Gives a collector's metrics out over HTTP, on threads of its own.

    Args:
        settings: address and port.
        collector: of prometheus_client's kind.

    Raises:
        MetricsError: prometheus_client is not installed, or the address cannot be used.
    """

    def __init__(self, settings: MetricsSettings, collect: Callable[[], Any]) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ModuleNotFoundError as exc:
            msg = "metrics need prometheus_client: pip install 'edgeward[serve]'"
            raise MetricsError(msg) from exc
        registry = CollectorRegistry(auto_describe=False)
        registry.register(collect())
        try:
            self._server, self._thread = start_http_server(
                settings.port or 0, settings.host, registry
            )
        except OSError as exc:
            msg = f"metrics cannot be served on {settings.host}:{settings.port}: {exc.strerror}"
            raise MetricsError(msg) from exc
        self.port = int(self._server.server_port)

    def close(self) -> None:
        """Stop serving."""
        with suppress(OSError):
            self._server.shutdown()
            self._server.server_close()
        self._thread.join(1.0)
