"""A worker's metrics for Prometheus: Triton's names, and our own beside them.

Owns how a model's statistics become metric families. Boards and alerts made for Triton work
because names, labels and units are Triton's exactly; `edgeward_*` has what Triton lacks.

Source: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from worker.engine.engine import Engine
from worker.engine.responses import CacheStats, ResponseCache
from worker.engine.service import Duration, ModelStats, Service
from worker.engine.shadow import Shadow, ShadowCounts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# prometheus_client would put `_total` behind a counter's name, which Triton's do not have.
_UNTYPED = re.compile(rb"^(# TYPE nv_\w+) untyped$", re.MULTILINE)
_NS_PER_US = 1000
_MB = 10**6

_COUNTS: tuple[tuple[str, str, Callable[[ModelStats], int]], ...] = (
    ("nv_inference_request_success", "Successful requests.", lambda s: s.success.count),
    ("nv_inference_count", "Inferences, that is rows.", lambda s: s.inference_count),
    ("nv_inference_exec_count", "Runs of the model.", lambda s: s.execution_count),
    ("nv_cache_num_hits_per_model", "Answers from the cache.", lambda s: s.cache_hit.count),
    ("nv_cache_num_misses_per_model", "Answers not in the cache.", lambda s: s.cache_miss.count),
)
_TIMES: tuple[tuple[str, str, Callable[[ModelStats], Duration]], ...] = (
    ("nv_inference_request_duration_us", "Of requests, all in all.", lambda s: s.success),
    ("nv_inference_queue_duration_us", "Spent in the queue.", lambda s: s.queue),
    ("nv_inference_compute_input_duration_us", "Of preparing inputs.", lambda s: s.compute_input),
    ("nv_inference_compute_infer_duration_us", "Of running the model.", lambda s: s.compute_infer),
    (
        "nv_inference_compute_output_duration_us",
        "Of preparing outputs.",
        lambda s: s.compute_output,
    ),
    ("nv_cache_hit_duration_per_model", "Of hits, in µs.", lambda s: s.cache_hit),
    ("nv_cache_miss_duration_per_model", "Of misses, in µs.", lambda s: s.cache_miss),
)
_SHADOW_COUNTS: tuple[tuple[str, str, Callable[[ShadowCounts], int]], ...] = (
    ("compared", "Answers of a version in shadow beside the active one's.", lambda c: c.compared),
    ("agreed", "Those that were the same for whoever asked.", lambda c: c.agreed),
    ("failed", "Copies that the version in shadow could not answer.", lambda c: c.failed),
    ("dropped", "Copies that were not run, as too many waited.", lambda c: c.dropped),
)
_REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


class ServiceCollector:
    """Collects the statistics of a service's models; a collector of prometheus_client.

    Args:
        service: the engine.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        """Yield all families."""
        stats = self._service.get_stats()
        for name, what, count in _COUNTS:
            yield _build(name, what, [(_label(item), count(item)) for item in stats])
        for name, what, time in _TIMES:
            samples = [(_label(item), time(item).ns // _NS_PER_US) for item in stats]
            yield _build(name, what, samples)
        yield _build(
            "nv_inference_request_failure",
            "Failed requests by reason.",
            [
                ({**_label(item), "reason": reason}, item.failures.get(reason, 0))
                for item in stats
                for reason in _REASONS
            ],
        )
        yield _build(
            "nv_inference_pending_request_count",
            "Requests that wait now.",
            [(_label(item), item.pending) for item in stats],
            kind="gauge",
        )
        yield _build(
            "edgeward_batch_runs",
            "Runs by the rows in them.",
            [
                ({**_label(item), "rows": str(batch.batch_size)}, batch.compute_infer.count)
                for item in stats
                for batch in item.batches
            ],
            suffix="_total",
            kind="counter",
        )
        yield _build(
            "edgeward_batch_run_seconds",
            "Time of those runs.",
            [
                ({**_label(item), "rows": str(batch.batch_size)}, batch.compute_infer.ns / 1e9)
                for item in stats
                for batch in item.batches
            ],
            suffix="_total",
            kind="counter",
        )
        yield _build(
            "edgeward_model_ready",
            "Whether requests for the model version are taken.",
            [
                ({"model": entry.name, "version": entry.version}, int(entry.status == "READY"))
                for entry in self._service.list_index()
            ],
            kind="gauge",
        )


class ShadowCollector:
    """Collects what came of copies that a candidate saw; a collector of prometheus_client.

    Args:
        shadow: that compares.
    """

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow

    def collect(self) -> Iterator[Any]:
        """Yield all families; nothing where there is no candidate in shadow."""
        found = self._shadow.list_counts()
        for name, what, count in _SHADOW_COUNTS:
            yield _build(
                f"edgeward_shadow_{name}",
                what,
                [({"model": m, "version": v}, count(counts)) for (m, v), counts in found.items()],
                suffix="_total",
                kind="counter",
            )


class EngineCollector:
    """Collects what loaded models and cached answers take; a collector of prometheus_client.

    Args:
        engine: that has the models.
        cache: of answers; None where there is none.
    """

    def __init__(self, engine: Engine, cache: ResponseCache | None = None) -> None:
        self._engine = engine
        self._cache = cache

    def collect(self) -> Iterator[Any]:
        """Yield all families."""
        served = self._engine.list_served()
        loaded = [one for one in served if self._engine.cache.is_loaded(one.key)]
        labels = [{"model": one.key.name, "version": one.key.version} for one in loaded]
        records = [self._engine.cache.find_record(one.key) for one in loaded]
        yield _build(
            "edgeward_model_memory_bytes",
            "What a loaded model version was measured to take.",
            [
                (label, record.mb * _MB)
                for label, record in zip(labels, records, strict=True)
                if record is not None
            ],
            kind="gauge",
        )
        yield _build(
            "edgeward_model_batch_rows_max",
            "Most rows that requests are put together to, as measured or configured.",
            [(label, one.batcher.max_rows) for label, one in zip(labels, loaded, strict=True)],
            kind="gauge",
        )
        budget_mb = self._engine.cache.budget_mb
        yield _build(
            "edgeward_model_memory_budget_bytes",
            "What all models of this process may take.",
            [] if budget_mb is None else [({}, budget_mb * _MB)],
            kind="gauge",
        )
        if self._cache is not None:
            yield from _collect_cache(self._cache.get_stats())


def _collect_cache(stats: CacheStats) -> Iterator[Any]:
    for name, what, value in (
        ("edgeward_response_cache_bytes", "What cached answers take.", stats.size_bytes),
        ("edgeward_response_cache_entries", "Cached answers.", stats.entries),
    ):
        yield _build(name, what, [({}, value)], kind="gauge")
    yield _build(
        "edgeward_response_cache_evicted",
        "Answers that left the cache for want of room.",
        [({}, stats.evicted)],
        suffix="_total",
        kind="counter",
    )


def _label(stats: ModelStats) -> dict[str, str]:
    return {"model": stats.name, "version": stats.version}


def _build(
    name: str,
    what: str,
    samples: Sequence[tuple[dict[str, str], float]],
    *,
    suffix: str = "",
    kind: str = "unknown",
) -> Any:
    from prometheus_client import Metric

    family = Metric(name, what, kind)
    for labels, value in samples:
        family.add_sample(name + suffix, labels, value)
    return family


def build_registry(service: Service) -> Any:
    """Return a registry of a service's metrics and of this process's own."""
    from prometheus_client import CollectorRegistry, ProcessCollector

    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(service))
    ProcessCollector(registry=registry)
    return registry


def render(registry: Any) -> bytes:
    """Return all metrics as Prometheus' text format, of `CONTENT_TYPE`."""
    from prometheus_client import generate_latest

    return _UNTYPED.sub(rb"\1 counter", generate_latest(registry))
