"""Is it slower than it was: a report against an earlier one, with noise in mind.

Pure: two reports in, findings out. A point has regressed where its p95 is higher, or its
throughput lower, by more than 10 % and by more than three standard deviations of the noise
that the rounds themselves showed (the noisier report counts). What regressed is for the caller to
measure again, and for `confirm` to keep or to drop.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from console.bench.report import Configuration, Point, Report, format_figure

TOLERANCE = 0.10
"""Smaller changes are not worth a person's time."""
NOISE_FACTOR = 3.0
"""Standard deviations; a process-control chart's usual limit."""


@dataclass(frozen=True)
class Change:
    """One figure that got worse by more than the noise."""

    artifact: str
    runtime: str
    concurrency: int
    batch: int
    figure: str
    """`p95_ms` or `rows_per_s`."""
    before: float
    now: float
    worse_by: float
    """A share: 0.25 stands for a quarter more time, or a quarter fewer rows."""
    allowed: float
    """What the noise and the tolerance allowed."""

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """Return which figure it is."""
        return self.artifact, self.runtime, self.concurrency, self.batch, self.figure

    def __str__(self) -> str:
        """Word it for a person."""
        name = {"p95_ms": "p95", "rows_per_s": "throughput"}[self.figure]
        unit = {"p95_ms": "ms", "rows_per_s": "rows/s"}[self.figure]
        return (
            f"{self.artifact} · {self.runtime}, {self.concurrency} × {self.batch}: {name} "
            f"{format_figure(self.before)} → {format_figure(self.now)} {unit}, "
            f"{self.worse_by:.0%} worse ({self.allowed:.0%} allowed)"
        )


@dataclass(frozen=True)
class Judgement:
    """What came of a comparison with a baseline."""

    compared: int
    """Points that both reports have."""
    regressions: tuple[Change, ...]
    broken: tuple[str, ...]
    """What was measured then and failed now."""
    notes: tuple[str, ...]
    """What differs and may explain it."""

    @property
    def is_worse(self) -> bool:
        """Say whether anything regressed."""
        return bool(self.regressions or self.broken)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {**asdict(self), "is_worse": self.is_worse}


def find_mismatches(before: Report, now: Report) -> list[str]:
    """Return why two reports cannot be compared; empty where they can."""
    sides = [
        ("the box's class", before.box.hardware_class, now.box.hardware_class),
        ("the CPU", before.box.cpu_model, now.box.cpu_model),
        ("the cores", before.box.cores, now.box.cores),
        ("the model's files (sha256)", before.model.digest, now.model.digest),
        ("the threads", before.conditions.threads, now.conditions.threads),
    ]
    return [f"{what}: {then}, now {this}" for what, then, this in sides if then != this]


def judge(before: Report, now: Report) -> Judgement:
    """Compare every point that both reports have."""
    changes, broken, notes, compared = [], [], [], 0
    known = {(item.artifact, item.runtime): item for item in now.configurations}
    for old in before.measured:
        new = known.get((old.artifact, old.runtime))
        if new is None:
            notes.append(f"{old.label} was not measured this time")
        elif new.status != "measured":
            broken.append(f"{old.label} ran then, and now {new.status}: {new.detail}")
        else:
            notes += _find_notes(old, new)
            pairs = [*_pair_points(old, new)]
            compared += len(pairs)
            changes += [change for pair in pairs for change in _compare_points(old, *pair)]
    if not compared:
        notes.append("no point of the baseline was measured again: nothing was compared")
    return Judgement(compared, tuple(changes), tuple(broken), tuple(notes))


def confirm(first: Judgement, again: Judgement) -> Judgement:
    """Return what a second measurement leaves of a judgement: what regressed both times.

    The rounds of one measurement are seconds apart, so a busy minute may hit all of them, and
    three values are a rough estimate of the noise; a model that is slower stays slower.
    """
    lasting = {change.key for change in first.regressions}
    kept = tuple(change for change in again.regressions if change.key in lasting)
    gone = len(first.regressions) - len(kept)
    note = f"measured again, {gone} of the figures that looked worse are within the noise"
    notes = (*first.notes, note) if gone else first.notes
    broken = tuple(dict.fromkeys((*first.broken, *again.broken)))
    return Judgement(first.compared, kept, broken, notes)


def _find_notes(old: Configuration, new: Configuration) -> Iterator[str]:
    for what in ("runtime_version", "provider"):
        then, this = getattr(old, what), getattr(new, what)
        if then != this:
            yield f"{old.label}: {what.replace('_', ' ')} {then}, now {this}"


def _pair_points(old: Configuration, new: Configuration) -> Iterator[tuple[Point, Point]]:
    for point in old.points:
        found = new.find_point(point.concurrency, point.batch)
        if found is not None:
            yield point, found


def _compare_points(which: Configuration, old: Point, new: Point) -> Iterator[Change]:
    for figure in ("p95_ms", "rows_per_s"):
        then, this = getattr(old, figure), getattr(new, figure)
        ratio = this.median / then.median
        worse_by = ratio - 1 if figure == "p95_ms" else 1 - ratio
        noise = max(then.relative_sd, this.relative_sd)
        allowed = max(TOLERANCE, NOISE_FACTOR * noise)
        if worse_by > allowed:
            yield Change(
                artifact=which.artifact,
                runtime=str(which.runtime),
                concurrency=new.concurrency,
                batch=new.batch,
                figure=figure,
                before=then.median,
                now=this.median,
                worse_by=worse_by,
                allowed=allowed,
            )
