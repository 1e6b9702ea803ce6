"""Recipes from ONNX to ONNX, by ONNX Runtime's own tools.

Owns the settings that our measurements favour (docs/conversion.md, "Compression") and the finding
that nothing was quantized. Runs in the process of a hop: `onnx` and `onnxruntime` are imported
inside.

Invariants: the source is read only; what is not float32 at the edges of the model stays so.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from converters.compression.calibration import CalibrationSet, read_calibration
from converters.compression.graph import (
    explain_no_fp16,
    explain_no_op,
    name_nodes,
    read_model,
    take_census,
)
from converters.compression.toolchain import (
    TOOL_FAULTS,
    get_calibration_file,
    get_choice,
    import_library,
    read_inputs,
    read_options,
    tell,
)
from converters.errors import CompressionError, RecipeError
from converters.task import Facts, Task
from platforms.artifact import TensorSpec
from platforms.runtimes.base import Array

EXTRA = "convert"
_PACKAGES = ("onnx", "onnxruntime")
_METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}

STATIC_OPTIONS: dict[str, Any] = {
    "calibration": "",
    "method": "minmax",
    "per_channel": True,
    "reduce_range": False,
    "exclude": (),
}
DYNAMIC_OPTIONS: dict[str, Any] = {
    "per_channel": True,
    "reduce_range": False,
    "exclude": (),
    "operators": ("MatMul", "Gemm", "Attention", "LSTM", "EmbedLayerNormalization"),
}
FP16_OPTIONS: dict[str, Any] = {"keep_io_types": True, "exclude": ()}
WEIGHT_ONLY_OPTIONS: dict[str, Any] = {
    "bits": 4,
    "block_size": 32,
    "symmetric": True,
    "rewrite_gemm": False,
    "exclude": (),
}


class _Feeds:
    """Calibration samples in the form that ONNX Runtime's calibrators ask for."""

    def __init__(self, found: CalibrationSet, specs: tuple[TensorSpec, ...]) -> None:
        self._feeds: Iterator[dict[str, Array]] = found.iter_feeds(specs)

    def get_next(self) -> dict[str, Array] | None:
        """Return the next run's inputs, or None at the end."""
        return next(self._feeds, None)


def static_int8(task: Task) -> Facts:
    """Quantize weights and activations to 8 bits: QDQ, unsigned activations, signed weights.

    Options: `calibration` (a file of `CalibrationSet.save`, needed); `method`: `minmax`,
    `percentile` or `entropy`, of which the first was as good and 5–10 times as fast; `per_channel`
    weights (per tensor ruins depthwise convolutions: EfficientNet-Lite0 agreed in .46 instead of
    .79); `reduce_range` to 7-bit weights, for x86 without VNNI, whose 16-bit sums overflow;
    `exclude`: names of nodes that stay in fp32.

    Raises:
        RecipeError, CalibrationError: an option, or the data, does not fit.
        CompressionError: ONNX Runtime cannot quantize the model.
    """
    options = read_options(task, STATIC_OPTIONS)
    get_choice(options, "method", tuple(_METHODS))
    import_library("onnx", EXTRA)
    specs = read_inputs(task.source.path, "ort")
    calibration = read_calibration(get_calibration_file(options), specs)
    task.report(0.1, "preparing the graph")
    prepared = prepare(task.source.path, task.scratch)
    task.report(0.3, f"calibrating with {calibration.samples} samples")
    quantize_static(prepared, task.target, options, calibration, specs)
    return _tell_quantized(task, "onnx_static", prepared, "Conv, MatMul, Gemm and others") | {
        "calibration": dict(calibration.facts),
        "method": options["method"],
        "reduce_range": options["reduce_range"],
        "left_in_fp32": list(options["exclude"]),
    }


def quantize_static(
    prepared: Path,
    target: Path,
    options: dict[str, Any],
    calibration: CalibrationSet,
    specs: tuple[TensorSpec, ...],
    cache: Path | None = None,
) -> None:
    """Write the static INT8 form of a prepared graph.

    Args:
        prepared: by `prepare`.
        target: written.
        options: as `STATIC_OPTIONS`.
        calibration: adapted to `specs`.
        specs: the model's inputs.
        cache: of the ranges that calibration found, so that a search calibrates once.

    Raises:
        RecipeError: a node to leave out is not there.
        CompressionError: ONNX Runtime cannot quantize the model.
    """
    from onnxruntime import quantization

    check_nodes(prepared, options["exclude"])
    try:
        quantization.quantize_static(
            prepared,
            target,
            _Feeds(calibration, specs),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=options["per_channel"],
            reduce_range=options["reduce_range"],
            nodes_to_exclude=list(options["exclude"]),
            calibrate_method=quantization.CalibrationMethod[_METHODS[options["method"]]],
            calibration_cache_path=cache,
        )
    except TOOL_FAULTS as exc:
        msg = f"ONNX Runtime cannot quantize the model: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc


def dynamic_int8(task: Task) -> Facts:
    """Quantize weights to 8 bits, and activations as they come; needs no calibration.

    Convolutions are left alone by default: in dynamic INT8 they ran at a tenth of fp32's speed.

    Options: `per_channel`, `reduce_range` and `exclude` as `static_int8`; `operators` to quantize.

    Raises:
        RecipeError: an option does not fit.
        CompressionError: ONNX Runtime cannot quantize the model.
    """
    options = read_options(task, DYNAMIC_OPTIONS)
    import_library("onnx", EXTRA)
    task.report(0.1, "preparing the graph")
    prepared = prepare(task.source.path, task.scratch)
    task.report(0.5, "quantizing")
    quantize_dynamic(prepared, task.target, options)
    wanted = ", ".join(options["operators"])
    return _tell_quantized(task, "onnx_dynamic", prepared, wanted) | {
        "left_in_fp32": list(options["exclude"])
    }


def quantize_dynamic(prepared: Path, target: Path, options: dict[str, Any]) -> None:
    """Write the dynamic INT8 form of a prepared graph.

    Raises:
        RecipeError: a node to leave out is not there.
        CompressionError: ONNX Runtime cannot quantize the model.
    """
    from onnxruntime import quantization

    check_nodes(prepared, options["exclude"])
    try:
        quantization.quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=list(options["operators"]),
            per_channel=options["per_channel"],
            reduce_range=options["reduce_range"],
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_add_products(options["exclude"]),
            extra_options={"MatMulConstBOnly": True},
        )
    except TOOL_FAULTS as exc:
        msg = f"ONNX Runtime cannot quantize the model: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc


def _add_products(names: Iterable[str]) -> list[str]:
    """Return the names, and what the dynamic quantizer calls a Gemm's product before it looks.

    It splits Gemm into MatMul and Add first: by its own name none would be left out.
    """
    return [form for name in names for form in (name, f"{name}_MatMul")]


def fp16(task: Task) -> Facts:
    """Turn weights and arithmetic into fp16; half the size. On CPUs it is no faster, or slower.

    Options: `keep_io_types`: the model still takes and gives float32; `exclude`: names of nodes
    that stay in fp32.

    Raises:
        RecipeError: an option does not fit.
        CompressionError: the model cannot be turned.
    """
    options = read_options(task, FP16_OPTIONS)
    onnx = import_library("onnx", EXTRA)
    float16 = import_library("onnxruntime.transformers.float16", EXTRA)
    model = read_model(task.source.path)
    name_nodes(model)
    _check_names({node.name for node in model.graph.node}, options["exclude"])
    task.report(0.3, "turning weights into fp16")
    try:
        made = float16.convert_float_to_float16(
            model,
            keep_io_types=options["keep_io_types"],
            node_block_list=list(options["exclude"]) or None,
        )
        onnx.save(made, str(task.target))
    except TOOL_FAULTS as exc:
        msg = f"the model cannot be turned into fp16: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    before, after = take_census(task.source.path), take_census(task.target)
    return tell(
        task,
        "onnx_fp16",
        explain_no_fp16(before, after),
        _PACKAGES,
        weight_bytes=dict(after.weight_bytes),
    )


def weight_only(task: Task) -> Facts:
    """Store the weights of MatMul nodes in 4 or 8 bits by blocks; arithmetic stays in float.

    Options: `bits`: 4 or 8; `block_size`: weights that share a scale, a power of 2 from 16;
    `symmetric`; `exclude`: names of nodes that stay in fp32; `rewrite_gemm`: first turn Gemm into
    MatMul and Add, without which a net of Gemm comes back as it went in.

    Raises:
        RecipeError: an option does not fit.
        CompressionError: ONNX Runtime cannot quantize the model.
    """
    options = read_options(task, WEIGHT_ONLY_OPTIONS)
    get_choice(options, "bits", (4, 8))
    get_choice(options, "block_size", (16, 32, 64, 128, 256))
    onnx = import_library("onnx", EXTRA)
    nbits = import_library("onnxruntime.quantization.matmul_nbits_quantizer", EXTRA)
    model = read_model(task.source.path)
    name_nodes(model)
    _check_names({node.name for node in model.graph.node}, options["exclude"])
    if options["rewrite_gemm"]:
        model = _rewrite_gemm(model)
    task.report(0.3, f"quantizing weights to {options['bits']} bits")
    try:
        quantizer = nbits.MatMulNBitsQuantizer(
            model,
            bits=options["bits"],
            block_size=options["block_size"],
            is_symmetric=options["symmetric"],
            nodes_to_exclude=list(options["exclude"]),
        )
        quantizer.process()
        onnx.save(quantizer.model.model, str(task.target))
    except TOOL_FAULTS as exc:
        msg = f"ONNX Runtime cannot quantize the weights: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    facts = _tell_quantized(task, f"onnx_weights{options['bits']}", task.source.path, "MatMul")
    return facts | {"bits": options["bits"], "block_size": options["block_size"]}


def _rewrite_gemm(model: Any) -> Any:
    from onnxruntime.quantization.onnx_model import ONNXModel

    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
    return wrapped.model


def prepare(source: Path, scratch: Path) -> Path:
    """Fold, fuse and infer shapes, as quantizers need it, and name every node.

    Returns:
        A file in `scratch`.

    Raises:
        CompressionError: ONNX Runtime cannot read or optimize the model.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    read_model(source, weights=False)
    prepared = scratch / "prepared.onnx"
    try:
        # Symbolic shapes would need sympy, and nothing here quantizes better with them.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        model = read_model(prepared)
        if name_nodes(model):
            onnx.save(model, str(prepared))
    except TOOL_FAULTS as exc:
        msg = f"ONNX Runtime cannot prepare the graph: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    return prepared


def check_nodes(prepared: Path, names: tuple[str, ...] | list[str]) -> None:
    """Refuse names of nodes that the graph has not: the quantizer would ignore them.

    Raises:
        RecipeError: there is no such node.
    """
    if not names:
        return
    graph = read_model(prepared, weights=False).graph
    _check_names({node.name for node in graph.node}, names)


def _check_names(known: set[str], names: tuple[str, ...] | list[str]) -> None:
    unknown = sorted(set(names) - known)
    if unknown:
        msg = f"there is no node {', '.join(unknown)} to leave in fp32"
        raise RecipeError(msg)


def _tell_quantized(task: Task, recipe: str, prepared: Path, wanted: str) -> dict[str, Any]:
    before, after = take_census(prepared), take_census(task.target)
    return tell(
        task,
        recipe,
        explain_no_op(before, after, wanted),
        _PACKAGES,
        operators=dict(after.operators),
        quantized_nodes=after.quantized_nodes - before.quantized_nodes,
        weight_bytes=dict(after.weight_bytes),
    )
