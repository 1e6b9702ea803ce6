"""Recipes from Core ML to Core ML, by coremltools; they run on Linux, too.

Owns the compression of an ML program's weights. Runs in the process of a hop. Nothing here runs
the model: only macOS can, elsewhere `converters.evidence` interprets the program.
"""

from typing import Any

from converters.compression.toolchain import (
    TOOL_FAULTS,
    get_choice,
    import_library,
    read_options,
    tell,
)
from converters.errors import CompressionError, RecipeError
from converters.task import Facts, Task

EXTRA = "convert"
PALETTE_EXTRA = "compress"
_PACKAGES = ("coremltools",)
_COMPRESSED = "constexpr_"
"""What the operations begin with that make full weights of compressed ones."""

WEIGHT_OPTIONS: dict[str, Any] = {"symmetric": True, "min_weights": 512}
PALETTE_OPTIONS: dict[str, Any] = {"bits": 6, "mode": "kmeans", "min_weights": 512}


def int8_weights(task: Task) -> Facts:
    """Store weights in 8 bits, a scale for each channel; arithmetic stays in float.

    Options: `symmetric`; `min_weights`: tensors with fewer values stay as they are.

    Raises:
        RecipeError: an option does not fit.
        CompressionError: coremltools cannot take the model.
    """
    options = read_options(task, WEIGHT_OPTIONS)
    compress = import_library("coremltools.optimize.coreml", EXTRA)
    config = compress.OpLinearQuantizerConfig(
        mode="linear_symmetric" if options["symmetric"] else "linear",
        dtype="int8",
        granularity="per_channel",
        weight_threshold=options["min_weights"],
    )
    return _compress(task, "coreml_int8_weights", compress.linear_quantize_weights, config)


def palettized(task: Task) -> Facts:
    """Store weights as indices into a table of each tensor; arithmetic stays in float.

    Options: `bits` of an index: 1, 2, 3, 4, 6 or 8; `mode`: `kmeans`, which needs scikit-learn, or
    `uniform`; `min_weights`:
    tensors with fewer values stay as they are.

    Raises:
        RecipeError: an option does not fit.
        CompressionError: coremltools cannot take the model.
    """
    options = read_options(task, PALETTE_OPTIONS)
    get_choice(options, "bits", (1, 2, 3, 4, 6, 8))
    if get_choice(options, "mode", ("kmeans", "uniform")) == "kmeans":
        # coremltools imports it in the middle of its work.
        import_library("sklearn.cluster", PALETTE_EXTRA)
    compress = import_library("coremltools.optimize.coreml", EXTRA)
    config = compress.OpPalettizerConfig(
        mode=options["mode"], nbits=options["bits"], weight_threshold=options["min_weights"]
    )
    facts = _compress(task, "coreml_palettized", compress.palettize_weights, config)
    return facts | {"bits": options["bits"]}


def _compress(task: Task, recipe: str, apply: Any, config: Any) -> dict[str, Any]:
    compress = import_library("coremltools.optimize.coreml", EXTRA)
    model = _read(task)
    before = _count_compressed(model)
    task.report(0.3, "compressing weights")
    try:
        made = apply(model, compress.OptimizationConfig(global_config=config))
        made.save(str(task.target))
    except TOOL_FAULTS as exc:
        msg = f"coremltools cannot compress the weights: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    added = _count_compressed(made) - before
    no_op = None if added > 0 else "no weight was compressed: none has as many values as asked for"
    return tell(task, recipe, no_op, _PACKAGES, compressed_weights=added)


def fp16(task: Task) -> Facts:
    """Turn a program of fp32 into fp16, its inputs and outputs left as they are.

    Takes no options.

    Raises:
        RecipeError: an option is given.
        CompressionError: coremltools cannot take the model.
    """
    read_options(task, {})
    coremltools = import_library("coremltools", EXTRA)
    programs = import_library("coremltools.converters.mil.frontend.milproto.load", EXTRA)
    model = _read(task)
    spec = model.get_spec()
    before = _count_fp16(spec)
    task.report(0.3, "turning weights into fp16")
    try:
        program = programs.load(
            spec,
            specification_version=spec.specificationVersion,
            file_weights_dir=model.weights_dir,
        )
        made = coremltools.convert(
            program,
            compute_precision=coremltools.precision.FLOAT16,
            minimum_deployment_target=_find_target(coremltools, spec.specificationVersion),
            skip_model_load=True,
        )
        made.save(str(task.target))
    except TOOL_FAULTS as exc:
        msg = f"coremltools cannot turn the model into fp16: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    added = _count_fp16(made.get_spec()) - before
    no_op = None if added > 0 else "no operation was turned into fp16: the model is in fp16 already"
    return tell(task, "coreml_fp16", no_op, _PACKAGES, fp16_operations=added)


def _find_target(coremltools: Any, version: int) -> Any:
    """Return the oldest system that runs this version of the format."""
    return min(
        (item for item in coremltools.target if int(item) == version), key=lambda item: item.name
    )


def _read(task: Task) -> Any:
    coremltools = import_library("coremltools", EXTRA)
    try:
        model = coremltools.models.MLModel(str(task.source.path), skip_model_load=True)
        kind = model.get_spec().WhichOneof("Type")
    except (*TOOL_FAULTS, import_library("google.protobuf.message", EXTRA).DecodeError) as exc:
        msg = f"{task.source.path.name} cannot be read as Core ML: {exc}"
        raise CompressionError(msg) from exc
    if kind != "mlProgram":
        msg = f"{task.source.path.name} is no ML program but {kind}: convert it again"
        raise RecipeError(msg)
    return model


def _iter_operations(spec: Any) -> Any:
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            yield from block.operations


def _count_compressed(model: Any) -> int:
    operations = _iter_operations(model.get_spec())
    return sum(operation.type.startswith(_COMPRESSED) for operation in operations)


def _count_fp16(spec: Any) -> int:
    from coremltools.proto import MIL_pb2

    return sum(
        output.type.tensorType.dataType == MIL_pb2.FLOAT16
        for operation in _iter_operations(spec)
        for output in operation.outputs
    )
