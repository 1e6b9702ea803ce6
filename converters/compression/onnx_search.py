"""The search of `sensitivity` over an ONNX graph, with real candidates run by ONNX Runtime.

Owns building and running them. Runs in the process of a hop.

Invariants: calibration runs once; the file that is left is one that was measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.compression.calibration import CalibrationSet, read_calibration
from converters.compression.graph import explain_no_op, read_model, take_census
from converters.compression.onnx_recipes import (
    DYNAMIC_OPTIONS,
    EXTRA,
    STATIC_OPTIONS,
    check_nodes,
    prepare,
    quantize_dynamic,
    quantize_static,
)
from converters.compression.sensitivity import DEFAULT_TRIALS, Budget, Found, Score, Search
from converters.compression.toolchain import (
    get_calibration_file,
    get_choice,
    import_library,
    open_session,
    read_inputs,
    read_options,
    tell,
)
from converters.errors import CalibrationError, CompressionError
from converters.task import Facts, Task
from platforms.artifact import TensorSpec
from platforms.errors import PlatformError
from platforms.parity import compare_output, find_worst
from platforms.runtimes.base import Array

SEARCH_OPTIONS: dict[str, Any] = {
    "recipe": "onnx_static",
    "golden": "",
    "min_agreement": 0.99,
    "min_sqnr_db": 20.0,
    "max_trials": DEFAULT_TRIALS,
    "time_limit_s": 0.0,
}
GOLDEN_ROWS_MAX = 256
_FAILED = Score(None, -math.inf, 0)


def search(task: Task) -> Facts:
    """Quantize to INT8 but for as few nodes as the budget asks for.

    Options: `recipe`: `onnx_static` or `onnx_dynamic`, and that recipe's own options, of which
    `exclude` is left out in every trial; `golden` (a file of `CalibrationSet.save`, needed), whose
    first 256 rows are the judges; `min_agreement` and `min_sqnr_db`, the budget; `max_trials`;
    `time_limit_s`, after which no trial begins.

    Raises:
        RecipeError, CalibrationError: an option, or the data, does not fit.
        CompressionError: not even the plain form could be built.
    """
    is_static = task.options.get("recipe", "onnx_static") == "onnx_static"
    own = STATIC_OPTIONS if is_static else DYNAMIC_OPTIONS
    options = read_options(task, {**own, **SEARCH_OPTIONS})
    get_choice(options, "recipe", ("onnx_static", "onnx_dynamic"))
    import_library("onnx", EXTRA)
    bench = _prepare(task, options)
    budget = Budget(options["min_agreement"], options["min_sqnr_db"])
    bench.build(frozenset(), task.target)
    found = Search(
        _find_nodes(bench.prepared, options),
        bench.measure,
        budget,
        options["max_trials"],
        options["time_limit_s"],
        task.report,
    ).run()
    bench.build(frozenset(found.left_out), task.target)
    return _tell(task, options, bench, found)


def _prepare(task: Task, options: dict[str, Any]) -> "_Bench":
    specs = read_inputs(task.source.path, "ort")
    golden = _read_golden(options, specs)
    calibration = None
    if options["recipe"] == "onnx_static":
        calibration = read_calibration(get_calibration_file(options), specs)
    prepared = prepare(task.source.path, task.scratch)
    check_nodes(prepared, options["exclude"])
    reference = _answer(task.source.path, golden, specs)
    return _Bench(prepared, task.scratch, options, specs, calibration, golden, reference)


def _read_golden(options: dict[str, Any], specs: tuple[TensorSpec, ...]) -> CalibrationSet:
    if not options["golden"]:
        msg = "the search needs golden inputs to score candidates on"
        raise CalibrationError(msg)
    return read_calibration(Path(options["golden"]), specs).take(slice(0, GOLDEN_ROWS_MAX))


def _answer(path: Path, golden: CalibrationSet, specs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Return a model's outputs, one run after the other, joined along axis 0."""
    session = open_session(path, "ort")
    try:
        runs = [session.run(feed) for feed in golden.iter_feeds(specs)]
    finally:
        session.close()
    return {name: np.concatenate([np.atleast_1d(run[name]) for run in runs]) for name in runs[0]}


def _find_nodes(prepared: Path, options: Mapping[str, Any]) -> list[str]:
    """Return the names of the nodes that the recipe would quantize, in the graph's order."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    kinds = (
        {*QDQRegistry, *QLinearOpsRegistry}
        if options["recipe"] == "onnx_static"
        else set(options["operators"])
    )
    nodes = read_model(prepared, weights=False).graph.node
    return [
        node.name for node in nodes if node.op_type in kinds and node.name not in options["exclude"]
    ]


@dataclass(frozen=True)
class _Bench:
    """Builds candidates and runs them."""

    prepared: Path
    scratch: Path
    options: dict[str, Any]
    specs: tuple[TensorSpec, ...]
    calibration: CalibrationSet | None
    golden: CalibrationSet
    reference: Mapping[str, Array]

    def build(self, left_out: frozenset[str], target: Path) -> None:
        """Write the candidate that leaves these nodes in fp32.

        Raises:
            CompressionError: the quantizer cannot.
        """
        options = {**self.options, "exclude": sorted({*self.options["exclude"], *left_out})}
        if self.calibration is None:
            quantize_dynamic(self.prepared, target, options)
            return
        # The first, which quantizes everything, finds the ranges of all.
        cache = self.scratch / "ranges.json"
        quantize_static(self.prepared, target, options, self.calibration, self.specs, cache=cache)

    def measure(self, left_out: frozenset[str]) -> Score:
        """Build a candidate, run it, and compare; one that fails scores −infinity."""
        candidate = self.scratch / "candidate.onnx"
        try:
            self.build(left_out, candidate)
            answers = _answer(candidate, self.golden, self.specs)
        except (CompressionError, PlatformError):
            return _FAILED
        parities = [compare_output(name, self.reference[name], answers[name]) for name in answers]
        agreement, sqnr_db = find_worst(parities)
        return Score(agreement, sqnr_db, candidate.stat().st_size)


def _tell(task: Task, options: dict[str, Any], bench: _Bench, found: Found) -> Facts:
    before, after = take_census(bench.prepared), take_census(task.target)
    return tell(
        task,
        f"{options['recipe']}_search",
        explain_no_op(before, after, "Conv, MatMul, Gemm and others"),
        ("onnx", "onnxruntime"),
        operators=dict(after.operators),
        quantized_nodes=after.quantized_nodes - before.quantized_nodes,
        calibration=dict(bench.calibration.facts) if bench.calibration else None,
        golden_rows=bench.golden.samples,
        budget={key: options[key] for key in ("min_agreement", "min_sqnr_db")},
        is_within_budget=found.best.is_within_budget,
        left_in_fp32=sorted({*options["exclude"], *found.left_out}),
        best=found.best.to_json(),
        plain=found.trials[0].to_json(),
        trials=[trial.to_json() for trial in found.trials],
        why_ended=found.why_ended,
    )
