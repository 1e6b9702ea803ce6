"""What a conversion made and how it was proven, as it is kept: `edgeward.conversion/v1`.

Owns the schema, the verdict on an artifact from its proofs, and the sentence that sums it all up.
Measures nothing; `converters.evidence.page` shows it to a person.

Invariants: a figure that is infinite or no number is null; times are in ms, memory in MB of
10⁶ bytes; nothing in it names a path of the machine beyond file names.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.errors import ReportError
from converters.evidence.layers import LayerError
from converters.evidence.proof import Outcome, Proof

SCHEMA: Final = "edgeward.conversion/v1"
JSON_FILE, PAGE_FILE = "report.json", "report.html"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Verdict(StrEnum):
    """What became of an artifact."""

    PUBLISHED = "published"
    REFUSED = "refused"
    """It runs, and nowhere within the budget."""
    FAILED = "failed"
    """A step of making it failed, or it runs nowhere that it was tried."""
    NOT_PROVEN = "not_proven"
    """It was made, and nothing here runs it."""


class OutputRecord(_Record):
    """One output on one runtime, against the original's; see `platforms.parity.Parity`."""

    name: str
    rows: int
    is_identical: bool
    sqnr_db: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    cosine: float | None = None
    top_1: float | None = None
    top_k: float | None = None
    k: int | None = None


class ProofRecord(_Record):
    """One artifact on one runtime; see `converters.evidence.proof.Proof`."""

    runtime: str
    outcome: Outcome
    reason: str = ""
    label: str = ""
    version: str = ""
    agreement: float | None = None
    sqnr_db: float | None = None
    is_identical: bool = False
    confident_agreement: float | None = None
    confident_rows: int = 0
    p50_ms: dict[int, float] = Field(default_factory=dict)
    """By rows of a run."""
    latency_ratio: dict[int, float] = Field(default_factory=dict)
    """To the baseline's, measured in turns; by rows of a run."""
    load_ms: float | None = None
    rss_mb: float | None = None
    outputs: tuple[OutputRecord, ...] = ()

    @classmethod
    def from_proof(cls, proof: Proof) -> "ProofRecord":
        """Return a proof as it is kept."""
        is_identical = bool(proof.parities) and all(item.is_identical for item in proof.parities)
        return cls.model_validate({**proof.to_json(), "is_identical": is_identical})


class LayerRecord(_Record):
    """How far one node's output is off; see `converters.evidence.layers.LayerError`."""

    node: str
    operator: str
    tensor: str
    sqnr_db: float | None
    """None: equal, or no number."""
    max_abs: float | None
    input_sqnr_db: float | None = None
    """Lowest of what the node reads; None: equal, or the model's own inputs."""

    @classmethod
    def from_layer(cls, layer: LayerError) -> "LayerRecord":
        """Return a layer's error as it is kept."""
        return cls.model_validate(layer.to_json())


class ArtifactRecord(_Record):
    """One artifact that was to be made."""

    name: str
    format: str
    precision: str
    verdict: Verdict
    reason: str = ""
    route: tuple[str, ...] = ()
    """What each step did, in order."""
    recipe: str = ""
    """Of its compression; empty for the format's plain form."""
    boxes: tuple[str, ...] = ()
    """Targets that it is for."""
    baseline: str = ""
    """The artifact that size and latency are compared with."""
    budget: str = ""
    size_bytes: int | None = None
    size_ratio: float | None = None
    digests: dict[str, str] = Field(default_factory=dict)
    """sha256 by file name."""
    proofs: tuple[ProofRecord, ...] = ()
    layers: tuple[LayerRecord, ...] = ()
    """Of what was refused: its worst nodes, the worst first."""
    calibration: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    duration_s: float | None = None

    @property
    def best(self) -> ProofRecord | None:
        """Return the proof within the budget that is fastest at one row."""
        proven = [item for item in self.proofs if item.outcome is Outcome.OK]
        return min(proven, key=lambda item: item.p50_ms.get(1, float("inf")), default=None)


class SourceRecord(_Record):
    """What was converted."""

    name: str
    version: str = ""
    format: str
    file: str
    sha256: str
    size_bytes: int | None = None


class GoldenRecord(_Record):
    """What the original was asked."""

    rows: int
    origin: str = ""
    reference: str = ""
    """What gave the answers: the original, and what ran it."""


class ConversionReport(_Record):
    """A whole conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_: Literal["edgeward.conversion/v1"] = Field(SCHEMA, alias="schema")
    made_at: str
    """UTC, ISO 8601."""
    edgeward: str
    """Its version."""
    source: SourceRecord
    golden: GoldenRecord
    artifacts: tuple[ArtifactRecord, ...]
    budget: str = ""
    """As it was asked for; empty: the defaults by precision."""
    targets: tuple[str, ...] = ()
    box: dict[str, str] = Field(default_factory=dict)
    """Where it was proven: what, in words."""
    tools: dict[str, str] = Field(default_factory=dict)
    """Versions of what took part."""
    warnings: tuple[str, ...] = ()

    def count(self, verdict: Verdict) -> int:
        """Return how many artifacts came to a verdict."""
        return sum(item.verdict is verdict for item in self.artifacts)

    @property
    def headline(self) -> str:
        """Return the sentence that a person reads first."""
        total, published = len(self.artifacts), self.count(Verdict.PUBLISHED)
        if not total:
            return "No artifact was asked for."
        if not published:
            return f"Nothing to publish: none of {_count(total, 'artifact')} is within its budget."
        rest = _describe_rest(self)
        return f"{published} of {_count(total, 'artifact')} within budget{rest}. {_praise(self)}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _describe_rest(report: ConversionReport) -> str:
    words = {
        Verdict.REFUSED: "refused",
        Verdict.FAILED: "failed",
        Verdict.NOT_PROVEN: "without a runtime here",
    }
    parts = [f"{report.count(key)} {text}" for key, text in words.items() if report.count(key)]
    return f", {', '.join(parts)}" if parts else ""


def _praise(report: ConversionReport) -> str:
    """Say what the fastest published artifact is worth."""
    found = [(item, item.best) for item in report.artifacts if item.verdict is Verdict.PUBLISHED]
    timed = [(item, best) for item, best in found if best is not None and 1 in best.p50_ms]
    if not timed:
        return "None of them could be timed here."
    artifact, best = min(timed, key=lambda pair: pair[1].p50_ms[1])
    text = f"Fastest: {artifact.name} on {best.runtime}, {best.p50_ms[1]:.3g} ms a row"
    ratio = best.latency_ratio.get(1)
    if ratio is not None:
        text += f", {ratio:.2f} × the uncompressed latency"
    if artifact.size_ratio is not None:
        text += f", {artifact.size_ratio:.2f} × the size"
    if best.agreement is not None:
        text += f", agreement {best.agreement:.4g}"
    return f"{text}."


def judge_artifact(proofs: Sequence[Proof]) -> tuple[Verdict, str, tuple[str, ...]]:
    """Return the verdict on an artifact, the reason, and what to warn of.

    One runtime on which it is within the budget is enough to publish it; on which it is not is a
    warning, as a box chooses and proves by itself.
    """
    by_outcome: dict[Outcome, list[Proof]] = {}
    for proof in proofs:
        by_outcome.setdefault(proof.outcome, []).append(proof)
    bad = [*by_outcome.get(Outcome.REFUSED, ()), *by_outcome.get(Outcome.FAILED, ())]
    reasons = tuple(f"{proof.runtime}: {proof.reason}" for proof in bad)
    if Outcome.OK in by_outcome:
        names = ", ".join(proof.runtime for proof in bad)
        return Verdict.PUBLISHED, "", (f"not for {names}: see there",) if bad else ()
    if Outcome.REFUSED in by_outcome:
        return Verdict.REFUSED, "; ".join(reasons), ()
    if Outcome.FAILED in by_outcome:
        return Verdict.FAILED, "; ".join(reasons), ()
    idle = "; ".join(proof.reason for proof in by_outcome.get(Outcome.NOT_RUN, ()))
    return Verdict.NOT_PROVEN, idle or "it was not tried", ()


def write_report(report: ConversionReport, folder: Path) -> Mapping[str, Path]:
    """Write `report.json` and `report.html`; return them by name."""
    from converters.evidence.page import render_page

    written = {JSON_FILE: folder / JSON_FILE, PAGE_FILE: folder / PAGE_FILE}
    written[JSON_FILE].write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    written[PAGE_FILE].write_text(render_page(report), encoding="utf-8")
    return written


def read_report(path: Path) -> ConversionReport:
    """Read a `report.json`.

    Raises:
        ReportError: the file is not there, or is no report of this schema.
    """
    try:
        return ConversionReport.model_validate_json(path.read_bytes())
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise ReportError(msg) from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "(whole document)"
        msg = f"{path.name} is no conversion report: {where}: {first['msg']}"
        raise ReportError(msg) from exc
