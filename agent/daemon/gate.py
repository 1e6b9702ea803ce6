"""The gate: whether a version on probation goes on, is committed, or is rolled back. Pure.

What it looks at, in this order: failures, hangs and crashes (told from outside), answers that
differ from the active version's, latency, memory; then whether time and requests are enough.

Invariants: a single failure never ends a probation (`min_failures`); a percentile counts only where
enough requests stand behind it; nothing but the end of the time commits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from agent.jobs import Reason
from agent.latency import compute_percentile_ms
from agent.lifecycle import NOTICEABLE_MS, Probation
from agent.tasks import FiguresBody, VersionFigures

ENOUGH = 100
"""Answers that a percentile needs on either side."""
ENOUGH_COPIES = 20

_COUNTS = ("success", "failed", "compared", "agreed", "shadow_failed")


@dataclass(frozen=True)
class Tally:
    """What one version has done in all workers since somebody began to count."""

    success: int = 0
    failed: int = 0
    compared: int = 0
    agreed: int = 0
    shadow_failed: int = 0
    latencies: Mapping[int, int] = field(default_factory=dict)

    @property
    def p95_ms(self) -> float | None:
        """None where too few answers stand behind it."""
        if sum(self.latencies.values()) < ENOUGH:
            return None
        return compute_percentile_ms(self.latencies, 0.95)

    @property
    def agreement(self) -> float | None:
        """Share of copies answered alike; None where there were too few."""
        return self.agreed / self.compared if self.compared >= ENOUGH_COPIES else None

    def to_json(self) -> dict[str, object]:
        """Return what is reported of it."""
        p95_ms, agreement = self.p95_ms, self.agreement
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "p95_ms": None if p95_ms is None else round(p95_ms, 4),
            "agreement": None if agreement is None else round(agreement, 4),
        }


class FigureBook:
    """Adds up what workers say, over their restarts.

    A worker's counts begin with its process, so each process's last word is kept.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, str], VersionFigures] = {}
        self._rss: dict[str, float] = {}
        self._first_rss: dict[str, float] = {}

    def add(self, bodies: Iterable[FiguresBody]) -> None:
        """Take in the newest words of the workers that live."""
        for body in bodies:
            self._rss[body.worker] = body.rss_mb
            self._first_rss.setdefault(body.worker, body.rss_mb)
            for one in body.versions:
                self._last[body.worker, one.model, one.version] = one

    def tally(self, model: str, number: int) -> Tally:
        """Return what a version has done in all processes that were ever heard of."""
        found = [
            one
            for (_, name, version), one in self._last.items()
            if (name, version) == (model, str(number))
        ]
        latencies: dict[int, int] = {}
        for one in found:
            for step, count in one.latencies.items():
                latencies[int(step)] = latencies.get(int(step), 0) + count
        sums = {name: sum(getattr(one, name) for one in found) for name in _COUNTS}
        return Tally(**sums, latencies=latencies)

    def find_growth_mb(self) -> float:
        """Return how much the process that grew most has grown since it was first heard of."""
        return max((self._rss[one] - self._first_rss[one] for one in self._rss), default=0.0)


def subtract(now: Tally, then: Tally) -> Tally:
    """Return what has been done between two tallies; nothing is ever less than none."""
    latencies = {
        step: count - then.latencies.get(step, 0)
        for step, count in now.latencies.items()
        if count > then.latencies.get(step, 0)
    }
    counts = {name: max(0, getattr(now, name) - getattr(then, name)) for name in _COUNTS}
    return Tally(**counts, latencies=latencies)


def find_objection(
    rules: Probation, candidate: Tally, previous: Tally, growth_mb: float
) -> Reason | None:
    """Return why a candidate must not go on, or None."""
    for found in (
        _check_failures(rules, candidate),
        _check_agreement(rules, candidate),
        _check_latency(rules, candidate, previous),
        _check_memory(rules, growth_mb),
    ):
        if found is not None:
            return found
    return None


def _check_failures(rules: Probation, candidate: Tally) -> Reason | None:
    failed = candidate.failed + candidate.shadow_failed
    runs = candidate.success + candidate.compared + failed
    if failed < rules.min_failures or failed <= rules.max_error_rate * runs:
        return None
    text = f"{failed} of {runs} runs failed, {rules.max_error_rate:.1%} allowed"
    return Reason("probation_errors", text)


def _check_agreement(rules: Probation, candidate: Tally) -> Reason | None:
    agreement = candidate.agreement
    if rules.min_agreement is None or agreement is None or agreement >= rules.min_agreement:
        return None
    text = (
        f"{agreement:.1%} of {candidate.compared} copies were answered as by the active version, "
        f"{rules.min_agreement:.1%} asked"
    )
    return Reason("probation_disagreement", text)


def _check_latency(rules: Probation, candidate: Tally, previous: Tally) -> Reason | None:
    mine, theirs = candidate.p95_ms, previous.p95_ms
    if mine is None or theirs is None:
        return None
    if mine <= rules.max_slowdown * theirs or mine - theirs < NOTICEABLE_MS:
        return None
    text = (
        f"p95 {mine:.3g} ms is {mine / theirs:.1f} × the previous version's {theirs:.3g} ms, "
        f"{rules.max_slowdown:g} × allowed"
    )
    return Reason("probation_slow", text)


def _check_memory(rules: Probation, growth_mb: float) -> Reason | None:
    if growth_mb <= rules.max_growth_mb:
        return None
    text = f"the serving process grew by {growth_mb:.0f} MB, {rules.max_growth_mb:g} MB allowed"
    return Reason("probation_memory", text)


def is_enough(rules: Probation, lasted_s: float, candidate: Tally, meanwhile: Tally) -> bool:
    """Say whether a candidate has been watched for long enough to be committed.

    Args:
        rules: of the probation, its duration filled in.
        lasted_s: so far.
        candidate: what it has done in that time.
        meanwhile: what the previous version has done in that time. As long as it alone answers,
            because the candidate is still loading, nothing is known of the candidate.
    """
    is_known = candidate.success > 0 or meanwhile.success == 0
    is_over = lasted_s >= (rules.duration_s or 0.0)
    return is_known and is_over and candidate.success >= rules.requests
