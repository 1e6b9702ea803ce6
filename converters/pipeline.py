"""From one trained model to proven artifacts: survey, convert, compress, prove, choose.

    survey ─► answers of the original ─► each format ─► each precision ─► proof on every runtime

Owns the order of these steps and what becomes of a failure: an artifact that cannot be made, or is
outside the budget, is an entry with its reason, and the others go on. Every step that loads a model
runs in a process of its own.

Invariants: an artifact is `ok` only where at least one runtime here has answered within the budget;
what was refused stays in the workspace for nobody to publish; the original is never written.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from converters.compression.calibration import CalibrationSet
from converters.compression.recipes import Recipe, choose_recipe, get_recipe, get_tool_entry
from converters.errors import (
    ConversionCanceledError,
    ConversionError,
    RecipeError,
    SourceError,
)
from converters.evidence.budget import Budget, merge_budgets
from converters.evidence.proof import (
    Baseline,
    Golden,
    Outcome,
    Proof,
    TrialLimits,
    find_runtimes,
    prove_artifact,
)
from converters.routes.hop import HopResult, Limits, run_hop
from converters.routes.inspection import inspect_source
from converters.routes.plan import plan
from converters.routes.registry import ToolEntry
from converters.task import Facts, ModelFile, ModelFormat, Report
from platforms.artifact import Datatype, Precision, TensorSpec
from platforms.errors import MeasuringError
from platforms.measuring.batches import describe_tensors, run_rows
from platforms.measuring.measurer import Measurer
from platforms.measuring.sample import load_arrays, make_random_inputs, save_arrays
from platforms.runtimes.base import Array, Declared

SUFFIXES: Mapping[ModelFormat, str] = {
    ModelFormat.ONNX: ".onnx",
    ModelFormat.TFLITE: ".tflite",
    ModelFormat.OPENVINO: ".xml",
    ModelFormat.COREML: ".mlpackage",
    ModelFormat.TORCHSCRIPT: ".pt",
    ModelFormat.TORCH_EXPORT: ".pt2",
}
"""Formats that leave the converters."""

MADE_UP_ROWS = 32
_TORCH = (
    ModelFormat.CALLABLE,
    ModelFormat.STATE_DICT,
    ModelFormat.TORCH_EXPORT,
    ModelFormat.TORCHSCRIPT,
)
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
    """Targets that it is for."""


@dataclass(frozen=True)
class Order:
    """What to make of a source."""

    builds: tuple[Build, ...]
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


def _stay_quiet(_share: float, _doing: str) -> None:
    return


def _go_on() -> bool:
    return False


def survey_source(
    source: ModelFile,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    report: Report = _stay_quiet,
    is_canceled: Callable[[], bool] = _go_on,
) -> Survey:
    """Say what a source is; blocks while a child process reads it.

    Raises:
        ConversionError: as `inspect_source`; it has no tensors that can be named.
    """
    facts = inspect_source(source, options, limits, report, is_canceled)
    sides = [
        tuple(
            TensorSpec(item["name"], Datatype(item["datatype"]), tuple(item["shape"]))
            for item in facts[side]
        )
        for side in ("inputs", "outputs")
    ]
    if not all(sides):
        msg = f"{source.path.name} has no inputs or no outputs"
        raise SourceError(msg)
    return Survey(source, sides[0], sides[1], facts.get("manifest") or {}, facts)


def convert_model(
    survey: Survey,
    order: Order,
    workspace: Path,
    report: Report = _stay_quiet,
    is_canceled: Callable[[], bool] = _go_on,
) -> Conversion:
    """Make and prove every build; blocks for minutes.

    Args:
        survey: of the source.
        order: what to make.
        workspace: an empty folder for the artifacts.
        report: told of the share that is done and what is being done.
        is_canceled: asked about ten times a second.

    Raises:
        ConversionCanceledError: `is_canceled` said so.
        ConversionError: the original itself cannot be run.
    """
    return _Pipeline(survey, order, workspace, report, is_canceled).run()


class _Pipeline:
    def __init__(
        self,
        survey: Survey,
        order: Order,
        workspace: Path,
        report: Report,
        is_canceled: Callable[[], bool],
    ) -> None:
        self._survey = survey
        self._order = order
        self._workspace = workspace
        self._report = report
        self._is_canceled = is_canceled
        self._files: dict[ModelFormat, Made] = {}
        """Formats that were made without compression."""
        self._share = (0.0, 0.0)
        self._golden_file = workspace / ".golden.npz"
        self._samples_file: Path | None = None

    def run(self) -> Conversion:
        """Make all of it."""
        started = time.monotonic()
        self._enter(0.0, 0.05, "the original's answers")
        golden = self._answer()
        self._keep_data(golden)
        made: list[Made] = []
        builds = self._order.builds
        for number, build in enumerate(builds):
            low, high = (0.05 + 0.95 * n / len(builds) for n in (number, number + 1))
            self._enter(low, high, f"{build.format.value} {build.precision.value}")
            made.append(self._make(build, golden))
        self._enter(1.0, 1.0, "")
        return Conversion(self._survey, golden, tuple(made), time.monotonic() - started)

    # --- the original ---------------------------------------------------------------------------

    def _answer(self) -> Golden:
        inputs, origin = self._order.golden_inputs, self._order.golden_origin
        if inputs is None:
            inputs = make_random_inputs(list(self._survey.inputs), MADE_UP_ROWS)
            origin = "made up: that it computes the same is shown, not that it knows its task"
        if self._survey.source.format in _TORCH:
            outputs = self._answer_in_torch(inputs)
        else:
            outputs = self._answer_in_runtime(inputs)
        return Golden(inputs, outputs, origin)

    def _answer_in_torch(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        source = self._survey.source
        tool = ToolEntry(
            name="answers of the original",
            sources=(source.format,),
            target=source.format,
            entry="converters.routes.tools.torch_answers:answer",
            modules=("torch",),
            extra="torch",
        )
        with tempfile.TemporaryDirectory(prefix="edgeward-answers-") as name:
            rows = Path(name) / "rows.npz"
            save_arrays(rows, inputs)
            options = {
                "rows": str(rows),
                "output_names": [spec.name for spec in self._survey.outputs],
            }
            self._hop(tool, source, Path(name) / "answers.npz", options)
            return load_arrays(Path(name) / "answers.npz")

    def _answer_in_runtime(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        source = self._survey.source
        runtimes = find_runtimes(source.format, self._order.runtimes)
        if not runtimes:
            msg = f"nothing here runs {source.format.value}, so nothing can be compared with it"
            raise SourceError(msg)
        declared = self._survey.declared
        try:
            with Measurer(self._order.trial.answer_s, self._order.trial.memory_mb) as child:
                loaded = child.ask(
                    {
                        "do": "load",
                        "runtime": runtimes[0],
                        "file": str(source.path),
                        "threads": 1,
                        "declared": {
                            "inputs": describe_tensors(declared.inputs),
                            "outputs": describe_tensors(declared.outputs),
                        },
                    }
                )
                return run_rows(child, loaded, inputs)
        except MeasuringError as exc:
            msg = f"the original does not run on {runtimes[0]}: {exc}"
            raise SourceError(msg) from exc

    def _keep_data(self, golden: Golden) -> None:
        save_arrays(self._golden_file, golden.inputs)
        if self._order.samples is not None:
            self._samples_file = self._order.samples.save(self._workspace / ".samples.npz")

    # --- one build ------------------------------------------------------------------------------

    def _make(self, build: Build, golden: Golden) -> Made:
        base = self._files.get(build.format)
        if base is None:
            base = self._files[build.format] = self._convert(Build(build.format), golden)
        if build.precision is _FP32 and build.recipe is None:
            base.build = build
            return base
        made = Made(build)
        if base.file is None:
            made.reason = f"there is no {build.format.value} to compress: {base.reason}"
            return made
        return self._compress(made, base, golden)

    def _convert(self, build: Build, golden: Golden) -> Made:
        """Change the format only."""
        made = Made(build, budget=merge_budgets(self._order.budget, _FP32))
        try:
            file = self._walk(build.format, made)
        except ConversionCanceledError:
            raise
        except ConversionError as exc:
            made.reason = f"{exc} [{exc.code}]"
            return made
        made.file = file
        self._prove(made, golden, None)
        return made

    def _walk(self, target: ModelFormat, made: Made) -> ModelFile:
        """Go the planned way to a format; steps that others went are not gone again."""
        file = self._survey.source
        for tool in plan(file, target):
            known = self._files.get(tool.target)
            if known is not None and known.file is not None and tool.target is not target:
                file = known.file
                continue
            path = self._workspace / f"model{SUFFIXES.get(tool.target, '.bin')}"
            done = self._hop(tool, file, path, {})
            made.steps.append(_describe_step(tool, done))
            file = done.file
            if tool.target is not target:
                self._files[tool.target] = Made(Build(tool.target), file, steps=list(made.steps))
        return file

    def _compress(self, made: Made, base: Made, golden: Golden) -> Made:
        build = made.build
        made.budget = merge_budgets(self._order.budget, build.precision)
        assert base.file is not None
        try:
            recipe, made.why = self._choose(build, base)
            self._apply(made, recipe, base.file)
        except ConversionCanceledError:
            raise
        except ConversionError as exc:
            made.reason = f"{exc} [{exc.code}]"
            return made
        self._prove(made, golden, base)
        if made.outcome is Outcome.REFUSED and self._may_search(recipe):
            return self._search(made, recipe, base, golden)
        return made

    def _choose(self, build: Build, base: Made) -> tuple[Recipe, str]:
        if build.recipe is not None:
            return get_recipe(build.recipe), "as the target asks"
        has_samples = self._samples_file is not None
        if build.format is ModelFormat.ONNX:
            operators = base.steps[-1]["facts"]["operators"] if base.steps else self._operators
            choice = choose_recipe(operators, build.precision)
            return get_recipe(choice.recipe), choice.why
        names = _RECIPES.get((build.format, build.precision))
        if names is None:
            msg = f"no recipe makes {build.precision.value} of {build.format.value}"
            raise RecipeError(msg)
        with_samples, without = names
        if has_samples:
            return get_recipe(with_samples), "calibrated on the samples given"
        return get_recipe(without), "needs no samples, and none were given"

    @property
    def _operators(self) -> Mapping[str, int]:
        found: Mapping[str, int] = self._survey.facts["operators"]
        return found

    def _apply(self, made: Made, recipe: Recipe, source: ModelFile) -> None:
        if recipe.needs_calibration and self._samples_file is None:
            msg = f"{recipe.name} watches the model on samples: give some with --calibration"
            raise RecipeError(msg)
        options: dict[str, Any] = dict(recipe.options)
        if recipe.needs_calibration:
            options["calibration"] = str(self._samples_file)
        if recipe.name.endswith("_search"):
            options["golden"] = str(self._golden_file)
            options.update(_to_search_options(made.budget))
            if self._samples_file is not None and "calibration" not in options:
                options["calibration"] = str(self._samples_file)
        suffix = SUFFIXES[made.build.format]
        named = "" if made.build.recipe is None else f".{recipe.name}"
        path = self._workspace / f"model.{made.build.precision.value}{named}{suffix}"
        done = self._hop(get_tool_entry(recipe), source, path, options)
        made.recipe = recipe.name
        made.steps.append(_describe_step(get_tool_entry(recipe), done))
        made.file = done.file
        made.is_no_op = bool(done.facts.get("is_no_op"))
        if made.is_no_op:
            why = done.facts.get("no_op_reason") or "nothing in the graph was compressed"
            msg = f"it does nothing here: {why}"
            raise RecipeError(msg)

    def _may_search(self, recipe: Recipe) -> bool:
        return self._order.searches and recipe.name in ("onnx_static", "onnx_dynamic")

    def _search(self, made: Made, recipe: Recipe, base: Made, golden: Golden) -> Made:
        """Leave the worst nodes in fp32 until the budget holds."""
        found = Made(made.build, budget=made.budget)
        found.why = f"{recipe.name} alone: {made.reason}"
        assert base.file is not None
        try:
            self._apply(found, get_recipe(f"{recipe.name}_search"), base.file)
        except ConversionCanceledError:
            raise
        except ConversionError as exc:
            made.reason += f"; a search for nodes to leave in fp32: {exc} [{exc.code}]"
            return made
        self._prove(found, golden, base)
        return found

    # --- evidence -------------------------------------------------------------------------------

    def _prove(self, made: Made, golden: Golden, base: Made | None) -> None:
        """Try an artifact on every runtime here and sum the verdicts up."""
        assert made.file is not None
        made.size_bytes = measure_size(made.file)
        made.size_ratio = made.size_bytes / base.size_bytes if base and base.size_bytes else None
        for runtime in find_runtimes(made.build.format, self._order.runtimes):
            baseline = None
            if base is not None and base.file is not None:
                baseline = Baseline(base.file, runtime, base.size_bytes)
            made.proofs.append(
                prove_artifact(
                    made.file,
                    runtime,
                    self._survey.declared,
                    golden,
                    made.budget,
                    size_bytes=made.size_bytes,
                    baseline=baseline,
                    limits=self._order.trial,
                    report=self._tell,
                    is_canceled=self._is_canceled,
                )
            )
        made.outcome, made.reason = _sum_up(made.proofs, made.build.format)

    # --- what the steps share -----------------------------------------------------------------

    def _hop(
        self, tool: ToolEntry, source: ModelFile, target: Path, options: Mapping[str, Any]
    ) -> HopResult:
        return run_hop(
            tool, source, target, options, self._order.limits, self._tell, self._is_canceled
        )

    def _enter(self, low: float, high: float, doing: str) -> None:
        if self._is_canceled():
            msg = "the conversion was called off"
            raise ConversionCanceledError(msg)
        self._share = (low, high)
        self._doing = doing
        self._report(low, doing)

    def _tell(self, share: float, doing: str) -> None:
        low, high = self._share
        text = f"{self._doing}: {doing}" if doing else self._doing
        self._report(low + (high - low) * min(1.0, max(0.0, share)), text)


_RECIPES: Mapping[tuple[ModelFormat, Precision], tuple[str, str]] = {
    (ModelFormat.TFLITE, Precision.INT8): ("litert_static", "litert_weight_only"),
    (ModelFormat.OPENVINO, Precision.INT8): ("openvino_int8", "openvino_weights8"),
    (ModelFormat.OPENVINO, Precision.INT4_WEIGHTS): ("openvino_weights4", "openvino_weights4"),
    (ModelFormat.OPENVINO, Precision.FP16): ("openvino_fp16", "openvino_fp16"),
    (ModelFormat.COREML, Precision.INT8): ("coreml_int8_weights", "coreml_int8_weights"),
    (ModelFormat.COREML, Precision.FP16): ("coreml_fp16", "coreml_fp16"),
    (ModelFormat.COREML, Precision.INT4_WEIGHTS): ("coreml_palettized", "coreml_palettized"),
}
"""With samples, and without; of ONNX the graph decides."""


def plan_builds(
    formats: Sequence[ModelFormat], precisions: Sequence[Precision] = ()
) -> tuple[Build, ...]:
    """Return each format as it is and in each precision, compressed ones first.

    The order is the publisher's: what a box takes that has measured nothing.
    """
    smaller = [one for one in precisions if one is not _FP32]
    return tuple(
        Build(model_format, precision)
        for model_format in formats
        for precision in (_FP32, *smaller)
        if precision is _FP32 or _is_compressible(model_format, precision)
    )


def _is_compressible(model_format: ModelFormat, precision: Precision) -> bool:
    return model_format is ModelFormat.ONNX or (model_format, precision) in _RECIPES


def measure_size(file: ModelFile) -> int:
    """Return the bytes of a model with all its files."""
    if file.path.is_dir():
        return sum(path.stat().st_size for path in file.path.rglob("*") if path.is_file())
    weights = file.path.with_suffix(".bin")
    extra = weights.stat().st_size if file.format is ModelFormat.OPENVINO else 0
    return file.path.stat().st_size + extra


def _sum_up(proofs: Sequence[Proof], model_format: ModelFormat) -> tuple[Outcome, str]:
    if not proofs:
        return Outcome.NOT_RUN, f"nothing here runs {model_format.value}, so it is not proven"
    good = [proof for proof in proofs if proof.outcome is Outcome.OK]
    if good:
        return Outcome.OK, "; ".join(_iter_reasons(proofs))
    worst = Outcome.REFUSED if any(p.outcome is Outcome.REFUSED for p in proofs) else Outcome.FAILED
    return worst, "; ".join(_iter_reasons(proofs))


def _iter_reasons(proofs: Sequence[Proof]) -> Iterator[str]:
    return (f"{proof.runtime}: {proof.reason}" for proof in proofs if proof.reason)


def _to_search_options(budget: Budget) -> dict[str, float]:
    # What is not asked for holds anyway; the tool's own defaults ask for more.
    return {"min_agreement": budget.agreement or 0.0, "min_sqnr_db": budget.sqnr or 0.0}


def _describe_step(tool: ToolEntry, done: HopResult) -> dict[str, Any]:
    return {
        "tool": tool.name,
        "duration_s": round(done.duration_s, 2),
        "peak_mb": round(done.peak_mb, 1),
        "facts": dict(done.facts),
    }
