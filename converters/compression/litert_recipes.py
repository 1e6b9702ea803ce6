"""Recipes from TFLite to TFLite, by Google's ai-edge-quantizer.

Owns the three kinds of INT8 that LiteRT knows. Runs in the process of a hop.

`dynamic` is there because it is the smallest step for a user of LiteRT, and because its trap must
be known: LiteRT 2 computes it rightly, tflite-runtime 2.14 loads and runs it and answers at chance
(ours, EfficientNet-Lite0: agreement .000). What serves it must be the runtime it was proven on.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.compression.calibration import CalibrationSet, read_calibration
from converters.compression.toolchain import (
    TOOL_FAULTS,
    get_calibration_file,
    get_choice,
    import_library,
    read_options,
    tell,
)
from converters.errors import CompressionError
from converters.task import Facts, Report, Task
from platforms.artifact import TensorSpec
from platforms.runtimes.base import DATATYPES

EXTRA = "convert"
_PACKAGES = ("ai-edge-quantizer", "ai-edge-litert")
_STATIC, _DYNAMIC, _WEIGHT_ONLY = "static_wi8_ai8", "dynamic_wi8_afp32", "weight_only_wi8_afp32"
_METHODS = {"minmax": "min_max_update", "moving_average": "moving_average_update"}
STATIC_OPTIONS: dict[str, Any] = {"calibration": "", "method": "minmax", "edges": "float"}
_NARROW = ("INT8", "UINT8", "INT4")


def static_int8(task: Task) -> Facts:
    """Quantize weights and activations to 8 bits, weights per channel.

    Options: `calibration` (a file of `CalibrationSet.save`, needed); `method`: `minmax`, or
    `moving_average`, which is the library's default and cost 20 dB or more on each of our nets (MLP
    43.0 to 15.8, CNN 36.4 to 16.8, encoder 36.6 to 16.0); `edges`: `float` leaves the
    model's inputs and outputs as they are, `int8` has them quantized too, for accelerators that
    take nothing else; the manifest must then tell scale and zero point.

    Raises:
        RecipeError, CalibrationError: an option, or the data, does not fit.
        CompressionError: the quantizer cannot take the model.
    """
    options = read_options(task, STATIC_OPTIONS)
    method = get_choice(options, "method", tuple(_METHODS))
    edges = get_choice(options, "edges", ("float", "int8"))
    import_library("ai_edge_quantizer", EXTRA)
    source = _sign(task.source.path, task.scratch)
    signature, specs = _read_signature(source)
    calibration = read_calibration(get_calibration_file(options), specs)
    seen = _Seen(source, signature, specs, calibration, method, edges == "float")
    facts = _quantize(task, "litert_static", _STATIC, seen)
    return {
        **facts,
        "calibration": dict(calibration.facts),
        "method": method,
        "edges": edges,
    }


@dataclass(frozen=True)
class _Seen:
    """What a static quantizer needs beside the model."""

    source: Path
    """The model, with a signature."""
    signature: str
    specs: tuple[TensorSpec, ...]
    calibration: CalibrationSet
    method: str
    has_float_edges: bool


def dynamic_int8(task: Task) -> Facts:
    """Quantize weights to 8 bits, and activations as they come. Wrong in tflite-runtime 2.14.

    Takes no options.

    Raises:
        RecipeError: an option is given.
        CompressionError: the quantizer cannot take the model.
    """
    read_options(task, {})
    return _quantize(task, "litert_dynamic", _DYNAMIC, None)


def weight_only(task: Task) -> Facts:
    """Store weights in 8 bits; arithmetic stays in float: a quarter of the size, no speed.

    Takes no options.

    Raises:
        RecipeError: an option is given.
        CompressionError: the quantizer cannot take the model.
    """
    read_options(task, {})
    return _quantize(task, "litert_weight_only", _WEIGHT_ONLY, None)


def _quantize(
    task: Task,
    name: str,
    kind: str,
    seen: _Seen | None,
) -> dict[str, Any]:
    library = import_library("ai_edge_quantizer.quantizer", EXTRA)
    recipes = import_library("ai_edge_quantizer.recipe", EXTRA)
    before = count_narrow_tensors(task.source.path)
    try:
        source = seen.source if seen is not None else task.source.path
        quantizer = library.Quantizer(str(source), getattr(recipes, kind)())
        ranges = _calibrate(quantizer, seen, task.report) if seen is not None else None
        task.report(0.6, "quantizing")
        made = quantizer.quantize(ranges, enable_progress_report=False)
        task.target.write_bytes(made.quantized_model)
    except TOOL_FAULTS as exc:
        msg = f"ai-edge-quantizer cannot take the model: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    quantized = count_narrow_tensors(task.target) - before
    no_op = None if quantized else "no tensor was quantized: the model has no weights it can take"
    return tell(task, name, no_op, _PACKAGES, quantized_tensors=quantized)


def _calibrate(quantizer: Any, seen: _Seen, report: Report) -> Any:
    """Return the ranges of all tensors.

    By the library's own default, a moving average of each sample's range, all but the last few
    samples are as good as forgotten and the largest values cut off.
    """
    library = import_library("ai_edge_quantizer.calibrator", EXTRA)
    managers = import_library("ai_edge_quantizer.recipe_manager", EXTRA)
    ranges = import_library("ai_edge_quantizer.utils.qsv_utils", EXTRA)
    if seen.has_float_edges:
        for edge in ("INPUT", "OUTPUT"):
            quantizer.update_quantization_recipe(".*", edge, algorithm_key="no_quantize")
    report(0.2, f"calibrating with {seen.calibration.samples} samples")
    feeds = list(seen.calibration.iter_feeds(seen.specs))
    calibrator = library.Calibrator(
        seen.source.read_bytes(),
        num_threads=1,
        qsv_update_func=getattr(ranges, _METHODS[seen.method]),
    )
    manager = managers.RecipeManager()
    manager.load_quantization_recipe(quantizer.get_quantization_recipe())
    calibrator.calibrate({seen.signature: feeds}, manager)
    return calibrator.get_model_qsvs()


def _sign(path: Path, scratch: Path) -> Path:
    """Return the model, or a copy with a signature where it has none: calibration goes by them.

    Files of TensorFlow 1 and MediaPipe have none.

    Raises:
        CompressionError: it is no `.tflite` file, or has several graphs and no signature.
    """
    schema = import_library("ai_edge_litert.schema_py_generated", EXTRA)
    flatbuffers = import_library("flatbuffers", EXTRA)
    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    except (*TOOL_FAULTS, struct.error) as exc:
        msg = f"{path.name} cannot be read as TFLite: {exc!r}"
        raise CompressionError(msg) from exc
    if model.signatureDefs:
        return path
    if len(model.subgraphs) != 1:
        msg = f"{path.name} has {len(model.subgraphs)} graphs and no signature to tell which runs"
        raise CompressionError(msg)
    (graph,) = model.subgraphs
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = "serving_default", 0
    for edge, indices in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        maps = [_map_tensor(schema, graph.tensors[index].name, index) for index in indices]
        setattr(signature, edge, maps)
    model.signatureDefs = [signature]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    signed = scratch / "signed.tflite"
    signed.write_bytes(builder.Output())
    return signed


def _map_tensor(schema: Any, name: bytes, index: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, int(index)
    return entry


def _read_signature(path: Path) -> tuple[str, tuple[TensorSpec, ...]]:
    """Return the first signature's name and its inputs, by which the quantizer is fed.

    Raises:
        CompressionError: the file cannot be read.
    """
    litert = import_library("ai_edge_litert.interpreter", EXTRA)
    try:
        interpreter = litert.Interpreter(model_path=str(path))
        signature = next(iter(interpreter.get_signature_list()))
        details = interpreter.get_signature_runner(signature).get_input_details()
    except TOOL_FAULTS as exc:
        msg = f"{path.name} cannot be read as TFLite: {exc}"
        raise CompressionError(msg) from exc
    specs = tuple(_describe(name, found) for name, found in details.items())
    return signature, specs


def _describe(name: str, found: dict[str, Any]) -> TensorSpec:
    shape = tuple(int(axis) for axis in found["shape"])
    return TensorSpec(name, DATATYPES[np.dtype(found["dtype"])], shape)


def count_narrow_tensors(path: Path) -> int:
    """Return how many tensors of a `.tflite` file hold 8 bits or fewer each.

    Raises:
        CompressionError: it is no such file.
    """
    schema = import_library("ai_edge_litert.schema_py_generated", EXTRA)
    narrow = {getattr(schema.TensorType, name) for name in _NARROW}
    try:
        model = schema.Model.GetRootAs(path.read_bytes(), 0)
        graphs = [model.Subgraphs(index) for index in range(model.SubgraphsLength())]
        return sum(
            graph.Tensors(index).Type() in narrow
            for graph in graphs
            for index in range(graph.TensorsLength())
        )
    except (*TOOL_FAULTS, struct.error) as exc:
        msg = f"{path.name} cannot be read as TFLite: {exc!r}"
        raise CompressionError(msg) from exc
