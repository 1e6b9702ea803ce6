"""Which nodes to leave in full precision, so that the rest may be quantized: a search.

Owns the search alone: it asks for measurements and decides by them; it builds and runs nothing
(`onnx_search` does). Two phases: groups of nodes are quantized *alone*, which shows the noise that
each brings without the others masking it, the worst group being split again and again; then the
noisiest are left out together, more or fewer of them, until the budget holds; what of them the
budget can bear is then quantized again.

Invariants: at most `max_trials` measurements; the same measurements give the same answer; no
figure is predicted: what is chosen was measured as it is. (Not monotone: leaving out one node more
may make things worse, as its neighbours then round at other places. Seen on EfficientNet-Lite0.)
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

from converters.task import Report

DEFAULT_TRIALS = 40
_RANKING_SHARE = 0.65


@dataclass(frozen=True)
class Budget:
    """What a compressed model must keep, compared with the original on the golden inputs."""

    min_agreement: float | None = None
    """Top-1, 0…1; asked of outputs that are class scores."""
    min_sqnr_db: float | None = None

    def is_held(self, score: "Score") -> bool:
        """Say whether a score is within the budget; NaN never is."""
        agreement_ok = (
            self.min_agreement is None
            or score.agreement is None
            or score.agreement >= self.min_agreement
        )
        return agreement_ok and (self.min_sqnr_db is None or score.sqnr_db >= self.min_sqnr_db)


@dataclass(frozen=True)
class Score:
    """What one candidate was measured to be."""

    agreement: float | None
    """Lowest top-1 agreement of its outputs; None: no output has classes."""
    sqnr_db: float
    """Lowest of its outputs; −infinity where it could not be built or run."""
    size_bytes: int

    @property
    def noise(self) -> float:
        """Noise power as a share of the signal's."""
        return math.inf if math.isnan(self.sqnr_db) else 10 ** (-self.sqnr_db / 10)


class TrialKind(StrEnum):
    """What a measurement was for."""

    PLAIN = "plain"
    """Everything quantized."""
    ALONE = "alone"
    """Only the named nodes quantized, to rank them."""
    LEFT_OUT = "left_out"
    """All but the named nodes quantized: a candidate."""


@dataclass(frozen=True)
class Trial:
    """One measurement."""

    kind: TrialKind
    nodes: tuple[str, ...]
    score: Score
    is_within_budget: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form; an infinite figure is null."""
        sqnr_db = self.score.sqnr_db
        return {
            "kind": self.kind.value,
            "nodes": list(self.nodes),
            "agreement": self.score.agreement,
            "sqnr_db": round(sqnr_db, 2) if math.isfinite(sqnr_db) else None,
            "size_bytes": self.score.size_bytes,
            "is_within_budget": self.is_within_budget,
        }


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    left_out: tuple[str, ...]
    """Nodes that stay in fp32."""
    best: Trial
    trials: tuple[Trial, ...]
    why_ended: str


Measure = Callable[[frozenset[str]], Score]
"""Build the candidate that leaves these nodes in fp32, run it on the golden set, and score it."""


class _LimitError(Exception):
    """No further measurement may be made."""


class Search:
    """One search over the nodes of a graph.

    Args:
        nodes: that a quantizer would quantize, in the graph's order.
        measure: takes what to leave out.
        budget: to hold.
        max_trials: measurements, the plain one included.
        time_limit_s: no measurement is begun after so long; 0: no limit.
        report: told of progress.
        clock: seconds.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        measure: Measure,
        budget: Budget,
        max_trials: int = DEFAULT_TRIALS,
        time_limit_s: float = 0.0,
        report: Report = lambda share, doing: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._nodes = tuple(nodes)
        self._measure = measure
        self._budget = budget
        self._max_trials = max_trials
        self._report = report
        self._clock = clock
        self._end_at = clock() + time_limit_s if time_limit_s else math.inf
        self._trials: list[Trial] = []

    def run(self) -> Found:
        """Search; blocks for as long as the measurements take.

        Where no candidate holds the budget, the best measured one is returned, and
        `best.is_within_budget` says so.
        """
        plain = self._try(TrialKind.PLAIN, ())
        why = "the plain form is within the budget"
        if not plain.is_within_budget:
            why = self._look_further()
        best = min(self._get_candidates(), key=self._rate)
        left_out = best.nodes if best.kind is TrialKind.LEFT_OUT else ()
        return Found(left_out, best, tuple(self._trials), why)

    def _look_further(self) -> str:
        try:
            ranked = self._rank()
            self._give_back(self._leave_out(ranked))
        except _LimitError as exc:
            return str(exc)
        is_held = any(trial.is_within_budget for trial in self._get_candidates())
        return "fewest nodes found" if is_held else "no candidate is within the budget"

    def _rate(self, trial: Trial) -> tuple[bool, float, float]:
        """Return what candidates are sorted by, best first."""
        if trial.is_within_budget:
            return (False, len(trial.nodes), trial.score.size_bytes)
        return (True, -(trial.score.agreement or 0.0), trial.score.noise)

    def _get_candidates(self) -> list[Trial]:
        return [trial for trial in self._trials if trial.kind is not TrialKind.ALONE]

    def _try(self, kind: TrialKind, nodes: Sequence[str]) -> Trial:
        if len(self._trials) >= self._max_trials:
            raise _LimitError(f"{self._max_trials} trials were made")
        if self._trials and self._clock() >= self._end_at:
            raise _LimitError("the time was over")
        named = frozenset(nodes)
        out = frozenset(self._nodes) - named if kind is TrialKind.ALONE else named
        score = self._measure(out)
        trial = Trial(kind, tuple(nodes), score, self._budget.is_held(score))
        self._trials.append(trial)
        self._report(
            len(self._trials) / self._max_trials,
            f"trial {len(self._trials)}: {kind.value} {len(nodes)}, {score.sqnr_db:.1f} dB",
        )
        return trial

    def _rank(self) -> list[tuple[str, ...]]:
        """Return groups of nodes, noisiest first, the noisy ones split into single nodes."""
        allowed = max(2, int(self._max_trials * _RANKING_SHARE))
        count = len(self._nodes) if len(self._nodes) <= allowed else max(2, allowed // 2)
        noises = {group: self._listen(group) for group in _cut(self._nodes, count)}
        while len(self._trials) + 2 <= allowed:
            worst = max(noises, key=lambda group: noises[group])
            if len(worst) == 1:
                break
            del noises[worst]
            for half in _cut(worst, 2):
                noises[half] = self._listen(half)
        return sorted(noises, key=lambda group: -noises[group])

    def _listen(self, group: tuple[str, ...]) -> float:
        return self._try(TrialKind.ALONE, group).score.noise

    def _leave_out(self, ranked: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Leave out 1, 2, 4, … groups until the budget holds, then look between for fewer.

        Returns the groups that do, or none.
        """
        fails, holds = 0, 0
        count = 1
        # With every group left out nothing would be quantized.
        while count < len(ranked):
            if self._try_prefix(ranked, count):
                holds = count
                break
            fails, count = count, count * 2
        if not holds and fails < len(ranked) - 1:
            holds = len(ranked) - 1 if self._try_prefix(ranked, len(ranked) - 1) else 0
        while holds - fails > 1:
            middle = (fails + holds) // 2
            if self._try_prefix(ranked, middle):
                holds = middle
            else:
                fails = middle
        return ranked[:holds]

    def _give_back(self, left_out: list[tuple[str, ...]]) -> None:
        """Quantize again what the budget can bear, the least noisy first, groups by halves."""
        kept = left_out
        pending = left_out[::-1]
        while pending:
            group = pending.pop(0)
            rest = [item for item in kept if item != group]
            if rest and self._try_prefix(rest, len(rest)):
                kept = rest
            elif len(group) > 1:
                halves = _cut(group, 2)
                kept = [*rest, *halves]
                pending = [*halves, *pending]

    def _try_prefix(self, ranked: list[tuple[str, ...]], count: int) -> bool:
        named = [node for group in ranked[:count] for node in group]
        return self._try(TrialKind.LEFT_OUT, named).is_within_budget


def _cut(nodes: tuple[str, ...], count: int) -> list[tuple[str, ...]]:
    """Return `count` parts of nearly equal length, in order."""
    count = min(count, len(nodes))
    edges = [len(nodes) * part // count for part in range(count + 1)] if count else []
    return [nodes[start:end] for start, end in pairwise(edges)]
