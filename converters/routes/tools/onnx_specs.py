"""The tensors and operators of an ONNX file, and their names."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from converters.errors import HopFailedError
from platforms.artifact import Datatype, TensorSpec

_DATATYPES = {
    onnx.TensorProto.BOOL: Datatype.BOOL,
    onnx.TensorProto.UINT8: Datatype.UINT8,
    onnx.TensorProto.UINT16: Datatype.UINT16,
    onnx.TensorProto.UINT32: Datatype.UINT32,
    onnx.TensorProto.UINT64: Datatype.UINT64,
    onnx.TensorProto.INT8: Datatype.INT8,
    onnx.TensorProto.INT16: Datatype.INT16,
    onnx.TensorProto.INT32: Datatype.INT32,
    onnx.TensorProto.INT64: Datatype.INT64,
    onnx.TensorProto.FLOAT16: Datatype.FP16,
    onnx.TensorProto.BFLOAT16: Datatype.BF16,
    onnx.TensorProto.FLOAT: Datatype.FP32,
    onnx.TensorProto.DOUBLE: Datatype.FP64,
    onnx.TensorProto.STRING: Datatype.BYTES,
}


def read_specs(path: Path) -> tuple[list[TensorSpec], list[TensorSpec], dict[str, int]]:
    """Return inputs, outputs and how often each operator stands in the main graph.

    Raises:
        HopFailedError: an input or output is no tensor.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [_to_spec(value) for value in graph.input if value.name not in weights]
    return inputs, [_to_spec(value) for value in graph.output], count_operators(graph)


def count_operators(graph: Any) -> dict[str, int]:
    """Return how often each operator stands in a graph, with its domain where it has one."""
    names = (f"{node.domain}.{node.op_type}".lstrip(".") for node in graph.node)
    return dict(Counter(names))


def _to_spec(value: Any) -> TensorSpec:
    kind = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or kind.elem_type not in _DATATYPES:
        msg = f"{value.name} is no tensor of a known type"
        raise HopFailedError(msg)
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in kind.shape.dim)
    return TensorSpec(value.name, _DATATYPES[kind.elem_type], shape)


def rename(model: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Give a model's inputs and outputs other names, by their order.

    Raises:
        HopFailedError: there is another number of them.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    own = (
        [value for value in graph.input if value.name not in weights],
        [*graph.output],
    )
    names: dict[str, str] = {}
    for values, wanted in zip(own, (inputs, outputs), strict=True):
        texts = [item if isinstance(item, str) else item["name"] for item in wanted]
        if texts and len(texts) != len(values):
            msg = f"the model has {len(values)} tensors in place of {', '.join(texts)}"
            raise HopFailedError(msg)
        names |= {value.name: text for value, text in zip(values, texts, strict=False)}
    for value in (*own[0], *own[1]):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
