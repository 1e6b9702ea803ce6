"""ONNX → a TensorRT engine, on the box that will run it.

An engine is bound to the GPU's architecture and to TensorRT's version: it is built at staging,
kept by both, and never published. `describe_engine` gives the key it is kept by.

The engine computes in the file's own precision (a strongly typed network): for half precision
the source is the fp16 form that the recipe `onnx_fp16` makes. TensorRT 11 knows no other way.

Options: `batch` (least, usual and most rows; [1, 1, 8]), `workspace_mb` (1024), `timing_cache`
(path; read and written).

Source: TensorRT 10 and 11 Python API, `IBuilder.build_serialized_network`, `OnnxParser`. Written
without hardware; nothing of it has run yet.
"""

from pathlib import Path
from typing import Any

from converters.errors import HopFailedError, OperatorError, SourceError
from converters.routes.tools.telling import tell
from converters.task import Facts, Task
from platforms.artifact import Datatype, Precision, TensorSpec

_BATCH = (1, 1, 8)
_WORKSPACE_MB = 1024


def convert(task: Task) -> Facts:
    """Write a serialized engine; blocks for minutes while kernels are timed on the GPU.

    Raises:
        OperatorError: TensorRT's parser has no form of an operator.
        SourceError: it cannot read the file.
        HopFailedError: no engine came of it.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    task.report(0.05, "reading the model")
    if not parser.parse_from_file(str(task.source.path)):
        _refuse(parser, task.source.path.name)
    config = _configure(trt, builder, network, task)
    cache = _load_timings(config, task.options.get("timing_cache"))
    inputs = [_to_spec(trt, network.get_input(n)) for n in range(network.num_inputs)]
    outputs = [_to_spec(trt, network.get_output(n)) for n in range(network.num_outputs)]
    task.report(0.1, "timing kernels on the GPU")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        msg = "TensorRT built no engine: its log says why"
        raise HopFailedError(msg)
    task.target.write_bytes(memoryview(engine))
    if cache is not None:
        cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    operators: dict[str, int] = {}
    for index in range(network.num_layers):
        kind = network.get_layer(index).type.name
        operators[kind] = operators.get(kind, 0) + 1
    facts = tell(inputs, outputs, operators, task.source.precision, ["tensorrt"])
    return {**facts, "engine": describe_engine(trt)}


def describe_engine(trt: Any) -> dict[str, str]:
    """Return what an engine is bound to: TensorRT's version and, where torch can tell, the GPU."""
    found = {"tensorrt": str(trt.__version__)}
    try:
        import torch
    except ImportError:
        return found
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return found


def _network_flags(trt: Any) -> int:
    # The one is gone in TensorRT 11, the other came with 8.6.
    known = trt.NetworkDefinitionCreationFlag.__members__
    wanted = (known.get("EXPLICIT_BATCH"), known.get("STRONGLY_TYPED"))
    return sum(1 << int(flag) for flag in wanted if flag is not None)


def _is_strongly_typed(trt: Any) -> bool:
    return "STRONGLY_TYPED" in trt.NetworkDefinitionCreationFlag.__members__


def _refuse(parser: Any, name: str) -> None:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    for error in errors:
        operator = getattr(error, "node_operator", lambda: "")()
        if operator and "UNSUPPORTED" in str(error.code()):
            msg = f"TensorRT has no form of {operator}: {error.desc()}"
            raise OperatorError(msg, operator, getattr(error, "node_name", lambda: "")())
    said = "; ".join(error.desc() for error in errors) or "it does not say why"
    msg = f"TensorRT cannot read {name}: {said}"
    raise SourceError(msg)


def _configure(trt: Any, builder: Any, network: Any, task: Task) -> Any:
    config = builder.create_builder_config()
    workspace_mb = int(task.options.get("workspace_mb", _WORKSPACE_MB))
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mb * 10**6)
    if task.source.precision is Precision.FP16 and not _is_strongly_typed(trt):
        config.set_flag(trt.BuilderFlag.FP16)
    # Else TF32, with ten bits of mantissa, stands in for float32 on Ampere and later.
    config.clear_flag(trt.BuilderFlag.TF32)
    rows = tuple(task.options.get("batch", _BATCH))
    profile = builder.create_optimization_profile()
    is_free = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if any(axis < 0 for axis in tensor.shape):
            is_free = True
            shapes = [_fill(tensor.shape, count) for count in rows]
            profile.set_shape(tensor.name, *shapes)
    if is_free:
        config.add_optimization_profile(profile)
    return config


def _fill(shape: Any, rows: int) -> tuple[int, ...]:
    if any(axis < 0 for axis in tuple(shape)[1:]):
        msg = f"an axis other than the batch is free in {tuple(shape)}: fix it for TensorRT"
        raise SourceError(msg)
    return (rows, *tuple(shape)[1:])


def _load_timings(config: Any, path: Any) -> Path | None:
    if not path:
        return None
    file = Path(path)
    data = file.read_bytes() if file.exists() else b""
    config.set_timing_cache(config.create_timing_cache(data), ignore_mismatch=False)
    return file


def _to_spec(trt: Any, tensor: Any) -> TensorSpec:
    known = {
        trt.DataType.FLOAT: Datatype.FP32,
        trt.DataType.HALF: Datatype.FP16,
        trt.DataType.INT32: Datatype.INT32,
        trt.DataType.INT64: Datatype.INT64,
        trt.DataType.INT8: Datatype.INT8,
        trt.DataType.UINT8: Datatype.UINT8,
        trt.DataType.BOOL: Datatype.BOOL,
    }
    return TensorSpec(tensor.name, known[tensor.dtype], tuple(int(axis) for axis in tensor.shape))
