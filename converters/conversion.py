"""What a conversion is asked for, and what came of it.

Owns the words that the pipeline, its callers and the report share. Converts nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from converters.compression.calibration import CalibrationSet
from converters.evidence.budget import Budget
from converters.evidence.proof import Golden, Outcome, Proof, TrialLimits
from converters.routes.hop import Limits
from converters.task import Facts, ModelFile, ModelFormat
from platforms.artifact import Precision, TensorSpec
from platforms.runtimes.base import Array, Declared

_FP32 = Precision.FP32


@dataclass(frozen=True)
class Survey:
    """What a source is."""

    source: ModelFile
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    manifest: Mapping[str, Any]
    """What the source says of itself: name, version, preprocess, …"""
    facts: Facts

    @property
    def declared(self) -> Declared:
        """Return the tensors as the runtimes take them."""
        return Declared(self.inputs, self.outputs)


@dataclass(frozen=True)
class Build:
    """One artifact to make."""

    format: ModelFormat
    precision: Precision = _FP32
    recipe: str | None = None
    """Of the compression; None with another precision than FP32: the one that fits the graph."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """The manifest's `requires`."""
    boxes: tuple[str, ...] = ()
    """Targets that it is for; none: any that can run it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe, as the target asks."""


@dataclass(frozen=True)
class Order:
    """What to make of a source."""

    builds: tuple[Build, ...]
    boxes: tuple[str, ...] = ()
    """Targets of `converters.targets`: what is worth making for these is made, too."""
    samples: CalibrationSet | None = None
    """What quantizers watch; None: recipes that need none."""
    golden_inputs: Mapping[str, Array] | None = None
    """None: made up, which proves less."""
    golden_origin: str = ""
    budget: Budget | None = None
    runtimes: tuple[str, ...] = ()
    """Those that work here."""
    limits: Limits = field(default_factory=Limits)
    trial: TrialLimits = field(default_factory=TrialLimits)
    searches: bool = True
    """Leave the worst nodes in fp32 where a quantized ONNX model is outside the budget."""


@dataclass
class Made:
    """What became of one build."""

    build: Build
    file: ModelFile | None = None
    recipe: str = ""
    """As used; nothing where only the format changed."""
    why: str = ""
    """Why this recipe."""
    outcome: Outcome = Outcome.FAILED
    reason: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    proofs: list[Proof] = field(default_factory=list)
    budget: Budget = field(default_factory=Budget)
    size_bytes: int = 0
    size_ratio: float | None = None
    is_no_op: bool = False

    @property
    def is_ok(self) -> bool:
        """Say whether it may be published."""
        return self.outcome is Outcome.OK

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {
            "format": self.build.format.value,
            "precision": self.build.precision.value,
            "file": None if self.file is None else self.file.path.name,
            "recipe": self.recipe,
            "why": self.why,
            "boxes": list(self.build.boxes),
            "requires": dict(self.build.requires),
            "outcome": self.outcome.value,
            "reason": self.reason,
            "budget": {k: v for k, v in asdict(self.budget).items() if v is not None},
            "size_bytes": self.size_bytes,
            "size_ratio": self.size_ratio,
            "is_no_op": self.is_no_op,
            "steps": self.steps,
            "proofs": [proof.to_json() for proof in self.proofs],
        }


@dataclass(frozen=True)
class Conversion:
    """All that came of an order."""

    survey: Survey
    golden: Golden
    made: tuple[Made, ...]
    duration_s: float

    @property
    def published(self) -> list[Made]:
        """Return what may leave."""
        return [one for one in self.made if one.is_ok]


def measure_size(file: ModelFile) -> int:
    """Return the bytes of a model with all its files."""
    if file.path.is_dir():
        return sum(path.stat().st_size for path in file.path.rglob("*") if path.is_file())
    weights = file.path.with_suffix(".bin")
    extra = weights.stat().st_size if file.format is ModelFormat.OPENVINO else 0
    return file.path.stat().st_size + extra
