"""A campaign: every configuration measured in turn, round after round.

Owns the order of things. Each round loads each configuration in a fresh child process, the
configurations begin in another order each time, so that a noisy minute hits all alike.

Invariants: a configuration that fails has a row that says why, and costs the others nothing;
no child is left behind, whatever ends the campaign.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from console.bench.report import Configuration, Point, Spread, Stress
from console.bench.target import Target
from platforms.errors import MeasuringError
from platforms.measuring.measurer import Measurer
from platforms.selection import Candidate, Verdict

Load = tuple[int, int]
"""Concurrency and rows per run."""

_FIGURES = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "rows_per_s", "cpu_percent")
_MEMORY = ("rss_mb", "pss_mb")


@dataclass(frozen=True)
class Plan:
    """What is asked of each configuration."""

    loads: tuple[Load, ...]
    seconds: float
    """Per load, all rounds together."""
    rounds: int
    threads: int
    inputs: Path | None
    """`.npz` with input rows; None has the child make random ones."""
    seed: int
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    stress_s: float = 0.0
    """Longer than 0: this replaces the loads, in one round, with the last of `loads`."""

    @property
    def steps(self) -> int:
        """Number of steps per configuration, all rounds together; about one a second of stress."""
        if self.stress_s:
            return 1 + math.ceil(self.stress_s)
        return self.rounds * (1 + len(self.loads))


def plan_loads(concurrency: Sequence[int], batch: Sequence[int]) -> tuple[Load, ...]:
    """Return a concurrency sweep of single rows and a batch sweep of one thread, in order."""
    return tuple(dict.fromkeys([*((c, 1) for c in concurrency), *((1, b) for b in batch)]))


@dataclass
class _Row:
    """A configuration and what its rounds have found so far."""

    candidate: Candidate
    facts: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    points: dict[Load, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    remarks: dict[str, None] = field(default_factory=dict)
    failure: str = ""
    stress: Stress | None = None

    @property
    def is_open(self) -> bool:
        return self.candidate.verdict is not Verdict.RULED_OUT and not self.failure

    def keep(self, answer: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Add a round's figures under the report's names; one that is None is left out."""
        for theirs, ours in names.items():
            if answer.get(theirs) is not None:
                self.series[ours].append(answer[theirs])


class Campaign:
    """Measures the candidates of one target.

    Args:
        target: whose artifacts.
        candidates: pairs of artifact and runtime.
        plan: what to do with each.
        advance: called after each step with what comes next, for a progress bar.
    """

    def __init__(
        self,
        target: Target,
        candidates: Sequence[Candidate],
        plan: Plan,
        advance: Callable[[str], None],
    ) -> None:
        self._target = target
        self._plan = plan
        self._advance = advance
        self._rows = [_Row(candidate) for candidate in candidates]

    def run(self) -> tuple[Configuration, ...]:
        """Measure everything; blocks for as long as the plan takes."""
        for number in range(self._plan.rounds):
            turn = number % max(1, len(self._rows))
            for row in (*self._rows[turn:], *self._rows[:turn]):
                if row.is_open:
                    self._run_round(row)
        return tuple(_conclude(row) for row in self._rows)

    def _run_round(self, row: _Row) -> None:
        try:
            with Measurer() as child:
                self._load(child, row)
                if self._plan.stress_s:
                    self._stress(child, row)
                else:
                    self._measure(child, row)
        except MeasuringError as exc:
            row.failure = str(exc)

    def _load(self, child: Measurer, row: _Row) -> None:
        label = f"{row.candidate.artifact.file} · {row.candidate.runtime}"
        self._advance(f"{label}: load")
        loaded = open_artifact(child, self._target, row.candidate, self._plan.threads)
        row.facts = loaded
        names = {name: name for name in (*_MEMORY, "import_ms", "load_ms", "base_rss_mb")}
        row.keep(loaded, names)
        inputs = None if self._plan.inputs is None else str(self._plan.inputs)
        shapes = {name: [*axes] for name, axes in self._plan.shapes.items()}
        request = {"do": "prepare", "inputs": inputs, "seed": self._plan.seed, "shapes": shapes}
        row.keep(child.ask(request), {"warm_up_ms": "warm_up_ms"})

    def _measure(self, child: Measurer, row: _Row) -> None:
        seconds = self._plan.seconds / self._plan.rounds
        last: dict[str, Any] = {}
        for concurrency, batch in self._plan.loads:
            self._advance(f"{row.candidate.artifact.file} · {concurrency} × {batch}")
            request = {"concurrency": concurrency, "batch": batch, "seconds": seconds}
            answer = child.ask({"do": "measure", **request}, seconds)
            if "skipped" in answer:
                row.remarks[f"{batch} rows left out: {answer['skipped']}"] = None
            else:
                row.points[concurrency, batch].append(answer)
                last = answer
        row.keep(last, {"rss_mb": "rss_end_mb", "pss_mb": "pss_end_mb"})

    def _stress(self, child: Measurer, row: _Row) -> None:
        concurrency, batch = self._plan.loads[-1]
        seconds = self._plan.stress_s
        label = f"{row.candidate.artifact.file} · {row.candidate.runtime}"

        def show(state: dict[str, Any]) -> None:
            failed = f", {state['failures']:,} failed" if state["failures"] else ""
            runs, rss = state["runs"], state["rss_mb"]
            self._advance(f"{label}: {runs:,} runs{failed}, {rss:.0f} MB")

        request: dict[str, Any] = {
            "concurrency": concurrency,
            "batch": batch,
            "seconds": seconds,
        }
        answer = child.ask({"do": "stress", **request}, seconds, show)
        if "skipped" in answer:
            raise MeasuringError(answer["skipped"])
        row.stress = Stress(**request, **answer)


def open_artifact(
    child: Measurer, target: Target, candidate: Candidate, threads: int
) -> dict[str, Any]:
    """Have a child load an artifact; return its answer.

    Raises:
        MeasuringError: it was refused, or the child died of it.
    """
    file = str(target.folder / candidate.artifact.file)
    request = {"do": "load", "runtime": candidate.runtime, "file": file, "threads": threads}
    return child.ask(request)


def _conclude(row: _Row) -> Configuration:
    artifact = row.candidate.artifact
    facts: dict[str, Any] = {
        "artifact": artifact.file,
        "format": artifact.format.value,
        "precision": artifact.precision.value,
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "runtime": row.candidate.runtime,
        "is_chosen": row.candidate.verdict is Verdict.CHOSEN,
    }
    if row.candidate.verdict is Verdict.RULED_OUT:
        return Configuration(**facts, status="ruled_out", detail=row.candidate.reason)
    facts["runtime_version"] = row.facts.get("version")
    facts["provider"] = row.facts.get("provider")
    if row.failure:
        return Configuration(**facts, status="failed", detail=row.failure)
    facts |= {name: Spread.from_values(values) for name, values in row.series.items()}
    return Configuration(
        **facts,
        status="measured",
        detail="; ".join(row.remarks),
        points=tuple(_conclude_point(load, found) for load, found in row.points.items()),
        stress=row.stress,
    )


def _conclude_point(load: Load, found: Sequence[Mapping[str, Any]]) -> Point:
    concurrency, batch = load
    return Point(
        concurrency=concurrency,
        batch=batch,
        runs=sum(item["runs"] for item in found),
        **{name: Spread.from_values([item[name] for item in found]) for name in _FIGURES},
    )
