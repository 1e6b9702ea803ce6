"""Why a model runs here as it does: its artifact, what batches of it cost, how requests wait.

Owns the gathering and the wording of it; `edgeward explain model` shows it. Reads the version's
small files and the kept cost curves. Loads nothing: what only a load tells (`describe_load`) is
asked for by itself, and the model of a running worker is never asked.

Invariant: what is shown of batches and queues is what `worker.engine` makes of the same files,
by its own functions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from agent.config import Settings
from agent.manifest import Manifest
from platforms.selection import Candidate, Preference
from platforms.spec import PlatformSpec
from platforms.threads import choose_concurrency, compute_sizes
from worker.engine.batcher import BatchOptions, WaitRules
from worker.engine.configured import apply_config
from worker.engine.costs import CostIdentity, KeptCurve, find_curves, get_objective, identify_costs
from worker.engine.engine import plan_options
from worker.engine.modelconfig.serving import ServingConfig
from worker.engine.modelconfig.source import build_serving, find_config
from worker.engine.sessions import load_model
from worker.staging.preference import find_preference

NOT_MEASURED = (
    "not measured yet: a worker with the HTTP API on (http.port) measures it at its first load"
)

DEFAULT, MEASURED, CONFIG, MANIFEST = "default", "measured", "config.pbtxt", "manifest"


@dataclass(frozen=True, slots=True)
class Setting:
    """One effective setting of a model version, and who made it."""

    name: str
    value: Any
    origin: str
    words: str
    """The value as a person reads it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What is on file of a model's costs."""

    kept: KeptCurve | None
    """Of this artifact, runtime and box; None where it is not measured."""
    note: str
    """Why there is none, or that there is one."""

    def to_json(self) -> dict[str, Any] | None:
        """Return the curve; None where there is none."""
        if self.kept is None:
            return None
        rows_per_s = [round(1000 / point.per_row_ms, 1) for point in self.kept.curve.points]
        return {
            **self.kept.curve.to_json(),
            "rows_per_s": rows_per_s,
            "measured_at": _format_time(self.kept.measured_s),
            "file": str(self.kept.path),
        }


def compute_box_sizes(settings: Settings, spec: PlatformSpec) -> tuple[int, int]:
    """Return the threads inside an operator and the instances that a worker of this box takes."""
    concurrency = choose_concurrency(spec.cores, settings.worker.concurrency or 0)
    return compute_sizes(spec.cores, concurrency)


def find_costs(
    settings: Settings,
    spec: PlatformSpec,
    chosen: Candidate | None,
    manifest: Manifest,
    loaded: Mapping[str, Any] | None = None,
) -> Costs:
    """Return what is on file of the chosen artifact's costs on this box.

    Args:
        settings: of the box.
        spec: of the box.
        chosen: the artifact and what runs it.
        manifest: of the version.
        loaded: what `describe_load` has said, which leaves no doubt about the provider.
    """
    if chosen is None or chosen.runtime is None:
        return Costs(None, "nothing of it can run here")
    known = spec.runtime(chosen.runtime)
    threads, _ = compute_box_sizes(settings, spec)
    question = identify_costs(
        chosen.artifact, chosen.runtime, known.version if known else None, threads, spec
    )
    if loaded is not None:
        question = replace(
            question, provider=loaded["provider"], is_batchable=loaded["is_batchable"]
        )
    objective = get_objective(manifest.objective)
    curves = find_curves(settings.costs_dir, chosen.artifact.sha256, objective)
    kept = next((one for one in curves if question.is_answered_by(one.identity)), None)
    if kept is not None:
        return Costs(kept, f"measured {_format_time(kept.measured_s)}")
    if not curves:
        return Costs(None, NOT_MEASURED)
    differs = ", ".join(_iterate_differences(question, curves[0].identity))
    when = _format_time(curves[0].measured_s)
    return Costs(None, f"{NOT_MEASURED} (the curve of {when} is of another {differs})")


def _iterate_differences(question: CostIdentity, found: CostIdentity) -> Iterator[str]:
    for name, asked in asdict(question).items():
        there = getattr(found, name)
        if asked not in (None, there):
            yield f"{name.replace('_', ' ')}: {there}, now {asked}"


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


# --- effective settings -----------------------------------------------------------------------


def list_settings(
    settings: Settings,
    spec: PlatformSpec,
    folder: Path,
    manifest: Manifest,
    costs: KeptCurve | None,
    is_batchable: bool | None = None,
) -> list[Setting]:
    """Return how a version's requests wait and are put together, and who says so.

    Args:
        settings: of the box.
        spec: of the box.
        folder: of the version.
        manifest: of the version.
        costs: as measured.
        is_batchable: as a load has shown it; None: as far as it is known without one.

    Raises:
        ModelConfigError: its configuration contradicts itself: it does not load either.
    """
    _, instances = compute_box_sizes(settings, spec)
    if is_batchable is None:
        is_batchable = _may_be_batched(manifest, costs)
    curve = costs.curve if costs is not None else None
    plan = plan_options(instances, curve, is_batchable=is_batchable)
    config = find_config(folder, manifest)
    layers = [
        (DEFAULT, ServingConfig()),
        (CONFIG, build_serving(config, manifest.model_copy(update={"serving": None}))),
        (MANIFEST, build_serving(config, manifest)),
    ]
    found = [(origin, _describe(apply_config(plan, one), one)) for origin, one in layers]
    effective = found[-1][1]
    measured = {"max_rows"} if costs is not None else set()
    return [
        Setting(name, value, _find_origin(found, name, measured), words)
        for name, (value, words) in effective.items()
    ]


def _find_origin(
    layers: Sequence[tuple[str, Mapping[str, tuple[Any, str]]]], name: str, measured: set[str]
) -> str:
    """Return the layer that made a setting what it is; one that changes nothing made nothing."""
    origin = MEASURED if name in measured else DEFAULT
    for (_, before), (layer, after) in pairwise(layers):
        if before.get(name) != after[name]:
            origin = layer
    return origin


def _may_be_batched(manifest: Manifest, costs: KeptCurve | None) -> bool:
    """Say whether rows can be stacked: as measured, else as the shapes allow."""
    if costs is not None and costs.identity.is_batchable is not None:
        return costs.identity.is_batchable
    tensors = (*manifest.inputs, *manifest.outputs)
    return all(tensor.to_spec().has_free_batch for tensor in tensors)


def _describe(options: BatchOptions, serving: ServingConfig) -> dict[str, tuple[Any, str]]:
    """Return each effective setting by its name, with its words."""
    is_together = options.is_batchable and options.is_joining
    together = "yes" if is_together else "no: each request runs alone"
    found: dict[str, tuple[Any, str]] = {
        "instances": (options.instances, f"{options.instances} runs at a time"),
        "is_batching": (is_together, together),
        "max_rows": (options.max_rows, f"{options.max_rows} in one run at most"),
        "request_rows_max": (
            options.request_rows_max,
            _word(options.request_rows_max, "{} in one request at most", "any number"),
        ),
        "preferred_rows": (
            list(options.preferred_rows),
            ", ".join(map(str, options.preferred_rows)) or "none",
        ),
        "max_queue_delay_s": (
            options.max_queue_delay_s,
            _word(options.max_queue_delay_s, "{:g} s for a fuller batch", "none"),
        ),
        "default_priority": (options.default_priority, str(options.default_priority)),
        "priority_levels": (options.priority_levels, _word(options.priority_levels, "{}", "any")),
        "queue": _describe_rules(options.queue),
    }
    for level, rules in sorted(options.priority_queues.items()):
        found[f"queue of priority {level}"] = _describe_rules(rules)
    found["response_cache"] = (options.is_cached, "yes" if options.is_cached else "no")
    warmup = [sample.name for sample in serving.warmup]
    found["warmup"] = (warmup, ", ".join(warmup) or "none")
    return found


def _describe_rules(rules: WaitRules) -> tuple[dict[str, Any], str]:
    value = {
        "requests_max": rules.requests_max,
        "timeout_s": rules.timeout_s,
        "allow_timeout_override": rules.is_timeout_free,
        "timeout_action": "delay" if rules.is_delaying else "reject",
    }
    waiting = f"{rules.requests_max} requests at most"
    if rules.timeout_s is None:
        return value, f"{waiting}, each for as long as it says"
    own = ", or less where it says so" if rules.is_timeout_free else ""
    late = "then put behind all others" if rules.is_delaying else "then refused"
    return value, f"{waiting}, each for {rules.timeout_s:g} s{own}, {late}"


def _word(value: float | None, words: str, none: str) -> str:
    return words.format(value) if value else none


# --- a load -----------------------------------------------------------------------------------


def describe_load(settings: Settings, spec: PlatformSpec, folder: Path) -> dict[str, Any]:
    """Load a version as a worker does, let go of it, and return what its runtime says.

    Raises:
        AgentError, PlatformError, WorkerError: as `load_model`.
    """
    threads, instances = compute_box_sizes(settings, spec)

    def prefer(at: Path, box: PlatformSpec) -> Preference | None:
        return find_preference(settings.choices_dir, at, box, threads)

    model = load_model(folder, spec, threads, instances=instances, prefer=prefer)
    try:
        return {
            "artifact": model.artifact.file,
            "runtime": model.runtime,
            "provider": model.provider,
            "assignment": dict(model.session.assignment),
            "findings": list(model.session.findings),
            "is_batchable": model.is_batchable,
            "load_ms": round(model.load_ms, 1),
        }
    finally:
        model.session.close()
