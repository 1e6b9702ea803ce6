"""The measured choice: which artifact of a version serves on this box, on which runtime, and why.

Owns the record of a staging (every candidate with its figures and its verdict), its file, and
the pure choice by the model's objective. Never runs a model.

Invariants: a record belongs to one version's manifest (by sha256) and one box as it was; a trial
whose identity is no longer this box's counts for nothing; a candidate that was not right is never
chosen, however fast.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.fileio import make_folders, write_atomic
from agent.manifest import MANIFEST_FILE, compute_sha256
from platforms.spec import PlatformSpec

SCHEMA = "edgeward.choice/v1"
TIE = 0.03
"""Candidates this close to the best are as good: among them the smaller one is chosen."""

_RECORD_MAX_BYTES = 4 << 20


class Verdict(StrEnum):
    """What became of a candidate."""

    CHOSEN = "chosen"
    RIGHT = "right"
    """It serves as well, and another one is better."""
    WRONG = "wrong"
    """Its answers are outside the tolerance."""
    FAILED = "failed"
    """It does not load, does not run, crashes, hangs or takes too much memory."""
    REFUSED = "refused"
    """It is right, and outside what the policy allows."""
    RULED_OUT = "ruled_out"
    """This box cannot run it; it was not tried."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Point(_Record):
    """Latency of one batch size."""

    rows: int
    p50_ms: float
    p95_ms: float
    rows_per_s: float
    energy_mj: float | None = None
    """Millijoules a row of the whole box, where it can tell."""


class Agreement(_Record):
    """How alike the answers are to a reference, over all outputs; the worst output counts."""

    rows: int
    top_1: float | None = None
    """Share of rows with the same best class."""
    top_5: float | None = None
    sqnr_db: float | None = None
    """None where it is infinite, or there are no numbers."""
    max_abs: float | None = None


class Trial(_Record):
    """One artifact on one runtime, as it was measured here."""

    file: str
    runtime: str | None
    """None where no proven runtime reads it."""
    format: str
    precision: str
    sha256: str
    identity: str = ""
    """Of the artifact on this box: `identify_trial`."""
    verdict: Verdict
    reason: str
    provider: str | None = None
    load_ms: float | None = None
    rss_mb: float | None = None
    """What the runtime and the model add to a process."""
    points: tuple[Point, ...] = ()
    golden: Agreement | None = None
    """With the publisher's reference answers."""
    active: Agreement | None = None
    """With the version that was active then."""

    @property
    def p95_ms(self) -> float | None:
        """Latency of a single row."""
        return self.points[0].p95_ms if self.points else None

    @property
    def energy_mj(self) -> float | None:
        """Of a row, by the best batch."""
        known = [point.energy_mj for point in self.points if point.energy_mj is not None]
        return min(known, default=None)

    @property
    def rows_per_s(self) -> float | None:
        """Of the best batch."""
        return max((point.rows_per_s for point in self.points), default=None)


class ChoiceRecord(_Record):
    """A staging's verdicts."""

    schema_: Literal["edgeward.choice/v1"] = Field(default="edgeward.choice/v1", alias="schema")
    name: str
    release: str
    digest: str
    """Sha256 of the version's manifest."""
    objective: str
    measured_at: str
    has_golden: bool
    threads: int
    trials: tuple[Trial, ...]
    reason: str
    """Why the chosen one, or why none."""
    baseline: Trial | None = None
    """The active version's artifact, measured in the same minutes."""

    @property
    def chosen(self) -> Trial | None:
        """Return the chosen trial, or None where the version must not serve here."""
        return next((one for one in self.trials if one.verdict is Verdict.CHOSEN), None)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return self.model_dump(mode="json", by_alias=True)


def compute_digest(folder: Path) -> str:
    """Return what a version is told by: the sha256 of its manifest, which names all its files.

    Raises:
        OSError: it cannot be read.
    """
    return compute_sha256(folder / MANIFEST_FILE)


def identify_trial(
    sha256: str, runtime: str, spec: PlatformSpec, threads: int, power_mode: str | None
) -> str:
    """Return a digest of all that a measurement depends on; another one asks for another trial."""
    found = spec.runtime(runtime)
    parts = (
        sha256,
        runtime,
        found and found.version,
        spec.cpu_model,
        sorted(spec.cpu_flags),
        spec.cores,
        [(item.kind, item.name, item.driver) for item in spec.accelerators],
        threads,
        power_mode,
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def choose_trial(trials: Sequence[Trial], objective: str) -> tuple[int | None, str]:
    """Return the index of the trial to serve with, and why. Pure.

    Args:
        trials: of one version; only those that are right are looked at.
        objective: `latency_p95`, `throughput`, `memory` or `energy`. Energy falls back to latency
            where a candidate has no figure for it.
    """
    right = [n for n, one in enumerate(trials) if one.verdict is Verdict.RIGHT and one.points]
    if not right:
        tried = "; ".join(f"{one.file} on {one.runtime}: {one.reason}" for one in trials)
        return None, f"no candidate is right here: {tried or 'there is none'}"
    if objective == "energy" and any(trials[n].energy_mj is None for n in right):
        objective = "latency_p95"
    cost = {n: _compute_cost(trials[n], objective) for n in right}
    lowest = min(cost.values())
    tied = [n for n in right if cost[n] <= lowest * (1 + TIE)]
    best = min(tied, key=lambda n: (trials[n].rss_mb or 0.0, cost[n]))
    return best, _explain(trials, best, right, objective)


def _compute_cost(trial: Trial, objective: str) -> float:
    match objective:
        case "throughput":
            return 1 / (trial.rows_per_s or 1e-9)
        case "memory":
            return trial.rss_mb or 0.0
        case "energy":
            return trial.energy_mj or 0.0
        case _:
            return trial.p95_ms or 0.0


def _explain(trials: Sequence[Trial], best: int, right: Sequence[int], objective: str) -> str:
    mine = trials[best]
    unit = {
        "throughput": "the time per row",
        "memory": "the memory",
        "energy": "the energy",
    }.get(objective, "the p95")
    text = f"best by {objective} of {len(right)} that are right"
    others = [n for n in right if n != best]
    if not others:
        return text if len(trials) == 1 else f"the only one of {len(trials)} that is right"
    second = min(others, key=lambda n: _compute_cost(trials[n], objective))
    ratio = _compute_cost(trials[second], objective) / max(_compute_cost(mine, objective), 1e-9)
    return f"{text}: {trials[second].file} on {trials[second].runtime} has {ratio:.2f} × {unit}"


def choice_path(folder: Path, digest: str) -> Path:
    """Return the record's file of a version, below the folder of all records."""
    return folder / f"{digest}.json"


def write_choice(folder: Path, record: ChoiceRecord) -> Path:
    """Keep a record, durably."""
    make_folders(folder)
    path = choice_path(folder, record.digest)
    write_atomic(path, json.dumps(record.to_json(), indent=1))
    return path


def sweep_choices(folder: Path, kept: Collection[str]) -> None:
    """Remove the records of versions that are gone.

    Args:
        folder: of all records.
        kept: digests of the versions that are there.
    """
    for path in folder.glob("*.json"):
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def find_choice(folder: Path, digest: str) -> ChoiceRecord | None:
    """Return the record of a version; None where there is none, or it is damaged."""
    path = choice_path(folder, digest)
    try:
        if path.stat().st_size > _RECORD_MAX_BYTES:
            return None
        return ChoiceRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
