"""What a batch costs: latency by rows, measured on this box, and the batch that follows from it.

A batch is no gain in itself: an MLP does 32 rows in little more than the time of one, a
MobileNetV2-shaped CNN gains about 12 % at 2–4 rows and loses at 32. So each model is measured
once, and the largest batch the engine makes of it is chosen from the curve. Owns the measuring,
the choice and the curve's file; knows no queue.

Invariants: `choose_rows` is pure; a curve always has its point at 1 row; nothing here raises
because a batch does not run: the curve ends before it.
"""

import hashlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from agent.fileio import write_atomic
from platforms.artifact import ArtifactSpec
from platforms.errors import PlatformError
from platforms.runtimes.base import DTYPES, Array, Session
from platforms.spec import PlatformSpec

ROWS_MAX = 64
"""Larger batches are never made: they cost memory, and no net we measured gained any more."""
GAIN_MIN = 0.10
"""Below this gain per row, batches are not worth their latency. Source: engine.md."""
LATENCY_MULTIPLE = 4.0
"""Under `latency_p95` a batch may take so many times as long as a single row."""

# A batch this close to the best per row is as good: the difference is noise.
_TIE = 0.02
# Doubling ends after so many batches in a row that gain nothing: each holds memory for good.
_FLAT_MAX = 2
_ROUNDS_MIN, _ROUNDS_MAX = 3, 7
# A sample lasts at least this long, or has so many runs: the clock's noise is microseconds.
_SAMPLE_S, _SAMPLE_RUNS_MAX = 0.0005, 50

_log = logging.getLogger(__name__)


class Objective(StrEnum):
    """What batches are for."""

    LATENCY_P95 = "latency_p95"
    """The best batch that takes at most `LATENCY_MULTIPLE` times as long as one row."""
    THROUGHPUT = "throughput"
    """The lowest cost per row, whatever its latency."""


def get_objective(name: str) -> Objective:
    """Return what a manifest's `objective` means for batches.

    Memory and energy say nothing about them: those take the default.
    """
    return Objective.THROUGHPUT if name == Objective.THROUGHPUT else Objective.LATENCY_P95


@dataclass(frozen=True, slots=True)
class CostPoint:
    """The latency of one batch."""

    rows: int
    latency_ms: float
    """Median of several runs."""

    @property
    def per_row_ms(self) -> float:
        """Latency per row."""
        return self.latency_ms / self.rows


@dataclass(frozen=True, slots=True)
class CostCurve:
    """A model's cost by batch, and what was chosen from it."""

    points: tuple[CostPoint, ...]
    """By rows, ascending; the first one is 1 row."""
    chosen_rows: int
    reason: str
    objective: Objective

    def find_latency_ms(self, rows: int) -> float | None:
        """Return the latency of the smallest measured batch that holds `rows`, if there is one."""
        return next((point.latency_ms for point in self.points if point.rows >= rows), None)

    def to_json(self) -> dict[str, Any]:
        """Return `{"points": [[rows, ms], …], "max_rows", "reason", "objective"}`."""
        return {
            "points": [[point.rows, round(point.latency_ms, 4)] for point in self.points],
            "max_rows": self.chosen_rows,
            "reason": self.reason,
            "objective": self.objective.value,
        }


@dataclass(frozen=True, slots=True)
class CostPolicy:
    """How models are measured."""

    objective: Objective = Objective.LATENCY_P95
    """The engine puts the model's own in its place."""
    budget_s: float = 1.0
    """Longest time for one model; a run of a single row is always measured."""
    rows_max: int = ROWS_MAX
    folder: Path | None = None
    """Where curves are kept; without it each process measures for itself."""


@dataclass(frozen=True, slots=True)
class CostIdentity:
    """All that a model's cost depends on: what a kept curve is of."""

    sha256: str
    """Of the artifact."""
    runtime: str
    runtime_version: str | None
    threads: int
    """Inside one operator."""
    cores: float
    cpu_model: str
    provider: str | None = None
    """Only a load tells; None in a question stands for any."""
    is_batchable: bool | None = None
    """As the provider."""

    def is_answered_by(self, other: "CostIdentity") -> bool:
        """Say whether `other` is what this one asks for."""
        mine, theirs = asdict(self), asdict(other)
        return all(mine[key] in (None, theirs[key]) for key in mine)


def identify_costs(
    artifact: ArtifactSpec,
    runtime: str,
    runtime_version: str | None,
    threads: int,
    spec: PlatformSpec,
) -> CostIdentity:
    """Return what a model's cost depends on here, as far as it is known before a load."""
    return CostIdentity(
        artifact.sha256, runtime, runtime_version, threads, spec.cores, spec.cpu_model
    )


def choose_rows(points: Sequence[CostPoint], objective: Objective) -> tuple[int, str]:
    """Return the largest batch to make of a model, and why. Pure.

    Args:
        points: by rows, ascending; the first one is 1 row.
        objective: what to go by.

    Raises:
        ValueError: there is no point at 1 row.
    """
    if not points or points[0].rows != 1:
        msg = "a cost curve begins at 1 row"
        raise ValueError(msg)
    alone = points[0]
    allowed = [point for point in points if _is_allowed(point, alone, objective)]
    lowest_ms = min(point.per_row_ms for point in allowed)
    best = next(point for point in allowed if point.per_row_ms <= lowest_ms * (1 + _TIE))
    gain = 1 - best.per_row_ms / alone.per_row_ms if alone.latency_ms else 0.0
    if gain < GAIN_MIN:
        return 1, _explain_none(points, lowest_ms)
    reason = (
        f"{best.rows} rows cost {best.per_row_ms:.4g} ms each, "
        f"{gain:.0%} less than {alone.latency_ms:.4g} ms alone"
    )
    if len(allowed) < len(points):
        reason += f"; more would take over {LATENCY_MULTIPLE:g} times as long as one"
    return best.rows, reason


def _is_allowed(point: CostPoint, alone: CostPoint, objective: Objective) -> bool:
    is_bounded = objective is Objective.LATENCY_P95
    return not is_bounded or point.latency_ms <= LATENCY_MULTIPLE * alone.latency_ms


def _explain_none(points: Sequence[CostPoint], lowest_ms: float) -> str:
    if len(points) == 1:
        return "no batching: a batch of 2 could not be measured, or not in the time there is"
    gain = max(0.0, 1 - lowest_ms / points[0].latency_ms) if points[0].latency_ms else 0.0
    return f"no batching: the best batch gains {gain:.0%} per row, under {GAIN_MIN:.0%}"


def build_curve(points: Sequence[CostPoint], objective: Objective) -> CostCurve:
    """Return the curve of these points with what is chosen from them."""
    rows, reason = choose_rows(points, objective)
    return CostCurve(tuple(points), rows, reason, objective)


# --- measuring ------------------------------------------------------------------------------


def measure_costs(
    session: Session,
    policy: CostPolicy,
    *,
    is_batchable: bool = True,
    inputs: Mapping[str, Array] | None = None,
) -> CostCurve:
    """Run a session at 1, 2, 4, 8, … rows; blocks for up to the policy's budget.

    Doubling ends at the budget, at the policy's largest batch, after two batches in a row
    that gain nothing, and at a batch that does not run.

    Args:
        session: what to measure.
        policy: the budget and the objective.
        is_batchable: False measures one run of the model as it is.
        inputs: one row of real input; else random numbers, with free axes of length 1.

    Raises:
        PlatformError: not even one row runs.
    """
    one = dict(inputs) if inputs is not None else make_inputs(session)
    if not is_batchable:
        point = CostPoint(1, _measure_rounds(session, [one], policy.budget_s)[0])
        return CostCurve((point,), 1, "no batching: the model has no batch axis", policy.objective)
    batches = _find_batches(session, one, policy)
    spent = _measure_rounds(session, batches, policy.budget_s)
    _give_back(session, one)
    points = [CostPoint(1 << n, latency_ms) for n, latency_ms in enumerate(spent)]
    return build_curve(points, policy.objective)


def _give_back(session: Session, one: Mapping[str, Array]) -> None:
    """Free what the largest batches took: most of them will never be made again."""
    try:
        session.shrink(one)
    except PlatformError as exc:
        _log.debug("memory of measuring is kept: %s", exc)


def make_inputs(session: Session, rows: int = 1) -> dict[str, Array]:
    """Return random inputs that any model takes: floats 0–1, integers 0 or 1, empty strings."""
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in session.inputs:
        free = [max(axis, 1) for axis in spec.shape]
        shape = (rows, *free[1:]) if spec.has_free_batch else tuple(free)
        dtype = DTYPES[spec.datatype]
        if dtype.hasobject:
            inputs[spec.name] = np.full(shape, "", dtype)
        elif dtype.kind == "f":
            inputs[spec.name] = rng.random(shape).astype(dtype)
        else:
            inputs[spec.name] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


def _find_batches(
    session: Session, one: Mapping[str, Array], policy: CostPolicy
) -> list[dict[str, Array]]:
    """Double the rows while that fits the budget and pays; each batch has run when this returns."""
    deadline = time.perf_counter() + policy.budget_s
    batches = [dict(one)]
    latencies = [_time_warm(session, batches[0])]
    flat = 0
    while flat < _FLAT_MAX:
        rows = 2 << (len(batches) - 1)
        expected_s = 2 * latencies[-1]
        rounds_s = _ROUNDS_MIN * (sum(latencies) + expected_s)
        if rows > policy.rows_max or time.perf_counter() + 2 * expected_s + rounds_s > deadline:
            break
        batch = {name: np.repeat(array, rows, axis=0) for name, array in one.items()}
        try:
            latency_s = _time_warm(session, batch)
        except PlatformError as exc:
            _log.info("a batch of %d does not run, so none is made: %s", rows, exc)
            break
        best_s = min(spent / (1 << n) for n, spent in enumerate(latencies))
        flat = flat + 1 if latency_s / rows > best_s * (1 - _TIE) else 0
        batches.append(batch)
        latencies.append(latency_s)
    return batches


def _time_warm(session: Session, batch: Mapping[str, Array]) -> float:
    session.run(batch)
    return _time_run(session, batch, 1)


def _time_run(session: Session, batch: Mapping[str, Array], runs: int) -> float:
    started = time.perf_counter()
    for _ in range(runs):
        session.run(batch)
    return (time.perf_counter() - started) / runs


def _measure_rounds(
    session: Session, batches: Sequence[Mapping[str, Array]], budget_s: float
) -> list[float]:
    """Return the median latency of each batch in ms, of rounds that take them all in turn."""
    deadline = time.perf_counter() + budget_s / 2
    runs = [
        min(_SAMPLE_RUNS_MAX, math.ceil(_SAMPLE_S / max(_time_warm(session, batch), 1e-7)))
        for batch in batches
    ]
    samples: list[list[float]] = [[] for _ in batches]
    for number in range(_ROUNDS_MAX):
        if number >= _ROUNDS_MIN and time.perf_counter() > deadline:
            break
        for batch, count, mine in zip(batches, runs, samples, strict=True):
            mine.append(_time_run(session, batch, count))
    return [1000 * statistics.median(mine) for mine in samples]


# --- keeping --------------------------------------------------------------------------------


def load_curve(
    policy: CostPolicy, identity: CostIdentity, measure: Callable[[], CostCurve]
) -> CostCurve:
    """Return the curve kept for `identity`, or measure and keep it.

    Args:
        policy: names the folder; the choice is made anew by its objective.
        identity: of the loaded model.
        measure: takes the measurement.
    """
    if policy.folder is None:
        return measure()
    text = json.dumps([asdict(identity), policy.rows_max])
    path = policy.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    points = _read_points(path)
    if points is not None:
        return build_curve(points, policy.objective)
    curve = measure()
    of = {"identity": asdict(identity), "measured_at": time.time()}
    try:
        policy.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**curve.to_json(), **of}))
    except OSError as exc:
        _log.warning("a cost curve is not kept, so the next start measures again: %s", exc)
    return curve


@dataclass(frozen=True, slots=True)
class KeptCurve:
    """A curve on file, and what it is of."""

    curve: CostCurve
    identity: CostIdentity
    measured_s: float
    """When: wall clock, seconds since 1970."""
    path: Path


def find_curves(folder: Path, sha256: str, objective: Objective) -> list[KeptCurve]:
    """Return the curves kept of an artifact, the newest first.

    There are several where a runtime's version, the threads or the box have changed; those of
    the present ones are told by `CostIdentity.is_answered_by`.

    Args:
        folder: of the curves.
        sha256: of the artifact.
        objective: to choose by.
    """
    found = []
    for path in folder.glob("*.json"):
        points = _read_points(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            identity = CostIdentity(**document["identity"])
            measured_s = float(document["measured_at"])
        except (OSError, ValueError, TypeError, KeyError):
            # Of an older Edgeward, or removed since.
            continue
        if points is not None and identity.sha256 == sha256:
            found.append(KeptCurve(build_curve(points, objective), identity, measured_s, path))
    return sorted(found, key=lambda kept: kept.measured_s, reverse=True)


def _read_points(path: Path) -> list[CostPoint] | None:
    """Return the points of a kept curve; None where there is none that makes sense."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["points"]
        points = [CostPoint(int(rows), float(latency_ms)) for rows, latency_ms in found]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    is_sound = [point.rows for point in points] == [1 << n for n in range(len(points))]
    is_positive = all(0 < point.latency_ms < math.inf for point in points)
    return points if points and is_sound and is_positive else None
