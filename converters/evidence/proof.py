"""Evidence about one artifact: it is run on the golden inputs, on every runtime that is here.

Owns the trial of an artifact on a runtime and the verdict by the budget. The trial runs in a
measuring child: a crash, a hang or all memory is a verdict here and harms nobody.

Invariants: no verdict without a run; the latency's ratio is to the baseline measured in turns in
the same minute, on the same inputs; NaN and infinity are outside of every budget.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConversionCanceledError
from converters.evidence.budget import Budget
from converters.evidence.venues import Venue, get_venue
from converters.evidence.venues import find_runtimes as find_runtimes
from converters.task import ModelFile, Report
from platforms.errors import MeasuringError, TensorError
from platforms.measuring.batches import describe_tensors, run_rows
from platforms.measuring.measurer import Measurer
from platforms.measuring.sample import SEED, repeat_rows, save_arrays
from platforms.parity import Parity, compare_output, find_worst, list_objections
from platforms.runtimes.base import Array, Declared

BATCHES = (1, 8)
_ROUNDS = 5
CONFIDENT = 0.5
"""A row counts as sure of itself from this probability of its best class on."""

# What the child answers where the runtime's own library is not there.
_MISSING = "runtime_missing"


class Outcome(StrEnum):
    """What a trial came to."""

    OK = "ok"
    REFUSED = "refused"
    """It runs, and is outside the budget."""
    FAILED = "failed"
    """It does not load, does not run, crashes, hangs or takes too much."""
    NOT_RUN = "not_run"
    """Nothing here runs it."""


@dataclass(frozen=True)
class Golden:
    """Inputs with the original's answers, by tensor name; axis 0 of each is the rows."""

    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    origin: str = ""
    """Where the inputs are from, for people."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class TrialLimits:
    """What a trial may take."""

    answer_s: float = 300.0
    memory_mb: float | None = 8000.0
    point_s: float = 0.3
    """How long a batch size is measured in each of five rounds."""


@dataclass(frozen=True)
class Baseline:
    """What latency and size are compared with: the uncompressed artifact of the same family."""

    file: ModelFile
    runtime: str
    size_bytes: int


@dataclass(frozen=True)
class Proof:
    """What one artifact was found to be on one runtime."""

    runtime: str
    outcome: Outcome
    reason: str = ""
    label: str = ""
    """What a reader must know of the runtime, such as that it is no real one."""
    version: str = ""
    parities: tuple[Parity, ...] = ()
    confident_agreement: float | None = None
    confident_rows: int = 0
    p50_ms: Mapping[int, float] = field(default_factory=dict)
    """By batch size."""
    latency_ratio: Mapping[int, float] = field(default_factory=dict)
    """Median of rounds of this artifact's p50 over the baseline's; by batch size."""
    load_ms: float | None = None
    rss_mb: float | None = None

    @property
    def agreement(self) -> float | None:
        """Lowest top-1 agreement of its outputs."""
        return find_worst(self.parities)[0]

    @property
    def sqnr_db(self) -> float | None:
        """Lowest signal to noise of its outputs; infinite where they are equal."""
        return find_worst(self.parities)[1] if self.parities else None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form; what is infinite or no number is null."""
        sqnr = self.sqnr_db
        return {
            **{key: value for key, value in asdict(self).items() if key != "parities"},
            "outputs": [item.to_json() for item in self.parities],
            "agreement": self.agreement,
            "sqnr_db": sqnr if sqnr is not None and math.isfinite(sqnr) else None,
        }


def prove(
    candidate: ModelFile,
    declared: Declared,
    golden: Golden,
    budget: Budget,
    *,
    size_bytes: int,
    venues: Sequence[Venue],
    baselines: Mapping[str, Baseline] | None = None,
    limits: TrialLimits | None = None,
    report: Report = lambda share, doing: None,
    is_canceled: Callable[[], bool] = lambda: False,
) -> list[Proof]:
    """Run an artifact wherever it can be run here; one proof each, at least one.

    Args:
        candidate: the artifact.
        declared: the tensors that the version declares.
        golden: inputs and the original's answers.
        budget: what it must keep to.
        size_bytes: of the artifact with all its files.
        venues: as `converters.evidence.venues.find_venues` returns them.
        baselines: by venue name.
        limits: on each trial.
        report: told of progress.
        is_canceled: asked between the steps.

    Raises:
        ConversionCanceledError: `is_canceled` said so.
    """
    if not venues:
        reason = f"no runtime for {candidate.format.value} is installed here"
        return [Proof("", Outcome.NOT_RUN, reason)]
    found = []
    for number, venue in enumerate(venues):

        def tell(share: float, doing: str, venue: Venue = venue, number: int = number) -> None:
            report((number + share) / len(venues), f"{venue.name}: {doing}" if doing else "")

        found.append(
            prove_artifact(
                candidate,
                venue,
                declared,
                golden,
                budget,
                size_bytes=size_bytes,
                baseline=(baselines or {}).get(venue.name),
                limits=limits,
                report=tell,
                is_canceled=is_canceled,
            )
        )
    return found


def prove_artifact(
    candidate: ModelFile,
    runtime: str | Venue,
    declared: Declared,
    golden: Golden,
    budget: Budget,
    *,
    size_bytes: int,
    baseline: Baseline | None = None,
    limits: TrialLimits | None = None,
    report: Report = lambda share, doing: None,
    is_canceled: Callable[[], bool] = lambda: False,
) -> Proof:
    """Run an artifact on one runtime and judge it; blocks for some seconds.

    Args:
        candidate: the artifact.
        runtime: a name that `find_runtimes` returned, or a venue.
        declared: the tensors that the version declares, by which outputs are told apart.
        golden: inputs and the original's answers.
        budget: what it must keep to.
        size_bytes: of the artifact with all its files.
        baseline: what latency and size are compared with; None: they are not.
        limits: on the trial.
        report: told of progress.
        is_canceled: asked between the steps.

    Raises:
        ConversionCanceledError: `is_canceled` said so.
    """
    trial = _Trial(declared, golden, limits or TrialLimits(), report, is_canceled)
    venue = get_venue(runtime) if isinstance(runtime, str) else runtime
    try:
        proof = trial.run(candidate, venue, baseline)
    except MeasuringError as exc:
        outcome = Outcome.NOT_RUN if exc.cause_code == _MISSING else Outcome.FAILED
        return Proof(venue.name, outcome, str(exc), venue.label)
    except TensorError as exc:
        return Proof(venue.name, Outcome.FAILED, str(exc), venue.label)
    objections = [
        *(
            text
            for parity in proof.parities
            for text in list_objections(parity, budget.to_bounds())
        ),
        *_list_costs(proof, budget, size_bytes, baseline),
    ]
    if objections:
        return replace(proof, outcome=Outcome.REFUSED, reason="; ".join(objections))
    return proof


def _list_costs(
    proof: Proof, budget: Budget, size_bytes: int, baseline: Baseline | None
) -> Iterator[str]:
    if budget.confident is not None and proof.confident_agreement is not None:
        found = proof.confident_agreement
        if not found >= budget.confident:
            yield (
                f"agreement {found:.4g} on the {proof.confident_rows} rows that the original is "
                f"sure of, at least {budget.confident:g} asked"
            )
    if baseline is None:
        return
    size = size_bytes / max(1, baseline.size_bytes)
    if budget.size is not None and size > budget.size:
        yield f"{size:.2f} × the uncompressed size, at most {budget.size:g} asked"
    slow = proof.latency_ratio.get(1)
    if budget.latency is not None and slow is not None and slow > budget.latency:
        yield f"{slow:.2f} × the uncompressed latency, at most {budget.latency:g} asked"


@dataclass(frozen=True)
class _Trial:
    """One artifact beside its baseline, each in a process of its own."""

    declared: Declared
    golden: Golden
    limits: TrialLimits
    report: Report
    is_canceled: Callable[[], bool]

    def run(self, candidate: ModelFile, venue: Venue, baseline: Baseline | None) -> Proof:
        with ExitStack() as stack:
            self._pause(0.0, "loading")
            child, loaded = self._load(stack, candidate, venue)
            self._pause(0.2, "golden inputs")
            outputs = run_rows(child, loaded, self.golden.inputs)
            parities = self._compare(outputs)
            sure, rows = self._compare_sure(outputs)
            costs = {}
            if venue.is_timed:
                self._pause(0.5, "latency")
                costs = self._measure_costs(stack, (child, loaded), candidate, baseline)
            self._pause(1.0, "")
        return Proof(
            runtime=venue.name,
            outcome=Outcome.OK,
            label=venue.label,
            version=loaded["version"],
            parities=parities,
            confident_agreement=sure,
            confident_rows=rows,
            **costs,
        )

    def _measure_costs(
        self,
        stack: ExitStack,
        mine: tuple[Measurer, dict[str, Any]],
        candidate: ModelFile,
        baseline: Baseline | None,
    ) -> dict[str, Any]:
        child, loaded = mine
        self._prepare(child, loaded)
        other = None
        if baseline is not None and baseline.file.path != candidate.path:
            other = self._load_baseline(stack, baseline)
        p50_ms, ratio = self._measure(child, other, _find_batches(loaded))
        after = child.ask({"do": "measure", "concurrency": 1, "batch": 1, "seconds": 0.05}, 0.05)
        return {
            "p50_ms": p50_ms,
            "latency_ratio": ratio,
            "load_ms": loaded["load_ms"],
            "rss_mb": after["rss_mb"] - loaded["base_rss_mb"],
        }

    def _load_baseline(self, stack: ExitStack, baseline: Baseline) -> Measurer | None:
        """Return the baseline, ready to be measured; None where it does not run.

        That it does not is no word on the candidate.
        """
        try:
            child, loaded = self._load(stack, baseline.file, get_venue(baseline.runtime))
            self._prepare(child, loaded)
        except MeasuringError:
            return None
        return child

    def _pause(self, share: float, doing: str) -> None:
        if self.is_canceled():
            msg = "the conversion was called off"
            raise ConversionCanceledError(msg)
        self.report(share, doing)

    def _load(
        self, stack: ExitStack, file: ModelFile, venue: Venue
    ) -> tuple[Measurer, dict[str, Any]]:
        child = stack.enter_context(
            Measurer(self.limits.answer_s, self.limits.memory_mb, interpreter=venue.interpreter)
        )
        loaded = child.ask(
            {
                "do": "load",
                "runtime": venue.runtime,
                "target": venue.target,
                "file": str(file.path),
                "threads": 1,
                "declared": {
                    "inputs": describe_tensors(self.declared.inputs),
                    "outputs": describe_tensors(self.declared.outputs),
                },
            }
        )
        return child, loaded

    def _compare(self, outputs: Mapping[str, Array]) -> tuple[Parity, ...]:
        found = []
        for name, right in self.golden.outputs.items():
            if name not in outputs:
                msg = f"there is no output {name!r}, only {', '.join(sorted(outputs))}"
                raise TensorError(msg)
            found.append(compare_output(name, right, outputs[name]))
        return tuple(found)

    def _compare_sure(self, outputs: Mapping[str, Array]) -> tuple[float | None, int]:
        """Return the agreement on rows that the original is sure of, and how many they are."""
        scores = [(name, a) for name, a in self.golden.outputs.items() if a.ndim == 2]
        if len(scores) != 1 or scores[0][1].shape[1] < 2:
            return None, 0
        name, right = scores[0]
        is_sure = compute_probabilities(right).max(axis=1) > CONFIDENT
        if not is_sure.any():
            return None, 0
        same = right[is_sure].argmax(axis=1) == outputs[name][is_sure].argmax(axis=1)
        return float(same.mean()), int(is_sure.sum())

    def _prepare(self, child: Measurer, loaded: Mapping[str, Any]) -> None:
        """Give the child inputs to measure with, and let it run once."""
        fixed = _find_fixed_batch(loaded)
        rows = self.golden.inputs if fixed is None else repeat_rows(self.golden.inputs, fixed)
        with tempfile.TemporaryDirectory(prefix="edgeward-proof-") as name:
            inputs = Path(name) / "inputs.npz"
            save_arrays(inputs, rows)
            child.ask({"do": "prepare", "inputs": str(inputs), "seed": SEED, "shapes": {}})

    def _measure(
        self, child: Measurer, other: Measurer | None, batches: Mapping[int, int]
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Return the p50 by batch size, and its ratio to the baseline's, taken in turns."""
        p50_ms: dict[int, float] = {}
        ratio: dict[int, float] = {}
        for rows, asked in batches.items():
            mine, theirs = [], []
            for _ in range(_ROUNDS):
                self._pause(0.6, f"batches of {rows}")
                mine.append(self._measure_once(child, asked))
                if other is not None:
                    theirs.append(self._measure_baseline(other, rows))
            p50_ms[rows] = float(np.median(mine))
            if theirs and np.isfinite(theirs).all():
                pairs = zip(mine, theirs, strict=True)
                ratio[rows] = float(np.median([one / two for one, two in pairs]))
        return p50_ms, ratio

    def _measure_baseline(self, child: Measurer, rows: int) -> float:
        """Return the baseline's p50; NaN where it does not run, or not with so many rows."""
        try:
            return self._measure_once(child, rows)
        except MeasuringError:
            return math.nan

    def _measure_once(self, child: Measurer, rows: int) -> float:
        part_s = self.limits.point_s
        request = {"do": "measure", "concurrency": 1, "batch": rows, "seconds": part_s}
        return float(child.ask(request, part_s).get("p50_ms", math.nan))


def _find_fixed_batch(loaded: Mapping[str, Any]) -> int | None:
    """Return the rows that a loaded model always takes, or None where it takes any number."""
    shapes = [item["shape"] for item in loaded["inputs"]]
    if all(shape and shape[0] == -1 for shape in shapes):
        return None
    return max(1, shapes[0][0] if shapes[0] else 1)


def _find_batches(loaded: Mapping[str, Any]) -> dict[int, int]:
    """Return which batches are measured, and what the child is asked for to do so."""
    fixed = _find_fixed_batch(loaded)
    return {rows: rows for rows in BATCHES} if fixed is None else {fixed: 1}


def compute_probabilities(scores: Array) -> Array:
    """Return `[N, C]` as probabilities: as they are where they are some, else their softmax."""
    values = scores.astype(np.float64)
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1.0, atol=1e-3):
        return values
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return result
