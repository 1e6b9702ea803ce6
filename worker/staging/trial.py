"""One candidate, tried in a throw-away process: does it load, is it right, what does it cost.

Owns the steps of a trial and the words for what went wrong. The child is
`platforms.measuring.child`; whatever the candidate does to it (a crash, a hang, all memory) is a
verdict here and harms nobody.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent.choice import Agreement, Point, Trial, Verdict
from agent.manifest import Manifest, Tolerance
from platforms.errors import MeasuringError
from platforms.measuring.batches import describe_tensors, run_rows
from platforms.measuring.measurer import Measurer
from platforms.measuring.sample import SEED, save_arrays
from platforms.resources import read_energy_uj
from platforms.runtimes.base import Array
from platforms.selection import Candidate
from worker.staging.golden import GoldenSet, compare

BATCHES = (1, 2, 4, 8, 16, 32)
_LEAK_MIN_MB = 64.0
_LEAK_SHARE = 0.25
# Of runs of one row, more than any runtime needs to have all its memory.
_LEAK_S = 0.25
_LEAK_ROUNDS = 8
_LEAK_RUNS = 4000
_LEAK_STEP_MB = 4.0
"""Less in a round is no leak, but the last caches that fill."""


@dataclass(frozen=True)
class TrialLimits:
    """What a trial may take."""

    answer_s: float = 120.0
    """For one step: a load, a run of the golden set."""
    memory_mb: float | None = None
    point_s: float = 0.4
    """How long each batch size is measured."""


@dataclass(frozen=True)
class Tried:
    """A trial and its answers to the golden inputs; none where it did not get so far."""

    trial: Trial
    outputs: Mapping[str, Array] | None


Pause = Callable[[], None]
"""Called between the steps; raises to end the trial (a cancel)."""


def run_trial(
    candidate: Candidate,
    folder: Path,
    manifest: Manifest,
    golden: GoldenSet,
    *,
    threads: int,
    limits: TrialLimits,
    pause: Pause,
) -> Tried:
    """Try one artifact on one runtime; blocks for some seconds.

    Returns:
        A trial with the verdict `right`, `wrong` or `failed`.
    """
    if candidate.runtime is None:
        return Tried(_describe(candidate, Verdict.RULED_OUT, candidate.reason), None)
    request = _build_load(candidate, folder, manifest, threads)
    figures: dict[str, Any] = {}
    outputs: dict[str, Array] | None = None
    try:
        with Measurer(limits.answer_s, limits.memory_mb) as child:
            loaded = child.ask(request)
            figures["provider"] = loaded["provider"]
            figures["load_ms"] = loaded["load_ms"]
            pause()
            outputs = run_rows(child, loaded, golden.inputs)
            pause()
            figures["points"] = _measure(child, golden, limits, pause)
            after = child.ask({"do": "measure", "concurrency": 1, "batch": 1, "seconds": _LEAK_S})
            figures["rss_mb"] = after["rss_mb"] - loaded["base_rss_mb"]
            leak = _find_leak(child, after["rss_mb"])
    except MeasuringError as exc:
        return Tried(_describe(candidate, Verdict.FAILED, str(exc), **figures), outputs)
    if leak:
        return Tried(_describe(candidate, Verdict.FAILED, leak, **figures), outputs)
    return Tried(_judge(candidate, manifest, golden, outputs, figures), outputs)


def _build_load(
    candidate: Candidate, folder: Path, manifest: Manifest, threads: int
) -> dict[str, Any]:
    return {
        "do": "load",
        "runtime": candidate.runtime,
        "file": str(folder / candidate.artifact.file),
        "threads": threads,
        "declared": {
            "inputs": describe_tensors(entry.to_spec() for entry in manifest.inputs),
            "outputs": describe_tensors(entry.to_spec() for entry in manifest.outputs),
        },
    }


def _measure(
    child: Measurer, golden: GoldenSet, limits: TrialLimits, pause: Pause
) -> tuple[Point, ...]:
    points: list[Point] = []
    with tempfile.TemporaryDirectory(prefix="edgeward-golden-") as name:
        inputs = Path(name) / "inputs.npz"
        save_arrays(inputs, golden.inputs)
        child.ask({"do": "prepare", "inputs": str(inputs), "seed": SEED, "shapes": {}})
    for rows in BATCHES:
        energy = read_energy_uj()
        try:
            found = child.ask(
                {"do": "measure", "concurrency": 1, "batch": rows, "seconds": limits.point_s},
                limits.point_s,
            )
        except MeasuringError:
            if not points:
                raise
            # A batch that does not run is no reason against a model that answers row by row.
            return tuple(points)
        if "skipped" in found:
            break
        points.append(
            Point(
                rows=rows,
                p50_ms=found["p50_ms"],
                p95_ms=found["p95_ms"],
                rows_per_s=found["rows_per_s"],
                energy_mj=_compute_energy(energy, rows * found["runs"]),
            )
        )
        pause()
        if _is_flat(points):
            break
    return tuple(points)


def _compute_energy(before_uj: int | None, rows: int) -> float | None:
    """Return the box's energy for a row since the counter was read, mJ."""
    now_uj = read_energy_uj()
    if before_uj is None or now_uj is None or now_uj <= before_uj or not rows:
        return None
    return (now_uj - before_uj) / 1000 / rows


def _is_flat(points: list[Point]) -> bool:
    """Say whether the last two batches have gained nothing: larger ones will not either."""
    if len(points) < 3:
        return False
    best = max(point.rows_per_s for point in points[:-2])
    return all(point.rows_per_s < best * 1.02 for point in points[-2:])


def _find_leak(child: Measurer, before_mb: float) -> str:
    """Return what is wrong where memory grows with every run, though nothing else changes."""
    request = {"do": "measure", "concurrency": 1, "batch": 1, "seconds": _LEAK_S}
    limit_mb = max(_LEAK_MIN_MB, _LEAK_SHARE * before_mb)
    runs, seen_mb = 0, before_mb
    # A slow box, or a busy one, gets more time for as many runs, as long as memory grows.
    for _ in range(_LEAK_ROUNDS):
        found = child.ask(request, _LEAK_S)
        runs += found["runs"]
        grown_mb = found["rss_mb"] - before_mb
        if grown_mb >= limit_mb:
            return f"it leaks: {grown_mb:.0f} MB more after {runs} runs of the same input"
        if runs >= _LEAK_RUNS or found["rss_mb"] - seen_mb < _LEAK_STEP_MB:
            break
        seen_mb = found["rss_mb"]
    return ""


def _judge(
    candidate: Candidate,
    manifest: Manifest,
    golden: GoldenSet,
    outputs: dict[str, Array],
    figures: dict[str, Any],
) -> Trial:
    broken = [
        name
        for name, array in outputs.items()
        if array.dtype.kind == "f" and not np.isfinite(array).all()
    ]
    if golden.outputs is None:
        if broken:
            reason = f"output {broken[0]} holds NaN or infinity for made-up inputs"
            return _describe(candidate, Verdict.WRONG, reason, **figures)
        reason = "it runs; without a golden set nobody can say whether it is right"
        return _describe(candidate, Verdict.RIGHT, reason, **figures)
    tolerance = _find_tolerance(candidate, manifest)
    golden_agreement, complaint = compare(golden.outputs, outputs, tolerance)
    verdict = Verdict.WRONG if complaint else Verdict.RIGHT
    reason = complaint or f"agrees with the golden set ({golden_agreement.rows} rows)"
    return _describe(candidate, verdict, reason, golden=golden_agreement, **figures)


def _find_tolerance(candidate: Candidate, manifest: Manifest) -> Tolerance:
    for entry in manifest.artifacts:
        if entry.file == candidate.artifact.file and entry.tolerance is not None:
            return entry.tolerance
    return manifest.golden.tolerance if manifest.golden is not None else Tolerance()


def _describe(candidate: Candidate, verdict: Verdict, reason: str, **figures: Any) -> Trial:
    artifact = candidate.artifact
    return Trial(
        file=artifact.file,
        runtime=candidate.runtime,
        format=artifact.format.value,
        precision=artifact.precision.value,
        sha256=artifact.sha256,
        verdict=verdict,
        reason=reason,
        **figures,
    )


def compare_with_active(tried: Tried, active: Mapping[str, Array] | None) -> Agreement | None:
    """Return how a trial's answers compare with the active version's; None where they cannot."""
    if tried.outputs is None or active is None:
        return None
    agreement, _ = compare(active, tried.outputs, Tolerance(min_agreement=None))
    return agreement
