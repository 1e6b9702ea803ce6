"""What a source is: its tensors, weights, operators and MANIFEST, told without converting it.

The answer is in the facts; the target is the same as a JSON file. Facts beside those of every
tool: `parameters` (how many numbers the weights are), `weights_bytes`, `manifest`.

Options: as in `torch_source`, for torch sources.
"""

import json
from collections.abc import Mapping
from typing import Any

from converters.errors import SourceError
from converters.routes.tools.telling import tell
from converters.task import Facts, ModelFormat, Task
from platforms.artifact import Precision


def inspect(task: Task) -> Facts:
    """Tell what the source is.

    Raises:
        SourceError: it cannot be read.
        ToolMissingError: what reads it is not installed.
    """
    task.report(0.0, "reading the model")
    match task.source.format:
        case ModelFormat.ONNX:
            facts = _inspect_onnx(task)
        case ModelFormat.TFLITE:
            facts = _inspect_litert(task)
        case ModelFormat.SAVED_MODEL | ModelFormat.OPENVINO:
            facts = _inspect_openvino(task)
        case ModelFormat.COREML | ModelFormat.TENSORRT:
            msg = f"{task.source.format} is not inspected"
            raise SourceError(msg)
        case _:
            facts = _inspect_torch(task)
    task.target.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return facts


def _add(
    facts: dict[str, Any], parameters: int, weights_bytes: int, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **facts,
        "parameters": parameters,
        "weights_bytes": weights_bytes,
        "manifest": dict(manifest),
    }


def _inspect_torch(task: Task) -> dict[str, Any]:
    from converters.routes.tools.torch_program import export_program
    from converters.routes.tools.torch_source import load_torch

    model = load_torch(task)
    task.report(0.5, "exporting")
    made = export_program(model)
    facts = tell(
        made.inputs, made.outputs, made.operators, model.find_precision(), ["torch"], made.notes
    )
    weights = model.iterate_weights()
    size = sum(value.numel() * value.element_size() for value in weights)
    return _add(facts, sum(value.numel() for value in weights), size, model.manifest)


def _inspect_onnx(task: Task) -> dict[str, Any]:
    import math

    import onnx

    from converters.routes.tools.onnx_specs import read_specs

    try:
        model = onnx.load(task.source.path, load_external_data=False)
        onnx.checker.check_model(str(task.source.path))
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as exc:
        msg = f"{task.source.path.name} is no valid ONNX model: {exc}"
        raise SourceError(msg) from exc
    inputs, outputs, operators = read_specs(task.source.path)
    sizes: dict[Any, int] = {}
    count = 0
    for tensor in model.graph.initializer:
        numbers = math.prod(tensor.dims)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + numbers * dtype.itemsize
        count += numbers
    precisions = {
        onnx.TensorProto.FLOAT16: Precision.FP16,
        onnx.TensorProto.BFLOAT16: Precision.BF16,
        onnx.TensorProto.INT8: Precision.INT8,
        onnx.TensorProto.UINT8: Precision.INT8,
        onnx.TensorProto.INT4: Precision.INT4_WEIGHTS,
        onnx.TensorProto.UINT4: Precision.INT4_WEIGHTS,
    }
    largest = max(sizes, key=lambda kind: sizes[kind], default=onnx.TensorProto.FLOAT)
    precision = precisions.get(largest, Precision.FP32)
    facts = tell(inputs, outputs, operators, precision, ["onnx"])
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    facts |= {"opsets": opsets, "ir_version": model.ir_version}
    return _add(facts, count, sum(sizes.values()), {})


def _inspect_litert(task: Task) -> dict[str, Any]:
    from converters.routes.tools.litert_names import count_weights, read_specs

    inputs, outputs, operators = read_specs(task.source.path)
    count, size, precision = count_weights(task.source.path)
    return _add(tell(inputs, outputs, operators, precision, ["ai-edge-litert"]), count, size, {})


def _inspect_openvino(task: Task) -> dict[str, Any]:
    from converters.routes.tools.any_openvino import describe_model, read_model

    model = read_model(task)
    facts, count, size = describe_model(model)
    return _add(facts, count, size, {})
